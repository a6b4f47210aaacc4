// Chooses the next token of one sequence from a row of logits.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/model.h"

namespace relay::engine {

class Sampler {
 public:
  virtual ~Sampler() = default;
  /// The token that follows row `row` of the model's last batch, which is thereby accepted.
  virtual Token sample(Model& model, int32_t row) = 0;
};

/// The most probable token, the first among equals, without the excluded ones. Reads the logits
/// once; at 128k tokens and 32 rows this is 16 MB a step, where a general sampler would copy and
/// sort.
class GreedySampler : public Sampler {
 public:
  explicit GreedySampler(std::vector<Token> excluded = {});
  Token sample(Model& model, int32_t row) override;

 private:
  std::vector<Token> excluded_;  // sorted
};

/// Index of the largest value, the first among equals; NaN never wins. -1 if there is none.
int32_t argmax(std::span<const float> values);

/// Natural log of the sum of e^x over all values.
double log_sum_exp(std::span<const float> values);

struct ScoredToken {
  Token token = -1;
  float logprob = 0.0f;
};
/// Log probabilities (softmax at temperature 1): of `token`, then of the `top` most probable
/// tokens, most probable first.
std::vector<ScoredToken> logprobs(std::span<const float> logits, Token token, int32_t top);

}  // namespace relay::engine
