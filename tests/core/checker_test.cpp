// Can the tests fail? Small faults are planted into correct results; the checker must see each one.
// This is the check on tolerances: a bound too loose to notice a lost slot is worth nothing.
#include "core/checker.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "core/numeric.h"
#include "core/test_env.h"

namespace relay::test {
namespace {

class Checker : public ::testing::TestWithParam<DType> {
 protected:
  Checker()
      : case_(shared_prefix_case(900, {20, 90, 1, 40})),
        config_(config()),
        op_(config_, case_.rows(), case_.block_size, case_.blocks, case_.used_slots(), 7),
        oracle_(op_, truth_of(case_), {kExact, kRounded}, 7) {}

  static OperatorConfig config() {
    OperatorConfig config;
    config.shape = {.q_heads = 4, .kv_heads = 2, .qk_dim = 64, .v_dim = 64};
    config.k_type = config.v_type = GetParam();
    return config;
  }

  /// Dense attention in f32 with the faults of a test's choosing.
  struct Fault {
    int64_t skipped_slot = -1;     ///< for row 0
    int64_t swapped_v = -1;        ///< row 0 reads this slot's V from its neighbour
    double logit_error = 0;        ///< factor 1 + error on all logits
    bool wrong_kv_head = false;    ///< row 0, head 0 reads the other KV head
    bool no_max_rescale = false;   ///< row 0 forgets to rescale half of its sum
    bool round_to_bf16 = false;    ///< Q and P rounded, as the bf16 kernels do
    bool round_to_8_bits = false;  ///< P rounded to 7 bits: too coarse for any kernel
  };

  void compute(const Fault& fault) {
    const HeadShape& shape = config_.shape;
    for (int64_t row = 0; row < case_.rows(); ++row) {
      const bool faulty = row == 0;
      for (int32_t head = 0; head < shape.q_heads; ++head) {
        int64_t kv_head = head / shape.group();
        if (faulty && fault.wrong_kv_head && head == 0) kv_head = 1 - kv_head;
        const AttentionInputs inputs = op_.oracle_inputs();
        const auto* q = static_cast<const float*>(inputs.q.at(row, head));
        std::vector<float> out(shape.v_dim);
        float max = -std::numeric_limits<float>::infinity();
        float sum = 0;
        for (const AttendedSlot& a : case_.attended(row)) {
          if (faulty && a.slot == fault.skipped_slot) continue;
          const auto k = op_.kv.k.decoded(a.slot, kv_head);
          float dot = 0;
          for (int32_t i = 0; i < shape.qk_dim; ++i) {
            dot += (fault.round_to_bf16 ? rounded(q[i]) : q[i]) * k[i];
          }
          const float logit =
              op_.scale * dot * static_cast<float>(1 + (faulty ? fault.logit_error : 0));
          if (logit > max) {
            const float shrink = std::exp(max - logit);
            sum *= shrink;
            const bool forget = faulty && fault.no_max_rescale && a.slot > 3;
            for (size_t j = 0; j < (forget ? out.size() / 2 : out.size()); ++j) out[j] *= shrink;
            max = logit;
          }
          float p = std::exp(logit - max);
          sum += p;
          if (fault.round_to_bf16) p = rounded(p);
          if (faulty && fault.round_to_8_bits) p = std::nearbyint(p * 128) / 128;
          const int64_t v_slot = faulty && a.slot == fault.swapped_v ? fault.swapped_v + 1 : a.slot;
          const auto v = op_.kv.v.decoded(v_slot, kv_head);
          for (int32_t j = 0; j < shape.v_dim; ++j) out[j] += p * v[j];
        }
        for (float& value : out) value /= sum;
        put(row, head, out, max + std::log(sum));
      }
    }
  }

  static float rounded(float value) {
    const uint16_t bits = to_bf16(value);
    return static_cast<float>(decode_element(DType::kBF16, &bits, 0));
  }

  void put(int64_t row, int64_t head, const std::vector<float>& out, float lse) {
    const MutableRows view = op_.out.view();
    std::memcpy(view.at(row, head), out.data(), out.size() * sizeof(float));
    op_.out.lse()[row * config_.shape.q_heads + head] = lse;
  }

  std::string verdict(const Arithmetic& arithmetic = kExact) {
    return oracle_.compare(op_, op_.out, arithmetic);
  }

  static constexpr Arithmetic kExact = {};
  static constexpr Arithmetic kRounded = {.query_rounding = 0x1p-8, .weight_rounding = 0x1p-8};

  ForestCase case_;
  OperatorConfig config_;
  OperatorCase op_;
  Oracle oracle_;
};

TEST_P(Checker, AcceptsF32Arithmetic) {
  compute({});
  EXPECT_EQ(verdict(), "");
  EXPECT_EQ(verdict(kRounded), "");
  EXPECT_EQ(op_.out.broken_guards(), "");
}

TEST_P(Checker, BF16RoundingIsAcceptedOnlyWhereAllowed) {
  compute({.round_to_bf16 = true});
  EXPECT_EQ(verdict(kRounded), "");
  EXPECT_NE(verdict(kExact), "");
  // The model is of the right size: neither too small nor ten times too large.
  EXPECT_EQ(verdict(kRounded), "");
  EXPECT_GT(oracle_.last_mean_ratio(), 0.1);
  EXPECT_LT(oracle_.last_mean_ratio(), 2.0);
}

TEST_P(Checker, SeesOneLostSlotOfAThousand) {
  compute({.skipped_slot = 500});
  EXPECT_NE(verdict(), "");
  EXPECT_NE(verdict(kRounded), "") << "bf16 rounding must not hide a lost slot";
}

TEST_P(Checker, SeesOneValueFromTheWrongSlot) {
  compute({.swapped_v = 321});
  EXPECT_NE(verdict(), "");
  EXPECT_NE(verdict(kRounded), "");
}

TEST_P(Checker, SeesASlightlyWrongScale) {
  compute({.logit_error = 1e-4});
  EXPECT_NE(verdict(), "");
  compute({.logit_error = 2e-2});
  EXPECT_NE(verdict(kRounded), "");
}

TEST_P(Checker, SeesTheWrongKvHead) {
  compute({.wrong_kv_head = true});
  EXPECT_NE(verdict(kRounded), "");
}

TEST_P(Checker, SeesAForgottenRescaling) {
  compute({.no_max_rescale = true});
  EXPECT_NE(verdict(kRounded), "");
}

TEST_P(Checker, SeesWeightsRoundedTooCoarsely) {
  compute({.round_to_8_bits = true});
  EXPECT_NE(verdict(kRounded), "");
}

TEST_P(Checker, SeesACorruptedV) {
  compute({});
  // The result was computed from the old value.
  std::vector<float> v(op_.kv.v.decoded(100, 0).begin(), op_.kv.v.decoded(100, 0).end());
  v[5] += 2.0f;
  op_.kv.v.set(100, 0, v);
  const Oracle oracle(op_, truth_of(case_), {kExact, kRounded}, 7);
  EXPECT_NE(oracle.compare(op_, op_.out, kExact), "");
}

TEST_P(Checker, SeesLseNanAndGarbage) {
  compute({});
  op_.out.lse()[3] += 0.01f;
  EXPECT_NE(verdict(), "");
  compute({});
  std::vector<float> row(config_.shape.v_dim, std::numeric_limits<float>::quiet_NaN());
  put(1, 1, row, 0);
  EXPECT_NE(verdict(), "");
  op_.out.reset();  // nothing written at all
  EXPECT_NE(verdict(), "");
}

INSTANTIATE_TEST_SUITE_P(Types, Checker,
                         ::testing::Values(DType::kF32, DType::kF16, DType::kBF16, DType::kQ8_0));

TEST(Guards, SeeOneByteAnywhere) {
  for (RowsLayout layout : {RowsLayout::kDense, RowsLayout::kHeadMajor, RowsLayout::kBlocked}) {
    OperatorConfig config;
    config.shape = {.q_heads = 2, .kv_heads = 1, .qk_dim = 3, .v_dim = 3};
    config.out_type = DType::kF16;
    config.out_layout = layout;
    OutputTensor output(config, 5);
    EXPECT_EQ(output.broken_guards(), "");
    auto* data = static_cast<unsigned char*>(output.view().data);
    data[-1] = 0;
    EXPECT_NE(output.broken_guards(), "");
    output.reset();
    data[3 * sizeof(uint16_t) - 1] = 0;  // the last byte of the first vector is no gap
    EXPECT_EQ(output.broken_guards(), "");
    const MutableRows view = output.view();
    std::vector<int64_t> ends_of_gaps;
    if (layout == RowsLayout::kHeadMajor) ends_of_gaps = {view.head_stride};
    if (layout == RowsLayout::kBlocked) {
      ends_of_gaps = {view.head_stride, view.row_stride, view.block_stride};
    }
    for (int64_t end : ends_of_gaps) {
      data[end - 1] = 0;
      EXPECT_NE(output.broken_guards(), "") << end;
      output.reset();
    }
    output.lse()[-1] = 0;
    EXPECT_NE(output.broken_guards(), "");
    output.reset();
    output.lse()[10] = 0;
    EXPECT_NE(output.broken_guards(), "");
  }
}

// The generator must produce what its name promises, or the property tests test nothing.
TEST(Generator, ReachesItsCorners) {
  int deep = 0, wide = 0, long_prefix = 0, windows = 0, tables = 0, prefill = 0, idle = 0;
  int several_roots = 0, empty_nodes = 0, shared_stops = 0;
  constexpr int kCases = 300;
  for (uint64_t seed = 1; seed <= kCases; ++seed) {
    const ForestCase c = generate_forest(seed, {});
    ASSERT_GE(c.rows(), 1);
    int roots = 0, depth = 0;
    for (const ForestCase::Node& node : c.nodes) {
      roots += node.parent < 0;
      empty_nodes += node.slots.empty();
      long_prefix += node.slots.size() > 4000;
      int d = 1;
      for (int32_t up = node.parent; up >= 0; up = c.nodes[up].parent) ++d;
      depth = std::max(depth, d);
    }
    bool has_prefill = false, has_idle = false;
    for (const ForestCase::Request& request : c.requests) {
      has_prefill |= request.rows > 1;
      has_idle |= request.node < 0;
    }
    deep += depth == 6;
    wide += c.rows() > 128;
    windows += c.window > 0;
    tables += c.tables_possible;
    prefill += has_prefill;
    idle += has_idle;
    several_roots += roots > 1;
    for (int64_t row = 0; row < c.rows(); ++row) {
      for (const AttendedSlot& a : c.attended(row)) ASSERT_LT(a.slot, c.slots());
    }
    shared_stops += c.requests.size() > c.nodes.size();
  }
  for (int count : {deep, wide, long_prefix, windows, tables, prefill, idle, several_roots,
                    empty_nodes, shared_stops}) {
    EXPECT_GT(count, kCases / 60);
  }
  EXPECT_EQ(generate_forest(9, {}).describe(), generate_forest(9, {}).describe());
}

}  // namespace
}  // namespace relay::test
