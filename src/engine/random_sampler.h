// Draws tokens at random as SamplingParams asks: penalties and biases, temperature, top_k, top_p,
// min_p, in this order. The temperature comes before the nuclei, as with OpenAI and vLLM: they are
// of the distribution that is drawn from.
#pragma once

#include <cstdint>
#include <random>
#include <span>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "engine/engine.h"
#include "engine/sampler.h"

namespace relay::engine {

class RandomSampler : public Sampler {
 public:
  /// `prompt`: a repetition penalty counts its tokens as well; the two others never do.
  RandomSampler(const SamplingParams& params, uint32_t seed, std::vector<Token> excluded,
                std::span<const Token> prompt);

  Token sample(Model& model, int32_t row) override;

  // sample() in two steps, for whoever comes between them (a grammar).
  /// -1: there is nothing to choose from. Takes one random number, whatever happens.
  Token choose(std::span<const float> logits);
  void accept(Token token) { ++generated_[token]; }
  /// Forgets what was accepted.
  void forget() { generated_.clear(); }

 private:
  bool adjusts() const;
  void adjust(std::vector<float>& logits) const;

  const SamplingParams params_;
  const std::vector<Token> excluded_;
  std::mt19937 random_;
  std::unordered_set<Token> prompt_;              // only for a repetition penalty
  std::unordered_map<Token, int32_t> generated_;  // how often each
};

}  // namespace relay::engine
