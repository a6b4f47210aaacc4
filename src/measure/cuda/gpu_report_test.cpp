// What is said of GPUs, from made-up numbers: needs none.
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "measure/cuda/block_layout.h"
#include "measure/cuda/explain.h"
#include "measure/cuda/gpu.h"
#include "measure/cuda/operator.h"

namespace relay::measure {
namespace {

OpProblem problem(int64_t prefix = 4096, int64_t context = 128, int32_t batch = 32) {
  return {.shape = {.q_heads = 32, .kv_heads = 8, .qk_dim = 128, .v_dim = 128},
          .kv_type = DType::kBF16,
          .prefix = prefix,
          .context = context,
          .batch = batch};
}

GpuLimits limits() {
  return {.gpu = "A GPU (9.0, 132 SMs)",
          .l2_bytes = int64_t{50} << 20,
          .flush_bytes = int64_t{256} << 20,
          .read_bytes = 3e12,
          .stream_bytes = int64_t{2} << 30};
}

cuda::PlanSummary plan(int64_t slots_read, int32_t shared) {
  cuda::PlanSummary plan;
  plan.segments = 33;
  plan.shared_segments = shared;
  plan.workers = 132;
  plan.kv_slots_read = slots_read;
  plan.kv_slots_attended = 135168;
  plan.partial_rows = 2048;
  plan.flops = 4.0 * 128 * 32 * 135168;
  return plan;
}

GpuOpReport report() {
  constexpr double kSlot = 8 * 256 * 2;
  GpuOpResult result{.problem = problem(),
                     .path = "wgmma",
                     .rounds = 10,
                     .ideal_bytes = 8192 * kSlot,
                     .on = {},
                     .off = {},
                     .difference = 1e-3};
  result.on = {.time = {.median = 20e-6, .low = 19e-6, .high = 21e-6, .best = 18e-6},
               .plan_time = {.median = 50e-6, .low = 49e-6, .high = 51e-6, .best = 48e-6},
               .plan = plan(8192, 1),
               .bytes_read = 8192 * kSlot};
  result.off = {.time = {.median = 200e-6, .low = 199e-6, .high = 201e-6, .best = 198e-6},
                .plan_time = {.median = 40e-6, .low = 39e-6, .high = 41e-6, .best = 38e-6},
                .plan = plan(135168, 0),
                .bytes_read = 135168 * kSlot};
  return {.limits = limits(), .results = {result}};
}

void expect_parts(const std::string& text, std::initializer_list<const char*> parts) {
  for (const char* part : parts) {
    EXPECT_NE(text.find(part), std::string::npos) << part << "\n" << text;
  }
}

TEST(GpuReport, Operator) {
  expect_parts(to_table(report()),
               {"A GPU (9.0, 132 SMs)", "read 3000.0 GB/s", "2048 MiB streamed",
                "32/8 heads of 128, bf16, prefix 4096, context 128, batch 32", "kernels wgmma",
                "20.0 us", "10.0%", "speed-up 10.00x", "decode 16.50x", "50.0 us"});
  const nlohmann::json json = nlohmann::json::parse(to_json(report()));
  EXPECT_EQ(json["device"], "cuda");
  EXPECT_EQ(json["machine"]["read_bytes_per_second"], 3e12);
  const nlohmann::json& result = json["results"][0];
  EXPECT_EQ(result["kernels"], "wgmma");
  EXPECT_DOUBLE_EQ(result["speedup"], 10);
  // 8192 slots of 4 KiB in 20 us are 1.678 TB/s of 3.
  EXPECT_NEAR(result["sharing_on"]["share_of_read_peak"], 0.5592, 1e-4);
  EXPECT_NEAR(result["sharing_off"]["share_of_read_peak"], 0.9227, 1e-4);
  EXPECT_NEAR(result["sharing_off"]["share_of_ideal"], 0.0559, 1e-4);
  EXPECT_EQ(result["sharing_on"]["plan"]["shared_segments"], 1);
}

GpuExplanation explanation() {
  GpuExplanation e;
  e.problem = {.name = "1B", .op = problem(), .layers = 16};
  e.limits = limits();
  e.path = "wgmma";
  e.stored = kv_stored(e.problem);
  e.formula = relay_speedup(e.problem.op);
  e.on = {.plan = plan(8192, 1),
          .bytes_read = 16 * 8192 * 4096.0,
          .partial_bytes = 1 << 20,
          .read_seconds = 179e-6,
          .measured = {}};
  e.off = {.plan = plan(135168, 0),
           .bytes_read = 16 * 135168 * 4096.0,
           .partial_bytes = 0,
           .read_seconds = 2953e-6,
           .measured = {}};
  return e;
}

TEST(GpuReport, Explanation) {
  GpuExplanation e = explanation();
  expect_parts(to_table(e), {"1B: 32/8 heads of 128, 16 layers, bf16 KV", "kernels wgmma",
                             "512.0 MiB", "8.25 GiB", "16.50x", "of several requests", "135168"});
  EXPECT_EQ(to_table(e).find("measured"), std::string::npos);
  EXPECT_FALSE(nlohmann::json::parse(to_json(e)).contains("measured_speedup"));
  e.on.measured = 200e-6;
  e.off.measured = 3000e-6;
  expect_parts(to_table(e), {"measured", "15.00x"});
  const nlohmann::json json = nlohmann::json::parse(to_json(e));
  EXPECT_DOUBLE_EQ(json["measured_speedup"], 15);
  EXPECT_EQ(json["sharing_on"]["plan"]["kv_slots_read"], 8192);
}

TEST(GpuReport, SaysThatNothingIsShared) {
  GpuExplanation e = explanation();
  EXPECT_EQ(to_table(e).find("Nothing is shared"), std::string::npos);
  e.on.plan.shared_segments = 0;
  expect_parts(to_table(e), {"Nothing is shared"});
}

TEST(GpuReport, PathsOfAGpu) {
  const Gpu gpu{.name = "A GPU (9.0, 132 SMs)",
                .paths = {{.kv_type = DType::kF16, .path = "wgmma", .obstacle = ""},
                          {.kv_type = DType::kBF16, .path = "wgmma", .obstacle = ""},
                          {.kv_type = DType::kF8E4M3, .path = "", .obstacle = "not that"}}};
  EXPECT_EQ(to_text(gpu, 0),
            "GPU 0: A GPU (9.0, 132 SMs)\n"
            "  wgmma for KV in f16, bf16\n"
            "  none for KV in f8_e4m3: not that\n");
}

TEST(GpuProblem, TypesOfKv) {
  EXPECT_EQ(parse_kv_type("f8_e4m3", Device::kCuda), DType::kF8E4M3);
  EXPECT_THROW(parse_kv_type("q8_0", Device::kCuda), Error);
  EXPECT_THROW(parse_kv_type("f8_e4m3", Device::kCpu), Error);
}

TEST(GpuProblem, WholeBlocksAreShared) {
  const BlockLayout even(problem(64, 17, 3));
  EXPECT_EQ(even.shared_blocks, 4);
  EXPECT_EQ(even.own_blocks, 2);
  EXPECT_EQ(even.columns, 6);
  EXPECT_EQ(even.blocks, 10);
  EXPECT_EQ(even.slots, 64 + 3 * 17);
  // The prefix ends within a block: its last 6 tokens are everybody's own.
  const BlockLayout odd(problem(70, 10, 3));
  EXPECT_EQ(odd.shared_blocks, 4);
  EXPECT_EQ(odd.own_blocks, 1);
  EXPECT_EQ(odd.slots, 64 + 3 * 16);
}

TEST(GpuProblem, EachBlockHasOneOwnerBehindThePrefix) {
  const BlockLayout layout(problem(64, 17, 3));
  const std::vector<int32_t> table = layout.table(3);
  ASSERT_EQ(table.size(), 18u);
  std::set<int32_t> ids(table.begin(), table.end());
  EXPECT_EQ(ids.size(), 10u);
  EXPECT_EQ(*ids.begin(), 0);
  EXPECT_EQ(*ids.rbegin(), 9);
  for (int request = 1; request < 3; ++request) {
    EXPECT_TRUE(std::equal(table.begin(), table.begin() + 4, table.begin() + 6 * request));
  }
}

TEST(GpuProblem, RefusesWhatCannotBe) {
  EXPECT_THROW(BlockLayout(problem(64, 17, 0)), Error);
  EXPECT_THROW(BlockLayout(problem(0, 0, 4)), Error);
  EXPECT_THROW(BlockLayout(problem(int64_t{1} << 40, 1, 1)), Error);
}

}  // namespace
}  // namespace relay::measure
