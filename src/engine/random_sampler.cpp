#include "engine/random_sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "engine/ranking.h"

namespace relay::engine {

namespace {

constexpr float kNothing = -std::numeric_limits<float>::infinity();

/// The count-th largest value: all but it and what is larger can be passed over. For small counts;
/// nearly every value fails the first comparison.
float largest(std::span<const float> values, size_t count) {
  std::vector<float> heap(count, kNothing);  // its least in front
  for (const float v : values) {
    if (!(v > heap.front())) continue;
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    heap.back() = v;
    std::push_heap(heap.begin(), heap.end(), std::greater<>());
  }
  return heap.front();
}

}  // namespace

RandomSampler::RandomSampler(const SamplingParams& params, uint32_t seed,
                             std::vector<Token> excluded, std::span<const Token> prompt)
    : params_(params), excluded_(std::move(excluded)), random_(seed) {
  if (params_.repetition_penalty != 1.0f) prompt_.insert(prompt.begin(), prompt.end());
}

Token RandomSampler::sample(Model& model, int32_t row) {
  const Token token = choose(model.logits(row));
  if (token >= 0) accept(token);
  return token;
}

bool RandomSampler::adjusts() const {
  const bool penalties = params_.presence_penalty != 0.0f || params_.frequency_penalty != 0.0f ||
                         params_.repetition_penalty != 1.0f;
  return !excluded_.empty() || !params_.logit_bias.empty() ||
         (penalties && !(generated_.empty() && prompt_.empty()));
}

void RandomSampler::adjust(std::vector<float>& logits) const {
  const auto at = [&](Token t) -> float& { return logits[static_cast<size_t>(t)]; };
  for (const auto& [token, bias] : params_.logit_bias) at(token) += bias;
  if (params_.repetition_penalty != 1.0f) {
    const auto repel = [&](float& logit) {
      logit = logit > 0 ? logit / params_.repetition_penalty : logit * params_.repetition_penalty;
    };
    for (const Token t : prompt_) repel(at(t));
    for (const auto& [token, count] : generated_) {
      if (!prompt_.contains(token)) repel(at(token));
    }
  }
  for (const auto& [token, count] : generated_) {
    at(token) -= params_.presence_penalty + static_cast<float>(count) * params_.frequency_penalty;
  }
  for (const Token t : excluded_) at(t) = kNothing;
}

Token RandomSampler::choose(std::span<const float> logits) {
  const double dice = std::uniform_real_distribution<double>(0.0, 1.0)(random_);
  // Scratch memory in the size of the vocabulary, of a thread and not of every request.
  thread_local std::vector<float> adjusted;
  thread_local Ranking ranking;
  if (adjusts()) {
    adjusted.assign(logits.begin(), logits.end());
    adjust(adjusted);
    logits = adjusted;
  }
  const Token best = argmax(logits);
  if (best < 0 || params_.temperature <= 0.0f) return best;
  const float top = logits[static_cast<size_t>(best)];
  if (std::isinf(top)) return best;

  // What is certainly cut off need not be ranked; top_p alone must know the mass of all.
  constexpr size_t kSmall = 1024;
  const auto k = static_cast<size_t>(std::max(0, params_.top_k));
  float least = k > 0 && k <= kSmall ? largest(logits, k) : kNothing;
  if (params_.min_p > 0.0f && params_.top_p >= 1.0f) {
    constexpr float kSafely = 1.001f;
    least = std::max(least, top + params_.temperature * std::log(params_.min_p) * kSafely);
  }
  ranking.assign(logits, top, params_.temperature, least);
  // Each of the three leaves a beginning of the ranking; the shortest one counts. top_p is a share
  // of what top_k leaves.
  double mass = ranking.mass();
  if (k > 0) mass = ranking.mass_of(k);
  if (params_.top_p < 1.0f) {
    mass = std::min(mass, ranking.mass_through(static_cast<double>(params_.top_p) * mass));
  }
  if (params_.min_p > 0.0f) mass = std::min(mass, ranking.mass_down_to(params_.min_p));
  return ranking.at(dice * mass);
}

}  // namespace relay::engine
