// The shape of a model's attention, from its GGUF file or by its name. A program without llama.cpp
// has neither: both functions throw then, and say what to build (model_shape_without_llama.cpp).
#pragma once

#include <cstdint>
#include <string>

namespace relay::cli {

struct ModelShape {
  std::string name;  ///< general.name or the architecture; or of `relay synth --list`
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
/// One of `relay synth --list`; throws std::invalid_argument for a name that is none.
ModelShape find_model_shape(const std::string& name);

}  // namespace relay::cli
