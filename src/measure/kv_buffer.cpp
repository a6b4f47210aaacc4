#include "measure/kv_buffer.h"

#include <cstring>
#include <random>

namespace relay::measure {

void KvBuffer::resize(int64_t bytes) {
  size_ = (static_cast<size_t>(bytes) + 63) / 64 * 64;
  data_.reserve(static_cast<int64_t>(size_));
}

RandomBits random_bits(DType type) {
  switch (type) {
    case DType::kF32:
      return {.keep = 0x81ffffff81ffffff, .set = 0x3e0000003e000000};
    case DType::kBF16:
      return {.keep = 0x81ff81ff81ff81ff, .set = 0x3e003e003e003e00};
    case DType::kF16:
      return {.keep = 0x8fff8fff8fff8fff, .set = 0x3000300030003000};
    case DType::kF8E4M3:
      return {.keep = 0x9f9f9f9f9f9f9f9f, .set = 0x2020202020202020};
    default:
      return {};
  }
}

void fill_random(DType type, KvBuffer& bytes, uint64_t seed) {
  std::mt19937_64 random(seed);
  const RandomBits bits = random_bits(type);
  auto* words = reinterpret_cast<uint64_t*>(bytes.data());
  const size_t count = bytes.size() / 8;
  for (size_t i = 0; i < count; ++i) words[i] = bits.of(random());
  if (type == DType::kQ8_0) {
    const uint16_t scale = 0x2000;  // 2^-7: int8 becomes -1 to 1
    for (size_t block = 0; block + 34 <= bytes.size(); block += 34) {
      std::memcpy(bytes.data() + block, &scale, sizeof(scale));
    }
  }
}

}  // namespace relay::measure
