#include "engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace relay::engine {

int32_t argmax(std::span<const float> values) {
  // Two passes over a block: its maximum by independent lanes, which the compiler turns into vector
  // maxima, and its place only for blocks that beat the best so far.
  constexpr size_t kLanes = 16;
  constexpr size_t kBlock = 64 * kLanes;
  int32_t best = -1;
  float best_value = -std::numeric_limits<float>::infinity();
  for (size_t at = 0; at < values.size(); at += kBlock) {
    const size_t count = std::min(kBlock, values.size() - at);
    const float* block = values.data() + at;
    float lanes[kLanes];
    std::fill(lanes, lanes + kLanes, -std::numeric_limits<float>::infinity());
    size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      for (size_t j = 0; j < kLanes; ++j)
        lanes[j] = block[i + j] > lanes[j] ? block[i + j] : lanes[j];
    }
    for (; i < count; ++i) lanes[0] = block[i] > lanes[0] ? block[i] : lanes[0];
    const float top = *std::max_element(lanes, lanes + kLanes);
    if (top > best_value) {
      best_value = top;
      best = static_cast<int32_t>(
          at + static_cast<size_t>(std::find(block, block + count, top) - block));
    }
  }
  return best;
}

GreedySampler::GreedySampler(std::vector<Token> excluded) : excluded_(std::move(excluded)) {
  std::sort(excluded_.begin(), excluded_.end());
}

Token GreedySampler::sample(Model& model, int32_t row) {
  const std::span<const float> logits = model.logits(row);
  const Token best = argmax(logits);
  if (excluded_.empty() || !std::binary_search(excluded_.begin(), excluded_.end(), best)) {
    return best;
  }
  Token allowed = -1;
  for (Token t = 0; t < static_cast<Token>(logits.size()); ++t) {
    const bool better =
        allowed < 0 || logits[static_cast<size_t>(t)] > logits[static_cast<size_t>(allowed)];
    if (better && !std::binary_search(excluded_.begin(), excluded_.end(), t)) allowed = t;
  }
  return allowed;
}

double log_sum_exp(std::span<const float> values) {
  const int32_t best = argmax(values);
  if (best < 0) return -std::numeric_limits<double>::infinity();
  const float top = values[static_cast<size_t>(best)];
  double sum = 0.0;
  for (const float v : values) sum += static_cast<double>(std::exp(v - top));
  return static_cast<double>(top) + std::log(sum);
}

std::vector<ScoredToken> logprobs(std::span<const float> logits, Token token, int32_t top) {
  const double norm = log_sum_exp(logits);
  const auto logprob = [&](Token t) {
    return static_cast<float>(static_cast<double>(logits[static_cast<size_t>(t)]) - norm);
  };
  std::vector<ScoredToken> result{{token, logprob(token)}};
  if (top <= 0) return result;
  // The best so far, best first; nearly every logit fails the first comparison.
  const size_t count = std::min(static_cast<size_t>(top), logits.size());
  std::vector<Token> best;
  for (Token t = 0; t < static_cast<Token>(logits.size()); ++t) {
    const float logit = logits[static_cast<size_t>(t)];
    if (best.size() == count && !(logit > logits[static_cast<size_t>(best.back())])) continue;
    if (best.size() == count) best.pop_back();
    const auto place = std::find_if(
        best.begin(), best.end(), [&](Token b) { return logit > logits[static_cast<size_t>(b)]; });
    best.insert(place, t);
  }
  for (const Token t : best) result.push_back({t, logprob(t)});
  return result;
}

}  // namespace relay::engine
