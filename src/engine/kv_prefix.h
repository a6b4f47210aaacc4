// A learned KV prefix (prefix tuning): keys and values that stand before every sequence, as if they
// were those of its first positions.
//
// The file is a GGUF file of its own kind, written by scripts/kv_prefix_from_peft.py: keys and
// values of each layer in f32, the elements of a head in Hugging Face's order. Its bytes are
// untrusted; what comes out has been checked against the sizes that it names.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "engine/kv_state.h"

namespace relay::engine {

struct KvPrefix {
  int32_t positions = 0;
  int32_t layers = 0;
  int32_t kv_heads = 0;
  int32_t head_size = 0;
  std::vector<std::vector<float>> keys;    ///< of each layer: positions x kv_heads x head_size
  std::vector<std::vector<float>> values;  ///< likewise

  int64_t row() const { return int64_t{kv_heads} * head_size; }
};

/// Throws std::runtime_error, saying what is wrong.
KvPrefix parse_kv_prefix(std::span<const uint8_t> file);
KvPrefix read_kv_prefix(const std::string& path);

/// How a model's keys order the elements of a head that rotate together.
enum class KeyOrder {
  kHalves,      ///< element i with i + half: Hugging Face's
  kNeighbours,  ///< element 2i with 2i + 1: what llama.cpp makes of a Llama
};

/// As make_kv_state takes it. Throws std::runtime_error if the cache has another shape, or a type
/// in which learned values cannot be stored as they are.
std::vector<uint8_t> kv_bytes(const KvPrefix& prefix, const KvLayout& layout, KeyOrder order);

}  // namespace relay::engine
