#include "core/tolerance.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "core/precision.h"

namespace relay::test {
namespace {

constexpr double kUnit = 0x1p-24;
constexpr double kBF16Unit = 0x1p-8;  // 8 significant bits, one of them implicit
constexpr double kHalvesUnit = 3 * 0x1p-16;
constexpr int kBlock = 32;  // elements of a block of q8_0
constexpr double kTile = 64;
constexpr double kByteUnit = 1.0 / 254;
constexpr double kWeightUnit = 1.0 / 32767;
constexpr double kExp = 8;
constexpr double kCoarseExp = 1.1e-4;
constexpr double kTanh = 16;
constexpr double kFlushed = 0x1p-100;
constexpr double kInfinity = std::numeric_limits<double>::infinity();

double square(double x) { return x * x; }

double norm(std::span<const float> values) {
  double sum = 0;
  for (float value : values) sum += square(value);
  return std::sqrt(sum);
}

double largest_of(std::span<const float> values) {
  double largest = 0;
  for (float value : values) largest = std::max(largest, std::fabs(static_cast<double>(value)));
  return largest;
}

/// Norm of each element's bound where elements are rounded to bytes, in units of u_b.
double block_norm(std::span<const float> q) {
  double sum = 0;
  for (size_t i = 0; i < q.size(); i += kBlock) {
    const auto block = q.subspan(i, std::min<size_t>(kBlock, q.size() - i));
    sum += static_cast<double>(block.size()) * square(largest_of(block));
  }
  return std::sqrt(sum);
}

Arithmetic arithmetic_of(Form form) {
  switch (form) {
    case Form::kF32:
      return {};
    case Form::kBF16:
      return {.query_rounding = kBF16Unit, .weight_rounding = kBF16Unit + kCoarseExp};
    case Form::kBF16Sums:
      return {.query_rounding = kHalvesUnit, .weight_rounding = kHalvesUnit};
    case Form::kBytes:
      return {.byte_rounding = kByteUnit, .weight_unit = kWeightUnit};
    case Form::kBF16Keys:
      return {.query_rounding = kBF16Unit, .key_rounding = kBF16Unit, .weight_unit = kWeightUnit};
  }
  throw std::logic_error("no such form");
}

}  // namespace

Arithmetic arithmetic_of(const std::string& isa, const HeadShape& shape, DType k_type,
                         DType v_type) {
  const Precision precision = precision_of(isa, shape, k_type, v_type);
  Arithmetic a;
  for (Form form : {precision.few, precision.many}) {
    const Arithmetic other = arithmetic_of(form);
    a.query_rounding = std::max(a.query_rounding, other.query_rounding);
    a.key_rounding = std::max(a.key_rounding, other.key_rounding);
    a.byte_rounding = std::max(a.byte_rounding, other.byte_rounding);
    a.weight_rounding = std::max(a.weight_rounding, other.weight_rounding);
    a.weight_unit = std::max(a.weight_unit, other.weight_unit);
  }
  return a;
}

double unit_roundoff(DType type) {
  if (type == DType::kF16) return 0x1p-11;
  if (type == DType::kBF16) return kBF16Unit;
  return kUnit;
}

double smallest_step(DType type) {
  if (type == DType::kF16) return 0x1p-25;
  return 0x1p-126;
}

Bounds derive_bounds(const Arithmetic& arithmetic, const OperatorCase& op, int64_t row,
                     int64_t head, int64_t position, std::span<const AttendedSlot> slots,
                     std::span<const double> logits, std::span<const double> out, double lse) {
  const HeadShape& shape = op.config.shape;
  const int64_t kv_head = head / shape.group();
  const double u = kUnit;
  const double d = shape.qk_dim;
  const double n = static_cast<double>(slots.size());
  const double cap = op.config.softcap;
  const double slope = op.config.slopes ? op.slopes[head] : 1.0;
  const double sink = op.config.sinks ? op.sinks[head] : -kInfinity;

  Bounds bounds;
  bounds.worst.assign(shape.v_dim, 0.0);
  bounds.variance.assign(shape.v_dim, 0.0);
  double max = sink;
  for (double logit : logits) max = std::max(max, logit);
  if (max == -kInfinity) return bounds;  // nothing attended: 0 and -inf, exactly

  const AttentionInputs oracle = op.oracle_inputs();
  const auto* q = static_cast<const float*>(oracle.q.at(row, head));
  const std::span<const float> query(q, static_cast<size_t>(shape.qk_dim));
  const double q_norm = norm(query);
  const double q_bytes =
      arithmetic.byte_rounding > 0 ? arithmetic.byte_rounding * block_norm(query) : 0;
  const double q_error =
      std::max((arithmetic.query_rounding + arithmetic.key_rounding) * q_norm, q_bytes);
  const double q_variance = std::max(
      (square(arithmetic.query_rounding) + square(arithmetic.key_rounding)) * square(q_norm),
      square(q_bytes));

  std::vector<double> weight(slots.size()), error(slots.size()), logit_variance(slots.size());
  const double sink_weight = std::exp(sink - lse);
  double sum_error = sink_weight > 0 ? sink_weight * std::expm1(u * (4 * (max - sink) + kExp)) : 0;
  for (size_t s = 0; s < slots.size(); ++s) {
    if (logits[s] == -kInfinity) continue;
    const double key = std::fabs(op.scale) * norm(op.kv.k.decoded(slots[s].slot, kv_head));
    const double product = q_norm * key;
    double bias = 0;
    if (oracle.bias.data) {
      bias = slope * decode_element(oracle.bias.type, oracle.bias.at(row, head), slots[s].column);
    } else if (op.config.slopes) {
      bias = slope * static_cast<double>(slots[s].column - position);
    }
    const double other = u * (kTanh * cap + 4 * (std::fabs(logits[s]) + std::fabs(bias)) +
                              4 * (max - logits[s]) + kExp);
    const double delta = (d + 8) * u * product + q_error * key + other;
    weight[s] = std::exp(logits[s] - lse);
    error[s] = std::expm1(std::min(delta, 100.0)) + arithmetic.weight_rounding;
    sum_error += weight[s] * error[s];
    // Without a cap the logit less its bias is scale * q.k; with one, q.k is larger, at most
    // |q||k|.
    const double dot = cap > 0 ? product : logits[s] - bias;
    logit_variance[s] = (square(product * u) + square(key) * q_variance / d) / 3 +
                        square(u) * d * square(dot) / 9 + square(other) / 3;
  }
  bounds.linear = sum_error < 0.1;

  const double sums = (3 * n + 640) * u;
  std::vector<double> magnitude(shape.v_dim), weighted(shape.v_dim), squares(shape.v_dim),
      largest(shape.v_dim);
  double weight_squares = square(sink_weight);
  for (size_t s = 0; s < slots.size(); ++s) {
    if (logits[s] == -kInfinity) continue;
    weight_squares += square(weight[s]);
    const std::span<const float> v = op.kv.v.decoded(slots[s].slot, kv_head);
    const double w = weight[s];
    const double w_square = w * w;
    const double w_error = w * (error[s] + sum_error) + kFlushed;
    const double spread = w_square * logit_variance[s];
    for (int64_t j = 0; j < shape.v_dim; ++j) {
      const double value = std::fabs(static_cast<double>(v[j]));
      magnitude[j] += w * value;
      weighted[j] += w_error * value;
      squares[j] += w_square * value * value;
      largest[j] = std::max(largest[j], value);
      bounds.variance[j] += spread * square(v[j] - out[j]);
    }
    if (arithmetic.weight_unit == 0) continue;
    for (int64_t j = 0; j < shape.v_dim; j += kBlock) {
      const double scaled = w * arithmetic.weight_unit * largest_of(v.subspan(j, kBlock));
      for (int64_t i = j; i < j + kBlock; ++i) {
        weighted[i] += kTile / 2 * scaled;
        bounds.variance[i] += kTile / 12 * square(scaled);
      }
    }
  }
  // The sink is a slot with the value 0.
  const double sink_spread =
      square(sink_weight * u * (4 * (max - std::max(sink, -1e30)) + kExp)) / 3;
  for (int64_t j = 0; j < shape.v_dim; ++j) {
    const double trivial = 2 * largest[j] * (1 + sums);
    const double derived = (weighted[j] + (2 * sums + 4 * u) * magnitude[j]) / (1 - sum_error);
    bounds.worst[j] = sum_error < 0.9 ? std::min(derived, trivial) : trivial;
    const double o2 = square(out[j]);
    bounds.variance[j] +=
        sink_spread * o2 +
        square(arithmetic.weight_rounding) / 3 * (squares[j] + weight_squares * o2) +
        4 * square(u) / 3 * (n / 3 * o2 + n / 2 * squares[j]) + 16 * square(u) * o2;
  }
  bounds.lse = (sum_error < 0.9 ? -std::log1p(-sum_error) : 1e30) + sums + kExp * u +
               4 * u * (std::fabs(lse) + std::fabs(max));
  return bounds;
}

}  // namespace relay::test
