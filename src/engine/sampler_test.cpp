#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "engine/fake_model.h"

namespace relay::engine {
namespace {

std::vector<float> noise(size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, 3.0f);
  std::vector<float> values(count);
  for (float& v : values) v = normal(random);
  return values;
}

TEST(Argmax, AgreesWithMaxElementForEveryTail) {
  for (size_t count : {1, 2, 15, 16, 17, 1023, 1024, 1025, 5000}) {
    for (unsigned seed = 0; seed < 20; ++seed) {
      std::vector<float> v = noise(count, seed);
      if (seed % 2 == 0) {
        for (float& x : v) x = std::round(x);  // many equals: the first wins
      }
      EXPECT_EQ(argmax(v), std::max_element(v.begin(), v.end()) - v.begin());
    }
  }
}

TEST(Argmax, OddValues) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(argmax({}), -1);
  EXPECT_EQ(argmax(std::vector<float>{-inf, -inf}), -1) << "nothing can be chosen";
  EXPECT_EQ(argmax(std::vector<float>{nan, -1.0f, nan}), 1);
  EXPECT_EQ(argmax(std::vector<float>(40, nan)), -1);
  EXPECT_EQ(argmax(std::vector<float>{1.0f, inf, 2.0f}), 1);
}

TEST(Logprobs, AreThoseOfTheSoftmaxInDoublePrecision) {
  std::vector<float> logits = noise(3000, 5);
  logits[7] = logits[1234] = 20.0f;
  long double sum = 0;
  for (const float v : logits) sum += std::exp(static_cast<long double>(v));
  const auto exact = [&](size_t i) {
    return static_cast<double>(static_cast<long double>(logits[i]) - std::log(sum));
  };
  std::vector<Token> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](Token a, Token b) {
    return logits[static_cast<size_t>(a)] > logits[static_cast<size_t>(b)];
  });
  const auto result = logprobs(logits, 42, 20);
  ASSERT_EQ(result.size(), 21u);
  EXPECT_EQ(result[0].token, 42);
  EXPECT_NEAR(result[0].logprob, exact(42), 1e-5);
  for (size_t i = 0; i < 20; ++i) {
    EXPECT_EQ(result[i + 1].token, order[i]);
    EXPECT_NEAR(result[i + 1].logprob, exact(static_cast<size_t>(order[i])), 1e-5);
  }
  EXPECT_EQ(logprobs(logits, 42, 0).size(), 1u);
  EXPECT_EQ(logprobs(std::vector<float>{1, 2}, 0, 20).size(), 3u);
}

TEST(GreedySampler, PassesOverExcludedTokens) {
  FakeModel model(16);
  Batch batch;
  batch.add(3, 0, 0, true);
  ASSERT_EQ(model.decode(batch), DecodeStatus::kOk);
  GreedySampler plain;
  const Token best = plain.sample(model, 0);
  EXPECT_EQ(best, FakeModel::next({3}));
  GreedySampler without({best});
  EXPECT_NE(without.sample(model, 0), best);
  EXPECT_GE(without.sample(model, 0), 0);
}

}  // namespace
}  // namespace relay::engine
