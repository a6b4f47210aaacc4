// The registry "RELAY" and its one device: what the host sees of the module.
//
// The device is the CPU device under another name, of type CPU so that llama.cpp, which takes the
// first device of that type, does not schedule on it. It is there to be named: in logs, and by
// `test-backend-ops -b RELAY`.
#pragma once

#include <ggml-backend.h>

namespace relay::ggml {

/// With `cpu` null the registry has no device.
ggml_backend_reg_t relay_registry(ggml_backend_dev_t cpu);

}  // namespace relay::ggml
