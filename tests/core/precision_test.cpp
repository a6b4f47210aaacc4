// The kernels against the table of precisions that all tolerances stand on (precision.h).
#include "core/precision.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "core/test_env.h"
#include "core/tolerance.h"
#include "cpu/kernels/kernels.h"

namespace relay::test {
namespace {

using kernels::QueryLayout;

constexpr DType kTypes[] = {DType::kF32, DType::kF16, DType::kBF16, DType::kQ8_0, DType::kCustom};

/// How queries have to lie for the kernels to multiply in this form.
QueryLayout layout_of(Form form) {
  switch (form) {
    case Form::kF32:
      return QueryLayout::kF32;
    case Form::kBF16:
    case Form::kBF16Keys:
      return QueryLayout::kBF16Pairs;
    case Form::kBF16Sums:
      return QueryLayout::kBF16Halves;
    case Form::kBytes:
      return QueryLayout::kInt8;
  }
  throw std::logic_error("no such form");
}

TEST(Precision, OfEveryKernelSetTypeAndHeadSize) {
  for_each_isa([&](const std::string& isa) {
    const kernels::KernelSet& set = kernels::active();
    for (DType k_type : kTypes) {
      for (DType v_type : kTypes) {
        for (int qk : {1, 16, 32, 40, 64, 80, 96, 112, 128, 192, 256, 576}) {
          for (int v : {1, 16, 32, 40, 64, 80, 96, 128, 256, 512}) {
            const auto whole = [](DType type, int dim) {
              return type != DType::kQ8_0 || dim % 32 == 0;
            };
            if (!whole(k_type, qk) || !whole(v_type, v)) continue;
            const HeadShape shape = {.q_heads = 1, .kv_heads = 1, .qk_dim = qk, .v_dim = v};
            const Precision expected = precision_of(isa, shape, k_type, v_type);
            const auto where = [&] {
              return std::string(to_string(k_type)) + "/" + to_string(v_type) + " of " +
                     std::to_string(qk) + "/" + std::to_string(v);
            };
            ASSERT_EQ(set.few_layout(k_type, v_type), layout_of(expected.few)) << where();
            ASSERT_EQ(set.many_layout(k_type, v_type, qk, v), layout_of(expected.many)) << where();
          }
        }
      }
    }
  });
}

TEST(Precision, WhatEachFormMayLose) {
  const HeadShape shape = {.q_heads = 1, .kv_heads = 1, .qk_dim = 64, .v_dim = 64};
  const auto of = [&](const char* isa, DType type) {
    return arithmetic_of(isa, shape, type, type);
  };
  const Arithmetic exact = {};
  const Arithmetic bf16 = {.query_rounding = 0.00390625, .weight_rounding = 0.00401625};
  const Arithmetic sums = {.query_rounding = 4.57763671875e-5, .weight_rounding = 4.57763671875e-5};
  const Arithmetic bytes_and_sums = {.query_rounding = 4.57763671875e-5,
                                     .byte_rounding = 1.0 / 254,
                                     .weight_rounding = 4.57763671875e-5,
                                     .weight_unit = 1.0 / 32767};
  const Arithmetic bytes_and_bf16 = {.query_rounding = 0.00390625,
                                     .key_rounding = 0.00390625,
                                     .byte_rounding = 1.0 / 254,
                                     .weight_unit = 1.0 / 32767};
  EXPECT_EQ(of("amx", DType::kBF16), bf16);
  EXPECT_EQ(of("amx", DType::kF16), sums);
  EXPECT_EQ(of("amx", DType::kQ8_0), bytes_and_sums);
  EXPECT_EQ(of("avx512bf16", DType::kBF16), bf16);
  EXPECT_EQ(of("avx512bf16", DType::kQ8_0), bytes_and_bf16);
  EXPECT_EQ(of("sve256", DType::kBF16), bf16);
  EXPECT_EQ(of("neonbf16", DType::kBF16), bf16);
  for (const char* isa : {"avx512", "avx2", "neon", "plain"}) {
    for (DType type : kTypes) EXPECT_EQ(of(isa, type), exact) << isa << ", " << to_string(type);
  }
  for (const char* isa : {"avx512bf16", "sve256", "neonbf16"}) {
    EXPECT_EQ(of(isa, DType::kF16), exact) << isa;
    EXPECT_EQ(of(isa, DType::kF32), exact) << isa;
  }
  EXPECT_EQ(arithmetic_of("amx", {.q_heads = 1, .kv_heads = 1, .qk_dim = 80, .v_dim = 64},
                          DType::kF16, DType::kF16),
            exact)
      << "AMX wants head sizes in multiples of 32";
  EXPECT_THROW(of("mmx", DType::kF16), std::invalid_argument);
}

}  // namespace
}  // namespace relay::test
