// Relay's error is no larger than that of stock ggml's flash attention on the same data, or not by
// more than what Relay rounds and ggml does not: its mean square is at most ggml's plus the
// variance of those roundings, by the model of core/tolerance.h.
//
// In f32 that is the order of summation: next to nothing beside ggml's error for q8_0 and for f16
// KV in decoding, about as much as it for f32, and for prompts in f16, which ggml expands to f32.
// With bf16 both round queries, to the same values; Relay rounds the weights, too, which ggml keeps
// in f32.
#include "bench/accuracy/accuracy.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "core/operator_case.h"
#include "core/tolerance.h"
#include "reference/logits.h"

namespace relay::bench {
namespace {

constexpr int32_t kThreads = 2;
constexpr int64_t kRows = 8;           // compared
constexpr int64_t kGgmlTileRows = 64;  // from here on ggml expands f16 K and V instead of rounding

/// u_q of core/tolerance.h for ggml.
double ggml_query_rounding(const AccuracyCase& c) {
  switch (c.kv_type) {
    case DType::kF16:
      return c.rows < kGgmlTileRows ? test::unit_roundoff(DType::kF16) : 0;
    case DType::kBF16:
      return test::unit_roundoff(DType::kBF16);
    case DType::kQ8_0:
      // Half a step of 1/127 of the largest of 32 elements, which is at most sqrt(32) of their rms.
      return std::sqrt(32.0) / 254;
    default:
      return 0;
  }
}

/// Gives the graph's values to the model's operator, which holds them in f32, exactly.
void copy_values(const AccuracyGraph& graph, const std::vector<int64_t>& rows,
                 test::OperatorCase& op) {
  const AttentionInputs& inputs = graph.inputs();
  const HeadShape& shape = graph.shape();
  op.scale = inputs.scale;
  std::vector<float> values(static_cast<size_t>(shape.qk_dim));
  const auto decode = [&values](DType type, const void* vector) {
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<float>(decode_element(type, vector, static_cast<int64_t>(i)));
    }
  };
  const auto copy = [&](const KvPlane& from, test::KvTensor& to) {
    for (int64_t slot = 0; slot < graph.slots(); ++slot) {
      for (int64_t head = 0; head < shape.kv_heads; ++head) {
        decode(from.type, from.at(INT64_MAX, slot, head));
        to.set(slot, head, values);
      }
    }
  };
  copy(inputs.kv.k, op.kv.k);
  copy(inputs.kv.v, op.kv.v);
  for (int64_t row : rows) {
    for (int64_t head = 0; head < shape.q_heads; ++head) {
      decode(inputs.q.type, inputs.q.at(row, head));
      op.q.set(row, head, values);
    }
  }
}

/// Modelled mean square of the error of `arithmetic`, relative to that of the output.
double modelled_square(const AccuracyGraph& graph, const ExactRows& exact,
                       const test::Arithmetic& arithmetic) {
  test::OperatorConfig config;
  config.shape = graph.shape();
  const std::vector<bool> unused(static_cast<size_t>(graph.slots()));
  test::OperatorCase op(config, graph.rows(), graph.slots(), 1, unused, 1);
  copy_values(graph, exact.rows, op);
  const int64_t heads = graph.shape().q_heads;
  const int64_t dim = graph.shape().v_dim;
  double variance = 0, squares = 0;
  for (size_t i = 0; i < exact.rows.size(); ++i) {
    for (int64_t head = 0; head < heads; ++head) {
      std::vector<AttendedSlot> slots;
      std::vector<double> logits;
      const std::vector<double> all =
          reference_logits(graph.shape(), graph.inputs(), exact.rows[i], head, 0, all_slots(graph));
      double sum = 0;  // the logits are far from overflow
      for (size_t s = 0; s < all.size(); ++s) {
        if (std::isinf(all[s])) continue;
        slots.push_back({.slot = static_cast<int64_t>(s), .column = static_cast<int64_t>(s)});
        logits.push_back(all[s]);
        sum += std::exp(all[s]);
      }
      const std::span<const double> out(
          exact.out.data() + (static_cast<int64_t>(i) * heads + head) * dim,
          static_cast<size_t>(dim));
      const test::Bounds bounds = test::derive_bounds(arithmetic, op, exact.rows[i], head, 0, slots,
                                                      logits, out, std::log(sum));
      for (size_t j = 0; j < out.size(); ++j) {
        variance += bounds.variance[j];
        squares += out[j] * out[j];
      }
    }
  }
  return variance / squares;
}

void compare(const AccuracyCase& c, measure::ThreadPool& pool) {
  AccuracyGraph graph(c, kThreads);
  const ExactRows exact = exact_rows(graph, kRows, pool);
  const double stock = exact.error_of(graph.ggml_flash()).rms;
  const double relay = exact.error_of(graph.relay()).rms;
  if (relay <= stock) return;

  test::Arithmetic arithmetic =
      test::arithmetic_of(current_isa(), graph.shape(), c.kv_type, c.kv_type);
  double stock_square = stock * stock;
  const double rounding = std::max(arithmetic.query_rounding + arithmetic.key_rounding,
                                   std::sqrt(32.0) * arithmetic.byte_rounding);
  if (rounding <= ggml_query_rounding(c)) {
    // Both round the queries. To the same values for bf16; otherwise these are two samples of one
    // variance, from N rows and heads: each has a relative standard deviation of sqrt(2 / N), and
    // three of their difference are allowed.
    if (rounding > 0 && c.kv_type != DType::kBF16) {
      const double samples = static_cast<double>(exact.rows.size()) * graph.shape().q_heads;
      stock_square *= 1 + 3 * std::sqrt(4 / samples);
    }
    arithmetic.query_rounding = arithmetic.key_rounding = arithmetic.byte_rounding = 0;
  }
  const double allowed = std::sqrt(stock_square + modelled_square(graph, exact, arithmetic));
  EXPECT_LE(relay, allowed) << to_string(c.kv_type) << ", " << c.kv_heads * c.group << "/"
                            << c.kv_heads << " heads of " << c.head_dim << ", " << c.rows
                            << (c.causal ? " causal" : "") << " rows, " << to_string(c.values)
                            << "; ggml's error is " << stock;
}

void compare_all(DType kv_type) {
  measure::ThreadPool pool(kThreads);
  AccuracyCase c{.kv_type = kv_type, .slots = 1024};
  for (Values values : {Values::kRealistic, Values::kPeaked, Values::kFlat}) {
    c.values = values;
    for (int64_t rows : {1, 8, 32, 512}) {
      c.rows = rows;
      c.causal = rows == 512;
      c.head_dim = 64;
      c.kv_heads = 4;
      c.group = 1;
      compare(c, pool);
      c.head_dim = 128;
      c.kv_heads = 1;
      c.group = 4;
      compare(c, pool);
    }
  }
}

TEST(Accuracy, F16) { compare_all(DType::kF16); }
TEST(Accuracy, BF16) { compare_all(DType::kBF16); }
TEST(Accuracy, Q8_0) { compare_all(DType::kQ8_0); }
TEST(Accuracy, F32) { compare_all(DType::kF32); }

}  // namespace
}  // namespace relay::bench
