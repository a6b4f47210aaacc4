// relay bench op: the attention operator by itself, sharing on against off, beside what the machine
// can do.
#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "cli/commands.h"
#include "cli/device.h"
#include "measure/cuda/operator.h"
#include "measure/operator.h"

namespace relay::cli {
namespace {

struct BenchOpOptions {
  std::string device = "cpu";
  int32_t heads = 32;
  int32_t kv_heads = 8;
  int32_t head_dim = 128;
  int32_t v_head_dim = 0;  ///< 0: as head_dim
  std::vector<int64_t> prefix = {4096};
  std::vector<int64_t> context = {128};
  std::vector<int32_t> batch = {1, 8, 32};
  std::vector<std::string> kv_types = {"f16"};
  std::string layout = "rows";
  int32_t threads = 0;  ///< 0: all
  int rounds = 10;
  std::string isa;
  bool json = false;
};

/// All combinations, each checked, so that a wrong one costs no measurement.
std::vector<measure::OpProblem> problems_of(const BenchOpOptions& options) {
  const measure::Device device = device_of(options.device);
  std::vector<measure::OpProblem> problems;
  for (const std::string& kv_type : options.kv_types) {
    for (int64_t prefix : options.prefix) {
      for (int64_t context : options.context) {
        for (int32_t batch : options.batch) {
          measure::OpProblem problem;
          problem.shape = {.q_heads = options.heads,
                           .kv_heads = options.kv_heads,
                           .qk_dim = options.head_dim,
                           .v_dim = options.v_head_dim > 0 ? options.v_head_dim : options.head_dim};
          problem.kv_type = measure::parse_kv_type(kv_type, device);
          problem.prefix = prefix;
          problem.context = context;
          problem.batch = batch;
          problem.layout = options.layout == "tiles" ? KvLayout::kTiles : KvLayout::kRows;
          measure::check_batch(problem);
          if (device == measure::Device::kCpu) measure::check(problem);
          problems.push_back(problem);
        }
      }
    }
  }
  return problems;
}

void say(const BenchOpOptions& options, const std::string& what) {
  if (!options.json) std::fprintf(stderr, "measuring %s ...\n", what.c_str());
}

void run_on_cpu(const BenchOpOptions& options) {
  if (!options.isa.empty()) select_isa(options.isa);
  const std::vector<measure::OpProblem> problems = problems_of(options);
  const int32_t threads = options.threads > 0
                              ? options.threads
                              : static_cast<int32_t>(std::thread::hardware_concurrency());
  measure::ThreadPool pool(threads);
  measure::OpReport report;
  report.isa = current_isa();
  report.load = measure::load_average();
  say(options, "the roofline");
  report.roofline = measure::measure_roofline(pool);
  for (const measure::OpProblem& problem : problems) {
    say(options, measure::to_string(problem));
    report.results.push_back(
        measure::run_op(problem, pool, options.rounds, report.roofline.read_bytes));
  }
  std::puts((options.json ? measure::to_json(report) : measure::to_table(report)).c_str());
}

void run_on_gpu(const BenchOpOptions& options) {
  const measure::GpuOpReport report = measure::run_op_on_gpu(
      problems_of(options), options.rounds, [&](const std::string& what) { say(options, what); });
  std::puts((options.json ? measure::to_json(report) : measure::to_table(report)).c_str());
}

}  // namespace

void add_bench_op(CLI::App& app) {
  auto options = std::make_shared<BenchOpOptions>();
  CLI::App* op = app.add_subcommand(
      "op", "The attention operator: decode rows over one shared prefix, sharing on against off");
  add_device(*op, options->device, "cpu, or cuda: an NVIDIA GPU")->capture_default_str();
  op->add_option("--heads", options->heads, "Query heads")->check(kPositive)->capture_default_str();
  op->add_option("--kv-heads", options->kv_heads, "KV heads")
      ->check(kPositive)
      ->capture_default_str();
  op->add_option("--head-dim", options->head_dim, "Elements of a Q, K and V vector")
      ->check(kPositive)
      ->capture_default_str();
  op->add_option("--v-head-dim", options->v_head_dim, "Elements of a V vector, if not --head-dim");
  op->add_option("--prefix", options->prefix, "Shared KV slots; several: a,b,c")
      ->delimiter(',')
      ->capture_default_str()
      ->option_text("N,...");
  op->add_option("--context", options->context, "KV slots of each request's own; several: a,b,c")
      ->delimiter(',')
      ->capture_default_str()
      ->option_text("N,...");
  op->add_option("--batch", options->batch, "Requests, one row each; several: a,b,c")
      ->delimiter(',')
      ->capture_default_str()
      ->option_text("N,...");
  op->add_option("--kv-type", options->kv_types,
                 "f32, f16, bf16, q8_0 (a GPU: f16, bf16, f8_e4m3); several: a,b,c")
      ->delimiter(',')
      ->capture_default_str()
      ->option_text("TYPE,...");
  op->add_option("--layout", options->layout,
                 "How KV lies: rows (as in llama.cpp) or tiles (as in vLLM with Relay)")
      ->check(CLI::IsMember({"rows", "tiles"}))
      ->capture_default_str()
      ->option_text("LAYOUT");
  op->add_option("--threads", options->threads, "Threads (default: all)")->check(kNotNegative);
  op->add_option("--rounds", options->rounds, "Alternating rounds of on and off")
      ->check(kPositive)
      ->capture_default_str();
  op->add_option("--isa", options->isa, "Kernel set, one of `relay isa` (default: the best)")
      ->option_text("NAME");
  op->add_flag("--json", options->json, "Print JSON");
  op->footer(
      "KV comes from memory, as in a model. Shares are those of peaks measured in the same run.\n"
      "Example: relay bench op --heads 32 --kv-heads 8 --head-dim 64 --prefix 4096 --batch 32");
  op->callback([op, options] {
    if (device_of(options->device) == measure::Device::kCpu) return run_on_cpu(*options);
    refuse_on_gpu(*op, {"--layout", "--threads", "--isa"});
    run_on_gpu(*options);
  });
}

}  // namespace relay::cli
