// relay-accuracy-bench: the numerical error of stock ggml's attention and of Relay's, side by side.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "bench/accuracy/accuracy.h"
#include "measure/problem.h"

namespace {

using relay::bench::AccuracyCase;
using relay::bench::Values;

struct Options {
  std::vector<std::string> kv_types = {"f16", "bf16", "q8_0", "f32"};
  std::vector<std::string> values = {"realistic", "peaked", "flat"};
  std::vector<int32_t> head_dim = {64, 128};
  std::vector<int32_t> group = {1, 4};
  std::vector<int64_t> slots = {128, 1024, 4096, 16384};
  std::vector<int64_t> rows = {1, 8, 32};
  std::vector<int64_t> prefill = {512};
  int32_t kv_heads = 2;
  int32_t threads = static_cast<int32_t>(std::max(1u, std::thread::hardware_concurrency()));
  std::string isa;
  bool quick = false;
  bool json = false;
};

Values parse_values(const std::string& name) {
  for (Values values : {Values::kRealistic, Values::kPeaked, Values::kFlat}) {
    if (name == relay::bench::to_string(values)) return values;
  }
  throw relay::Error("--values is one of realistic, peaked, flat, not '" + name + "'");
}

/// Every combination, but for prompts longer than the context.
std::vector<AccuracyCase> cases_of(const Options& options) {
  std::vector<AccuracyCase> cases;
  AccuracyCase c;
  c.kv_heads = options.kv_heads;
  const auto add_rows = [&](const std::vector<int64_t>& counts, bool causal) {
    for (int64_t rows : counts) {
      if (causal && rows > c.slots) continue;
      c.rows = rows;
      c.causal = causal;
      for (const std::string& values : options.values) {
        c.values = parse_values(values);
        cases.push_back(c);
      }
    }
  };
  for (const std::string& kv_type : options.kv_types) {
    c.kv_type = relay::measure::parse_kv_type(kv_type);
    for (int32_t head_dim : options.head_dim) {
      c.head_dim = head_dim;
      for (int32_t group : options.group) {
        c.group = group;
        for (int64_t slots : options.slots) {
          c.slots = slots;
          add_rows(options.rows, false);
          add_rows(options.prefill, true);
        }
      }
    }
  }
  return cases;
}

void run(const Options& options) {
  if (!options.isa.empty()) relay::select_isa(options.isa);
  const std::vector<AccuracyCase> cases = cases_of(options);
  relay::measure::ThreadPool pool(options.threads);
  relay::bench::AccuracyReport report{
      .isa = relay::current_isa(), .threads = options.threads, .results = {}};
  for (const AccuracyCase& c : cases) {
    std::fprintf(stderr, "\r%zu of %zu ", report.results.size() + 1, cases.size());
    report.results.push_back(relay::bench::measure_accuracy(c, pool));
  }
  std::fprintf(stderr, "\n");
  std::puts((options.json ? to_json(report) : to_table(report)).c_str());
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{
      "Numerical error of attention: stock ggml (flash attention, and without) and Relay, against "
      "double precision over the same KV",
      "relay-accuracy-bench"};
  const auto several = [&app](const char* name, auto& into, const char* what) {
    return app.add_option(name, into, std::string(what) + "; several: a,b,c")
        ->delimiter(',')
        ->capture_default_str();
  };
  several("--kv-type", options.kv_types, "f32, f16, bf16, q8_0");
  several("--values", options.values, "What the values are like: realistic, peaked, flat");
  CLI::Option* head_dim =
      several("--head-dim", options.head_dim, "Elements of a Q, K and V vector");
  CLI::Option* group = several("--group", options.group, "Query heads of each KV head");
  CLI::Option* slots = several("--slots", options.slots, "KV slots");
  several("--rows", options.rows, "Rows that decode over one shared prefix");
  several("--prefill", options.prefill, "Rows that are the last tokens of a prompt");
  app.add_option("--kv-heads", options.kv_heads, "KV heads")->capture_default_str();
  app.add_option("--threads", options.threads, "Threads")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  app.add_option("--isa", options.isa, "Kernel set, one of `relay isa` (default: the best)");
  app.add_flag("--quick", options.quick, "1024 slots, head size 128, groups of 4: seconds");
  app.add_flag("--json", options.json, "Print JSON");
  CLI11_PARSE(app, argc, argv);
  if (options.quick) {
    if (slots->empty()) options.slots = {1024};
    if (head_dim->empty()) options.head_dim = {128};
    if (group->empty()) options.group = {4};
  }
  try {
    run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "relay-accuracy-bench: error: %s\n", error.what());
    return 1;
  }
  return 0;
}
