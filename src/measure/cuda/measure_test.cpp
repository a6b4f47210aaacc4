// The measuring itself, on a small problem: whether the parts fit together, not how fast anything
// is.
#include <gtest/gtest.h>

#include "measure/cuda/explain.h"
#include "measure/cuda/gpu.h"
#include "measure/cuda/operator.h"

namespace relay::measure {
namespace {

class GpuMeasure : public testing::Test {
 protected:
  void SetUp() override {
    try {
      require_gpu();
    } catch (const Error& error) {
      GTEST_SKIP() << "needs an NVIDIA GPU: " << error.what();
    }
  }
};

OpProblem problem(DType kv_type) {
  return {.shape = {.q_heads = 8, .kv_heads = 2, .qk_dim = 128, .v_dim = 128},
          .kv_type = kv_type,
          .prefix = 4102,  // long enough for sharing to pay
          .context = 50,
          .batch = 8};
}

TEST_F(GpuMeasure, FindsWhichKernelsServe) {
  for (const Gpu& gpu : find_gpus()) {
    EXPECT_FALSE(gpu.name.empty());
    for (const GpuPath& path : gpu.paths) EXPECT_EQ(path.obstacle, "") << to_text(gpu, 0);
  }
}

TEST_F(GpuMeasure, RunsWithSharingAndWithout) {
  const OpProblem problems[] = {problem(DType::kF16), problem(DType::kBF16),
                                problem(DType::kF8E4M3)};
  std::vector<std::string> said;
  const GpuOpReport report =
      run_op_on_gpu(problems, 3, [&](const std::string& what) { said.push_back(what); });
  EXPECT_EQ(said.size(), 4u);
  EXPECT_GT(report.limits.read_bytes, 10e9);
  ASSERT_EQ(report.results.size(), 3u);
  for (const GpuOpResult& result : report.results) {
    EXPECT_GT(result.on.time.best, 0);
    EXPECT_GT(result.off.time.best, 0);
    EXPECT_GT(result.on.plan_time.best, 0);
    // Everything but rounding is the same: outputs are bf16 or f16.
    EXPECT_LT(result.difference, 0.05) << to_string(result.problem);
    // 256 whole blocks are shared, and 56 tokens are each request's own.
    EXPECT_EQ(result.on.plan.kv_slots_read, 4096 + 8 * 56);
    EXPECT_EQ(result.off.plan.kv_slots_read, 8 * 4152);
    EXPECT_DOUBLE_EQ(result.ideal_bytes, result.on.bytes_read);
    EXPECT_EQ(result.off.plan.shared_segments, 0);
  }
}

TEST_F(GpuMeasure, ExplainsThePlan) {
  const ExplainProblem p{.name = "", .op = problem(DType::kBF16), .layers = 3};
  const GpuExplanation e = explain_on_gpu(p, 2);
  EXPECT_EQ(e.on.plan.shared_segments, 1);
  EXPECT_EQ(e.on.plan.kv_slots_attended, 8 * 4152);
  EXPECT_DOUBLE_EQ(e.off.bytes_read, 3.0 * 8 * 4152 * 2 * 256 * 2);
  EXPECT_GT(*e.on.measured, 0);
  EXPECT_FALSE(explain_on_gpu(p, 0).measured_speedup());
}

TEST_F(GpuMeasure, RefusesBeforeItMeasures) {
  OpProblem wrong = problem(DType::kBF16);
  wrong.shape.qk_dim = wrong.shape.v_dim = 32;
  const OpProblem problems[] = {problem(DType::kBF16), wrong};
  int said = 0;
  EXPECT_THROW(run_op_on_gpu(problems, 1, [&](const std::string&) { ++said; }), Error);
  EXPECT_EQ(said, 0);
}

}  // namespace
}  // namespace relay::measure
