#include "engine/random_sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <set>

#include "engine/ranking.h"

namespace relay::engine {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> normal(size_t count, float deviation, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> distribution(0.0f, deviation);
  std::vector<float> values(count);
  for (float& v : values) v = distribution(random);
  return values;
}

/// The definition: sort everything, cut, and walk until the dice are reached.
struct Sorted {
  Sorted(const std::vector<float>& logits, const SamplingParams& s) {
    std::vector<Token> order(logits.size());
    std::iota(order.begin(), order.end(), 0);
    std::erase_if(order, [&](Token t) { return std::isnan(logits[static_cast<size_t>(t)]); });
    const auto logit = [&](Token t) { return static_cast<double>(logits[static_cast<size_t>(t)]); };
    std::stable_sort(order.begin(), order.end(),
                     [&](Token a, Token b) { return logit(a) > logit(b); });
    if (s.top_k > 0 && order.size() > static_cast<size_t>(s.top_k)) {
      order.resize(static_cast<size_t>(s.top_k));
    }
    for (const Token t : order) {
      weights.push_back(
          std::exp((logit(t) - logit(order[0])) / static_cast<double>(s.temperature)));
    }
    const double all = std::accumulate(weights.begin(), weights.end(), 0.0);
    double running = 0.0;
    size_t keep = 0;
    while (keep < weights.size() && running < static_cast<double>(s.top_p) * all) {
      running += weights[keep++];
    }
    while (keep > 1 && weights[keep - 1] < static_cast<double>(s.min_p)) --keep;
    order.resize(keep);
    weights.resize(keep);
    tokens = std::move(order);
  }
  Token at(double dice) const {
    const double mass = dice * std::accumulate(weights.begin(), weights.end(), 0.0);
    double running = 0.0;
    for (size_t i = 0; i < weights.size(); ++i) {
      running += weights[i];
      if (running >= mass) return tokens[i];
    }
    return tokens.back();
  }
  std::vector<Token> tokens;
  std::vector<double> weights;
};

struct Case {
  float temperature;
  float top_p;
  int32_t top_k;
  float min_p;
};
const std::vector<Case> kCases = {{1, 1, 0, 0},         {1, 0.9f, 0, 0},       {0.7f, 0.95f, 0, 0},
                                  {2, 0.5f, 0, 0},      {1, 0.01f, 0, 0},      {1, 1, 40, 0},
                                  {0.6f, 0.95f, 20, 0}, {1, 0.999f, 3000, 0},  {1, 1, 0, 0.05f},
                                  {1, 0.9f, 100, 0.1f}, {0.1f, 0.9f, 0, 0.3f}, {1, 1, 1, 0}};

TEST(RandomSampler, DrawsWhatSortingEverythingWouldDraw) {
  constexpr int kDraws = 100;
  int different = 0;
  int draws = 0;
  for (const float deviation : {0.01f, 0.5f, 1.0f, 3.0f, 8.0f}) {
    for (const size_t vocabulary : {17ul, 1000ul, 20000ul}) {
      const std::vector<float> logits = normal(vocabulary, deviation, 7);
      for (const Case& c : kCases) {
        SamplingParams s;
        s.temperature = c.temperature;
        s.top_p = c.top_p;
        s.top_k = c.top_k;
        s.min_p = c.min_p;
        RandomSampler sampler(s, 11, {}, {});
        const Sorted sorted(logits, s);
        std::mt19937 random(11);
        for (int i = 0; i < kDraws; ++i) {
          const double dice = std::uniform_real_distribution<double>(0, 1)(random);
          different += sampler.choose(logits) != sorted.at(dice) ? 1 : 0;
          ++draws;
        }
      }
    }
  }
  // The weights are floats here and doubles there: a draw between two tokens may fall to the other.
  EXPECT_LT(different, draws / 1000) << "of " << draws;
}

TEST(RandomSampler, CutsExactlyWhereSortingWouldCut) {
  const std::vector<float> logits = normal(5000, 2.0f, 3);
  for (const Case& c : kCases) {
    SamplingParams s;
    s.temperature = c.temperature;
    s.top_p = c.top_p;
    s.top_k = c.top_k;
    s.min_p = c.min_p;
    const Sorted sorted(logits, s);
    const std::set<Token> allowed(sorted.tokens.begin(), sorted.tokens.end());
    RandomSampler sampler(s, 1, {}, {});
    std::set<Token> seen;
    for (int i = 0; i < 1500; ++i) seen.insert(sampler.choose(logits));
    for (const Token t : seen) EXPECT_TRUE(allowed.contains(t)) << t;
    EXPECT_GE(seen.size(), std::min<size_t>(allowed.size() * 9 / 10, 20));
  }
}

TEST(RandomSampler, EqualLogitsStandInTheOrderOfTheirIds) {
  SamplingParams s;
  s.top_k = 3;
  RandomSampler sampler(s, 1, {}, {});
  const std::vector<float> logits(2000, 1.5f);
  std::set<Token> seen;
  for (int i = 0; i < 200; ++i) seen.insert(sampler.choose(logits));
  EXPECT_EQ(seen, (std::set<Token>{0, 1, 2}));
}

TEST(RandomSampler, OddLogits) {
  RandomSampler sampler({}, 1, {}, {});
  EXPECT_EQ(sampler.choose(std::vector<float>{kNan, -kInf, kNan}), -1);
  EXPECT_EQ(sampler.choose(std::vector<float>{-kInf, -kInf}), -1);
  EXPECT_EQ(sampler.choose(std::vector<float>{0.0f, kInf, 5.0f}), 1);
  EXPECT_EQ(sampler.choose(std::vector<float>{-kInf, -3.0f, kNan, -kInf}), 1);
  std::vector<float> one(1000, -kInf);
  one[123] = -1e30f;
  SamplingParams nucleus;
  nucleus.top_p = 0.5f;
  nucleus.top_k = 900;
  nucleus.min_p = 1.0f;
  RandomSampler narrow(nucleus, 2, {}, {});
  for (int i = 0; i < 20; ++i) EXPECT_EQ(narrow.choose(one), 123);
}

TEST(RandomSampler, ATinyTemperatureIsGreedy) {
  SamplingParams s;
  for (const float temperature : {0.0f, 1e-42f, 1e-6f}) {
    s.temperature = temperature;
    RandomSampler sampler(s, 3, {}, {});
    const std::vector<float> logits = normal(3000, 1.0f, 5);
    const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
    for (int i = 0; i < 10; ++i) EXPECT_EQ(sampler.choose(logits), best) << temperature;
  }
}

TEST(RandomSampler, SeedsDecide) {
  const std::vector<float> logits = normal(500, 1.0f, 5);
  const auto draw = [&](uint32_t seed) {
    RandomSampler sampler({}, seed, {}, {});
    std::vector<Token> tokens;
    for (int i = 0; i < 20; ++i) tokens.push_back(sampler.choose(logits));
    return tokens;
  };
  EXPECT_EQ(draw(1), draw(1));
  EXPECT_NE(draw(1), draw(2));
}

TEST(RandomSampler, PenaltiesCountWhatWasGenerated) {
  SamplingParams s;
  s.temperature = 0;
  s.frequency_penalty = 0.5f;
  s.presence_penalty = 1.0f;
  const std::vector<Token> prompt = {0, 0, 0};
  RandomSampler sampler(s, 1, {}, prompt);
  const std::vector<float> logits = {3.0f, 1.6f, 0.0f};
  const auto next = [&] {
    const Token t = sampler.choose(logits);
    sampler.accept(t);
    return t;
  };
  // 3.0 | 3 - 1.5 = 1.5 < 1.6 | 1.6 - 1.5 = 0.1 < 1.5 | 3 - 2 = 1 | 3 - 2.5 = 0.5 | 3 - 3 = 0 < 0.1
  EXPECT_EQ(next(), 0) << "the prompt does not count";
  EXPECT_EQ(next(), 1);
  EXPECT_EQ(next(), 0);
  EXPECT_EQ(next(), 0);
  EXPECT_EQ(next(), 0);
  EXPECT_EQ(next(), 1);
  sampler.forget();
  EXPECT_EQ(next(), 0);
}

TEST(RandomSampler, ARepetitionPenaltyCountsThePromptToo) {
  SamplingParams s;
  s.temperature = 0;
  s.repetition_penalty = 2.0f;
  const std::vector<Token> prompt = {0};
  RandomSampler sampler(s, 1, {}, prompt);
  const std::vector<float> logits = {3.0f, 1.6f, 1.0f, -0.7f};
  EXPECT_EQ(sampler.choose(logits), 1) << "3 / 2 < 1.6";
  sampler.accept(1);
  sampler.accept(0);
  EXPECT_EQ(sampler.choose(logits), 0) << "once, however often it was seen";
  const std::vector<float> negative = {-1.0f, -1.5f, -3.0f, -1.7f};
  EXPECT_EQ(sampler.choose(negative), 3) << "negative ones are multiplied";
}

TEST(RandomSampler, BiasesAndExclusions) {
  SamplingParams s;
  s.temperature = 0;
  s.logit_bias = {{2, 5.0f}, {1, -kInf}};
  const std::vector<float> logits = {1.0f, 9.0f, 0.0f};
  EXPECT_EQ(RandomSampler(s, 1, {}, {}).choose(logits), 2);
  EXPECT_EQ(RandomSampler(s, 1, {2}, {}).choose(logits), 0);
  EXPECT_EQ(RandomSampler(s, 1, {0, 2}, {}).choose(logits), -1);
}

TEST(Ranking, WeightsAreThoseOfTheSoftmax) {
  const std::vector<float> logits = normal(50000, 6.0f, 9);
  const float top = *std::max_element(logits.begin(), logits.end());
  Ranking ranking;
  ranking.assign(logits, top, 0.8f);
  long double sum = 0;
  for (const float l : logits) {
    sum += std::exp((static_cast<long double>(l) - static_cast<long double>(top)) / 0.8f);
  }
  EXPECT_NEAR(ranking.mass() / static_cast<double>(sum), 1.0, 1e-6);
  EXPECT_EQ(ranking.mass_of(logits.size() + 1), ranking.mass());
  EXPECT_FLOAT_EQ(static_cast<float>(ranking.mass_of(1)), 1.0f);
  EXPECT_FLOAT_EQ(static_cast<float>(ranking.mass_down_to(1.0f)), 1.0f);
}

}  // namespace
}  // namespace relay::engine
