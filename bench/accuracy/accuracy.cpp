#include "bench/accuracy/accuracy.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>

#include "bench/ggml/cpu_backend.h"
#include "graph_runner.h"
#include "statistics.h"

namespace relay::bench {
namespace {

constexpr size_t kMaxTensors = 32;
constexpr int64_t kComparedRows = 32;

int64_t visible_slots(const AccuracyCase& c, int64_t row) {
  return c.causal ? c.slots - c.rows + row + 1 : c.slots - c.rows;  // without a row's own
}

bool visible(const AccuracyCase& c, int64_t row, int64_t slot) {
  return slot < visible_slots(c, row) || (!c.causal && slot == c.slots - c.rows + row);
}

void set_values(ggml_tensor* t, const std::vector<float>& values) {
  std::vector<char> raw(ggml_nbytes(t));
  ggml_quantize_chunk(t->type, values.data(), raw.data(), 0, ggml_nrows(t), t->ne[0], nullptr);
  ggml_backend_tensor_set(t, raw.data(), 0, raw.size());
}

void check(const AccuracyCase& c) {
  if (c.kv_heads < 1 || c.group < 1 || c.rows < 1) throw Error("a case has heads and rows");
  if (c.head_dim < 32 || c.head_dim % 32 != 0) throw Error("a head size is a multiple of 32");
  if (visible_slots(c, 0) < 1) {
    throw Error(std::to_string(c.slots) + " slots are too few for " + std::to_string(c.rows) +
                " rows");
  }
}

void require(ggml_status status) {
  if (status != GGML_STATUS_SUCCESS) throw std::runtime_error(ggml_status_to_string(status));
}

}  // namespace

const char* to_string(Values values) {
  switch (values) {
    case Values::kRealistic:
      return "realistic";
    case Values::kPeaked:
      return "peaked";
    case Values::kFlat:
      return "flat";
  }
  return "?";
}

AccuracyGraph::AccuracyGraph(const AccuracyCase& c, int32_t threads)
    : threads_(threads), backend_(ggml_backend_dev_init(cpu_device(), nullptr)) {
  check(c);
  const auto set_threads =
      reinterpret_cast<ggml_backend_set_n_threads_t>(ggml_backend_reg_get_proc_address(
          ggml_backend_dev_backend_reg(cpu_device()), "ggml_backend_set_n_threads"));
  set_threads(backend_.get(), threads);

  context_.reset(ggml_init({.mem_size = kMaxTensors * ggml_tensor_overhead() +
                                        2 * ggml_graph_overhead_custom(kMaxTensors, false),
                            .mem_buffer = nullptr,
                            .no_alloc = true}));
  ggml_context* const ctx = context_.get();
  const ggml_type type = ggml_type_of(c.kv_type);
  const int64_t heads = int64_t{c.kv_heads} * c.group;
  q_ = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, c.head_dim, heads, c.rows);
  k_ = ggml_new_tensor_3d(ctx, type, c.head_dim, c.kv_heads, c.slots);
  v_ = ggml_new_tensor_3d(ctx, type, c.head_dim, c.kv_heads, c.slots);
  mask_ = ggml_new_tensor_2d(ctx, GGML_TYPE_F16, c.slots, c.rows);
  ggml_tensor* const q = ggml_permute(ctx, q_, 0, 2, 1, 3);
  ggml_tensor* const k = ggml_permute(ctx, k_, 0, 2, 1, 3);
  ggml_tensor* const v = ggml_permute(ctx, v_, 0, 2, 1, 3);
  const float scale = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
  const auto graph_of = [ctx](ggml_tensor* result) {
    ggml_cgraph* const graph = ggml_new_graph_custom(ctx, kMaxTensors, false);
    ggml_build_forward_expand(graph, result);
    return graph;
  };
  flash_ = graph_of(ggml_flash_attn_ext(ctx, q, k, v, mask_, scale, 0.0f, 0.0f));
  if (!ggml_is_quantized(type)) {
    ggml_tensor* const weights = ggml_soft_max_ext(ctx, ggml_mul_mat(ctx, k, q), mask_, scale, 0);
    ggml_tensor* const v_rows = ggml_cont(ctx, ggml_transpose(ctx, v));
    ggml_tensor* const out = ggml_mul_mat(ctx, v_rows, weights);
    softmax_ = graph_of(ggml_cont(ctx, ggml_permute(ctx, out, 0, 2, 1, 3)));
  }
  buffer_.reset(ggml_backend_alloc_ctx_tensors(ctx, backend_.get()));
  if (buffer_ == nullptr) throw std::runtime_error("ggml has no memory for these tensors");
  fill(c);
  const ggml::Verdict verdict =
      ggml::read_flash_attention(*ggml_graph_node(flash_, -1), attention_);
  if (verdict != ggml::Verdict::kServed) throw std::runtime_error(ggml::to_string(verdict));
}

void AccuracyGraph::fill(const AccuracyCase& c) {
  std::mt19937_64 random(1);
  std::normal_distribution<float> normal;
  const auto normal_values = [&](const ggml_tensor* t, float mean, float deviation) {
    std::vector<float> values(static_cast<size_t>(ggml_nelements(t)));
    for (float& x : values) x = mean + deviation * normal(random);
    return values;
  };
  const std::vector<float> k = normal_values(k_, 0, 1);
  set_values(k_, k);
  set_values(v_, normal_values(v_, c.values == Values::kFlat ? 1 : 0, 1));

  // A logit is q.k / sqrt(dim): as spread as the elements of q are.
  constexpr float kDeviation[] = {2.0f, 0.5f, 0.01f};
  std::vector<float> q = normal_values(q_, 0, kDeviation[static_cast<size_t>(c.values)]);
  if (c.values == Values::kPeaked) {
    // Plus a multiple of one key, with which it has a logit near 20; others are spread by about 2.
    const float multiple = 20.0f / std::sqrt(static_cast<float>(c.head_dim));
    const int64_t heads = int64_t{c.kv_heads} * c.group;
    for (int64_t at = 0; at < c.rows * heads; ++at) {
      const int64_t slot =
          std::uniform_int_distribution<int64_t>(0, visible_slots(c, at / heads) - 1)(random);
      const int64_t key = slot * c.kv_heads + at % heads / c.group;
      for (int64_t i = 0; i < c.head_dim; ++i) {
        q[static_cast<size_t>(at * c.head_dim + i)] +=
            multiple * k[static_cast<size_t>(key * c.head_dim + i)];
      }
    }
  }
  set_values(q_, q);

  std::vector<float> mask(static_cast<size_t>(ggml_nelements(mask_)));
  for (int64_t row = 0; row < c.rows; ++row) {
    for (int64_t slot = 0; slot < c.slots; ++slot) {
      mask[static_cast<size_t>(row * c.slots + slot)] =
          visible(c, row, slot) ? 0.0f : -std::numeric_limits<float>::infinity();
    }
  }
  set_values(mask_, mask);
}

std::vector<float> AccuracyGraph::output(ggml_cgraph* graph) const {
  const ggml_tensor* const result = ggml_graph_node(graph, -1);
  std::vector<float> values(static_cast<size_t>(ggml_nelements(result)));
  ggml_backend_tensor_get(result, values.data(), 0, values.size() * sizeof(float));
  return values;
}

std::vector<float> AccuracyGraph::ggml_flash() {
  require(ggml_backend_graph_compute(backend_.get(), flash_));
  return output(flash_);
}

std::optional<std::vector<float>> AccuracyGraph::ggml_softmax() {
  if (softmax_ == nullptr) return std::nullopt;
  require(ggml_backend_graph_compute(backend_.get(), softmax_));
  return output(softmax_);
}

std::vector<float> AccuracyGraph::relay() {
  const ggml::Statistics& statistics = ggml::Statistics::instance();
  const int64_t served = statistics.nodes(ggml::Verdict::kServed);
  ggml::GraphRunner runner;
  runner.set_threads(threads_);
  require(runner.run(backend_.get(), flash_, ggml_backend_graph_compute));
  if (statistics.nodes(ggml::Verdict::kServed) == served) {
    throw std::runtime_error("Relay left the node to ggml");
  }
  return output(flash_);
}

std::vector<AttendedSlot> all_slots(const AccuracyGraph& graph) {
  std::vector<AttendedSlot> slots(static_cast<size_t>(graph.slots()));
  for (size_t s = 0; s < slots.size(); ++s) {
    slots[s] = {.slot = static_cast<int64_t>(s), .column = static_cast<int64_t>(s)};
  }
  return slots;
}

ExactRows exact_rows(const AccuracyGraph& graph, int64_t limit, measure::ThreadPool& pool) {
  const int64_t rows = graph.rows();
  const int64_t count = std::min(limit, rows);
  const int64_t width = int64_t{graph.shape().q_heads} * graph.shape().v_dim;
  ExactRows exact;
  // The last row of each of `count` equal parts: causal rows are the longer, the later.
  for (int64_t i = 1; i <= count; ++i) exact.rows.push_back(i * rows / count - 1);
  exact.out.resize(static_cast<size_t>(count * width));
  const std::vector<AttendedSlot> slots = all_slots(graph);
  pool.run([&](int32_t thread) {
    for (int64_t i = thread; i < count; i += pool.size()) {
      reference_row(graph.shape(), graph.inputs(), exact.rows[static_cast<size_t>(i)], 0, slots,
                    exact.out.data() + i * width, nullptr);
    }
  });
  return exact;
}

OutputError ExactRows::error_of(std::span<const float> output) const {
  const size_t width = out.size() / rows.size();
  double squares = 0, error_squares = 0, max = 0;
  for (size_t i = 0; i < rows.size(); ++i) {
    for (size_t j = 0; j < width; ++j) {
      const double exact = out[i * width + j];
      const double error = output[static_cast<size_t>(rows[i]) * width + j] - exact;
      squares += exact * exact;
      error_squares += error * error;
      max = std::max(max, std::fabs(error));
    }
  }
  const double count = static_cast<double>(out.size());
  return {.rms = std::sqrt(error_squares / squares), .max = max / std::sqrt(squares / count)};
}

AccuracyResult measure_accuracy(const AccuracyCase& c, measure::ThreadPool& pool) {
  AccuracyGraph graph(c, pool.size());
  const ExactRows exact = exact_rows(graph, kComparedRows, pool);
  AccuracyResult result{.problem = c,
                        .ggml_flash = exact.error_of(graph.ggml_flash()),
                        .ggml_softmax = std::nullopt,
                        .relay = exact.error_of(graph.relay())};
  if (const auto output = graph.ggml_softmax()) result.ggml_softmax = exact.error_of(*output);
  return result;
}

}  // namespace relay::bench
