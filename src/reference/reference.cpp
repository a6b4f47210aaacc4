// Dense attention in double precision. Nothing here is fast and nothing is shared with the kernels:
// every formula stands as it does in relay/inputs.h.
#include "relay/reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "reference/logits.h"

namespace relay {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <typename T>
T load(const void* from, int64_t index) {
  T value;
  std::memcpy(&value, static_cast<const char*>(from) + index * static_cast<int64_t>(sizeof(T)),
              sizeof(T));
  return value;
}

double f16_to_double(uint16_t bits) {
  const double sign = (bits & 0x8000) ? -1.0 : 1.0;
  const int exponent = (bits >> 10) & 0x1f;
  const int mantissa = bits & 0x3ff;
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  if (exponent < 31) return sign * std::ldexp(1024 + mantissa, exponent - 25);
  return mantissa == 0 ? sign * kInfinity : std::numeric_limits<double>::quiet_NaN();
}

double bf16_to_double(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

double f8_e4m3_to_double(uint8_t bits) {
  const double sign = (bits & 0x80) ? -1.0 : 1.0;
  const int exponent = (bits >> 3) & 0xf;
  const int mantissa = bits & 0x7;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<double>::quiet_NaN();
  return sign *
         (exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10));
}

double q8_0_to_double(const void* vector, int64_t i) {
  constexpr int64_t kBlock = 32;
  constexpr int64_t kBlockBytes = 2 + kBlock;
  const char* block = static_cast<const char*>(vector) + i / kBlock * kBlockBytes;
  return f16_to_double(load<uint16_t>(block, 0)) * load<int8_t>(block + 2, i % kBlock);
}

std::vector<double> decode_vector(const KvPlane& plane, const void* vector, int64_t count) {
  std::vector<double> out(count);
  if (plane.type == DType::kCustom) {
    std::vector<float> unpacked(count);
    plane.unpack(vector, unpacked.data(), count);
    std::copy(unpacked.begin(), unpacked.end(), out.begin());
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = decode_element(plane.type, vector, i);
  }
  return out;
}

}  // namespace

double decode_element(DType type, const void* vector, int64_t i) {
  switch (type) {
    case DType::kF32:
      return load<float>(vector, i);
    case DType::kF16:
      return f16_to_double(load<uint16_t>(vector, i));
    case DType::kBF16:
      return bf16_to_double(load<uint16_t>(vector, i));
    case DType::kQ8_0:
      return q8_0_to_double(vector, i);
    case DType::kF8E4M3:
      return f8_e4m3_to_double(load<uint8_t>(vector, i));
    case DType::kCustom:
      break;
  }
  throw Error("decode_element: a custom type is read through KvPlane::unpack, as a whole vector");
}

std::vector<double> reference_logits(const HeadShape& shape, const AttentionInputs& inputs,
                                     int64_t row, int64_t head, int64_t position,
                                     std::span<const AttendedSlot> slots) {
  const KvCache& kv = inputs.kv;
  const int64_t kv_head = head / shape.group();
  const double slope = inputs.slopes ? inputs.slopes[head] : 1.0;

  std::vector<double> q(shape.qk_dim);
  const void* q_vector = inputs.q.at(row, head);
  for (int64_t i = 0; i < shape.qk_dim; ++i) q[i] = decode_element(inputs.q.type, q_vector, i);

  std::vector<double> logits;
  logits.reserve(slots.size());
  for (const AttendedSlot& attended : slots) {
    double bias = 0.0;
    if (inputs.bias.data) {
      const double mask =
          decode_element(inputs.bias.type, inputs.bias.at(row, head), attended.column);
      if (mask == -kInfinity) {  // hidden whatever the slope, also if that is 0
        logits.push_back(-kInfinity);
        continue;
      }
      bias = slope * mask;
    } else if (inputs.slopes) {
      bias = slope * static_cast<double>(attended.column - position);
    }

    const std::vector<double> k =
        decode_vector(kv.k, kv.k.at(kv.block_size, attended.slot, kv_head), shape.qk_dim);
    double dot = 0.0;
    for (int64_t i = 0; i < shape.qk_dim; ++i) dot += q[i] * k[i];

    double logit = inputs.scale * dot;
    if (inputs.softcap > 0) logit = inputs.softcap * std::tanh(logit / inputs.softcap);
    logits.push_back(logit + bias);
  }
  return logits;
}

void reference_row(const HeadShape& shape, const AttentionInputs& inputs, int64_t row,
                   int64_t position, std::span<const AttendedSlot> slots, double* out,
                   double* lse) {
  const KvCache& kv = inputs.kv;
  for (int64_t head = 0; head < shape.q_heads; ++head) {
    const std::vector<double> logits = reference_logits(shape, inputs, row, head, position, slots);
    const double sink = inputs.sinks ? inputs.sinks[head] : -kInfinity;

    double max = sink;
    for (double logit : logits) max = std::max(max, logit);

    double* head_out = out + head * shape.v_dim;
    std::fill_n(head_out, shape.v_dim, 0.0);
    if (max == -kInfinity) {  // nothing is visible
      if (lse) lse[head] = -kInfinity;
      continue;
    }

    double sum = std::exp(sink - max);
    for (size_t s = 0; s < slots.size(); ++s) {
      if (logits[s] == -kInfinity) continue;  // its V may be anything
      const double weight = std::exp(logits[s] - max);
      sum += weight;
      const std::vector<double> v = decode_vector(
          kv.v, kv.v.at(kv.block_size, slots[s].slot, head / shape.group()), shape.v_dim);
      for (int64_t j = 0; j < shape.v_dim; ++j) head_out[j] += weight * v[j];
    }
    for (int64_t j = 0; j < shape.v_dim; ++j) head_out[j] /= sum;
    if (lse) lse[head] = max + std::log(sum);
  }
}

}  // namespace relay
