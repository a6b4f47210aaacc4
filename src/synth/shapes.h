// The named model shapes: what a real model's config.json says, without its weights.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace relay::synth {

/// The architectures of llama.cpp that can be written.
enum class Architecture { kLlama, kPhi2, kGemma2 };

/// llama.cpp's name: "llama", "phi2", "gemma2".
std::string_view architecture_name(Architecture architecture);

struct Shape {
  std::string name;
  std::string about;  ///< one line for `relay synth --list`
  Architecture architecture = Architecture::kLlama;
  std::string vocabulary;     ///< a name of vocabulary.h
  std::string chat_template;  ///< likewise; empty: the one that belongs to the vocabulary
  int64_t layers = 0;
  int64_t width = 0;  ///< of the residual stream
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t rope_dim = 0;  ///< leading elements of a head that are rotated
  int64_t ffn = 0;
  int64_t context = 0;  ///< trained context length, in tokens
  float norm_epsilon = 1e-5f;
  float rope_base = 10000.0f;
  bool llama3_rope = false;        ///< Llama 3.1's per-frequency factors
  float llama3_rope_factor = 1.0;  ///< config.json's rope_scaling.factor
  bool tied_output = false;        ///< the output matrix is the token embedding
  int64_t vocabulary_size = 0;  ///< 0: as many as there are tokens; more: padded with unused ones
  int64_t sliding_window = 0;   ///< tokens; every second layer; 0: none
  float attention_soft_cap = 0;
  float output_soft_cap = 0;
};

/// All of them, small ones first.
std::span<const Shape> shapes();

/// Throws std::invalid_argument, naming the shapes there are, for any other name.
const Shape& find_shape(std::string_view name);

/// Throws std::invalid_argument saying what is wrong with a shape that no model can have.
void check_shape(const Shape& shape);

}  // namespace relay::synth
