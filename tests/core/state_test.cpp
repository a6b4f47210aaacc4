// The merge law of partial attention states (relay/state.h), against double precision.
#include "relay/state.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "core/random.h"
#include "core/test_env.h"

namespace relay::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr double kUnit = 0x1p-24;
constexpr int kDim = 8;

/// A state with its vector, as the merge law speaks of it.
struct Partial {
  SoftmaxState state;
  std::vector<float> o = std::vector<float>(kDim, 0.0f);
};

Partial merged(Partial a, const Partial& b) {
  const MergeWeights w = merge(a.state, b.state);
  for (int i = 0; i < kDim; ++i) a.o[i] = w.into * a.o[i] + w.part * b.o[i];
  return a;
}

struct Slot {
  float x;  ///< base-2 logit
  std::vector<float> v;
};

Partial of(const Slot& slot) { return {{slot.x, 1.0f}, slot.v}; }

std::vector<Slot> random_slots(Random& random, int count, float spread) {
  std::vector<Slot> slots;
  for (int i = 0; i < count; ++i) {
    Slot slot{spread * random.normal(), std::vector<float>(kDim)};
    for (float& v : slot.v) v = random.normal();
    slots.push_back(slot);
  }
  return slots;
}

/// Each merge rounds: two exp2 of differences (argument error u |d|, result 2 ulp), two products, a
/// sum. With weights at most 1 that is below 8 u of the sum of magnitudes, for n merges 8 n u. The
/// argument errors add up to at most u times the range of the logits.
void expect_softmax_of(const Partial& partial, const std::vector<Slot>& slots) {
  double max = -kInf, min = kInf;
  for (const Slot& slot : slots) {
    max = std::max<double>(max, slot.x);
    min = std::min<double>(min, slot.x);
  }
  const double tolerance = (8.0 * static_cast<double>(slots.size()) + 2 * (max - min) + 8) * kUnit;
  double sum = 0;
  std::vector<double> o(kDim), magnitude(kDim);
  for (const Slot& slot : slots) {
    const double p = std::exp2(slot.x - max);
    sum += p;
    for (int i = 0; i < kDim; ++i) {
      o[i] += p * slot.v[i];
      magnitude[i] += p * std::fabs(slot.v[i]);
    }
  }
  EXPECT_EQ(partial.state.max, static_cast<float>(max));
  EXPECT_NEAR(partial.state.sum, sum, tolerance * sum);
  const double lse = (max + std::log2(sum)) * 0.6931471805599453;
  EXPECT_NEAR(partial.state.log_sum_exp(), lse,
              tolerance + 4 * kUnit * (std::fabs(lse) + std::fabs(max)));
  for (int i = 0; i < kDim; ++i) EXPECT_NEAR(partial.o[i], o[i], tolerance * magnitude[i]);
}

class MergeLaw : public ::testing::TestWithParam<uint64_t> {};

TEST_P(MergeLaw, AnyTreeOfMergesIsTheSoftmax) {
  Random random(derive_seed(GetParam(), 0x3e));
  const float spread = random.pick(std::vector<float>{0.0f, 1.0f, 20.0f, 1000.0f});
  const std::vector<Slot> slots =
      random_slots(random, static_cast<int>(random.log_between(1, 200)), spread);
  SCOPED_TRACE(repeat_command());

  Partial left, right;  // both begin with the empty state
  for (size_t i = 0; i < slots.size(); ++i) left = merged(left, of(slots[i]));
  for (size_t i = slots.size(); i-- > 0;) right = merged(of(slots[i]), right);
  expect_softmax_of(left, slots);
  expect_softmax_of(right, slots);

  // A random binary tree, empty states strewn in: associative and commutative.
  std::vector<Partial> pool;
  for (const Slot& slot : slots) pool.push_back(of(slot));
  for (int64_t i = random.between(0, 5); i > 0; --i) pool.emplace_back();
  random.shuffle(pool);
  while (pool.size() > 1) {
    const size_t i = random.between(0, static_cast<int64_t>(pool.size()) - 2);
    pool[i] = random.chance(0.5) ? merged(pool[i], pool[i + 1]) : merged(pool[i + 1], pool[i]);
    pool.erase(pool.begin() + static_cast<int64_t>(i) + 1);
  }
  expect_softmax_of(pool[0], slots);
}

INSTANTIATE_TEST_SUITE_P(Seeds, MergeLaw, ::testing::ValuesIn(seeds(100)));

TEST(MergeLaw, EmptyIsTheIdentityToTheBit) {
  Random random(5);
  for (const Slot& slot : random_slots(random, 50, 30.0f)) {
    const Partial partial = of(slot);
    for (const Partial& result : {merged(partial, {}), merged({}, partial)}) {
      EXPECT_EQ(result.state.max, partial.state.max);
      EXPECT_EQ(result.state.sum, partial.state.sum);
      EXPECT_EQ(result.o, partial.o);
    }
  }
}

TEST(MergeLaw, TwoEmptyStatesStayEmpty) {
  const Partial both = merged({}, {});
  EXPECT_TRUE(both.state.empty());
  EXPECT_EQ(both.state.max, -kInf);
  EXPECT_EQ(both.state.sum, 0.0f);
  EXPECT_EQ(both.state.log_sum_exp(), -kInf);
  for (float o : both.o) EXPECT_EQ(o, 0.0f);
}

TEST(MergeLaw, EmptyIgnoresWhatItsVectorHolds) {
  // The vector of an empty state is never computed; its weight must be 0, not NaN.
  SoftmaxState full{3.0f, 2.0f};
  EXPECT_EQ(merge(full, {}).part, 0.0f);
  SoftmaxState empty;
  EXPECT_EQ(merge(empty, {3.0f, 2.0f}).into, 0.0f);
}

TEST(MergeLaw, DistantStatesDoNotOverflow) {
  SoftmaxState low{-1e30f, 5.0f};
  const MergeWeights w = merge(low, {1e30f, 2.0f});
  EXPECT_EQ(w.into, 0.0f);
  EXPECT_EQ(w.part, 1.0f);
  EXPECT_EQ(low.max, 1e30f);
  EXPECT_EQ(low.sum, 2.0f);
}

}  // namespace
}  // namespace relay::test
