#include "engine/lora_file.h"

#include <ggml.h>
#include <gguf.h>

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
  if (gguf_find_key(header.keys.get(), "adapter.alora.invocation_tokens") >= 0) {
    refuse("it is an activated LoRA, which applies from its invocation tokens on; not supported");
  }
  if (gguf_get_n_tensors(header.keys.get()) == 0) refuse("it has no tensors");
  for (int64_t i = 0; i < gguf_get_n_tensors(header.keys.get()); ++i) {
    const std::string_view name = gguf_get_tensor_name(header.keys.get(), i);
    if (name.ends_with("_norm.weight")) {
      refuse("llama.cpp does not apply its tensor " + std::string(name));
    }
  }
  const ggml_tensor* a = ggml_get_tensor(header.tensors.get(), "token_embd.weight.lora_a");
  const ggml_tensor* b = ggml_get_tensor(header.tensors.get(), "token_embd.weight.lora_b");
  if (a == nullptr || b == nullptr) return;
  if (a->ne[0] != b->ne[0]) refuse("the ranks of its tensors for token_embd.weight differ");
  for (const std::string& file : model) {
    if (gguf_find_tensor(Header(file).keys.get(), "output.weight") >= 0) return;
  }
  refuse("it changes the token embedding, which is this model's output matrix, too; not supported");
}

}  // namespace relay::engine
