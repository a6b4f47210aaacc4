// Random operators over random forests against the oracle: every builder, kernel set, element type,
// head shape, layout and number of threads, in random batches.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#include "core/bent_costs.h"
#include "core/checker.h"
#include "core/forest_generator.h"
#include "core/operator_case.h"
#include "core/test_env.h"

namespace relay::test {
namespace {

/// Multiply-adds of one run, so that the plain kernels get through in a second or so.
constexpr double kMaxWork = 1.2e8;
/// Elements of K and V together.
constexpr double kMaxElements = 3e6;

ForestLimits limits_for(const OperatorConfig& config, double size) {
  const HeadShape& shape = config.shape;
  const double dims = shape.qk_dim + shape.v_dim;
  ForestLimits limits;
  limits.max_slots = std::clamp<int64_t>(
      static_cast<int64_t>(size * kMaxElements / (dims * shape.kv_heads)), 256, 16384);
  limits.max_attended =
      std::max<int64_t>(512, static_cast<int64_t>(size * kMaxWork / (dims * shape.q_heads)));
  return limits;
}

struct Way {
  std::string name;
  const Forest* forest;
  ConstRows bias;
  int64_t window = 0;
};

uint64_t number_of(const std::string& name) {
  uint64_t number = 14695981039346656037u;  // FNV-1a
  for (unsigned char c : name) number = (number ^ c) * 1099511628211u;
  return number;
}

/// Runs `op` the given way on every kernel set and compares.
void check_way(OperatorCase& op, const Oracle& oracle, const Way& way, uint64_t seed) {
  Random random(derive_seed(seed, number_of(way.name)));
  const int32_t threads = static_cast<int32_t>(random.between(1, 16));
  const Threading threading = random.pick(
      std::vector<Threading>{Threading::kInTurn, Threading::kInRandomTurn, Threading::kReal});
  const double bend = random_bend(random);
  SCOPED_TRACE(way.name + ", " + std::to_string(threads) + " threads, threading " +
               std::to_string(static_cast<int>(threading)) + ", partial results cost " +
               std::to_string(bend) + " times as much");
  for_each_isa([&](const std::string& isa) {
    op.out.reset();
    AttentionInputs inputs = op.inputs();
    inputs.bias = way.bias;
    inputs.window = way.window;
    const PlanPtr plan = make_plan_by_bent_costs(*way.forest, op.options(threads), bend);
    ASSERT_NO_THROW(validate(*plan, inputs));
    Workspace workspace(*plan);
    run_plan(*plan, inputs, workspace, threads, threading, seed);
    const Arithmetic arithmetic =
        arithmetic_of(isa, op.config.shape, op.config.k_type, op.config.v_type);
    ASSERT_EQ(oracle.compare(op, op.out, arithmetic), "");
    ASSERT_EQ(op.out.broken_guards(), "");
  });
}

class Property : public ::testing::TestWithParam<uint64_t> {};

TEST_P(Property, AllBuildersOverOneForest) {
  const uint64_t seed = GetParam();
  Random random(derive_seed(seed, 1));
  OperatorConfig config = random_config(random);
  ForestLimits limits = limits_for(config, std::min(1.0, scale()));
  limits.tables_possible = random.chance(0.5);
  const ForestCase c = generate_forest(seed, limits);
  // Without positions there is nothing that slopes alone could measure.
  if (!c.causal) config.slopes = false;

  OperatorCase op(config, c.rows(), c.block_size, c.blocks, c.used_slots(), seed);
  SCOPED_TRACE(c.describe() + "\n" + config.describe() + "\n" + repeat_command());
  const Oracle oracle(op, truth_of(c), arithmetics_for(config), seed);

  const Sharing other = random.chance(0.5) ? Sharing::kOn : Sharing::kOff;
  Forest forest;
  build_from_tree(c, Sharing::kOn, seed, forest);
  check_way(op, oracle, {"tree", &forest, {}, c.window}, seed);
  if (HasFatalFailure()) return;
  build_from_tree(c, Sharing::kOff, seed, forest);
  check_way(op, oracle, {"tree without sharing", &forest, {}, c.window}, seed);
  if (HasFatalFailure()) return;

  if (c.tables_possible) {
    build_from_tables(c, other, forest);
    check_way(op, oracle, {"block tables", &forest, {}, c.window}, seed);
    if (HasFatalFailure()) return;
  }

  if (c.rows() * c.slots() <= 400'000) {
    // A mask that spells out ALiBi's distances means the same as slopes and positions. They are
    // exact in f32, and in f16 up to 2048.
    const DType type = random.chance(0.5) || config.slopes ? DType::kF32 : DType::kF16;
    const Mask mask =
        mask_of(c, type, config.slopes ? MaskValues::kDistance : MaskValues::kZero, seed);
    build_from_mask(mask.batch(), other, forest);
    check_way(op, oracle, {"mask", &forest, mask.bias()}, seed);
  }
}

TEST_P(Property, MaskWithBias) {
  const uint64_t seed = GetParam();
  Random random(derive_seed(seed, 2));
  const OperatorConfig config = random_config(random);
  const double size = std::min(1.0, scale());
  const ForestLimits limits = limits_for(config, size);
  const int32_t max_rows =
      static_cast<int32_t>(std::clamp<int64_t>(limits.max_attended / 256, 1, 160));
  const int64_t max_columns = std::min<int64_t>(limits.max_slots / 4, 1200);
  const Mask mask = generate_mask(seed, max_rows, std::max<int64_t>(1, max_columns));
  const int64_t rows = static_cast<int64_t>(mask.streams) * mask.rows_per_stream;

  std::vector<bool> used(mask.streams * mask.columns);
  for (int64_t row = 0; row < rows; ++row) {
    for (const AttendedSlot& a : mask.attended(row)) used[a.slot] = true;
  }
  OperatorCase op(config, rows, mask.columns, mask.streams, used, seed);
  op.bias = mask.bias();
  SCOPED_TRACE(std::to_string(mask.streams) + " streams of " +
               std::to_string(mask.rows_per_stream) + " rows and " + std::to_string(mask.columns) +
               " columns, mask " + to_string(mask.type) + ", " + config.describe() + "\n" +
               repeat_command());
  const Oracle oracle(op, truth_of(mask), arithmetics_for(config), seed);
  Forest forest;
  for (Sharing sharing : {Sharing::kOn, Sharing::kOff}) {
    build_from_mask(mask.batch(), sharing, forest);
    check_way(op, oracle, {sharing == Sharing::kOn ? "shared" : "alone", &forest, mask.bias()},
              seed);
    if (HasFatalFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, Property, ::testing::ValuesIn(seeds(120)));

// --- The largest ---------------------------------------------------------------------------------

class Large : public ::testing::TestWithParam<uint64_t> {};

TEST_P(Large, ForestOfManyRowsAndLongPrefixes) {
  // Up to 256 rows over up to 8k shared slots: few heads, so that the plain kernels get through.
  Random random(derive_seed(GetParam(), 3));
  OperatorConfig config;
  config.shape = {.q_heads = 2, .kv_heads = 1, .qk_dim = 64, .v_dim = 64};
  config.k_type = config.v_type =
      random.pick(std::vector<DType>{DType::kF16, DType::kBF16, DType::kQ8_0});
  ForestLimits limits;
  limits.max_attended = static_cast<int64_t>(2e6 * std::min(1.0, scale()));
  // The first of the drawn forests that is large enough.
  ForestCase c;
  for (uint64_t draw = 0; c.rows() < 64 || c.slots() < 4096; ++draw) {
    ASSERT_LT(draw, 1000u) << "the generator makes no large forests";
    c = generate_forest(derive_seed(GetParam(), 0x1a0 + draw), limits);
  }
  OperatorCase op(config, c.rows(), c.block_size, c.blocks, c.used_slots(), GetParam());
  SCOPED_TRACE(c.describe() + "\n" + config.describe() + "\n" + repeat_command());
  const Oracle oracle(op, truth_of(c), arithmetics_for(config), GetParam());
  Forest forest;
  build_from_tree(c, Sharing::kOn, GetParam(), forest);
  check_way(op, oracle, {"tree", &forest, {}, c.window}, GetParam());
}

INSTANTIATE_TEST_SUITE_P(Seeds, Large, ::testing::ValuesIn(seeds(6)));

// --- Every shape and type by itself
// --------------------------------------------------------------- Random mixes visit everything in
// the long run; these visit it in every run.

/// 5 requests over a prefix of 150, one of them a prefill chunk.
ForestCase mixed_batch(uint64_t seed) {
  ForestCase c = shared_prefix_case(150, {9, 33, 1, 70, 17});
  c.seed = seed;
  c.causal = true;
  c.requests[3].rows = 19;
  c.index_rows();
  return c;
}

void check_config(const OperatorConfig& config, uint64_t seed) {
  const ForestCase c = mixed_batch(seed);
  OperatorCase op(config, c.rows(), c.block_size, c.blocks, c.used_slots(), seed);
  SCOPED_TRACE(config.describe() + "\n" + repeat_command());
  const Oracle oracle(op, truth_of(c), arithmetics_for(config), seed);
  Forest forest;
  build_from_tree(c, Sharing::kOn, seed, forest);
  check_way(op, oracle, {"tree", &forest, {}, 0}, seed);
}

struct Dims {
  int32_t qk, v;
};

class HeadSizes : public ::testing::TestWithParam<Dims> {};

TEST_P(HeadSizes, EveryKvType) {
  for (DType type : {DType::kF32, DType::kF16, DType::kBF16, DType::kQ8_0, DType::kCustom}) {
    if (type == DType::kQ8_0 && (GetParam().qk % 32 != 0 || GetParam().v % 32 != 0)) continue;
    OperatorConfig config;
    config.shape = {.q_heads = 4, .kv_heads = 2, .qk_dim = GetParam().qk, .v_dim = GetParam().v};
    config.k_type = config.v_type = type;
    config.placement = Placement::kPadded;
    check_config(config, 100 + static_cast<uint64_t>(type));
    if (HasFatalFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(All, HeadSizes,
                         ::testing::Values(Dims{32, 32}, Dims{40, 40}, Dims{64, 64}, Dims{65, 67},
                                           Dims{67, 65}, Dims{72, 72}, Dims{80, 80}, Dims{96, 96},
                                           Dims{128, 128}, Dims{192, 128}, Dims{256, 256},
                                           Dims{320, 256}, Dims{576, 512}, Dims{1, 1}, Dims{3, 2},
                                           Dims{15, 17}, Dims{31, 33}, Dims{1024, 1024}),
                         [](const auto& info) {
                           return std::to_string(info.param.qk) + "_" +
                                  std::to_string(info.param.v);
                         });

class Groups : public ::testing::TestWithParam<int32_t> {};

TEST_P(Groups, OneAndThreeKvHeads) {
  for (int32_t kv_heads : {1, 3}) {
    for (DType type : {DType::kF16, DType::kBF16, DType::kQ8_0}) {
      OperatorConfig config;
      config.shape = {
          .q_heads = GetParam() * kv_heads, .kv_heads = kv_heads, .qk_dim = 64, .v_dim = 64};
      config.k_type = config.v_type = type;
      check_config(config, 200 + static_cast<uint64_t>(kv_heads));
      if (HasFatalFailure()) return;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, Groups, ::testing::Values(1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 32));

TEST(Types, EveryPairOfKAndVWithEveryQAndOut) {
  const std::vector<DType> kv = {DType::kF32, DType::kF16, DType::kBF16, DType::kQ8_0,
                                 DType::kCustom};
  const std::vector<DType> plain = {DType::kF32, DType::kF16, DType::kBF16};
  int turn = 0;
  for (DType k : kv) {
    for (DType v : kv) {
      for (DType q : plain) {
        OperatorConfig config;
        config.shape = {.q_heads = 3, .kv_heads = 1, .qk_dim = 96, .v_dim = 64};
        config.k_type = k;
        config.v_type = v;
        config.q_type = q;
        config.out_type = plain[turn++ % 3];
        check_config(config, 300 + turn);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(Features, EachOneAlone) {
  OperatorConfig base;
  base.shape = {.q_heads = 6, .kv_heads = 2, .qk_dim = 64, .v_dim = 64};
  for (DType type : {DType::kF16, DType::kBF16, DType::kQ8_0}) {
    base.k_type = base.v_type = type;
    std::vector<OperatorConfig> configs(6, base);
    configs[0].slopes = true;
    configs[1].sinks = true;
    configs[2].softcap = 2.0f;
    configs[3].softcap = 30.0f;
    configs[3].sharpness = 8.0f;
    configs[4].slopes = configs[4].sinks = true;
    configs[4].softcap = 10.0f;
    configs[5].lse = false;
    for (const OperatorConfig& config : configs) {
      check_config(config, 400);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST(Features, SlidingWindows) {
  for (int64_t window : {1, 2, 17, 64, 200, 1000}) {
    ForestCase c = mixed_batch(500);
    c.window = window;
    for (DType type : {DType::kF16, DType::kBF16, DType::kQ8_0}) {
      OperatorConfig config;
      config.shape = {.q_heads = 4, .kv_heads = 2, .qk_dim = 64, .v_dim = 96};
      config.k_type = config.v_type = type;
      // Slots that have left all windows are NaN: nobody may look at them again.
      OperatorCase op(config, c.rows(), c.block_size, c.blocks, c.used_slots(), 500);
      SCOPED_TRACE("window " + std::to_string(window) + ", " + config.describe());
      const Oracle oracle(op, truth_of(c), arithmetics_for(config), 500);
      Forest forest;
      build_from_tree(c, Sharing::kOn, 500, forest);
      check_way(op, oracle, {"tree", &forest, {}, window}, 500);
      build_from_tables(c, Sharing::kOn, forest);
      check_way(op, oracle, {"block tables", &forest, {}, window}, 500);
      if (::testing::Test::HasFatalFailure()) return;
    }
  }
}

TEST(Features, BiasOfEachHeadItsOwn) {
  constexpr int32_t kRows = 7, kHeads = 6;
  constexpr int64_t kColumns = 150;
  for (DType bias_type : {DType::kF16, DType::kF32}) {
    for (DType type : {DType::kF16, DType::kBF16, DType::kCustom}) {
      for (bool slopes : {false, true}) {
        OperatorConfig config;
        config.shape = {.q_heads = kHeads, .kv_heads = 2, .qk_dim = 64, .v_dim = 64};
        config.k_type = config.v_type = type;
        config.slopes = slopes;
        OperatorCase op(config, kRows, kColumns, 1, std::vector<bool>(kColumns, true), 550);
        // A mask of rows x heads rows is a bias of [row][head][column]. Some of it hides.
        Random random(551);
        Mask mask = make_mask(bias_type, kRows * kHeads, 1, kColumns);
        for (int64_t row = 0; row < kRows * kHeads; ++row) {
          for (int64_t column = 0; column < kColumns; ++column) {
            if (!random.chance(0.3)) mask.set(row, column, random.normal());
          }
        }
        op.bias = {.type = bias_type,
                   .data = mask.bytes.data(),
                   .row_stride = mask.row_stride * kHeads,
                   .head_stride = mask.row_stride};
        Forest forest;
        forest.rows = kRows;
        forest.spans = {{.slot = 0, .column = 0, .count = kColumns}};
        for (uint32_t row = 0; row < kRows; ++row) forest.row_index.push_back(row);
        forest.segments = {{.span_begin = 0,
                            .span_end = 1,
                            .row_begin = 0,
                            .row_end = kRows,
                            .slots = kColumns,
                            .visibility = Visibility::kBias}};
        const Truth everything = [](int64_t) {
          RowTruth truth;
          for (int64_t c = 0; c < kColumns; ++c) truth.slots.push_back({.slot = c, .column = c});
          return truth;
        };
        const Oracle oracle(op, everything, arithmetics_for(config), 550);
        check_way(op, oracle, {"by hand", &forest, op.bias, 0}, 550);
        if (::testing::Test::HasFatalFailure()) return;
      }
    }
  }
}

// --- Can it fail? --------------------------------------------------------------------------------

/// One vector of K or V takes its neighbour's place; true if every kernel set's result gives it
/// away.
void expect_seen(DType type, bool keys, int64_t prefix) {
  SCOPED_TRACE(std::string(to_string(type)) + (keys ? " keys" : " values"));
  OperatorConfig config;
  config.shape = {.q_heads = 4, .kv_heads = 2, .qk_dim = 64, .v_dim = 64};
  config.k_type = config.v_type = type;
  const ForestCase c = shared_prefix_case(prefix, {20, 90, 1, 40});
  OperatorCase op(config, c.rows(), c.block_size, c.blocks, c.used_slots(), 600);
  const Oracle oracle(op, truth_of(c), arithmetics_for(config), 600);
  Forest forest;
  build_from_tree(c, Sharing::kOn, 600, forest);
  const auto verdict = [&](const std::string& isa) {
    op.out.reset();
    attend_forest(forest, op.options(2), op.inputs());
    return oracle.compare(op, op.out, arithmetic_of(isa, config.shape, type, type));
  };
  for_each_isa([&](const std::string& isa) { EXPECT_EQ(verdict(isa), ""); });
  KvTensor& tensor = keys ? op.kv.k : op.kv.v;
  const auto neighbour = tensor.decoded(prefix / 2 + 1, 0);
  tensor.set(prefix / 2, 0, std::vector<float>(neighbour.begin(), neighbour.end()));
  for_each_isa([&](const std::string& isa) { EXPECT_NE(verdict(isa), ""); });
}

TEST(Mutation, OneWrongVectorIsSeenWithEveryKernelSet) {
  for (DType type : {DType::kF32, DType::kF16, DType::kBF16, DType::kQ8_0}) {
    expect_seen(type, false, 700);
    // A wrong key moves one weight of about 1 / n by its own size: with Q rounded to bf16 that
    // drowns in the rounding of 700 logits, not of 100.
    expect_seen(type, true, 100);
  }
}

}  // namespace
}  // namespace relay::test
