#include "core/numeric.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

namespace relay::test {
namespace {

uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

template <typename T>
void store(void* to, int64_t index, T value) {
  std::memcpy(static_cast<char*>(to) + index * static_cast<int64_t>(sizeof(T)), &value, sizeof(T));
}

int8_t to_int8(float value) {
  return static_cast<int8_t>(std::clamp(std::nearbyint(value), -127.0f, 127.0f));
}

float absolute_max(std::span<const float> values) {
  float max = 0;
  for (float value : values) max = std::max(max, std::fabs(value));
  return max;
}

}  // namespace

uint16_t to_f16(float value) {
  const uint16_t sign = static_cast<uint16_t>(bits_of(value) >> 16 & 0x8000);
  if (std::isnan(value)) return sign | 0x7e00;
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude >= 65520.0) return sign | 0x7c00;  // the midpoint above the largest f16 rounds up
  // One unit in the last place is 2^(e-10), and 2^-24 for subnormals; nearbyint ties to even.
  int exponent = 0;
  std::frexp(magnitude, &exponent);
  exponent = std::max(exponent - 1, -14);
  const int units = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  // `units` has the implicit bit at 1024 (absent for subnormals); a carry moves into the exponent.
  const int biased = units >= 1024 ? exponent + 15 : 0;
  const int bits = units >= 1024 ? (biased << 10) + (units - 1024) : units;
  return static_cast<uint16_t>(sign | bits);
}

uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if (std::isnan(value)) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

int64_t custom_bytes(int64_t count) { return static_cast<int64_t>(sizeof(float)) + count; }

void unpack_custom(const void* row, float* out, int64_t count) {
  float scale;
  std::memcpy(&scale, row, sizeof(scale));
  const int8_t* values = static_cast<const int8_t*>(row) + sizeof(scale);
  for (int64_t i = 0; i < count; ++i) out[i] = scale * static_cast<float>(values[i]);
}

int64_t vector_bytes(DType type, int64_t count) {
  switch (type) {
    case DType::kF32:
      return 4 * count;
    case DType::kF16:
    case DType::kBF16:
      return 2 * count;
    case DType::kQ8_0:
      return count / 32 * 34;
    case DType::kF8E4M3:
      return count;
    case DType::kCustom:
      return custom_bytes(count);
  }
  return 0;
}

int64_t element_alignment(DType type) {
  switch (type) {
    case DType::kF32:
      return 4;
    case DType::kF16:
    case DType::kBF16:
      return 2;
    case DType::kQ8_0:
    case DType::kF8E4M3:
    case DType::kCustom:
      return 1;
  }
  return 1;
}

void encode(DType type, std::span<const float> values, void* to) {
  const int64_t count = static_cast<int64_t>(values.size());
  switch (type) {
    case DType::kF32:
      std::memcpy(to, values.data(), values.size_bytes());
      return;
    case DType::kF16:
      for (int64_t i = 0; i < count; ++i) store(to, i, to_f16(values[i]));
      return;
    case DType::kBF16:
      for (int64_t i = 0; i < count; ++i) store(to, i, to_bf16(values[i]));
      return;
    case DType::kQ8_0:
      for (int64_t block = 0; block < count / 32; ++block) {
        const std::span<const float> part = values.subspan(block * 32, 32);
        char* bytes = static_cast<char*>(to) + block * 34;
        const float scale = absolute_max(part) / 127.0f;
        store(bytes, 0, to_f16(scale));
        for (int64_t i = 0; i < 32; ++i) {
          store(bytes + 2, i, to_int8(scale > 0 ? part[i] / scale : 0.0f));
        }
      }
      return;
    case DType::kF8E4M3:
      break;  // GPUs only: tests/cuda has its own
    case DType::kCustom: {
      const float scale = absolute_max(values) / 127.0f;
      store(to, 0, scale);
      char* bytes = static_cast<char*>(to) + sizeof(scale);
      for (int64_t i = 0; i < count; ++i) {
        store(bytes, i, to_int8(scale > 0 ? values[i] / scale : 0.0f));
      }
      return;
    }
  }
}

}  // namespace relay::test
