#include "cli/model_shape.h"

#include <gguf.h>

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#include "synth/shapes.h"

namespace relay::cli {
namespace {

struct FreeGguf {
  void operator()(gguf_context* file) const { gguf_free(file); }
};

class Metadata {
 public:
  explicit Metadata(const std::string& path) : path_(path) {
    file_.reset(gguf_init_from_file(path.c_str(), {.no_alloc = true, .ctx = nullptr}));
    if (!file_) throw std::runtime_error(path + " is not a GGUF file that can be read");
  }

  std::string text(const char* key, const std::string& otherwise) const {
    const int64_t id = gguf_find_key(file_.get(), key);
    if (id < 0 || gguf_get_kv_type(file_.get(), id) != GGUF_TYPE_STRING) return otherwise;
    return gguf_get_val_str(file_.get(), id);
  }

  /// One number or a list of them; empty where there is no such key.
  std::vector<int32_t> numbers(const std::string& key) const {
    const int64_t id = gguf_find_key(file_.get(), key.c_str());
    if (id < 0) return {};
    const gguf_type type = gguf_get_kv_type(file_.get(), id);
    if (type == GGUF_TYPE_UINT32) {
      return {static_cast<int32_t>(gguf_get_val_u32(file_.get(), id))};
    }
    if (type == GGUF_TYPE_INT32) return {gguf_get_val_i32(file_.get(), id)};
    if (type == GGUF_TYPE_ARRAY) {
      const gguf_type of = gguf_get_arr_type(file_.get(), id);
      if (of == GGUF_TYPE_UINT32 || of == GGUF_TYPE_INT32) {
        const auto* data = static_cast<const int32_t*>(gguf_get_arr_data(file_.get(), id));
        return {data, data + gguf_get_arr_n(file_.get(), id)};
      }
    }
    throw std::runtime_error(path_ + ": " + key + " is not a number or a list of numbers");
  }

 private:
  const std::string path_;
  std::unique_ptr<gguf_context, FreeGguf> file_;
};

}  // namespace

ModelShape read_model_shape(const std::string& path) {
  const Metadata metadata(path);
  const std::string architecture = metadata.text("general.architecture", "");
  ModelShape shape;
  shape.name = metadata.text("general.name", architecture);
  const auto of = [&](const char* key) { return metadata.numbers(architecture + "." + key); };
  const auto first = [](const std::vector<int32_t>& numbers, int32_t otherwise) {
    return numbers.empty() ? otherwise : numbers[0];
  };

  shape.layers = first(of("block_count"), 0);
  const std::vector<int32_t> heads = of("attention.head_count");
  std::vector<int32_t> kv_heads = of("attention.head_count_kv");
  if (kv_heads.empty()) kv_heads = heads;
  // The first layer with KV; layers without do not count.
  const auto with_kv =
      std::find_if(kv_heads.begin(), kv_heads.end(), [](int32_t n) { return n > 0; });
  if (shape.layers < 1 || heads.empty() || with_kv == kv_heads.end()) {
    throw std::runtime_error(path + " does not say how many attention heads its layers have");
  }
  const auto at = static_cast<size_t>(with_kv - kv_heads.begin());
  shape.kv_heads = *with_kv;
  shape.heads = heads[std::min(at, heads.size() - 1)];
  if (kv_heads.size() > 1) {
    shape.layers = static_cast<int32_t>(
        std::count_if(kv_heads.begin(), kv_heads.end(), [](int32_t n) { return n > 0; }));
  }
  const int32_t width = first(of("embedding_length"), 0);
  const int32_t dim = shape.heads > 0 ? width / shape.heads : 0;
  shape.k_dim = first(of("attention.key_length"), dim);
  shape.v_dim = first(of("attention.value_length"), dim);
  if (shape.heads < 1 || shape.k_dim < 1 || shape.v_dim < 1) {
    throw std::runtime_error(path + " does not say how large its attention heads are");
  }
  return shape;
}

ModelShape find_model_shape(const std::string& name) {
  const synth::Shape& shape = synth::find_shape(name);
  return {.name = shape.name,
          .layers = static_cast<int32_t>(shape.layers),
          .heads = static_cast<int32_t>(shape.heads),
          .kv_heads = static_cast<int32_t>(shape.kv_heads),
          .k_dim = static_cast<int32_t>(shape.head_dim),
          .v_dim = static_cast<int32_t>(shape.head_dim)};
}

}  // namespace relay::cli
