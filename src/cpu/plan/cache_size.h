// How large this machine's caches are: what a thread may keep at hand while KV streams by.
#pragma once

#include <cstdint>

namespace relay {

/// Bytes of the second-level cache that one core may call its own: where several cores share one,
/// its even part. 1 MiB where the system does not tell.
int64_t core_cache_bytes();

/// Bytes of the largest cache there is; 32 MiB where the system does not tell.
int64_t last_level_cache_bytes();

}  // namespace relay
