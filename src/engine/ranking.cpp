#include "engine/ranking.h"

#include <algorithm>
#include <bit>
#include <cmath>

namespace relay::engine {

namespace {

// Deeper than this a weight is zero. (Well before it, all of a vocabulary has no mass any more.)
constexpr float kDeepest = 88.0f;

/// e^-depth to within two units in the last place, for depths from 0 on that are at most kDeepest;
/// zero from 87.7 on. Unlike std::exp it has no branch and no call, so that the compiler turns the
/// loop around it into vector code. (Cephes' polynomial on what whole powers of two leave.)
inline float falling_exp(float depth) {
  const float x = -depth;
  const auto power = static_cast<int32_t>(x * 1.44269504f - 0.5f);  // -127 makes the factor 0
  const auto whole = static_cast<float>(power);
  const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return ((p * r * r + r) + 1.0f) * std::bit_cast<float>((power + 127) << 23);
}

/// NaN becomes the deepest.
inline float cap(float depth) { return depth < kDeepest ? depth : kDeepest; }

}  // namespace

int32_t Ranking::bin_of(float capped_depth) {
  constexpr float kBinsPerUnit = static_cast<float>(kBins - 1) / kDeepest;
  return static_cast<int32_t>(capped_depth * kBinsPerUnit);
}

void Ranking::assign(std::span<const float> logits, float top, float temperature, float least) {
  logits_ = logits;
  top_ = top;
  temperature_ = temperature;
  tokens_.clear();
  all_ = std::isinf(least);
  if (!all_) {
    for (size_t i = 0; i < logits.size(); ++i) {
      if (logits[i] >= least) tokens_.push_back(static_cast<Token>(i));
    }
  }
  const size_t count = all_ ? logits.size() : tokens_.size();
  weight_.resize(count);
  bin_.resize(count);
  masses_.assign(kBins, 0.0);
  float* const weight = weight_.data();
  int32_t* const bin = bin_.data();
  if (all_) {
    const float* const from = logits.data();
    for (size_t i = 0; i < count; ++i) weight[i] = cap((top - from[i]) / temperature);
  } else {
    for (size_t i = 0; i < count; ++i) weight[i] = cap((top - logit(i)) / temperature);
  }
  // A loop of its own: in one, the compiler makes a branch of the cap, and no vector code.
  for (size_t i = 0; i < count; ++i) {
    bin[i] = bin_of(weight[i]);
    weight[i] = falling_exp(weight[i]);
  }
  for (size_t i = 0; i < count; ++i) {
    masses_[static_cast<size_t>(bin[i])] += static_cast<double>(weight[i]);
  }
  mass_ = 0.0;
  for (const double m : masses_) mass_ += m;
}

double Ranking::mass_of(size_t count) {
  counts_.assign(kBins, 0);
  for (const int32_t bin : bin_) ++counts_[static_cast<size_t>(bin)];
  double running = 0.0;
  for (size_t bin = 0; bin < kBins; ++bin) {
    if (counts_[bin] < count) {
      count -= counts_[bin];
      running += masses_[bin];
      continue;
    }
    open(bin);
    for (size_t i = 0; i < std::min(count, opened_.size()); ++i) {
      running += static_cast<double>(weight_[opened_[i]]);
    }
    return running;
  }
  return mass_;
}

double Ranking::mass_down_to(float weight) {
  const float depth = -std::log(weight);
  const auto last = static_cast<size_t>(bin_of(cap(depth)));
  double running = 0.0;
  for (size_t bin = 0; bin < last; ++bin) running += masses_[bin];
  open(last);
  for (const uint32_t i : opened_) {
    if ((top_ - logit(i)) / temperature_ <= depth) running += static_cast<double>(weight_[i]);
  }
  return running;
}

Ranking::Place Ranking::find(double mass) {
  double running = 0.0;
  size_t bin = 0;
  size_t last = 0;  // of those with any mass: where rounding may lead beyond the end
  double before_last = 0.0;
  for (; bin < kBins; ++bin) {
    if (masses_[bin] > 0.0) {
      last = bin;
      before_last = running;
      if (running + masses_[bin] >= mass) break;
    }
    running += masses_[bin];
  }
  open(last);
  Place place{-1, before_last};
  for (const uint32_t i : opened_) {
    place.token = token(i);
    place.running += static_cast<double>(weight_[i]);
    if (place.running >= mass) break;
  }
  return place;
}

void Ranking::open(size_t which) {
  const auto bin = static_cast<int32_t>(which);
  opened_.clear();
  for (size_t i = 0; i < bin_.size(); ++i) {
    if (bin_[i] == bin && weight_[i] > 0.0f) opened_.push_back(static_cast<uint32_t>(i));
  }
  std::sort(opened_.begin(), opened_.end(), [this](uint32_t a, uint32_t b) {
    const float x = logit(a);
    const float y = logit(b);
    return x != y ? x > y : a < b;
  });
}

}  // namespace relay::engine
