// relay-ggml-op-bench: GGML_OP_FLASH_ATTN_EXT of ggml's CPU backend, on the batches of
// `relay bench op`: one decode row per request over a shared prefix and a context of its own, KV
// from memory.
//
// KV lies as llama.cpp's unified cache does ([slot][KV head][dim], the prefix once), and an f16
// mask says who sees what. Each "layer" has KV of its own, together several times the last-level
// cache.
#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "bench/ggml/cpu_backend.h"
#include "cpu/plan/cache_size.h"
#include "measure/kv_buffer.h"
#include "measure/operator.h"
#include "measure/problem_json.h"
#include "measure/roofline.h"
#include "measure/timing.h"

namespace {

using relay::DType;
using relay::bench::cpu_device;
using relay::measure::OpProblem;

void fill(ggml_tensor* tensor, DType type, uint64_t seed) {
  relay::measure::KvBuffer bytes;
  bytes.resize(static_cast<int64_t>(ggml_nbytes(tensor)));
  relay::measure::fill_random(type, bytes, seed);
  ggml_backend_tensor_set(tensor, bytes.data(), 0, bytes.size());
}

/// A graph of several layers' operators, which share nothing but queries and mask.
class Layers {
 public:
  Layers(const OpProblem& p, int32_t threads)
      : backend_(ggml_backend_dev_init(cpu_device(), nullptr)) {
    ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(cpu_device());
    reinterpret_cast<ggml_backend_set_n_threads_t>(ggml_backend_reg_get_proc_address(
        registry, "ggml_backend_set_n_threads"))(backend_.get(), threads);
    const int64_t slots = p.prefix + p.context * p.batch;
    const int64_t bytes = slots * relay::measure::slot_bytes(p);
    count_ = static_cast<int>(
        std::clamp<int64_t>(4 * relay::last_level_cache_bytes() / bytes + 1, 2, 2048));
    const size_t tensors = 8 * static_cast<size_t>(count_) + 8;
    context_.reset(ggml_init(
        {.mem_size = tensors * ggml_tensor_overhead() + ggml_graph_overhead_custom(tensors, false),
         .mem_buffer = nullptr,
         .no_alloc = true}));
    ggml_context* const ctx = context_.get();
    graph_ = ggml_new_graph_custom(ctx, tensors, false);
    const ggml_type type = relay::bench::ggml_type_of(p.kv_type);
    ggml_tensor* const q =
        ggml_new_tensor_3d(ctx, GGML_TYPE_F32, p.shape.qk_dim, p.shape.q_heads, p.batch);
    ggml_tensor* const mask = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, slots, p.batch);
    std::vector<ggml_tensor*> keys, values;
    const auto by_head = [ctx](ggml_tensor* t) { return ggml_permute(ctx, t, 0, 2, 1, 3); };
    const float scale = 1.0f / std::sqrt(static_cast<float>(p.shape.qk_dim));
    for (int layer = 0; layer < count_; ++layer) {
      keys.push_back(ggml_new_tensor_3d(ctx, type, p.shape.qk_dim, p.shape.kv_heads, slots));
      values.push_back(ggml_new_tensor_3d(ctx, type, p.shape.v_dim, p.shape.kv_heads, slots));
      ggml_build_forward_expand(
          graph_, ggml_flash_attn_ext(ctx, by_head(q), by_head(keys.back()), by_head(values.back()),
                                      mask, scale, 0.0f, 0.0f));
    }
    buffer_.reset(ggml_backend_alloc_ctx_tensors(ctx, backend_.get()));
    if (buffer_ == nullptr) throw std::runtime_error("ggml has no memory for these tensors");
    fill(q, DType::kF32, 1);
    for (size_t i = 0; i < keys.size(); ++i) {
      fill(keys[i], p.kv_type, 2 * i + 1);
      fill(values[i], p.kv_type, 2 * i + 2);
    }
    set_mask(p, mask, slots);
  }

  int count() const { return count_; }

  /// Seconds of one layer.
  double run() {
    const auto start = std::chrono::steady_clock::now();
    const ggml_status status = ggml_backend_graph_compute(backend_.get(), graph_);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    if (status != GGML_STATUS_SUCCESS) throw std::runtime_error(ggml_status_to_string(status));
    return seconds.count() / count_;
  }

 private:
  static void set_mask(const OpProblem& p, ggml_tensor* mask, int64_t slots) {
    std::vector<ggml_fp16_t> cells(static_cast<size_t>(slots) * static_cast<size_t>(p.batch),
                                   ggml_fp32_to_fp16(-std::numeric_limits<float>::infinity()));
    const ggml_fp16_t seen = ggml_fp32_to_fp16(0.0f);
    for (int64_t row = 0; row < p.batch; ++row) {
      const auto first = cells.begin() + row * slots;
      std::fill(first, first + p.prefix, seen);
      std::fill(first + p.prefix + row * p.context, first + p.prefix + (row + 1) * p.context, seen);
    }
    ggml_backend_tensor_set(mask, cells.data(), 0, cells.size() * sizeof(ggml_fp16_t));
  }

  ggml_backend_ptr backend_;
  ggml_context_ptr context_;
  ggml_backend_buffer_ptr buffer_;
  ggml_cgraph* graph_ = nullptr;
  int count_ = 0;
};

struct Options {
  OpProblem problem;
  std::vector<int64_t> prefix = {4096};
  std::vector<int64_t> context = {128};
  std::vector<int32_t> batch = {1, 8, 32};
  std::vector<std::string> kv_types = {"f16"};
  int32_t threads = static_cast<int32_t>(std::max(1U, std::thread::hardware_concurrency()));
  int rounds = 10;
};

nlohmann::json measure(const OpProblem& p, const Options& options) {
  relay::measure::check(p);
  Layers layers(p, options.threads);
  layers.run();  // page tables, clocks
  std::vector<double> seconds;
  for (int round = 0; round < options.rounds; ++round) seconds.push_back(layers.run());
  const relay::measure::Timing time = relay::measure::timing_of(seconds);
  nlohmann::json json = relay::measure::json_of(p);
  json.update({{"layers", layers.count()},
               {"rounds", options.rounds},
               {"seconds_median", time.median},
               {"seconds_quartile_low", time.low},
               {"seconds_quartile_high", time.high},
               {"seconds_best", time.best}});
  return json;
}

void run(const Options& options) {
  nlohmann::json results = nlohmann::json::array();
  OpProblem p = options.problem;
  for (const std::string& kv_type : options.kv_types) {
    p.kv_type = relay::measure::parse_kv_type(kv_type);
    for (int64_t prefix : options.prefix) {
      p.prefix = prefix;
      for (int64_t context : options.context) {
        p.context = context;
        for (int32_t batch : options.batch) {
          p.batch = batch;
          results.push_back(measure(p, options));
        }
      }
    }
  }
  const nlohmann::json report = {{"benchmark", "ggml-op"},
                                 {"cpu", relay::measure::cpu_model()},
                                 {"threads", options.threads},
                                 {"results", std::move(results)}};
  std::puts(report.dump(2).c_str());
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app{"ggml's flash attention on the CPU, timed as `relay bench op` times Relay's; JSON",
               "relay-ggml-op-bench"};
  relay::HeadShape& shape = options.problem.shape;
  shape = {.q_heads = 32, .kv_heads = 8, .qk_dim = 128, .v_dim = 128};
  const auto count = [&app](const char* name, auto& into, const char* what) {
    app.add_option(name, into, what)->check(CLI::PositiveNumber)->capture_default_str();
  };
  const auto several = [&app](const char* name, auto& into, const char* what) {
    app.add_option(name, into, what)->delimiter(',')->capture_default_str();
  };
  count("--heads", shape.q_heads, "Query heads");
  count("--kv-heads", shape.kv_heads, "KV heads");
  count("--head-dim", shape.qk_dim, "Elements of a Q, K and V vector");
  count("--threads", options.threads, "Threads");
  count("--rounds", options.rounds, "Rounds");
  several("--prefix", options.prefix, "Shared KV slots; several: a,b,c");
  several("--context", options.context, "KV slots of each request's own; several: a,b,c");
  several("--batch", options.batch, "Requests, one row each; several: a,b,c");
  several("--kv-type", options.kv_types, "f32, f16, bf16, q8_0; several: a,b,c");
  CLI11_PARSE(app, argc, argv);
  shape.v_dim = shape.qk_dim;
  try {
    run(options);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "relay-ggml-op-bench: error: %s\n", error.what());
    return 1;
  }
  return 0;
}
