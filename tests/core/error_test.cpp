// Every documented refusal: input that no attention can be computed from throws relay::Error, and
// nothing else goes wrong first.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <string>

#include "core/forest_generator.h"
#include "core/operator_case.h"
#include "core/test_env.h"

namespace relay::test {
namespace {

TEST(RowBytes, OfEachType) {
  EXPECT_EQ(row_bytes(DType::kF32, 3), 12);
  EXPECT_EQ(row_bytes(DType::kF16, 3), 6);
  EXPECT_EQ(row_bytes(DType::kBF16, 3), 6);
  EXPECT_EQ(row_bytes(DType::kQ8_0, 96), 102);
  EXPECT_EQ(row_bytes(DType::kF16, 0), 0);
  EXPECT_THROW(row_bytes(DType::kQ8_0, 40), Error);
  EXPECT_THROW(row_bytes(DType::kCustom, 32), Error);
}

TEST(TypeNames, AreDistinct) {
  EXPECT_STREQ(to_string(DType::kF32), "f32");
  EXPECT_STREQ(to_string(DType::kF16), "f16");
  EXPECT_STREQ(to_string(DType::kBF16), "bf16");
  EXPECT_STREQ(to_string(DType::kQ8_0), "q8_0");
}

class PlanErrors : public ::testing::Test {
 protected:
  PlanErrors() {
    const ForestCase c = shared_prefix_case(4, {2, 3});
    build_from_tree(c, Sharing::kOn, 1, forest_);
    options_.shape = {.q_heads = 4, .kv_heads = 2, .qk_dim = 64, .v_dim = 64};
  }
  void expect_refused(const char* why) {
    EXPECT_THROW(make_plan(forest_, options_), Error) << why;
    // A refused remake leaves a plan that can be made again.
    PlanOptions good;
    good.shape = {.q_heads = 4, .kv_heads = 2, .qk_dim = 64, .v_dim = 64};
    ForestCase c = shared_prefix_case(4, {2, 3});
    Forest forest;
    build_from_tree(c, Sharing::kOn, 1, forest);
    const PlanPtr plan = make_plan(forest, good);
    EXPECT_THROW(remake_plan(*plan, forest_, options_), Error) << why;
    EXPECT_NO_THROW(remake_plan(*plan, forest, good));
  }

  Forest forest_;
  PlanOptions options_;
};

TEST_F(PlanErrors, NothingWrong) { EXPECT_NO_THROW(make_plan(forest_, options_)); }
TEST_F(PlanErrors, HeadsNotAMultiple) {
  options_.shape.q_heads = 5;
  expect_refused("5 query heads, 2 KV heads");
}
TEST_F(PlanErrors, NoHeads) {
  options_.shape.q_heads = 0;
  expect_refused("q_heads 0");
}
TEST_F(PlanErrors, NoKvHeads) {
  options_.shape.kv_heads = 0;
  expect_refused("kv_heads 0");
}
TEST_F(PlanErrors, NegativeHeads) {
  options_.shape.q_heads = options_.shape.kv_heads = -2;
  expect_refused("-2 heads");
}
TEST_F(PlanErrors, HeadSizeZero) {
  options_.shape.qk_dim = 0;
  expect_refused("qk_dim 0");
}
TEST_F(PlanErrors, HeadSizeTooLarge) {
  options_.shape.v_dim = 1025;
  expect_refused("v_dim 1025");
}
TEST_F(PlanErrors, PartialQ8Blocks) {
  options_.shape.qk_dim = 40;
  options_.k_type = DType::kQ8_0;
  expect_refused("q8_0 keys of 40");
  options_.shape.qk_dim = 64;
  options_.shape.v_dim = 72;
  options_.k_type = DType::kF16;
  options_.v_type = DType::kQ8_0;
  expect_refused("q8_0 values of 72");
}
TEST_F(PlanErrors, NoThreads) {
  options_.threads = 0;
  expect_refused("threads 0");
}
TEST_F(PlanErrors, BrokenForest) {
  forest_.segments[0].span_end = 1000;
  expect_refused("span range");
}
TEST_F(PlanErrors, ForestRowOutOfRange) {
  forest_.row_index[0] = 77;
  expect_refused("row 77");
}

class InputErrors : public ::testing::Test {
 protected:
  InputErrors()
      : case_(shared_prefix_case(4, {2, 3})),
        op_(config(), case_.rows(), case_.block_size, case_.blocks, case_.used_slots(), 3) {
    build_from_tree(case_, Sharing::kOn, 1, forest_);
    plan_ = make_plan(forest_, op_.options(1));
    inputs_ = op_.inputs();
  }
  static OperatorConfig config() {
    OperatorConfig config;
    config.shape = {.q_heads = 4, .kv_heads = 2, .qk_dim = 64, .v_dim = 64};
    config.k_type = config.v_type = DType::kF16;
    return config;
  }
  void expect_refused(const char* why) {
    EXPECT_THROW(validate(*plan_, inputs_), Error) << why;
    EXPECT_THROW(attend_forest(forest_, op_.options(1), inputs_), Error) << why;
    EXPECT_EQ(op_.out.bits(), OutputTensor(config(), case_.rows()).bits()) << "and wrote: " << why;
  }

  ForestCase case_;
  OperatorCase op_;
  Forest forest_;
  PlanPtr plan_;
  AttentionInputs inputs_;
};

TEST_F(InputErrors, NothingWrong) {
  EXPECT_NO_THROW(validate(*plan_, inputs_));
  EXPECT_NO_THROW(attend_forest(forest_, op_.options(2), inputs_));
}
TEST_F(InputErrors, NullQ) {
  inputs_.q.data = nullptr;
  expect_refused("q");
}
TEST_F(InputErrors, NullOut) {
  inputs_.out.data = nullptr;
  expect_refused("out");
}
TEST_F(InputErrors, NullK) {
  inputs_.kv.k.data = nullptr;
  expect_refused("k");
}
TEST_F(InputErrors, NullV) {
  inputs_.kv.v.data = nullptr;
  expect_refused("v");
}
TEST_F(InputErrors, OtherKType) {
  inputs_.kv.k.type = DType::kBF16;
  expect_refused("planned for f16");
}
TEST_F(InputErrors, OtherVType) {
  inputs_.kv.v.type = DType::kF32;
  expect_refused("planned for f16");
}
TEST_F(InputErrors, QuantizedQ) {
  inputs_.q.type = DType::kQ8_0;
  expect_refused("q in q8_0");
}
TEST_F(InputErrors, QuantizedOut) {
  inputs_.out.type = DType::kQ8_0;
  expect_refused("out in q8_0");
}
TEST_F(InputErrors, NegativeWindow) {
  inputs_.window = -1;
  expect_refused("window");
}
TEST_F(InputErrors, NegativeSoftcap) {
  inputs_.softcap = -1.0f;
  expect_refused("softcap");
}
TEST_F(InputErrors, NanSoftcap) {
  inputs_.softcap = std::numeric_limits<float>::quiet_NaN();
  expect_refused("softcap");
}
TEST_F(InputErrors, NanScale) {
  inputs_.scale = std::numeric_limits<float>::quiet_NaN();
  expect_refused("scale");
}
TEST_F(InputErrors, ZeroBlockSize) {
  inputs_.kv.block_size = 0;
  expect_refused("kv block_size");
}
TEST_F(InputErrors, ZeroRowsPerBlock) {
  inputs_.q.rows_per_block = 0;
  expect_refused("q rows_per_block");
}
TEST_F(InputErrors, ZeroOutRowsPerBlock) {
  inputs_.out.rows_per_block = 0;
  expect_refused("out rows_per_block");
}
TEST_F(InputErrors, SlopesWithoutPositions) {
  const float slopes[4] = {1, 1, 1, 1};
  inputs_.slopes = slopes;
  expect_refused("slopes measure from positions, the forest has none");
}
TEST_F(InputErrors, BiasOfAnotherType) {
  inputs_.bias = {.type = DType::kBF16, .data = inputs_.q.data};
  expect_refused("bias is f16 or f32");
}

TEST_F(InputErrors, BiasMissingWhereTheForestNeedsIt) {
  const Mask mask = mask_of(case_, DType::kF16, MaskValues::kRandom, 1);
  build_from_mask(mask.batch(), Sharing::kOn, forest_);
  plan_ = make_plan(forest_, op_.options(1));
  expect_refused("no bias");
}

TEST(InputErrorsOfCustom, UnpackMissing) {
  OperatorConfig config;
  config.shape = {.q_heads = 1, .kv_heads = 1, .qk_dim = 32, .v_dim = 32};
  config.k_type = config.v_type = DType::kCustom;
  const ForestCase c = shared_prefix_case(2, {1});
  OperatorCase op(config, c.rows(), c.block_size, c.blocks, c.used_slots(), 3);
  Forest forest;
  build_from_tree(c, Sharing::kOn, 1, forest);
  for (bool keys : {true, false}) {
    AttentionInputs inputs = op.inputs();
    (keys ? inputs.kv.k : inputs.kv.v).unpack = nullptr;
    EXPECT_THROW(attend_forest(forest, op.options(1), inputs), Error);
  }
}

TEST_F(InputErrors, WorkspaceOfAnotherPlan) {
  Workspace workspace(*plan_);
  const PlanPtr other = make_plan(forest_, op_.options(1));
  EXPECT_THROW(attend(*other, inputs_, workspace, 0), Error);
  workspace.fit(*other);
  EXPECT_NO_THROW(attend(*other, inputs_, workspace, 0));
}

TEST_F(InputErrors, WorkspaceOfAnOlderPlanning) {
  Workspace workspace(*plan_);
  // The same place and the same forest, but a new plan: counters and partials are set up anew.
  remake_plan(*plan_, forest_, op_.options(1));
  EXPECT_THROW(attend(*plan_, inputs_, workspace, 0), Error);
  EXPECT_EQ(op_.out.bits(), OutputTensor(config(), case_.rows()).bits()) << "and wrote";
  workspace.fit(*plan_);
  EXPECT_NO_THROW(attend(*plan_, inputs_, workspace, 0));
}

TEST_F(InputErrors, WorkspaceOfNoPlan) {
  Workspace workspace;
  EXPECT_THROW(attend(*plan_, inputs_, workspace, 0), Error);
}

TEST_F(InputErrors, WorkspaceOutlivesARefusedPlanning) {
  Workspace workspace(*plan_);
  PlanOptions bad = op_.options(1);
  bad.threads = 0;
  EXPECT_THROW(remake_plan(*plan_, forest_, bad), Error);
  EXPECT_NO_THROW(attend(*plan_, inputs_, workspace, 0)) << "nothing was planned again";
}

TEST_F(InputErrors, WorkspaceOfAPlanThatLayInTheSamePlace) {
  Workspace workspace(*plan_);
  for (int i = 0; i < 8; ++i) {  // an allocator likes to give the same memory again
    plan_.reset();
    plan_ = make_plan(forest_, op_.options(1));
    EXPECT_THROW(attend(*plan_, inputs_, workspace, 0), Error);
  }
}

TEST_F(InputErrors, ThreadOutOfRange) {
  Workspace workspace(*plan_);
  EXPECT_THROW(attend(*plan_, inputs_, workspace, 1), Error);
  EXPECT_THROW(attend(*plan_, inputs_, workspace, -1), Error);
}

TEST_F(InputErrors, ForestThatIsBroken) {
  forest_.segments.push_back(forest_.segments[0]);  // attended twice
  EXPECT_THROW(attend_forest(forest_, op_.options(1), inputs_), Error);
}

TEST(Isas, UnknownNamesAreRefused) {
  const std::string before = current_isa();
  EXPECT_THROW(select_isa("sse9"), Error);
  EXPECT_THROW(select_isa(""), Error);
  EXPECT_EQ(current_isa(), before);
}

TEST(Isas, PlainIsAlwaysThereAndLast) {
  const std::string before = current_isa();
  const auto names = available_isas();
  ASSERT_FALSE(names.empty());
  EXPECT_EQ(names.back(), "plain");
  for (const std::string& name : names) {
    EXPECT_NO_THROW(select_isa(name));
    EXPECT_EQ(current_isa(), name);
  }
  select_isa(before);
}

TEST(Isas, AreThoseThatThisCpuIsKnownToHave) {
  const char* known = std::getenv("RELAY_TEST_ISAS");
  if (known == nullptr) GTEST_SKIP() << "RELAY_TEST_ISAS does not say what this CPU has";
  std::string found;
  for (const std::string& name : available_isas()) found += (found.empty() ? "" : " ") + name;
  EXPECT_EQ(found, known);
}

}  // namespace
}  // namespace relay::test
