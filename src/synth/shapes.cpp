#include "synth/shapes.h"

#include <stdexcept>
#include <vector>

namespace relay::synth {
namespace {

std::vector<Shape> make_shapes() {
  std::vector<Shape> all;

  // The tiny ones have what makes their architecture special at sizes that tests can afford:
  // grouped heads; biases, a fused QKV and a partly rotated head; windows and soft caps that short
  // prompts already reach. The vocabulary is a small one, because it would outweigh everything
  // else.
  Shape tiny;
  tiny.name = "tiny";
  tiny.about = "Llama architecture, for tests";
  tiny.architecture = Architecture::kLlama;
  tiny.vocabulary = "phi-3";
  tiny.layers = 3;
  tiny.width = 128;
  tiny.heads = 4;
  tiny.kv_heads = 2;
  tiny.head_dim = 32;
  tiny.rope_dim = 32;
  tiny.ffn = 384;
  tiny.context = 32768;
  all.push_back(tiny);

  Shape tiny_phi2 = tiny;
  tiny_phi2.name = "tiny-phi2";
  tiny_phi2.about = "phi-2 architecture (LayerNorm, biases, parallel FFN), for tests";
  tiny_phi2.architecture = Architecture::kPhi2;
  tiny_phi2.vocabulary = "gpt-2";
  tiny_phi2.kv_heads = 4;
  tiny_phi2.rope_dim = 16;
  all.push_back(tiny_phi2);

  Shape tiny_gemma2 = tiny;
  tiny_gemma2.name = "tiny-gemma2";
  tiny_gemma2.about = "Gemma 2 architecture (window of 64, soft caps), for tests";
  tiny_gemma2.architecture = Architecture::kGemma2;
  tiny_gemma2.layers = 4;
  tiny_gemma2.tied_output = true;
  tiny_gemma2.norm_epsilon = 1e-6f;
  tiny_gemma2.sliding_window = 64;
  tiny_gemma2.attention_soft_cap = 5.0f;
  tiny_gemma2.output_soft_cap = 30.0f;
  all.push_back(tiny_gemma2);

  Shape llama_1b;
  llama_1b.name = "llama-3.2-1b";
  // The real one's output matrix is tied to the embedding. Here it has one of its own, for the sake
  // of stable greedy output (tensors.cpp): a larger file, but the same work and traffic per token.
  llama_1b.about = "Llama 3.2 1B with an output matrix of its own";
  llama_1b.architecture = Architecture::kLlama;
  llama_1b.vocabulary = "llama-bpe";
  llama_1b.layers = 16;
  llama_1b.width = 2048;
  llama_1b.heads = 32;
  llama_1b.kv_heads = 8;
  llama_1b.head_dim = 64;
  llama_1b.rope_dim = 64;
  llama_1b.ffn = 8192;
  llama_1b.context = 131072;
  llama_1b.rope_base = 500000.0f;
  llama_1b.llama3_rope = true;
  llama_1b.llama3_rope_factor = 32.0f;
  all.push_back(llama_1b);

  Shape gemma_2b;
  gemma_2b.name = "gemma-2-2b";
  gemma_2b.about = "Gemma 2 2B (sliding window, soft caps) with Gemma 4's vocabulary";
  gemma_2b.architecture = Architecture::kGemma2;
  gemma_2b.vocabulary = "gemma-4";
  gemma_2b.layers = 26;
  gemma_2b.width = 2304;
  gemma_2b.heads = 8;
  gemma_2b.kv_heads = 4;
  gemma_2b.head_dim = 256;
  gemma_2b.rope_dim = 256;
  gemma_2b.ffn = 9216;
  gemma_2b.context = 8192;
  gemma_2b.norm_epsilon = 1e-6f;
  gemma_2b.tied_output = true;
  gemma_2b.sliding_window = 4096;
  gemma_2b.attention_soft_cap = 50.0f;
  gemma_2b.output_soft_cap = 30.0f;
  all.push_back(gemma_2b);

  Shape phi_2;
  phi_2.name = "phi-2";
  phi_2.about = "phi-2 (2.8B, MHA, head size 80)";
  phi_2.architecture = Architecture::kPhi2;
  phi_2.vocabulary = "gpt-2";
  phi_2.vocabulary_size = 51200;
  phi_2.layers = 32;
  phi_2.width = 2560;
  phi_2.heads = 32;
  phi_2.kv_heads = 32;
  phi_2.head_dim = 80;
  phi_2.rope_dim = 32;
  phi_2.ffn = 10240;
  phi_2.context = 2048;
  all.push_back(phi_2);

  Shape llama_7b;
  llama_7b.name = "llama-2-7b";
  llama_7b.about = "Llama 2 7B (MHA)";
  llama_7b.architecture = Architecture::kLlama;
  llama_7b.vocabulary = "llama-spm";
  llama_7b.chat_template = "llama-2";
  llama_7b.layers = 32;
  llama_7b.width = 4096;
  llama_7b.heads = 32;
  llama_7b.kv_heads = 32;
  llama_7b.head_dim = 128;
  llama_7b.rope_dim = 128;
  llama_7b.ffn = 11008;
  llama_7b.context = 4096;
  all.push_back(llama_7b);

  Shape mistral_7b = llama_7b;
  mistral_7b.name = "mistral-7b";
  mistral_7b.about = "Mistral 7B v0.2 (GQA)";
  mistral_7b.chat_template = "mistralai-Mistral-Nemo-Instruct-2407";
  mistral_7b.kv_heads = 8;
  mistral_7b.ffn = 14336;
  mistral_7b.context = 32768;
  mistral_7b.rope_base = 1000000.0f;
  all.push_back(mistral_7b);

  return all;
}

}  // namespace

std::string_view architecture_name(Architecture architecture) {
  switch (architecture) {
    case Architecture::kLlama:
      return "llama";
    case Architecture::kPhi2:
      return "phi2";
    case Architecture::kGemma2:
      return "gemma2";
  }
  throw std::logic_error("architecture without a name");
}

std::span<const Shape> shapes() {
  static const std::vector<Shape> all = make_shapes();
  return all;
}

const Shape& find_shape(std::string_view name) {
  std::string known;
  for (const Shape& shape : shapes()) {
    if (shape.name == name) {
      return shape;
    }
    known += known.empty() ? "" : ", ";
    known += shape.name;
  }
  throw std::invalid_argument("no shape '" + std::string(name) + "'; there are: " + known);
}

void check_shape(const Shape& shape) {
  const auto require = [&](bool holds, const char* what) {
    if (!holds) {
      throw std::invalid_argument("shape " + shape.name + ": " + what);
    }
  };
  require(shape.layers > 0 && shape.layers <= 512, "layers must be 1 to 512");
  require(shape.width > 0 && shape.ffn > 0, "the width and the FFN width must be positive");
  require(shape.heads > 0 && shape.kv_heads > 0 && shape.heads % shape.kv_heads == 0,
          "the heads must be a multiple of the KV heads");
  require(shape.head_dim > 0 && shape.head_dim % 2 == 0, "the head size must be even");
  require(shape.rope_dim > 0 && shape.rope_dim % 2 == 0 && shape.rope_dim <= shape.head_dim,
          "the rotated part of a head must be even and no longer than the head");
  require(shape.architecture == Architecture::kPhi2 || shape.rope_dim == shape.head_dim,
          "this architecture rotates whole heads");
  require(shape.architecture != Architecture::kPhi2 || shape.heads == shape.kv_heads,
          "phi2 has as many KV heads as heads");
  require(shape.architecture != Architecture::kPhi2 || shape.heads * shape.head_dim == shape.width,
          "phi2's heads fill its width");
  require(shape.context > 0, "the context must be positive");
}

}  // namespace relay::synth
