// ggml's own CPU backend, for measuring beside it.
#pragma once

#include <ggml-backend.h>
#include <ggml.h>

#include "relay/types.h"

namespace relay::bench {

/// ggml's CPU backend, and no other: GGML_BACKEND_PATH may name Relay's module. Throws
/// std::runtime_error where it cannot be loaded.
ggml_backend_dev_t cpu_device();

/// Throws Error for what ggml's attention has no KV of.
ggml_type ggml_type_of(DType type);

}  // namespace relay::bench
