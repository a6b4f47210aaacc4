// Counts by hand, on traces of a few requests.
#include "measure/trace.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <sstream>

namespace relay::measure {
namespace {

TraceProblem problem() {
  TraceProblem p;
  p.shape = {.q_heads = 8, .kv_heads = 2, .qk_dim = 64, .v_dim = 64};
  p.layers = 4;
  p.threads = 2;
  p.token_seconds = 1;
  p.every = 1;
  return p;
}

Roofline machine() {
  Roofline r;
  r.threads = 2;
  r.f32_flops = 200e9;
  r.read_bytes = 40e9;
  return r;
}

Trace trace_of(const std::string& text, int64_t block_size = 64) {
  std::istringstream lines(text);
  return read_trace(lines, block_size);
}

// Three requests begin with block 0; two of them go on with block 1.
const char* const kTree =
    R"({"timestamp": 0, "input_length": 192, "output_length": 2, "hash_ids": [0, 1, 2]}
{"timestamp": 0, "input_length": 150, "output_length": 1, "hash_ids": [0, 1, 3]}

{"timestamp": 0, "input_length": 70, "output_length": 1, "hash_ids": [0, 4]}
)";

TEST(Trace, CountsLevelByLevel) {
  const TraceReport report = analyse(trace_of(kTree), problem(), machine());
  ASSERT_EQ(report.steps.size(), 2u);
  const TraceStep& first = report.steps[0];
  EXPECT_EQ(first.batch, 3);
  EXPECT_EQ(first.all.attended, 193 + 151 + 71);
  EXPECT_EQ(first.all.read, 193 + 151 + 71 - 2 * 64 - 64);
  ASSERT_EQ(first.levels.size(), 2u);
  EXPECT_EQ(first.levels[0].attended, 3 * 64);
  EXPECT_EQ(first.levels[0].read, 64);
  EXPECT_EQ(first.levels[1].attended, 2 * 64);
  EXPECT_EQ(first.levels[1].read, 64);
  EXPECT_GT(first.seconds_off, 0);
  const TraceStep& second = report.steps[1];
  EXPECT_EQ(second.batch, 1);
  EXPECT_TRUE(second.levels.empty()) << "alone, it shares with nobody";
  EXPECT_EQ(second.all.attended, 194);
  EXPECT_EQ(second.seconds_on, second.seconds_off) << "the same plan";
  EXPECT_EQ(report.mean.batch, 2);
  EXPECT_EQ(report.mean.levels[0].read, 32);
}

TEST(Trace, TheLastBlockIsOwnUnlessFull) {
  const TraceReport report = analyse(
      trace_of(R"({"timestamp": 0, "input_length": 100, "output_length": 50, "hash_ids": [5, 6]}
{"timestamp": 0, "input_length": 100, "output_length": 50, "hash_ids": [5, 6]})"),
      problem(), machine());
  for (const TraceStep& step : report.steps) {
    ASSERT_EQ(step.levels.size(), 1u);
    EXPECT_EQ(step.levels[0].read, 64) << "what is answered is nobody else's";
  }
}

TEST(Trace, LaterRequestsWaitForAPlace) {
  TraceProblem p = problem();
  p.max_batch = 2;
  const TraceReport report = analyse(trace_of(kTree), p, machine());
  ASSERT_EQ(report.steps.size(), 2u);
  EXPECT_EQ(report.steps[0].batch, 2);
  EXPECT_EQ(report.steps[1].batch, 2) << "the third begins when the second has ended";
}

void expect_error(const std::string& text, const std::string& part) {
  try {
    trace_of(text);
    FAIL() << "no error for " << text;
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

TEST(Trace, NamesLineAndField) {
  const std::string good =
      R"({"timestamp": 0, "input_length": 64, "output_length": 1, "hash_ids": [0]})"
      "\n";
  expect_error(good + "{", "line 2");
  expect_error(good + "[]", "line 2: this is no JSON object");
  expect_error(R"({"input_length": 64, "output_length": 1, "hash_ids": [0]})", "'timestamp'");
  expect_error(R"({"timestamp": 0, "input_length": 0, "output_length": 1, "hash_ids": [0]})",
               "'input_length'");
  expect_error(R"({"timestamp": 0, "input_length": 64, "output_length": 1, "hash_ids": [0, 1]})",
               "2 blocks, but 64 tokens are 1 blocks of 64");
  expect_error(R"({"timestamp": 0, "input_length": 64, "output_length": 1, "hash_ids": [-1]})",
               "'hash_ids'");
  EXPECT_THROW(analyse(trace_of(""), problem(), machine()), Error);
}

TEST(Trace, ReportsAddUp) {
  const TraceReport report = analyse(trace_of(kTree), problem(), machine());
  const auto json = nlohmann::json::parse(to_json(report));
  EXPECT_EQ(json["requests"], 3);
  EXPECT_EQ(json["steps"].size(), 2u);
  EXPECT_EQ(json["mean"]["levels"][1]["kv_slots_read"], 32);
  EXPECT_NE(to_table(report).find("level 2"), std::string::npos);
}

}  // namespace
}  // namespace relay::measure
