// relay bench trace: what sharing saves on a recorded trace of requests, on paper.
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <memory>
#include <string>
#include <thread>

#include "cli/commands.h"
#include "cli/model_shape.h"
#include "measure/explain.h"
#include "measure/problem.h"
#include "measure/trace.h"

namespace relay::cli {
namespace {

struct BenchTraceOptions {
  std::string trace;
  std::string shape = "llama-2-7b";
  std::string kv_type = "f16";
  int64_t block_size = 512;
  int32_t threads = 0;  ///< 0: all
  double token_ms = 50;
  double every = 10;
  int32_t max_batch = 0;
  bool json = false;
};

void run(const BenchTraceOptions& options) {
  std::ifstream file(options.trace);
  if (!file) throw Error("cannot read " + options.trace);
  const measure::Trace trace = measure::read_trace(file, options.block_size);
  const ModelShape shape = find_model_shape(options.shape);
  const auto all = static_cast<int32_t>(std::max(1U, std::thread::hardware_concurrency()));
  const measure::TraceProblem problem = {.shape = {.q_heads = shape.heads,
                                                   .kv_heads = shape.kv_heads,
                                                   .qk_dim = shape.k_dim,
                                                   .v_dim = shape.v_dim},
                                         .kv_type = measure::parse_kv_type(options.kv_type),
                                         .layers = shape.layers,
                                         .threads = options.threads > 0 ? options.threads : all,
                                         .token_seconds = 1e-3 * options.token_ms,
                                         .every = options.every,
                                         .max_batch = options.max_batch};
  measure::ThreadPool pool(std::min(problem.threads, all));
  const measure::TraceReport report = measure::analyse(
      trace, problem, measure::scaled_to(measure::measure_roofline(pool), problem.threads));
  std::puts((options.json ? to_json(report) : to_table(report)).c_str());
}

}  // namespace

void add_bench_trace(CLI::App& app) {
  auto options = std::make_shared<BenchTraceOptions>();
  CLI::App* trace = app.add_subcommand(
      "trace", "A recorded trace of requests, on paper: what is shared, level by level");
  trace->add_option("--trace", options->trace, "A trace in Mooncake's format, JSON lines")
      ->required()
      ->check(CLI::ExistingFile)
      ->option_text("FILE");
  trace->add_option("--shape", options->shape, "A shape of `relay synth --list`")
      ->capture_default_str()
      ->option_text("NAME");
  trace->add_option("--kv-type", options->kv_type, "f32, f16, bf16 or q8_0")
      ->capture_default_str()
      ->option_text("TYPE");
  trace->add_option("--block-size", options->block_size, "Tokens of a block of the trace")
      ->check(kPositive)
      ->capture_default_str();
  trace->add_option("--threads", options->threads, "Threads (default: all)")->check(kNotNegative);
  trace->add_option("--token-ms", options->token_ms, "Milliseconds of a decode step")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  trace->add_option("--every", options->every, "Seconds between the steps that are looked at")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  trace->add_option("--max-batch", options->max_batch, "Requests at once, others wait; 0: no limit")
      ->check(kNotNegative)
      ->capture_default_str();
  trace->add_flag("--json", options->json, "Print JSON, with every step");
  trace->footer(
      "Each request decodes from its arrival on, at a fixed speed. Computing prompts takes no\n"
      "time here, and KV has room. Times are predicted for this machine, all layers.");
  trace->callback([options] { run(*options); });
}

}  // namespace relay::cli
