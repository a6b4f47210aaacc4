// Small LoRA adapters with random weights for tests.
#pragma once

#include <ggml.h>
#include <gguf.h>

#include <cstddef>
#include <cstring>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "synth/shapes.h"

namespace relay::engine {

/// A LoRA file, to be changed into one that is wrong before it is written.
class AdapterFile {
 public:
  explicit AdapterFile(const std::string& architecture) : keys(gguf_init_empty()) {
    gguf_set_val_str(keys, "general.type", "adapter");
    gguf_set_val_str(keys, "general.architecture", architecture.c_str());
    gguf_set_val_str(keys, "adapter.type", "lora");
    gguf_set_val_f32(keys, "adapter.lora.alpha", 2.0f * kRank);
  }
  ~AdapterFile() {
    ggml_free(tensors_);
    gguf_free(keys);
  }
  AdapterFile(const AdapterFile&) = delete;
  AdapterFile& operator=(const AdapterFile&) = delete;

  /// Both matrices of a weight.
  void add(const std::string& weight, int64_t in, int64_t out, std::mt19937& random) {
    add_tensor(weight + ".lora_a", in, kRank, random);
    add_tensor(weight + ".lora_b", kRank, out, random);
  }
  void add_tensor(const std::string& name, int64_t columns, int64_t rows, std::mt19937& random) {
    auto* values = static_cast<float*>(add_zeros(name, GGML_TYPE_F32, {columns, rows})->data);
    std::normal_distribution<float> normal(0.0f, 0.1f);
    for (int64_t i = 0; i < columns * rows; ++i) values[i] = normal(random);
  }
  ggml_tensor* add_zeros(const std::string& name, ggml_type type,
                         const std::vector<int64_t>& shape) {
    ggml_tensor* tensor =
        ggml_new_tensor(tensors_, type, static_cast<int>(shape.size()), shape.data());
    ggml_set_name(tensor, name.c_str());
    if (ggml_is_empty(tensor)) tensor->data = tensor;  // gguf wants some to write nothing of
    std::memset(tensor->data, 0, ggml_nbytes(tensor));
    gguf_add_tensor(keys, tensor);
    return tensor;
  }
  void write(const std::string& path) const {
    if (!gguf_write_to_file(keys, path.c_str(), false)) throw std::runtime_error(path);
  }

  static constexpr int64_t kRank = 4;
  gguf_context* const keys;

 private:
  ggml_context* const tensors_ = ggml_init({size_t{32} << 20, nullptr, false});
};

/// An adapter for a model of this shape; other seeds give others.
inline void write_test_adapter(const std::string& shape_name, unsigned seed,
                               const std::string& path) {
  const synth::Shape& shape = synth::find_shape(shape_name);
  AdapterFile file{std::string(synth::architecture_name(shape.architecture))};
  std::mt19937 random(seed);
  for (int64_t layer = 0; layer < shape.layers; ++layer) {
    const std::string block = "blk." + std::to_string(layer) + '.';
    file.add(block + "attn_q.weight", shape.width, shape.heads * shape.head_dim, random);
    file.add(block + "attn_v.weight", shape.width, shape.kv_heads * shape.head_dim, random);
    file.add(block + "ffn_down.weight", shape.ffn, shape.width, random);
  }
  file.write(path);
}

}  // namespace relay::engine
