// The scales below make a random model behave as a test needs it. Each matrix has deviation
// gain / sqrt(columns), so that normalised input gives output of deviation `gain`.
//
// - Attention must matter and must not be flat: query and key gains give logits whose deviation
//   differs from head to head between 1 (looks at many tokens) and 3 (looks at a few).
// - In the residual stream the branches of all layers together have about the variance of the
// token's
//   embedding, whatever the depth. With much less, context would not matter; with much more, what
//   all tokens have in common takes over layer by layer, and greedy output is one token for ever.
//   It also keeps rounding errors from growing with depth.
// - Each ordinary token has two successors, whose output rows contain its embedding, the second
// one's
//   less and not always by much. So the best token mostly leads by a wide margin, as in a trained
//   model, and every few tokens context decides between two. Independent rows would leave the two
//   best of 100,000 tokens so close that greedy output depends on rounding every few tokens.
// - With a tied output matrix there can be no successors (that relation would be symmetric), and
// the
//   embedding in the residual stream votes for its own token. Random signs in the last norm's
//   weights take that vote away.
// - Tokens that are not ordinary text (end of text, say) get small rows and are never the best.
#include "synth/tensors.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "synth/random.h"

namespace relay::synth {
namespace {

constexpr float kNormDeviation = 0.1f;
constexpr float kBiasDeviation = 0.1f;
constexpr float kKeyGain = 1.4142135f;
constexpr float kSharpestHead = 3.0f;
constexpr float kFlattestHead = 1.0f;
constexpr float kBranchGain = 1.5f;  // of attn_output and ffn_down, times 1 / sqrt(layers)
// The share of the embedding in the normalised residual stream that follows from kBranchGain.
constexpr float kEmbeddingShare = 0.7f;
// How far a successor's logit lies above the others' mean, in deviations. The best of the others is
// at 4 to 5.
constexpr float kFirstSuccessor = 8.5f;
constexpr float kWeakestSecond = 5.5f;
constexpr float kLargestEcho =
    0.9f;  // of a row's variance, where narrow models cannot have so much
// What the branches of other architectures come to; Gemma 2 normalises its branches and sets it.
constexpr float kAttentionSize = 0.4f;  // less than 1: values are averaged
constexpr float kFfnSize = 0.6f;        // of silu(normal) * normal
constexpr float kLogitDeviation = 3.0f;
constexpr float kUnspeakable = 0.1f;  // of an ordinary row

float inverse_sqrt(int64_t n) { return 1.0f / std::sqrt(static_cast<float>(n)); }

class Builder {
 public:
  Builder(const Shape& shape, const Vocabulary& vocabulary, ggml_type type, uint64_t seed)
      : shape_(shape), vocabulary_(vocabulary), type_(type), seed_(seed) {}

  std::vector<TensorSpec> build() {
    const bool gemma = shape_.architecture == Architecture::kGemma2;
    const bool phi = shape_.architecture == Architecture::kPhi2;
    // Gemma scales the embedding by sqrt(width) when it reads it.
    const float embedding = gemma ? inverse_sqrt(shape_.width) : 1.0f;
    const float tied_gain = kLogitDeviation * inverse_sqrt(shape_.width) / embedding;

    embedding_matrix(embedding);
    if (shape_.llama3_rope) {
      rope_factors();
    }
    for (int64_t layer = 0; layer < shape_.layers; ++layer) {
      const std::string prefix = "blk." + std::to_string(layer) + ".";
      if (phi) {
        phi2_layer(prefix);
      } else {
        llama_layer(prefix, gemma);
      }
    }
    norm("output_norm", shape_.tied_output ? tied_gain : 1.0f);
    tensors_.back().random_signs = shape_.tied_output;
    if (phi) {
      bias("output_norm", shape_.width);
    }
    if (!shape_.tied_output) {
      TensorSpec& output = matrix("output.weight", shape_.width, vocabulary_.size(), output_type());
      output.row_deviation = vocabulary_rows(kLogitDeviation * inverse_sqrt(shape_.width));
      output.echo = successors();
      if (phi) {
        bias("output", vocabulary_.size());
      }
    }
    return std::move(tensors_);
  }

 private:
  void embedding_matrix(float deviation) {
    TensorSpec& tensor = matrix("token_embd.weight", shape_.width, vocabulary_.size(),
                                shape_.tied_output ? output_type() : type_);
    if (shape_.tied_output) {
      tensor.row_deviation = vocabulary_rows(deviation);
    } else {
      tensor.row_deviation.assign(static_cast<size_t>(tensor.rows), deviation);
    }
  }

  void llama_layer(const std::string& prefix, bool gemma) {
    norm(prefix + "attn_norm", 1.0f);
    const int64_t query = shape_.heads * shape_.head_dim;
    const int64_t key = shape_.kv_heads * shape_.head_dim;
    TensorSpec& q = matrix(prefix + "attn_q.weight", shape_.width, query, type_);
    q.row_deviation = query_rows(q.name);
    uniform(matrix(prefix + "attn_k.weight", shape_.width, key, type_), kKeyGain);
    uniform(matrix(prefix + "attn_v.weight", shape_.width, key, type_), 1.0f);
    uniform(matrix(prefix + "attn_output.weight", query, shape_.width, type_), branch_gain());
    if (gemma) {
      norm(prefix + "post_attention_norm", kAttentionSize * branch_gain());
    }
    norm(prefix + "ffn_norm", 1.0f);
    uniform(matrix(prefix + "ffn_gate.weight", shape_.width, shape_.ffn, type_), 1.0f);
    uniform(matrix(prefix + "ffn_up.weight", shape_.width, shape_.ffn, type_), 1.0f);
    uniform(matrix(prefix + "ffn_down.weight", shape_.ffn, shape_.width, type_), branch_gain());
    if (gemma) {
      norm(prefix + "post_ffw_norm", kFfnSize * branch_gain());
    }
  }

  void phi2_layer(const std::string& prefix) {
    norm(prefix + "attn_norm", 1.0f);
    bias(prefix + "attn_norm", shape_.width);
    TensorSpec& qkv = matrix(prefix + "attn_qkv.weight", shape_.width, 3 * shape_.width, type_);
    qkv.row_deviation = query_rows(qkv.name);
    const float unit = inverse_sqrt(shape_.width);
    qkv.row_deviation.resize(static_cast<size_t>(2 * shape_.width), kKeyGain * unit);
    qkv.row_deviation.resize(static_cast<size_t>(3 * shape_.width), unit);
    bias(prefix + "attn_qkv", 3 * shape_.width);
    uniform(matrix(prefix + "attn_output.weight", shape_.width, shape_.width, type_),
            branch_gain());
    bias(prefix + "attn_output", shape_.width);
    uniform(matrix(prefix + "ffn_up.weight", shape_.width, shape_.ffn, type_), 1.0f);
    bias(prefix + "ffn_up", shape_.ffn);
    uniform(matrix(prefix + "ffn_down.weight", shape_.ffn, shape_.width, type_), branch_gain());
    bias(prefix + "ffn_down", shape_.width);
  }

  float branch_gain() const { return kBranchGain * inverse_sqrt(shape_.layers); }

  // Llama 3.1 slows down the low frequencies: each is divided by its factor, with a ramp between
  // the wavelengths that the original context holds 4 times and once.
  void rope_factors() {
    constexpr double kOriginalContext = 8192;
    constexpr double kLow = 1;
    constexpr double kHigh = 4;
    TensorSpec& tensor = add("rope_freqs.weight", shape_.rope_dim / 2, 1, GGML_TYPE_F32, false);
    for (int64_t i = 0; i < tensor.columns; ++i) {
      const double exponent = 2.0 * static_cast<double>(i) / static_cast<double>(shape_.rope_dim);
      const double wavelength = 2 * 3.14159265358979323846 * std::pow(shape_.rope_base, exponent);
      const double turns = kOriginalContext / wavelength;
      double factor = 1;
      if (turns < kLow) {
        factor = shape_.llama3_rope_factor;
      } else if (turns <= kHigh) {
        const double smooth = (turns - kLow) / (kHigh - kLow);
        factor = 1 / ((1 - smooth) / shape_.llama3_rope_factor + smooth);
      }
      tensor.values.push_back(static_cast<float>(factor));
    }
  }

  std::vector<float> query_rows(const std::string& name) const {
    const uint64_t key = stream_key(seed_, name + "/head");
    std::vector<float> rows;
    for (int64_t head = 0; head < shape_.heads; ++head) {
      const float sharpness = kFlattestHead + (kSharpestHead - kFlattestHead) *
                                                  random_uniform(key, static_cast<uint64_t>(head));
      rows.insert(rows.end(), static_cast<size_t>(shape_.head_dim),
                  sharpness / kKeyGain * inverse_sqrt(shape_.width));
    }
    return rows;
  }

  std::vector<float> vocabulary_rows(float deviation) const {
    std::vector<float> rows;
    rows.reserve(vocabulary_.speakable.size());
    for (const bool speakable : vocabulary_.speakable) {
      rows.push_back(speakable ? deviation : deviation * kUnspeakable);
    }
    return rows;
  }

  // Two rings through all ordinary tokens: steps of a constant length, coprime to their number.
  Echo successors() const {
    std::vector<int64_t> ring;
    for (size_t token = 0; token < vocabulary_.speakable.size(); ++token) {
      if (vocabulary_.speakable[token]) {
        ring.push_back(static_cast<int64_t>(token));
      }
    }
    const uint64_t key = stream_key(seed_, "vocabulary/rings");
    const size_t first_step = ring_step(random_bits(key, 0), ring.size());
    const size_t second_step = ring_step(first_step + 1 + random_bits(key, 1) % 1000, ring.size());
    Echo echo;
    echo.tensor = "token_embd.weight";
    echo.parts.resize(vocabulary_.speakable.size());
    const float whole = kEmbeddingShare / inverse_sqrt(shape_.width);  // share 1, in deviations
    for (size_t i = 0; i < ring.size(); ++i) {
      const auto token = static_cast<size_t>(ring[i]);
      const float second =
          kWeakestSecond + (kFirstSuccessor - kWeakestSecond) * random_uniform(key, token + 2);
      Echo::Part& first_part = echo.parts[token][0];
      Echo::Part& second_part = echo.parts[token][1];
      first_part.row = ring[(i + first_step) % ring.size()];
      first_part.share = kFirstSuccessor / whole;
      second_part.row = ring[(i + second_step) % ring.size()];
      second_part.share = second / whole;
      const float variance =
          first_part.share * first_part.share + second_part.share * second_part.share;
      if (variance > kLargestEcho) {
        const float fit = std::sqrt(kLargestEcho / variance);
        first_part.share *= fit;
        second_part.share *= fit;
      }
    }
    return echo;
  }

  static size_t ring_step(uint64_t wanted, size_t size) {
    size_t step = wanted % std::max<size_t>(size, 1);
    while (std::gcd(step, size) > 1) {
      ++step;
    }
    return step;
  }

  // llama-quantize keeps the output matrix at 6 bits where the rest has fewer, for its weight in
  // the result; so do we, lest the shape be faster here than a real model of its type.
  ggml_type output_type() const {
    if (!ggml_is_quantized(type_) || type_ == GGML_TYPE_Q8_0) {
      return type_;
    }
    return shape_.width % ggml_blck_size(GGML_TYPE_Q6_K) == 0 ? GGML_TYPE_Q6_K : GGML_TYPE_Q8_0;
  }

  TensorSpec& add(std::string name, int64_t columns, int64_t rows, ggml_type type, bool is_matrix) {
    TensorSpec& tensor = tensors_.emplace_back();
    tensor.name = std::move(name);
    tensor.columns = columns;
    tensor.rows = rows;
    tensor.type = type;
    tensor.matrix = is_matrix;
    return tensor;
  }

  TensorSpec& matrix(std::string name, int64_t columns, int64_t rows, ggml_type type) {
    if (columns % ggml_blck_size(type) != 0) {
      throw std::invalid_argument("shape " + shape_.name + " cannot have the type " +
                                  ggml_type_name(type) + ": rows of " + name + " have " +
                                  std::to_string(columns) + " elements, no multiple of " +
                                  std::to_string(ggml_blck_size(type)));
    }
    return add(std::move(name), columns, rows, type, true);
  }

  static void uniform(TensorSpec& tensor, float gain) {
    tensor.row_deviation.assign(static_cast<size_t>(tensor.rows),
                                gain * inverse_sqrt(tensor.columns));
  }

  void norm(const std::string& name, float mean) {
    TensorSpec& tensor = add(name + ".weight", shape_.width, 1, GGML_TYPE_F32, false);
    tensor.mean = mean;
    tensor.row_deviation = {mean * kNormDeviation};
  }

  void bias(const std::string& name, int64_t size) {
    TensorSpec& tensor = add(name + ".bias", size, 1, GGML_TYPE_F32, false);
    tensor.row_deviation = {kBiasDeviation};
  }

  const Shape& shape_;
  const Vocabulary& vocabulary_;
  ggml_type type_;
  uint64_t seed_;
  std::vector<TensorSpec> tensors_;
};

}  // namespace

size_t TensorSpec::row_bytes() const { return ggml_row_size(type, columns); }

void fill_rows(const TensorSpec& tensor, uint64_t seed, int64_t first, int64_t count, float* out) {
  if (!tensor.values.empty()) {
    std::copy(tensor.values.begin(), tensor.values.end(), out);
    return;
  }
  const uint64_t key = stream_key(seed, tensor.name);
  const uint64_t echo_key = stream_key(seed, tensor.echo.tensor);
  const auto columns = static_cast<uint64_t>(tensor.columns);
  for (int64_t i = first; i < first + count; ++i) {
    const auto row = static_cast<size_t>(i);
    const auto parts =
        tensor.echo.parts.empty() ? std::array<Echo::Part, 2>() : tensor.echo.parts[row];
    float own = 1;
    for (const Echo::Part& part : parts) {
      own -= part.share * part.share;
    }
    own = std::sqrt(own);
    for (uint64_t column = 0; column < columns; ++column) {
      const uint64_t index = columns * row + column;
      float normal = own * random_normal(key, index);
      for (const Echo::Part& part : parts) {
        if (part.share != 0) {
          normal += part.share *
                    random_normal(echo_key, columns * static_cast<uint64_t>(part.row) + column);
        }
      }
      const float value = tensor.mean + tensor.row_deviation[row] * normal;
      const bool negative = tensor.random_signs && (random_bits(~key, index) & 1) != 0;
      *out++ = negative ? -value : value;
    }
  }
}

std::vector<TensorSpec> make_tensors(const Shape& shape, const Vocabulary& vocabulary,
                                     ggml_type type, uint64_t seed) {
  check_shape(shape);
  return Builder(shape, vocabulary, type, seed).build();
}

}  // namespace relay::synth
