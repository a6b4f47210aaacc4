// The oracle against numbers worked out by hand: everything else is measured by it.
#include "relay/reference.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "core/numeric.h"
#include "core/random.h"

namespace relay::test {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

double decode_f16(uint16_t bits) { return decode_element(DType::kF16, &bits, 0); }
double decode_bf16(uint16_t bits) { return decode_element(DType::kBF16, &bits, 0); }

TEST(DecodeElement, KnownF16) {
  EXPECT_EQ(decode_f16(0x3c00), 1.0);
  EXPECT_EQ(decode_f16(0xc000), -2.0);
  EXPECT_EQ(decode_f16(0x7bff), 65504.0);
  EXPECT_EQ(decode_f16(0x0400), std::ldexp(1.0, -14));
  EXPECT_EQ(decode_f16(0x0001), std::ldexp(1.0, -24));
  EXPECT_EQ(decode_f16(0x3555), 0.333251953125);
  EXPECT_EQ(decode_f16(0xfc00), -kInf);
  EXPECT_TRUE(std::isnan(decode_f16(0x7e00)));
  EXPECT_TRUE(std::signbit(decode_f16(0x8000)));
}

TEST(DecodeElement, KnownBF16) {
  EXPECT_EQ(decode_bf16(0x3f80), 1.0);
  EXPECT_EQ(decode_bf16(0xc040), -3.0);
  EXPECT_EQ(decode_bf16(0x0001), std::ldexp(1.0, -133));
  EXPECT_EQ(decode_bf16(0xff80), -kInf);
}

TEST(DecodeElement, Q8BlocksHaveTheirOwnScale) {
  std::vector<unsigned char> bytes(1 + 2 * 34);  // odd address
  unsigned char* vector = bytes.data() + 1;
  const uint16_t half = to_f16(0.5f), two = to_f16(2.0f);
  std::memcpy(vector, &half, 2);
  std::memcpy(vector + 34, &two, 2);
  vector[2] = static_cast<unsigned char>(-128);
  vector[2 + 31] = 7;
  vector[36] = 127;
  EXPECT_EQ(decode_element(DType::kQ8_0, vector, 0), -64.0);
  EXPECT_EQ(decode_element(DType::kQ8_0, vector, 31), 3.5);
  EXPECT_EQ(decode_element(DType::kQ8_0, vector, 32), 254.0);
}

TEST(DecodeElement, CustomIsRefused) {
  const float zero = 0;
  EXPECT_THROW(decode_element(DType::kCustom, &zero, 0), Error);
}

// The tests' encoders and the oracle's decoders know nothing of each other.
TEST(Encoders, F16RoundTripsAndRoundsToNearestEven) {
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const double value = decode_f16(static_cast<uint16_t>(bits));
    ASSERT_EQ(to_f16(static_cast<float>(value)), bits);
    ASSERT_EQ(to_f16(static_cast<float>(-value)), bits | 0x8000);
    if (bits + 1 < 0x7c00) {
      const double next = decode_f16(static_cast<uint16_t>(bits + 1));
      ASSERT_EQ(to_f16(static_cast<float>((value + next) / 2)), bits + (bits & 1)) << value;
    }
  }
  EXPECT_EQ(to_f16(65519.0f), 0x7bff);
  EXPECT_EQ(to_f16(65520.0f), 0x7c00);
  EXPECT_EQ(to_f16(-std::numeric_limits<float>::infinity()), 0xfc00);
}

TEST(Encoders, BF16RoundTripsAndRoundsToNearestEven) {
  for (uint32_t bits = 0; bits < 0x7f7f; ++bits) {
    const double value = decode_bf16(static_cast<uint16_t>(bits));
    const double next = decode_bf16(static_cast<uint16_t>(bits + 1));
    ASSERT_EQ(to_bf16(static_cast<float>(value)), bits);
    ASSERT_EQ(to_bf16(static_cast<float>((value + next) / 2)), bits + (bits & 1));
  }
}

/// Two query heads over one KV head, three slots, in f32.
class SmallReference : public ::testing::Test {
 protected:
  SmallReference() {
    inputs_.q = {.data = q_, .row_stride = 4 * sizeof(float), .head_stride = 2 * sizeof(float)};
    inputs_.kv.k = {.type = DType::kF32, .data = k_, .slot_stride = 2 * sizeof(float)};
    inputs_.kv.v = {.type = DType::kF32, .data = v_, .slot_stride = sizeof(float)};
  }

  void run(int64_t position = 0) {
    reference_row(shape_, inputs_, 0, position, slots_, out_, lse_);
  }

  HeadShape shape_ = {.q_heads = 2, .kv_heads = 1, .qk_dim = 2, .v_dim = 1};
  float q_[4] = {1, 0, 0, 1};
  float k_[6] = {1, 0, 2, 0, 0, 3};
  float v_[3] = {10, 20, 40};
  AttentionInputs inputs_;
  std::vector<AttendedSlot> slots_ = {{0, 0}, {1, 1}, {2, 2}};
  double out_[2];
  double lse_[2];
};

TEST_F(SmallReference, Softmax) {
  run();
  const double e = std::exp(1.0), e2 = std::exp(2.0), e3 = std::exp(3.0);
  EXPECT_NEAR(out_[0], (10 * e + 20 * e2 + 40) / (e + e2 + 1), 1e-12);
  EXPECT_NEAR(out_[1], (10 + 20 + 40 * e3) / (2 + e3), 1e-12);
  EXPECT_NEAR(lse_[0], std::log(e + e2 + 1), 1e-12);
  EXPECT_NEAR(lse_[1], std::log(2 + e3), 1e-12);
}

TEST_F(SmallReference, ScaleAndCap) {
  inputs_.scale = 0.5f;
  inputs_.softcap = 2.0f;
  slots_ = {{0, 0}, {1, 1}};
  run();
  const double a = std::exp(2 * std::tanh(0.5 / 2)), b = std::exp(2 * std::tanh(1.0 / 2));
  EXPECT_NEAR(out_[0], (10 * a + 20 * b) / (a + b), 1e-12);
}

TEST_F(SmallReference, SinksTakeWeightAndGiveNothing) {
  const float sinks[2] = {0.0f, 1.0f};
  inputs_.sinks = sinks;
  slots_ = {{0, 0}};
  run();
  EXPECT_NEAR(out_[0], 10 * std::exp(1.0) / (std::exp(1.0) + 1), 1e-12);
  EXPECT_NEAR(out_[1], 10 / (1 + std::exp(1.0)), 1e-12);
  EXPECT_NEAR(lse_[1], std::log(1 + std::exp(1.0)), 1e-12);
  slots_.clear();
  run();
  EXPECT_EQ(out_[0], 0.0);
  EXPECT_EQ(lse_[1], 1.0);
}

TEST_F(SmallReference, AlibiByPosition) {
  const float slopes[2] = {0.5f, 0.0f};
  inputs_.slopes = slopes;
  run(2);
  const double a = std::exp(1 - 1.0), b = std::exp(2 - 0.5), c = std::exp(0.0);
  EXPECT_NEAR(out_[0], (10 * a + 20 * b + 40 * c) / (a + b + c), 1e-12);
  EXPECT_NEAR(out_[1], (10 + 20 + 40 * std::exp(3.0)) / (2 + std::exp(3.0)), 1e-12);
}

TEST_F(SmallReference, BiasByColumnTimesSlope) {
  const float slopes[2] = {2.0f, 0.0f};
  const float bias[3] = {0.25f, -std::numeric_limits<float>::infinity(), 1.0f};
  inputs_.slopes = slopes;
  inputs_.bias = {.data = bias};
  v_[1] = std::numeric_limits<float>::quiet_NaN();  // hidden, so it may be anything
  run();
  const double a = std::exp(1 + 0.5), c = std::exp(0 + 2.0);
  EXPECT_NEAR(out_[0], (10 * a + 40 * c) / (a + c), 1e-12);
  EXPECT_NEAR(out_[1], (10 + 40 * std::exp(3.0)) / (1 + std::exp(3.0)), 1e-12);
}

TEST_F(SmallReference, NothingAttended) {
  slots_.clear();
  run();
  EXPECT_EQ(out_[0], 0.0);
  EXPECT_EQ(out_[1], 0.0);
  EXPECT_EQ(lse_[0], -kInf);
}

TEST_F(SmallReference, LargeLogitsDoNotOverflow) {
  inputs_.scale = 1e5f;
  run();
  EXPECT_EQ(out_[0], 20.0);
  EXPECT_NEAR(lse_[0], 2e5, 1e-9);
}

TEST(Reference, BlocksStridesAndGroups) {
  // 2 KV heads, group 2; slot s lies in block s / 2 of a cache with gaps.
  const HeadShape shape = {.q_heads = 4, .kv_heads = 2, .qk_dim = 1, .v_dim = 1};
  constexpr int64_t kBlock = 100, kSlot = 12, kHead = 4;
  std::vector<unsigned char> k(2 * kBlock, 0), v(2 * kBlock, 0);
  const auto put = [&](std::vector<unsigned char>& to, int64_t slot, int64_t head, float value) {
    std::memcpy(to.data() + slot / 2 * kBlock + slot % 2 * kSlot + head * kHead, &value, 4);
  };
  for (int64_t slot = 0; slot < 4; ++slot) {
    for (int64_t head = 0; head < 2; ++head) {
      put(v, slot, head, static_cast<float>(10 * slot + head));
    }
  }
  const float q[8] = {};
  AttentionInputs inputs;
  inputs.q = {
      .data = q, .row_stride = 16, .head_stride = 4, .rows_per_block = 1, .block_stride = 16};
  inputs.kv = {.k = {.type = DType::kF32,
                     .data = k.data(),
                     .block_stride = kBlock,
                     .slot_stride = kSlot,
                     .head_stride = kHead},
               .v = {.type = DType::kF32,
                     .data = v.data(),
                     .block_stride = kBlock,
                     .slot_stride = kSlot,
                     .head_stride = kHead},
               .block_size = 2};
  const std::vector<AttendedSlot> slots = {{1, 0}, {2, 1}};
  double out[4];
  reference_row(shape, inputs, 1, 0, slots, out, nullptr);
  EXPECT_EQ(out[0], 15.0);
  EXPECT_EQ(out[1], 15.0);
  EXPECT_EQ(out[2], 16.0);
  EXPECT_EQ(out[3], 16.0);
}

TEST(Reference, CustomFormatIsUnpackedWhole) {
  const HeadShape shape = {.q_heads = 1, .kv_heads = 1, .qk_dim = 3, .v_dim = 3};
  std::vector<unsigned char> bytes(1 + custom_bytes(3));
  const float values[3] = {127, -64, 1};
  encode(DType::kCustom, values, bytes.data() + 1);
  const KvPlane plane = {.type = DType::kCustom,
                         .data = bytes.data() + 1,
                         .slot_stride = custom_bytes(3),
                         .unpack = unpack_custom};
  const float q[3] = {0, 0, 2};
  AttentionInputs inputs;
  inputs.q = {.data = q};
  inputs.kv = {.k = plane, .v = plane};
  const std::vector<AttendedSlot> slots = {{0, 0}};
  double out[3], lse;
  reference_row(shape, inputs, 0, 0, slots, out, &lse);
  EXPECT_EQ(out[1], -64.0);
  EXPECT_EQ(lse, 2.0);
}

}  // namespace
}  // namespace relay::test
