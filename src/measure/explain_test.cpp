// Counts by hand, a machine that is made up. On a clock depend `measure`, and the kernels' costs,
// so predictions are compared with one another.
#include "measure/explain.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

namespace relay::measure {
namespace {

ExplainProblem problem(int32_t batch, int64_t prefix = 4096, int64_t context = 128) {
  ExplainProblem p;
  p.name = "1B";
  p.op.shape = {.q_heads = 32, .kv_heads = 8, .qk_dim = 64, .v_dim = 64};
  p.op.kv_type = DType::kF16;
  p.op.batch = batch;
  p.op.prefix = prefix;
  p.op.context = context;
  p.layers = 16;
  p.threads = 2;
  return p;
}

Roofline machine() {
  Roofline r;
  r.threads = 2;
  r.f32_flops = 200e9;
  r.bf16_flops = 400e9;
  r.read_bytes = 40e9;
  return r;
}

TEST(Explain, CountsBytesAndFlops) {
  const Explanation e = explain(problem(32), machine());
  const double slot = 16 * 8 * (64 + 64) * 2;  // bytes of all layers
  EXPECT_DOUBLE_EQ(e.stored.shared, (4096 + 32 * 128) * slot);
  EXPECT_DOUBLE_EQ(e.stored.apart, 32 * (4096 + 128) * slot);
  EXPECT_DOUBLE_EQ(e.on.bytes_read, (4096 + 32 * 128) * slot);
  EXPECT_DOUBLE_EQ(e.off.bytes_read, 32 * (4096 + 128) * slot);
  EXPECT_DOUBLE_EQ(e.on.flops, 16.0 * 2 * 32 * (4096 + 128) * 32 * (64 + 64));
  EXPECT_DOUBLE_EQ(e.off.flops, e.on.flops);
  EXPECT_DOUBLE_EQ(e.on.read_floor, e.on.bytes_read / 40e9);
  EXPECT_DOUBLE_EQ(e.on.arithmetic_floor, e.on.flops / 200e9);
  EXPECT_DOUBLE_EQ(e.formula, 32.0 * (4096 + 128) / (4096 + 32 * 128));
}

TEST(Explain, ThePapersFormula) {
  EXPECT_DOUBLE_EQ(relay_speedup(problem(1).op), 1);
  EXPECT_DOUBLE_EQ(relay_speedup(problem(32, 4096, 0).op), 32) << "nothing of their own";
  EXPECT_DOUBLE_EQ(relay_speedup(problem(32, 0, 128).op), 1) << "nothing shared";
}

TEST(Explain, PredictsSharedFasterThanApart) {
  const auto speedup = [](int32_t batch, int64_t prefix) {
    return explain(problem(batch, prefix), machine()).predicted_speedup();
  };
  for (int32_t batch : {2, 8, 32, 128}) {
    EXPECT_DOUBLE_EQ(speedup(batch, 0), 1) << batch << ": nothing is shared, the same plan";
    EXPECT_GE(speedup(batch, 512), 1) << batch;
    EXPECT_GE(speedup(batch, 16384), batch < 8 ? 1.0 : 1.2) << batch;
  }
  EXPECT_DOUBLE_EQ(speedup(1, 4096), 1) << "nobody to share with, the same plan";
}

TEST(Explain, ScalesWithLayers) {
  ExplainProblem p = problem(8);
  const Explanation many = explain(p, machine());
  p.layers = 1;
  const Explanation one = explain(p, machine());
  EXPECT_DOUBLE_EQ(many.on.predicted, 16 * one.on.predicted);
  EXPECT_DOUBLE_EQ(many.off.bytes_read, 16 * one.off.bytes_read);
}

TEST(Explain, ScalesRooflinesToOtherThreads) {
  const Roofline eight = scaled_to(machine(), 8);
  EXPECT_EQ(eight.threads, 8);
  EXPECT_DOUBLE_EQ(eight.f32_flops, 800e9);
  EXPECT_DOUBLE_EQ(eight.read_bytes, 40e9) << "the memory is the same";
  EXPECT_DOUBLE_EQ(scaled_to(machine(), 1).read_bytes, 20e9);
}

TEST(Explain, RefusesWhatCannotBe) {
  EXPECT_THROW(explain(problem(0), machine()), Error);
  EXPECT_THROW(explain(problem(4, 0, 0), machine()), Error);
  ExplainProblem p = problem(4);
  p.layers = 0;
  EXPECT_THROW(explain(p, machine()), Error);
  p = problem(4);
  p.op.shape.kv_heads = 5;
  EXPECT_THROW(explain(p, machine()), Error);
}

TEST(Explain, MeasuresAndSaysHowFarItWasOff) {
  ExplainProblem p = problem(4, 256, 16);
  Explanation e = explain(p, machine());
  EXPECT_FALSE(e.on.error());
  EXPECT_FALSE(e.measured_speedup());
  ThreadPool pool(p.threads);
  measure(e, pool, 1);
  ASSERT_TRUE(e.on.measured && e.off.measured);
  EXPECT_GT(*e.on.measured, 0);
  EXPECT_DOUBLE_EQ(*e.on.error(), (e.on.predicted - *e.on.measured) / *e.on.measured);
  EXPECT_NE(to_table(e).find("prediction was off by"), std::string::npos);
  EXPECT_TRUE(nlohmann::json::parse(to_json(e))["sharing_on"].contains("prediction_error"));
}

TEST(Explain, ReportsAsTableAndAsJson) {
  const Explanation e = explain(problem(32), machine());
  const std::string table = to_table(e);
  for (const char* part : {"1B: 32/8 heads of 64, 16 layers, f16 KV", "32 requests", "4096 tokens",
                           "16.50x", "256.0 MiB", "4.12 GiB", "predicted"}) {
    EXPECT_NE(table.find(part), std::string::npos) << part << "\n" << table;
  }
  EXPECT_EQ(table.find("measured"), std::string::npos);
  const nlohmann::json json = nlohmann::json::parse(to_json(e));
  EXPECT_EQ(json["batch"], 32);
  EXPECT_EQ(json["sharing_off"]["kv_bytes_read"], e.off.bytes_read);
  EXPECT_DOUBLE_EQ(json["formula_speedup"], e.formula);
  EXPECT_FALSE(json.contains("measured_speedup"));
}

}  // namespace
}  // namespace relay::measure
