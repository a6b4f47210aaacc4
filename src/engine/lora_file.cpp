#include "engine/lora_file.h"

#include <ggml.h>
#include <gguf.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string_view>

namespace relay::engine {

namespace {

struct Deleter {
  void operator()(gguf_context* context) const { gguf_free(context); }
  void operator()(ggml_context* context) const { ggml_free(context); }
};

/// The keys and the tensors' shapes of a GGUF file.
struct Header {
  std::unique_ptr<gguf_context, Deleter> keys;
  std::unique_ptr<ggml_context, Deleter> tensors;

  explicit Header(const std::string& path) {
    ggml_context* shapes = nullptr;
    keys.reset(gguf_init_from_file(path.c_str(), {.no_alloc = true, .ctx = &shapes}));
    tensors.reset(shapes);
    if (!keys) throw std::runtime_error(path + " is no GGUF file, or a broken one");
  }
};

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error(what); }

void require_text(const Header& header, const char* key, std::string_view expected) {
  const int64_t id = gguf_find_key(header.keys.get(), key);
  if (id < 0 || gguf_get_kv_type(header.keys.get(), id) != GGUF_TYPE_STRING) {
    refuse(std::string("it has no ") + key);
  }
  const std::string value = gguf_get_val_str(header.keys.get(), id);
  if (!expected.empty() && value != expected) {
    refuse(std::string("its ") + key + " is '" + value + "', not '" + std::string(expected) + "'");
  }
}

/// Those of all files of a model.
class Shapes {
 public:
  explicit Shapes(const std::vector<std::string>& files) {
    for (const std::string& file : files) headers_.emplace_back(file);
  }
  const ggml_tensor* find(const std::string& name) const {
    for (const Header& header : headers_) {
      if (const auto* found = ggml_get_tensor(header.tensors.get(), name.c_str())) return found;
    }
    return nullptr;
  }

 private:
  std::vector<Header> headers_;
};

bool can_be_multiplied(ggml_type type) {
  // Quantised types of activations are there to be multiplied with.
  if (type == GGML_TYPE_Q8_1 || type == GGML_TYPE_Q8_K) return false;
  return type == GGML_TYPE_F32 || type == GGML_TYPE_F16 || type == GGML_TYPE_BF16 ||
         ggml_is_quantized(type);
}

/// Whether llama.cpp multiplies with a tensor of this name, and so applies what a LoRA says of it.
/// Biases and norms are added and multiplied elementwise, the others looked up by row or convolved.
bool is_multiplied(const std::string& weight) {
  constexpr std::string_view kEnd = ".weight";
  if (weight.size() < kEnd.size() ||
      weight.compare(weight.size() - kEnd.size(), kEnd.size(), kEnd) != 0) {
    return false;
  }
  for (const char* part : {"_norm.", "_norm_", "per_layer_token_embd.", "position_embd.",
                           "token_types.", "rope_freqs.", "conv1d."}) {
    if (weight.find(part) != std::string::npos) return false;
  }
  return true;
}

/// llama.cpp compares the first two dimensions itself.
void check_matrix(const ggml_tensor& t, const Shapes& model) {
  const std::string name = t.name;
  const std::string weight = name.substr(0, name.rfind(".lora_"));
  // llama.cpp strikes these out wherever they stand.
  if (weight.find(".lora_a") != std::string::npos || weight.find(".lora_b") != std::string::npos) {
    refuse("the name of its tensor " + name + " is none of a LoRA's");
  }
  if (!is_multiplied(weight)) refuse("llama.cpp does not apply its tensor " + name);
  if (!can_be_multiplied(t.type)) {
    refuse("llama.cpp cannot multiply with its tensor " + name + " of type " +
           ggml_type_name(t.type));
  }
  if (ggml_is_empty(&t)) refuse("its tensor " + name + " is empty");
  const ggml_tensor* changed = model.find(weight);
  if (changed == nullptr) refuse("the model has no tensor " + weight + " for its " + name);
  if (t.ne[2] != changed->ne[2] || t.ne[3] != 1) {
    refuse("its tensor " + name + " is of " + std::to_string(t.ne[2] * t.ne[3]) +
           " matrices, and the model's " + weight + " of " + std::to_string(changed->ne[2]));
  }
}

/// An attention may swallow what is not finite in its scores: the answers are then wrong and look
/// like others.
void check_values(const std::string& path, const gguf_context& keys) {
  const uint64_t size = std::filesystem::file_size(path);
  std::ifstream file(path, std::ios::binary);
  std::vector<char> values;
  for (int64_t i = 0; i < gguf_get_n_tensors(&keys); ++i) {
    const uint64_t begin = gguf_get_data_offset(&keys) + gguf_get_tensor_offset(&keys, i);
    const uint64_t bytes = gguf_get_tensor_size(&keys, i);
    if (begin > size || bytes > size - begin) refuse("it is cut short");
    values.resize(bytes);
    file.seekg(static_cast<std::streamoff>(begin));
    if (!file.read(values.data(), static_cast<std::streamsize>(bytes))) {
      refuse("it cannot be read");
    }
    if (!ggml_validate_row_data(gguf_get_tensor_type(&keys, i), values.data(), bytes)) {
      refuse(std::string("its tensor ") + gguf_get_tensor_name(&keys, i) +
             " has values that are not finite");
    }
  }
}

}  // namespace

void check_lora_file(const std::string& path, const std::vector<std::string>& model) {
  const Header header(path);
  require_text(header, "general.type", "adapter");
  require_text(header, "adapter.type", "lora");
  require_text(header, "general.architecture", "");
  const int64_t alpha = gguf_find_key(header.keys.get(), "adapter.lora.alpha");
  if (alpha >= 0 && gguf_get_kv_type(header.keys.get(), alpha) != GGUF_TYPE_FLOAT32) {
    refuse("its adapter.lora.alpha is not of type f32");
  }
  if (alpha >= 0 && !std::isfinite(gguf_get_val_f32(header.keys.get(), alpha))) {
    refuse("its adapter.lora.alpha is not finite");
  }
  if (gguf_find_key(header.keys.get(), "adapter.alora.invocation_tokens") >= 0) {
    refuse("it is an activated LoRA, which applies from its invocation tokens on; not supported");
  }
  if (gguf_get_n_tensors(header.keys.get()) == 0) refuse("it has no tensors");
  const Shapes shapes(model);
  for (ggml_tensor* t = ggml_get_first_tensor(header.tensors.get()); t != nullptr;
       t = ggml_get_next_tensor(header.tensors.get(), t)) {
    check_matrix(*t, shapes);
  }
  check_values(path, *header.keys);
  const ggml_tensor* a = ggml_get_tensor(header.tensors.get(), "token_embd.weight.lora_a");
  const ggml_tensor* b = ggml_get_tensor(header.tensors.get(), "token_embd.weight.lora_b");
  if (a == nullptr || b == nullptr) return;
  if (a->ne[0] != b->ne[0]) refuse("the ranks of its tensors for token_embd.weight differ");
  if (shapes.find("output.weight") != nullptr) return;
  refuse("it changes the token embedding, which is this model's output matrix, too; not supported");
}

}  // namespace relay::engine
