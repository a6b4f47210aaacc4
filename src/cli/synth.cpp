// relay synth: writes a GGUF with random weights in the shape of a known model.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>

#include "cli/commands.h"
#include "synth/write_model.h"

namespace relay::cli {
namespace {

using synth::Request;
using synth::Result;
using synth::Shape;

std::atomic<bool> interrupted = false;
static_assert(std::atomic<bool>::is_always_lock_free, "set in a signal handler");

void on_signal(int) { interrupted = true; }

/// Ctrl-C and the like stop the writing, which then removes its temporary file.
void catch_signals() {
  struct sigaction action = {};
  action.sa_handler = on_signal;
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) {
    sigaction(signal, &action, nullptr);
  }
}

struct Options {
  std::string shape;
  std::string output;
  std::string type = "q4_0";
  std::string vocabulary;
  std::string chat_template;
  uint64_t seed = 1;
  int64_t ffn = 0;
  int64_t layers = 0;
  int64_t context = 0;
  int threads = 0;
  bool force = false;
  bool list = false;
  bool quiet = false;
};

Request make_request(const Options& options) {
  Request request;
  request.shape = synth::find_shape(options.shape);
  if (options.ffn > 0) {
    request.shape.ffn = options.ffn;
  }
  if (options.layers > 0) {
    request.shape.layers = options.layers;
  }
  if (options.context > 0) {
    request.shape.context = options.context;
  }
  request.output = options.output;
  request.type = options.type;
  request.seed = options.seed;
  request.vocabulary = options.vocabulary;
  request.chat_template = options.chat_template;
  request.force = options.force;
  request.threads = options.threads;
  request.cancel = &interrupted;
  return request;
}

std::string size_in(const Shape& shape, const char* type) {
  Request request;
  request.shape = shape;
  request.type = type;
  try {
    char text[32];
    std::snprintf(text, sizeof text, "%.0f MB",
                  static_cast<double>(synth::measure_model(request).bytes) / 1e6);
    return text;
  } catch (const std::invalid_argument&) {
    return "-";  // rows that this type's blocks do not fit
  }
}

void print_shapes() {
  std::printf("%-13s %6s %5s %6s %5s %3s %4s %6s %8s %9s %9s %9s  %s\n", "shape", "layers", "width",
              "FFN", "heads", "KV", "size", "vocab", "context", "f16", "q8_0", "q4_0", "");
  for (const Shape& shape : synth::shapes()) {
    Request request;
    request.shape = shape;
    const Result result = synth::measure_model(request);
    std::printf(
        "%-13s %6lld %5lld %6lld %5lld %3lld %4lld %6lld %8lld %9s %9s %9s  %s\n",
        shape.name.c_str(), static_cast<long long>(shape.layers),
        static_cast<long long>(shape.width), static_cast<long long>(shape.ffn),
        static_cast<long long>(shape.heads), static_cast<long long>(shape.kv_heads),
        static_cast<long long>(shape.head_dim), static_cast<long long>(result.vocabulary_size),
        static_cast<long long>(shape.context), size_in(shape, "f16").c_str(),
        size_in(shape, "q8_0").c_str(), size_in(shape, "q4_0").c_str(), shape.about.c_str());
  }
}

/// A line that renews itself on a terminal; elsewhere one line per tenth, if it takes longer.
class Progress {
 public:
  void operator()(uint64_t done, uint64_t total) {
    const int percent = static_cast<int>(100 * done / total);
    if (percent == last_ || (!terminal_ && (percent / 10 == last_ / 10 || young()))) {
      return;
    }
    last_ = percent;
    std::fprintf(stderr, terminal_ ? "\r%3d %% of %.0f MB" : "%3d %% of %.0f MB\n", percent,
                 static_cast<double>(total) / 1e6);
  }
  void end() const {
    if (terminal_ && last_ >= 0) {
      std::fputs("\r                    \r", stderr);
    }
  }

 private:
  bool young() const { return std::chrono::steady_clock::now() - start_ < std::chrono::seconds(2); }

  const std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  const bool terminal_ = ::isatty(STDERR_FILENO) != 0;
  int last_ = -1;
};

void run(const Options& options) {
  if (options.list) {
    print_shapes();
    return;
  }
  if (options.shape.empty() || options.output.empty()) {
    throw std::invalid_argument("give a shape and an output file: relay synth tiny tiny.gguf");
  }
  Request request = make_request(options);
  Progress progress;
  if (!options.quiet) {
    request.progress = std::ref(progress);
  }
  catch_signals();
  const auto start = std::chrono::steady_clock::now();
  Result result;
  try {
    result = synth::write_model(request);
  } catch (const synth::Cancelled& cancelled) {
    progress.end();
    std::fprintf(stderr, "relay: %s\n", cancelled.what());
    throw CLI::RuntimeError(130);  // as shells report an interrupted program
  }
  progress.end();
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  if (!options.quiet) {
    std::printf("%s: %s, %s, seed %llu\n", options.output.c_str(), options.shape.c_str(),
                options.type.c_str(), static_cast<unsigned long long>(options.seed));
    std::printf("  %.2f million parameters in %lld tensors, %.1f MB, written in %.1f s\n",
                static_cast<double>(result.parameters) / 1e6,
                static_cast<long long>(result.tensors), static_cast<double>(result.bytes) / 1e6,
                seconds.count());
    std::printf("  vocabulary: %lld tokens of %s\n", static_cast<long long>(result.vocabulary_size),
                result.vocabulary_source.c_str());
    std::printf("  chat template: %s\n", result.template_source.c_str());
  }
}

}  // namespace

void add_synth(CLI::App& app) {
  const auto options = std::make_shared<Options>();
  CLI::App* synth = app.add_subcommand(
      "synth", "Writes a GGUF with random weights in the shape of a known model");
  synth->add_option("shape", options->shape, "One of --list");
  synth->add_option("output", options->output, "The file to write");
  synth->add_flag("--list", options->list, "Lists the shapes with their sizes and ends");
  std::string types;
  for (const std::string& type : synth::weight_types()) {
    types += (types.empty() ? "" : ", ") + type;
  }
  synth
      ->add_option(
          "--type", options->type,
          "Type of the weight matrices: " + types +
              ". Types below 8 bits keep the output matrix at q6_k (q8_0 where its rows do "
              "not fit), as llama-quantize does")
      ->capture_default_str()
      ->option_text("TYPE");
  synth
      ->add_option("--seed", options->seed,
                   "The same seed gives the same file, whatever the number of threads")
      ->capture_default_str();
  synth
      ->add_option(
          "--vocab", options->vocabulary,
          "Another vocabulary: a name (llama-bpe, llama-spm, phi-3, gpt-2, gemma-4, qwen2: "
          "llama.cpp's models/ggml-vocab-NAME.gguf), or a GGUF file, whole models included")
      ->option_text("NAME|FILE");
  synth
      ->add_option("--chat-template", options->chat_template,
                   "Another chat template: a Jinja file, or a name of llama.cpp's models/templates")
      ->option_text("NAME|FILE");
  synth
      ->add_option("--ffn", options->ffn,
                   "Another FFN width. llama-3.2-1b has the real model's 8192; 5632 gives the "
                   "lighter 1B shape of some published measurements")
      ->check(kPositive);
  synth->add_option("--layers", options->layers, "Another number of layers")->check(kPositive);
  synth->add_option("--context", options->context, "Another trained context length, in tokens")
      ->check(kPositive);
  synth->add_option("--threads", options->threads, "Threads (default: all)")->check(kNotNegative);
  synth->add_flag("--force", options->force, "Replaces an existing file");
  synth->add_flag("--quiet", options->quiet, "Prints nothing but errors");
  synth->footer(
      "The weights are scaled so that the model behaves: attention that is not flat, greedy "
      "output\n"
      "that neither repeats one token nor ends at once. What it says means nothing.\n"
      "Example: relay synth llama-3.2-1b 1b.gguf --type q4_0 --seed 1");
  synth->callback([options] { run(*options); });
}

}  // namespace relay::cli
