// The shape of a model's attention, as its GGUF file tells.
#pragma once

#include <cstdint>
#include <string>

namespace relay::cli {

struct ModelShape {
  std::string name;  ///< general.name, or the architecture
  int32_t layers = 0;
  int32_t heads = 0;
  int32_t kv_heads = 0;
  int32_t k_dim = 0;
  int32_t v_dim = 0;
};

/// Reads the metadata of a GGUF file, no weights. Where layers differ (a list of head counts), the
/// first one with attention stands for all that have it. Throws std::runtime_error for a file that
/// is none or says nothing of attention heads.
ModelShape read_model_shape(const std::string& path);

}  // namespace relay::cli
