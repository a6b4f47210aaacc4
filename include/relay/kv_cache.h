// Writing a KV cache whose layout is Relay's to choose.
#pragma once

#include <cstdint>
#include <span>

#include "relay/types.h"

namespace relay {

/// Writes the K and V vectors of tokens into the slots of a cache, in its layout.
/// k, v: [tokens][kv_heads][dim], of the cache's types (no conversion); rows_per_block is ignored.
/// slots[i] is token i's slot; negative ones are skipped (padding). Writes the KV heads
/// [head_begin, head_end), so that threads may share the work. The planes' data must be writable.
/// Throws Error, before anything is written, for a type or layout that cannot be written and for a
/// slot that the cache does not have (where KvCache::slots says how many it has).
void write_kv(const KvCache& cache, const HeadShape& shape, const ConstRows& k, const ConstRows& v,
              std::span<const int64_t> slots, int32_t head_begin, int32_t head_end);

}  // namespace relay
