#include "bench/ggml/cpu_backend.h"

#include <stdexcept>

namespace relay::bench {

ggml_backend_dev_t cpu_device() {
  static const ggml_backend_dev_t device = [] {
    ggml_backend_load(GGML_CPU_MODULE);
    return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  }();
  if (device == nullptr)
    throw std::runtime_error("ggml's CPU module " GGML_CPU_MODULE " is no use");
  return device;
}

ggml_type ggml_type_of(DType type) {
  switch (type) {
    case DType::kF32:
      return GGML_TYPE_F32;
    case DType::kF16:
      return GGML_TYPE_F16;
    case DType::kBF16:
      return GGML_TYPE_BF16;
    case DType::kQ8_0:
      return GGML_TYPE_Q8_0;
    case DType::kF8E4M3:
    case DType::kCustom:
      break;
  }
  throw Error("ggml is measured with KV of f32, f16, bf16 or q8_0");
}

}  // namespace relay::bench
