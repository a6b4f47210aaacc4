// Inputs that random ones rarely are: huge logits, lengths at the edges of tiles, garbage next to
// everything, rows with one slot or none.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <numeric>
#include <string>
#include <vector>

#include "core/checker.h"
#include "core/forest_generator.h"
#include "core/operator_case.h"
#include "core/test_env.h"

namespace relay::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
const std::vector<DType> kTypes = {DType::kF32, DType::kF16, DType::kBF16, DType::kQ8_0,
                                   DType::kCustom};

OperatorConfig config_of(DType type) {
  OperatorConfig config;
  config.shape = {.q_heads = 4, .kv_heads = 2, .qk_dim = 64, .v_dim = 64};
  config.k_type = config.v_type = type;
  config.placement = Placement::kPadded;
  config.out_layout = RowsLayout::kBlocked;
  return config;
}

OperatorCase make_case(const OperatorConfig& config, const ForestCase& c) {
  return OperatorCase(config, c.rows(), c.block_size, c.blocks, c.used_slots(), c.seed);
}

/// Runs the case shared and alone on each kernel set, against the oracle. Statistics are for
/// random data only: crafted keys have roundings that agree with each other.
void check(OperatorCase& op, const ForestCase& c, const Truth& truth, bool statistics,
           const Mask* mask = nullptr, int32_t threads = 3) {
  const Oracle oracle(op, truth, arithmetics_for(op.config), c.seed);
  for (Sharing sharing : {Sharing::kOn, Sharing::kOff}) {
    Forest forest;
    if (mask) {
      build_from_mask(mask->batch(), sharing, forest);
    } else {
      build_from_tree(c, sharing, c.seed, forest);
    }
    for_each_isa([&](const std::string& isa) {
      SCOPED_TRACE(op.config.describe() + (sharing == Sharing::kOn ? ", shared" : ", alone"));
      op.out.reset();
      AttentionInputs inputs = op.inputs();
      inputs.window = mask ? 0 : c.window;
      if (mask) inputs.bias = mask->bias();
      const PlanPtr plan = make_plan(forest, op.options(threads));
      Workspace workspace(*plan);
      run_plan(*plan, inputs, workspace, threads, Threading::kInTurn, c.seed);
      ASSERT_EQ(
          oracle.compare(op, op.out,
                         arithmetic_of(isa, op.config.shape, op.config.k_type, op.config.v_type),
                         statistics),
          "");
      ASSERT_EQ(op.out.broken_guards(), "");
    });
    if (::testing::Test::HasFatalFailure()) return;
  }
}

/// Where a mask stands for the forest, only the seed is needed.
ForestCase seeded(uint64_t seed) {
  ForestCase c;
  c.seed = seed;
  return c;
}

void check(OperatorCase& op, const ForestCase& c, bool statistics) {
  check(op, c, truth_of(c), statistics);
}

// --- Lengths -------------------------------------------------------------------------------------

const std::vector<int64_t> kEdges = {0,  1,  2,  7,  8,  15, 16,  17,  31,  32,
                                     33, 47, 63, 64, 65, 95, 127, 128, 129, 255};

/// Where it is slow, on an emulated processor or under TSan, the case of every third index.
bool is_taken(int64_t index) { return scale() >= 0.1 || index % 3 == 0; }

TEST(Lengths, PrefixAndContextAroundTileSizes) {
  int64_t index = 0;
  for (DType type : {DType::kF16, DType::kBF16, DType::kQ8_0}) {
    for (int64_t prefix : kEdges) {
      if (!is_taken(index++)) continue;
      std::vector<int64_t> contexts;
      for (int64_t context : kEdges) {
        if (prefix + context > 0) contexts.push_back(context);
      }
      ForestCase c = shared_prefix_case(prefix, contexts);
      c.seed = static_cast<uint64_t>(prefix) + 1;
      OperatorCase op = make_case(config_of(type), c);
      SCOPED_TRACE("prefix " + std::to_string(prefix));
      check(op, c, true);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Lengths, RowsAroundBlockSizes) {
  // Rows times group walk over the register blocks and the limit between few and many.
  int64_t index = 0;
  for (DType type : {DType::kF32, DType::kBF16}) {
    for (int32_t rows = 1; rows <= 40; rows += rows < 18 ? 1 : 5) {
      if (!is_taken(index++)) continue;
      ForestCase c = shared_prefix_case(100, std::vector<int64_t>(rows, 3));
      c.seed = static_cast<uint64_t>(rows);
      OperatorConfig config = config_of(type);
      config.shape.q_heads = config.shape.kv_heads = 1;
      OperatorCase op = make_case(config, c);
      SCOPED_TRACE(std::to_string(rows) + " rows");
      check(op, c, true);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Lengths, OneRowOfManySlots) {
  ForestCase c = shared_prefix_case(8191, {1});
  for (DType type : kTypes) {
    OperatorCase op = make_case(config_of(type), c);
    check(op, c, true);
    if (HasFatalFailure()) return;
  }
}

TEST(Lengths, ManyRowsOfOneSlot) {
  // All share the same one, or each has its own.
  ForestCase shared = shared_prefix_case(1, std::vector<int64_t>(256, 0));
  ForestCase own = shared_prefix_case(0, std::vector<int64_t>(256, 1));
  for (DType type : kTypes) {
    for (const ForestCase& c : {shared, own}) {
      OperatorCase op = make_case(config_of(type), c);
      check(op, c, true);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Lengths, ManyRowsOfAPrefill) {
  // One request reads in 256 tokens behind 300 others.
  ForestCase c = shared_prefix_case(300, {256});
  c.causal = true;
  c.requests[0].rows = 256;
  c.index_rows();
  for (DType type : {DType::kF16, DType::kBF16}) {
    OperatorCase op = make_case(config_of(type), c);
    check(op, c, true);
    if (HasFatalFailure()) return;
  }
}

TEST(Lengths, SixLevelsOfSingleSlots) {
  ForestCase c;
  c.seed = 11;
  c.block_size = 1;
  c.causal = false;
  for (int64_t level = 0; level < 6; ++level) {
    c.nodes.push_back({.parent = static_cast<int32_t>(level) - 1, .slots = {5 - level}});
    c.requests.push_back({.node = static_cast<int32_t>(level), .kv_length = level + 1, .rows = 1});
  }
  c.blocks = 6;
  c.index_rows();
  for (DType type : kTypes) {
    OperatorCase op = make_case(config_of(type), c);
    check(op, c, true);
    if (HasFatalFailure()) return;
  }
}

// --- Nothing to attend ---------------------------------------------------------------------------

void expect_nothing(OperatorCase& op, const Forest& forest, const Mask* mask) {
  for_each_isa([&](const std::string&) {
    op.out.reset();
    AttentionInputs inputs = op.inputs();
    if (mask) inputs.bias = mask->bias();
    attend_forest(forest, op.options(2), inputs);
    for (int64_t row = 0; row < op.rows; ++row) {
      for (int32_t head = 0; head < op.config.shape.q_heads; ++head) {
        for (int32_t j = 0; j < op.config.shape.v_dim; ++j) {
          ASSERT_EQ(op.out.out(row, head, j), 0.0);
        }
        const double expected = op.config.sinks ? op.sinks[head] : -kInf;
        // One product with log2(e), one with its inverse.
        ASSERT_TRUE(op.out.lse(row, head) == expected ||
                    std::fabs(op.out.lse(row, head) - expected) <= 0x1p-21 * std::fabs(expected))
            << op.out.lse(row, head) << " instead of " << expected;
      }
    }
    ASSERT_EQ(op.out.broken_guards(), "");
  });
}

TEST(Nothing, NoSegmentAtAll) {
  for (bool sinks : {false, true}) {
    OperatorConfig config = config_of(DType::kF16);
    config.sinks = sinks;
    OperatorCase op(config, 7, 1, 1, {false}, 1);
    Forest forest;
    forest.rows = 7;
    expect_nothing(op, forest, nullptr);
  }
}

TEST(Nothing, NoRowsAtAll) {
  OperatorCase op(config_of(DType::kF16), 1, 1, 1, {true}, 1);
  for_each_isa([&](const std::string&) {
    op.out.reset();
    attend_forest(Forest{}, op.options(2), op.inputs());
    const OutputTensor untouched(op.config, 1);
    EXPECT_EQ(op.out.bits(), untouched.bits());
  });
}

TEST(Nothing, AllRowsMasked) {
  for (DType mask_type : {DType::kF16, DType::kF32}) {
    for (bool sinks : {false, true}) {
      OperatorConfig config = config_of(DType::kBF16);
      config.sinks = sinks;
      const Mask mask = make_mask(mask_type, 5, 1, 200);
      OperatorCase op(config, 5, 200, 1, std::vector<bool>(200, false), 1);
      Forest forest;
      build_from_mask(mask.batch(), Sharing::kOn, forest);
      expect_nothing(op, forest, &mask);
    }
  }
}

TEST(Nothing, BiasThatHidesEverythingInASegment) {
  // The forest lists the slots; the bias takes them all away again.
  const Mask mask = make_mask(DType::kF32, 5, 1, 200);
  for (DType type : kTypes) {
    for (bool sinks : {false, true}) {
      OperatorConfig config = config_of(type);
      config.sinks = sinks;
      OperatorCase op(config, 5, 200, 1, std::vector<bool>(200, true), 1);
      Forest forest;
      forest.rows = 5;
      forest.spans = {{.slot = 0, .column = 0, .count = 200}};
      forest.row_index = {0, 1, 2, 3, 4};
      forest.segments = {{.span_begin = 0,
                          .span_end = 1,
                          .row_begin = 0,
                          .row_end = 5,
                          .slots = 200,
                          .visibility = Visibility::kBias}};
      expect_nothing(op, forest, &mask);
    }
  }
}

TEST(Nothing, SomeRowsAmongOthers) {
  for (DType type : kTypes) {
    ForestCase c = shared_prefix_case(90, {5, 70, 20});
    c.requests.insert(c.requests.begin() + 1, {.node = -1, .kv_length = 0, .rows = 2});
    c.requests.push_back({.node = -1, .kv_length = 0, .rows = 1});
    c.index_rows();
    OperatorCase op = make_case(config_of(type), c);
    check(op, c, true);
    if (HasFatalFailure()) return;
  }
}

// --- Logits --------------------------------------------------------------------------------------

TEST(Logits, HugeOnes) {
  // +-1e4: every exponential but the largest ones underflows, and nothing may overflow.
  for (DType type : kTypes) {
    for (float sharpness : {100.0f, 3000.0f}) {
      OperatorConfig config = config_of(type);
      config.sharpness = sharpness;
      const ForestCase c = shared_prefix_case(300, {40, 3, 129});
      OperatorCase op = make_case(config, c);
      check(op, c, false);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Logits, OneHugeAmongTheSmall) {
  for (DType type : kTypes) {
    for (int64_t where : {0, 63, 64, 150, 299, 305}) {
      for (float size : {50.0f, -50.0f}) {
        const OperatorConfig config = config_of(type);
        const ForestCase c = shared_prefix_case(300, {40, 6});
        OperatorCase op = make_case(config, c);
        // Keys along q of row 0, so that this slot's logit is size * |q|^2 / sqrt(d).
        std::vector<float> key(64);
        const auto* q = static_cast<const float*>(op.q.oracle_view().data);
        for (int i = 0; i < 64; ++i) key[i] = size * q[i];
        op.kv.k.set(where, 0, key);
        SCOPED_TRACE("slot " + std::to_string(where) + ", " + std::to_string(size));
        check(op, c, false);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(Logits, OneVisibleAmongTheHidden) {
  for (DType type : kTypes) {
    for (int64_t where : {0, 1, 63, 64, 100, 199}) {
      Mask mask = make_mask(DType::kF16, 3, 1, 200);
      for (int64_t row = 0; row < 3; ++row) mask.set(row, where, row == 1 ? 0.0f : -60000.0f);
      std::vector<bool> used(200);
      used[where] = true;
      OperatorCase op(config_of(type), 3, 200, 1, used, 9);
      op.bias = mask.bias();
      SCOPED_TRACE("slot " + std::to_string(where));
      check(op, seeded(9), truth_of(mask), false, &mask);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Logits, MaskOfHugeFiniteBiases) {
  // Hosts write -65504 or -1e30 where they mean "hidden": finite, so it is a bias and no more.
  Mask mask = make_mask(DType::kF32, 4, 1, 130);
  for (int64_t row = 0; row < 4; ++row) {
    for (int64_t column = 0; column < 130; ++column) {
      mask.set(row, column, row == 3 || column % 3 == row ? -1e30f : 0.0f);
    }
  }
  for (DType type : kTypes) {
    OperatorCase op(config_of(type), 4, 130, 1, std::vector<bool>(130, true), 9);
    op.bias = mask.bias();
    check(op, seeded(9), truth_of(mask), false, &mask);
    if (HasFatalFailure()) return;
  }
}

TEST(Logits, AllEqual) {
  // q = 0: the output is the mean of V, whatever the keys.
  for (DType type : kTypes) {
    const ForestCase c = shared_prefix_case(200, {1, 100});
    OperatorCase op = make_case(config_of(type), c);
    const std::vector<float> zero(64, 0.0f);
    for (int64_t row = 0; row < 2; ++row) {
      for (int64_t head = 0; head < 4; ++head) op.q.set(row, head, zero);
    }
    check(op, c, false);
    if (HasFatalFailure()) return;
  }
}

TEST(Logits, ScaleZeroAndNegative) {
  for (DType type : kTypes) {
    for (float factor : {0.0f, -1.0f}) {
      const ForestCase c = shared_prefix_case(100, {10, 20});
      OperatorCase op = make_case(config_of(type), c);
      op.scale *= factor;
      check(op, c, false);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Logits, RisingAndFalling) {
  // Rising keys rescale the state at every tile, falling ones never.
  for (DType type : kTypes) {
    for (bool rising : {true, false}) {
      const ForestCase c = shared_prefix_case(500, {130, 1});
      OperatorCase op = make_case(config_of(type), c);
      const auto* q = static_cast<const float*>(op.q.oracle_view().data);
      std::vector<float> key(64);
      for (int64_t slot = 0; slot < 500; ++slot) {
        const float size = 0.01f * static_cast<float>(rising ? slot : 500 - slot);
        for (int i = 0; i < 64; ++i) key[i] = size * q[i];
        op.kv.k.set(slot, 0, key);
      }
      check(op, c, false);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Logits, RisingSteeplyForManyRows) {
  // Each tile's maximum is above those before it: a little, by more than a weight may be large, by
  // more than f32 can tell. Other rows fall meanwhile, or stay.
  for (DType type : kTypes) {
    for (float step : {0.01f, 0.1f, 3.0f}) {
      const ForestCase c = shared_prefix_case(500, std::vector<int64_t>(20, 3));
      OperatorCase op = make_case(config_of(type), c);
      const auto* q = static_cast<const float*>(op.q.oracle_view().data);
      std::vector<float> key(64);
      for (int64_t slot = 0; slot < 500; ++slot) {
        for (int i = 0; i < 64; ++i) key[i] = step * static_cast<float>(slot) * q[i];
        for (int64_t head = 0; head < 2; ++head) op.kv.k.set(slot, head, key);
      }
      check(op, c, false);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Logits, OneSlotFarAboveAllBefore) {
  // For one row only, by powers of two whose exponents overflow to 2^0 and the like.
  for (DType type : kTypes) {
    for (float above : {20.0f, 126.0f, 128.0f, 255.0f, 256.0f, 300.0f, 512.0f}) {
      const ForestCase c = shared_prefix_case(500, std::vector<int64_t>(20, 3));
      OperatorCase op = make_case(config_of(type), c);
      std::vector<float> vector(64, 0.0f);
      for (int64_t row = 0; row < 20; ++row) {
        for (int64_t head = 0; head < 4; ++head) op.q.set(row, head, vector);
      }
      for (int64_t slot = 0; slot < 500; ++slot) op.kv.k.set(slot, 0, vector);
      vector[5] = 1.0f;
      op.q.set(7, 1, vector);
      vector[5] = above * std::numbers::ln2_v<float> / op.scale;
      op.kv.k.set(200, 0, vector);
      check(op, c, false);
      if (HasFatalFailure()) return;
    }
  }
}

TEST(Logits, TwoSlotsShowHowExactTheExponentialIs) {
  // Over many slots its error drowns in that of the sums. Here the output is w / (1 + w) with the
  // one weight w = 2^x, through all fractions of x. Bound: 2.5e-7 of the exponential
  // (math-inl.h), 1.5e-7 of its rounded argument, four roundings of 6e-8.
  constexpr double kBound = 7e-7;
  constexpr int32_t kSteps = 161;
  for (int32_t rows : {1, kSteps}) {
    const ForestCase c = shared_prefix_case(2, std::vector<int64_t>(rows, 0));
    OperatorConfig config = config_of(DType::kF32);
    config.shape.q_heads = config.shape.kv_heads = 1;
    OperatorCase op = make_case(config, c);
    for (int64_t slot : {0, 1}) {
      std::vector<float> key(64, 0.0f);
      key[5] = static_cast<float>(slot);
      op.kv.k.set(slot, 0, key);
      op.kv.v.set(slot, 0, std::vector<float>(64, static_cast<float>(slot)));
    }
    Forest forest;
    build_from_tree(c, Sharing::kOn, c.seed, forest);
    const PlanPtr plan = make_plan(forest, op.options(1));
    Workspace workspace(*plan);
    for (int32_t first = 0; first < kSteps; first += rows) {
      std::vector<double> logits;
      for (int32_t row = 0; row < rows; ++row) {
        const double x = -2.5 + 5.0 * (first + row) / (kSteps - 1);
        std::vector<float> query(64, 0.0f);
        query[5] = static_cast<float>(x * std::numbers::ln2 / op.scale);
        op.q.set(row, 0, query);
        logits.push_back(double{query[5]} * op.scale);
      }
      for_each_isa([&](const std::string&) {
        op.out.reset();
        attend(*plan, op.inputs(), workspace, 0);
        for (int32_t row = 0; row < rows; ++row) {
          const double weight = std::exp(logits[row]);
          const double expected = weight / (1 + weight);
          ASSERT_NEAR(op.out.out(row, 0, 17) / expected, 1, kBound)
              << "x = " << logits[row] / std::numbers::ln2 << ", " << rows << " rows";
        }
      });
    }
  }
}

TEST(Logits, SinksThatTakeAllAndNothing) {
  for (DType type : {DType::kF16, DType::kBF16}) {
    OperatorConfig config = config_of(type);
    config.sinks = true;
    const ForestCase c = shared_prefix_case(70, {10, 20});
    OperatorCase op = make_case(config, c);
    op.sinks = {1e4f, -1e4f, 60.0f, -kInf};
    check(op, c, false);
    if (HasFatalFailure()) return;
  }
}

// --- Garbage -------------------------------------------------------------------------------------

TEST(Garbage, HiddenByMaskBetweenVisibleSlots) {
  // Every third slot is NaN and hidden from all rows.
  for (DType type : kTypes) {
    for (DType mask_type : {DType::kF16, DType::kF32}) {
      for (bool biased : {false, true}) {
        Mask mask = make_mask(mask_type, 6, 1, 190);
        std::vector<bool> used(190);
        for (int64_t column = 0; column < 190; ++column) {
          if (column % 3 == 1) continue;
          used[column] = true;
          for (int64_t row = 0; row < 6; ++row) {
            mask.set(row, column, biased ? 0.25f * static_cast<float>(row) : 0.0f);
          }
        }
        OperatorCase op(config_of(type), 6, 190, 1, used, 21);
        op.bias = mask.bias();
        check(op, seeded(21), truth_of(mask), true, &mask);
        if (HasFatalFailure()) return;
      }
    }
  }
}

TEST(Garbage, BetweenWindowsOfDistantRows) {
  // Two requests on one long trunk, far from each other: what lies between has left both windows.
  for (DType type : kTypes) {
    ForestCase c = shared_prefix_case(700, {0, 5, 0});
    c.seed = 22;
    c.causal = true;
    c.window = 20;
    c.requests[0] = {.node = 0, .kv_length = 100, .rows = 3};
    c.requests[2] = {.node = 0, .kv_length = 400, .rows = 1};
    c.index_rows();
    OperatorCase op = make_case(config_of(type), c);
    op.window = c.window;
    check(op, c, true);
    if (HasFatalFailure()) return;
  }
}

TEST(Garbage, NanInASlotSpoilsOnlyThoseWhoAttendIt) {
  for (DType type : {DType::kF32, DType::kF16, DType::kBF16, DType::kQ8_0}) {
    const ForestCase c = shared_prefix_case(150, {40, 50, 60});
    OperatorCase op = make_case(config_of(type), c);
    op.kv.v.poison(c.path(c.requests[1])[160], 0);  // context of request 1, KV head 0
    Forest forest;
    build_from_tree(c, Sharing::kOn, 1, forest);
    for_each_isa([&](const std::string&) {
      op.out.reset();
      attend_forest(forest, op.options(3), op.inputs());
      for (int64_t row = 0; row < 3; ++row) {
        for (int64_t head = 0; head < 4; ++head) {
          const bool spoilt = row == 1 && head < 2;
          for (int64_t j = 0; j < 64; ++j) {
            ASSERT_EQ(std::isnan(op.out.out(row, head, j)), spoilt) << row << " " << head;
          }
        }
      }
    });
  }
}

TEST(Garbage, NanBehindAMaskSpoilsOnlyItsRequest) {
  // A short prompt, then 6 columns of row 0's, of rows 1 and 2, and of row 2's: all would fit one
  // tile, and fill it cheaply.
  constexpr int64_t kPrompt = 20;
  const std::vector<std::vector<int64_t>> readers = {{0}, {1, 2}, {2}};
  const int64_t columns = kPrompt + 6 * static_cast<int64_t>(readers.size());
  Mask mask = make_mask(DType::kF16, 3, 1, columns);
  for (int64_t column = 0; column < columns; ++column) {
    const std::vector<int64_t> all = {0, 1, 2};
    for (int64_t row : column < kPrompt ? all : readers[(column - kPrompt) / 6]) {
      mask.set(row, column, 0.0f);
    }
  }
  Forest forest;
  build_from_mask(mask.batch(), Sharing::kOn, forest);
  for (DType type : {DType::kF32, DType::kF16, DType::kBF16, DType::kQ8_0}) {
    for (int64_t spoilt : {0, 2}) {
      OperatorCase op(config_of(type), 3, columns, 1, std::vector<bool>(columns, true), 23);
      op.kv.v.poison(kPrompt + 6 * spoilt + 2, 0);  // KV head 0
      for_each_isa([&](const std::string&) {
        op.out.reset();
        AttentionInputs inputs = op.inputs();
        inputs.bias = mask.bias();
        attend_forest(forest, op.options(3), inputs);
        for (int64_t head = 0; head < 4; ++head) {
          for (int64_t j = 0; j < 64; ++j) {
            ASSERT_EQ(std::isnan(op.out.out(spoilt, head, j)), head < 2) << head;
            ASSERT_FALSE(std::isnan(op.out.out(2 - spoilt, head, j))) << head;
          }
        }
      });
    }
  }
}

// --- Values --------------------------------------------------------------------------------------

TEST(Values, ExtremeOnesSurvive) {
  // The largest f16 times weights that sum to 1, and the smallest subnormals.
  for (DType out : {DType::kF32, DType::kF16}) {
    for (float value : {65504.0f, -65504.0f, 0x1p-24f, 6e-8f, 0.0f}) {
      const ForestCase c = shared_prefix_case(130, {1, 64});
      OperatorConfig config = config_of(DType::kF16);
      config.out_type = out;
      OperatorCase op = make_case(config, c);
      const std::vector<float> v(64, value);
      for (int64_t slot = 0; slot < c.slots() - 1; ++slot) {
        for (int64_t head = 0; head < 2; ++head) op.kv.v.set(slot, head, v);
      }
      // sum p v / sum p may round to just above the largest f16, never to its infinity.
      SCOPED_TRACE(value);
      check(op, c, false);
      if (HasFatalFailure()) return;
    }
  }
}

// --- The host's threads --------------------------------------------------------------------------

#if defined(__x86_64__)

struct alignas(64) AmxConfiguration {
  std::array<uint8_t, 64> bytes{};
};
void configure_amx(const AmxConfiguration& c) { asm volatile("ldtilecfg %0" : : "m"(c)); }
AmxConfiguration configured_amx() {
  AmxConfiguration c;
  asm volatile("sttilecfg %0" : "=m"(c));
  return c;
}

TEST(Host, FindsItsAmxConfigurationAgain) {
  const std::vector<std::string> isas = available_isas();
  if (std::find(isas.begin(), isas.end(), "amx") == isas.end()) GTEST_SKIP() << "no AMX";
  AmxConfiguration none;
  AmxConfiguration tiles;  // palette 1, tiles 0 and 5 of 8 rows of 32 bytes
  tiles.bytes[0] = 1;
  for (int tile : {0, 5}) {
    tiles.bytes[16 + 2 * tile] = 32;
    tiles.bytes[48 + tile] = 8;
  }
  // 16 and 4 rows of a head: blocks of both sizes.
  const ForestCase c = shared_prefix_case(200, std::vector<int64_t>(10, 3));
  Forest forest;
  build_from_tree(c, Sharing::kOn, 1, forest);
  for (DType type : {DType::kF16, DType::kBF16, DType::kQ8_0}) {
    OperatorCase op = make_case(config_of(type), c);
    for (const AmxConfiguration& host : {tiles, none}) {
      for_each_isa([&](const std::string&) {
        const PlanPtr plan = make_plan(forest, op.options(1));
        Workspace workspace(*plan);
        configure_amx(host);
        attend(*plan, op.inputs(), workspace, 0);
        const AmxConfiguration after = configured_amx();
        configure_amx(none);
        ASSERT_EQ(after.bytes, host.bytes) << to_string(type);
      });
    }
  }
}

#endif

}  // namespace
}  // namespace relay::test
