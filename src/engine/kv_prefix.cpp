#include "engine/kv_prefix.h"

#include <ggml.h>
#include <gguf.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <system_error>

namespace relay::engine {

namespace {

constexpr uint64_t kMostBytes = uint64_t{1} << 30;  // of a file
constexpr const char* kArchitecture = "kvprefix";

[[noreturn]] void refuse(const std::string& what) { throw std::runtime_error(what); }

struct GgufDeleter {
  void operator()(gguf_context* context) const { gguf_free(context); }
};
using Gguf = std::unique_ptr<gguf_context, GgufDeleter>;

int32_t number(const gguf_context* file, const char* name, uint32_t most) {
  const std::string key = std::string(kArchitecture) + "." + name;
  const int64_t id = gguf_find_key(file, key.c_str());
  if (id < 0 || gguf_get_kv_type(file, id) != GGUF_TYPE_UINT32) refuse("it has no " + key);
  const uint32_t value = gguf_get_val_u32(file, id);
  if (value < 1 || value > most) {
    refuse(key + " is " + std::to_string(value) + ", not 1 to " + std::to_string(most));
  }
  return static_cast<int32_t>(value);
}

std::vector<float> tensor(const gguf_context* file, std::span<const uint8_t> bytes,
                          const std::string& name, uint64_t elements) {
  const int64_t id = gguf_find_tensor(file, name.c_str());
  if (id < 0) refuse("it has no tensor " + name);
  const uint64_t size = elements * sizeof(float);
  if (gguf_get_tensor_type(file, id) != GGML_TYPE_F32 || gguf_get_tensor_size(file, id) != size) {
    refuse("tensor " + name + " is not of " + std::to_string(elements) + " elements in f32");
  }
  const uint64_t begin = gguf_get_data_offset(file) + gguf_get_tensor_offset(file, id);
  if (begin > bytes.size() || size > bytes.size() - begin) {
    refuse("it ends within tensor " + name);
  }
  std::vector<float> values(elements);
  std::memcpy(values.data(), bytes.data() + begin, size);
  for (const float value : values) {
    if (!std::isfinite(value)) refuse("tensor " + name + " holds NaN or infinity");
  }
  return values;
}

// From halves to neighbours, within each head.
std::vector<float> interleaved(const std::vector<float>& rows, size_t head_size) {
  std::vector<float> result(rows.size());
  const size_t half = head_size / 2;
  for (size_t head = 0; head < rows.size(); head += head_size) {
    for (size_t i = 0; i < half; ++i) {
      result[head + 2 * i] = rows[head + i];
      result[head + 2 * i + 1] = rows[head + half + i];
    }
  }
  return result;
}

void append(const std::vector<float>& rows, int32_t type, std::vector<uint8_t>& bytes) {
  const size_t at = bytes.size();
  const auto count = static_cast<int64_t>(rows.size());
  bytes.resize(at + rows.size() * ggml_type_size(static_cast<ggml_type>(type)));
  if (type == GGML_TYPE_F32) {
    std::memcpy(bytes.data() + at, rows.data(), rows.size() * sizeof(float));
  } else if (type == GGML_TYPE_F16) {
    constexpr float kLargest = 65504.0F;
    for (const float value : rows) {
      if (std::fabs(value) > kLargest) {
        refuse("it holds " + std::to_string(value) +
               ", too large for KV in f16; use bf16 or f32 (--cache-type-k, --cache-type-v)");
      }
    }
    ggml_fp32_to_fp16_row(rows.data(), reinterpret_cast<ggml_fp16_t*>(bytes.data() + at), count);
  } else {
    ggml_fp32_to_bf16_row(rows.data(), reinterpret_cast<ggml_bf16_t*>(bytes.data() + at), count);
  }
}

}  // namespace

KvPrefix parse_kv_prefix(std::span<const uint8_t> bytes) {
  const Gguf file(
      gguf_init_from_buffer(bytes.data(), bytes.size(), {.no_alloc = true, .ctx = nullptr}));
  if (file == nullptr) refuse("it is not a GGUF file");
  const int64_t architecture = gguf_find_key(file.get(), "general.architecture");
  if (architecture < 0 || gguf_get_kv_type(file.get(), architecture) != GGUF_TYPE_STRING ||
      gguf_get_val_str(file.get(), architecture) != std::string_view(kArchitecture)) {
    refuse("it is not a KV prefix; scripts/kv_prefix_from_peft.py makes one");
  }
  KvPrefix prefix;
  prefix.positions = number(file.get(), "positions", 1 << 20);
  prefix.layers = number(file.get(), "layer_count", 4096);
  prefix.kv_heads = number(file.get(), "head_count_kv", 4096);
  prefix.head_size = number(file.get(), "head_size", 4096);
  if (gguf_get_n_tensors(file.get()) != int64_t{2} * prefix.layers) {
    refuse("it has not a key and a value tensor for each layer, and no more");
  }
  const auto elements = static_cast<uint64_t>(prefix.positions * prefix.row());
  for (int32_t layer = 0; layer < prefix.layers; ++layer) {
    const std::string name = "layer." + std::to_string(layer);
    prefix.keys.push_back(tensor(file.get(), bytes, name + ".key", elements));
    prefix.values.push_back(tensor(file.get(), bytes, name + ".value", elements));
  }
  return prefix;
}

KvPrefix read_kv_prefix(const std::string& path) {
  std::error_code error;
  const uint64_t size = std::filesystem::file_size(path, error);
  if (error) refuse("it cannot be read: " + error.message());
  if (size > kMostBytes) refuse("it is larger than 1 GiB");
  std::vector<uint8_t> bytes(size);
  std::ifstream file(path, std::ios::binary);
  if (!file.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(size))) {
    refuse("it cannot be read");
  }
  return parse_kv_prefix(bytes);
}

std::vector<uint8_t> kv_bytes(const KvPrefix& prefix, const KvLayout& layout, KeyOrder order) {
  const auto layers = static_cast<size_t>(prefix.layers);
  if (layout.layers != layers) {
    refuse("it is for " + std::to_string(layers) + " layers with KV, and the model has " +
           std::to_string(layout.layers));
  }
  if (layout.tensors.size() != 2 * layers) refuse("the model's layers do not all store values");
  if (order == KeyOrder::kNeighbours && prefix.head_size % 2 != 0) refuse("its head size is odd");
  std::vector<uint8_t> bytes;
  for (size_t i = 0; i < layout.tensors.size(); ++i) {
    const KvLayout::Rows& rows = layout.tensors[i];
    const auto type = static_cast<ggml_type>(rows.type);
    if (type != GGML_TYPE_F32 && type != GGML_TYPE_F16 && type != GGML_TYPE_BF16) {
      refuse(std::string("learned keys and values cannot be stored in ") + ggml_type_name(type) +
             "; use f16, bf16 or f32 (--cache-type-k, --cache-type-v)");
    }
    if (rows.row_bytes != ggml_row_size(type, prefix.row())) {
      refuse("it has " + std::to_string(prefix.kv_heads) + " KV heads of " +
             std::to_string(prefix.head_size) + ", and layer " + std::to_string(i % layers) +
             " of the model stores " + std::to_string(rows.row_bytes / ggml_type_size(type)) +
             " elements a position");
    }
    if (i < layers) {
      const auto head_size = static_cast<size_t>(prefix.head_size);
      append(order == KeyOrder::kHalves ? prefix.keys[i] : interleaved(prefix.keys[i], head_size),
             rows.type, bytes);
    } else {
      append(prefix.values[i - layers], rows.type, bytes);
    }
  }
  return bytes;
}

}  // namespace relay::engine
