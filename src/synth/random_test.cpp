#include "synth/random.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace relay::synth {
namespace {

TEST(Random, HasTheStatedMomentsAndRange) {
  constexpr int kCount = 1'000'000;
  double sum = 0;
  double squares = 0;
  for (uint64_t i = 0; i < kCount; ++i) {
    const double value = random_normal(42, i);
    ASSERT_LE(std::fabs(value), 3.465);
    sum += value;
    squares += value * value;
  }
  EXPECT_NEAR(sum / kCount, 0, 5 / std::sqrt(kCount));
  // The variance of a square of this distribution is below 2.
  EXPECT_NEAR(squares / kCount, 1, 5 * std::sqrt(2.0 / kCount));
}

TEST(Random, StreamsAndNeighboursAreUncorrelated) {
  constexpr int kCount = 200'000;
  const uint64_t a = stream_key(1, "blk.0.attn_q.weight");
  const uint64_t b = stream_key(1, "blk.1.attn_q.weight");
  const uint64_t c = stream_key(2, "blk.0.attn_q.weight");
  double names = 0;
  double seeds = 0;
  double neighbours = 0;
  for (uint64_t i = 0; i < kCount; ++i) {
    names += random_normal(a, i) * random_normal(b, i);
    seeds += random_normal(a, i) * random_normal(c, i);
    neighbours += random_normal(a, i) * random_normal(a, i + 1);
  }
  const double bound = 5 / std::sqrt(kCount);
  EXPECT_NEAR(names / kCount, 0, bound);
  EXPECT_NEAR(seeds / kCount, 0, bound);
  EXPECT_NEAR(neighbours / kCount, 0, bound);
}

TEST(Random, UniformFillsItsRange) {
  std::vector<int> buckets(16);
  for (uint64_t i = 0; i < 16'000; ++i) {
    const float value = random_uniform(7, i);
    ASSERT_GE(value, 0.0f);
    ASSERT_LT(value, 1.0f);
    ++buckets[static_cast<size_t>(value * 16)];
  }
  for (const int count : buckets) {
    EXPECT_NEAR(count, 1000, 200);
  }
}

// Files made with a seed must stay the same from version to version: these are the numbers of the
// first one.
TEST(Random, StaysWhatItWas) {
  static_assert(mix64(0) == 0);
  EXPECT_EQ(random_bits(0, 0), 0xE220A8397B1DCDAFu);  // SplitMix64 seeded with 0, as published
  EXPECT_EQ(random_bits(0, 1), 0x6E789E6AA1B965F4u);
  EXPECT_NE(stream_key(1, "a"), stream_key(1, "b"));
  EXPECT_NE(stream_key(1, "a"), stream_key(2, "a"));
}

}  // namespace
}  // namespace relay::synth
