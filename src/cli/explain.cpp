// relay explain: what sharing a prompt saves on this machine, predicted and, if asked, measured.
#include "measure/explain.h"

#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>

#include "cli/commands.h"
#include "cli/device.h"
#include "cli/model_shape.h"
#include "measure/cuda/explain.h"

namespace relay::cli {
namespace {

struct ExplainOptions {
  std::string device = "cpu";
  std::string model;
  std::string shape;
  int32_t heads = 32;
  int32_t kv_heads = 8;
  int32_t head_dim = 128;
  int32_t layers = 1;
  int64_t prefix = 4096;
  int64_t context = 128;
  int32_t batch = 32;
  std::string kv_type = "f16";
  int32_t threads = 0;  ///< 0: all
  bool measure = false;
  int rounds = 10;
  bool json = false;
};

measure::ExplainProblem problem_of(const ExplainOptions& options) {
  measure::ExplainProblem p;
  if (!options.model.empty() || !options.shape.empty()) {
    const ModelShape shape =
        options.model.empty() ? find_model_shape(options.shape) : read_model_shape(options.model);
    p.name = shape.name;
    p.layers = shape.layers;
    p.op.shape = {.q_heads = shape.heads,
                  .kv_heads = shape.kv_heads,
                  .qk_dim = shape.k_dim,
                  .v_dim = shape.v_dim};
  } else {
    p.layers = options.layers;
    p.op.shape = {.q_heads = options.heads,
                  .kv_heads = options.kv_heads,
                  .qk_dim = options.head_dim,
                  .v_dim = options.head_dim};
  }
  p.op.kv_type = measure::parse_kv_type(options.kv_type, device_of(options.device));
  p.op.prefix = options.prefix;
  p.op.context = options.context;
  p.op.batch = options.batch;
  measure::check_batch(p.op);
  return p;
}

void print(const std::string& text) { std::fputs(text.c_str(), stdout); }

void run_on_cpu(const ExplainOptions& options) {
  const int32_t all = std::max(1, static_cast<int32_t>(std::thread::hardware_concurrency()));
  const int32_t threads = options.threads > 0 ? options.threads : all;
  if (options.measure && threads > all) {
    throw Error("--measure needs a core for each thread, and there are " + std::to_string(all));
  }
  measure::ExplainProblem problem = problem_of(options);
  problem.threads = threads;
  measure::check(problem.op);
  measure::ThreadPool pool(std::min(threads, all));
  if (!options.json) std::fprintf(stderr, "measuring what the machine can do ...\n");
  measure::Explanation explanation =
      measure::explain(problem, measure::scaled_to(measure::measure_roofline(pool), threads));
  if (options.measure) {
    if (!options.json) std::fprintf(stderr, "measuring the operator ...\n");
    measure::measure(explanation, pool, options.rounds);
  }
  print(options.json ? to_json(explanation) + "\n" : to_table(explanation));
}

void run_on_gpu(const ExplainOptions& options) {
  const measure::GpuExplanation explanation =
      measure::explain_on_gpu(problem_of(options), options.measure ? options.rounds : 0);
  print(options.json ? to_json(explanation) + "\n" : to_table(explanation));
}

}  // namespace

void add_explain(CLI::App& app) {
  auto options = std::make_shared<ExplainOptions>();
  CLI::App* explain = app.add_subcommand(
      "explain", "Predicts what sharing a prompt saves on this machine: bytes, flops, time");
  add_device(*explain, options->device, "cpu, or cuda: an NVIDIA GPU")->capture_default_str();
  CLI::Option* model =
      explain->add_option("--model,-m", options->model, "A GGUF file, for its shape")
          ->check(CLI::ExistingFile)
          ->option_text("FILE");
  CLI::Option* shape =
      explain->add_option("--shape", options->shape, "A shape of `relay synth --list`")
          ->excludes(model)
          ->option_text("NAME");
  for (CLI::Option* option :
       {explain->add_option("--heads", options->heads, "Query heads"),
        explain->add_option("--kv-heads", options->kv_heads, "KV heads"),
        explain->add_option("--head-dim", options->head_dim, "Elements of a Q, K and V vector"),
        explain->add_option("--layers", options->layers, "Layers")}) {
    option->capture_default_str()->check(kPositive)->excludes(model)->excludes(shape);
  }
  explain->add_option("--prefix", options->prefix, "Tokens of the shared prompt")
      ->capture_default_str();
  explain->add_option("--context", options->context, "Tokens of each request's own")
      ->capture_default_str();
  explain->add_option("--batch", options->batch, "Requests at once")->capture_default_str();
  explain
      ->add_option("--kv-type", options->kv_type,
                   "f32, f16, bf16 or q8_0 (a GPU: f16, bf16 or f8_e4m3)")
      ->capture_default_str()
      ->option_text("TYPE");
  explain->add_option("--threads", options->threads,
                      "Threads (default: all). For more than there are cores, arithmetic is "
                      "scaled from what they do and memory taken as it is");
  explain->add_flag("--measure", options->measure,
                    "Runs the operator too, and says how far the prediction was off");
  explain->add_option("--rounds", options->rounds, "Rounds of --measure")
      ->check(kPositive)
      ->capture_default_str();
  explain->add_flag("--json", options->json, "Print JSON");
  explain->footer(
      "Attention alone, of one decode step; the rest of a step costs the same either way.\n"
      "--device cuda tells how the GPU plans the batch, which takes a GPU, and predicts no time "
      "but\n"
      "that of reading KV from memory.\n"
      "Example: relay explain --shape llama-3.2-1b --prefix 4096 --context 128 --batch 32");
  explain->callback([explain, options] {
    if (device_of(options->device) == measure::Device::kCpu) return run_on_cpu(*options);
    refuse_on_gpu(*explain, {"--threads"});
    run_on_gpu(*options);
  });
}

}  // namespace relay::cli
