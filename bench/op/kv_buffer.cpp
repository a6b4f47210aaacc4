#include "bench/op/kv_buffer.h"

#include <cstring>
#include <new>
#include <random>

namespace relay::bench {

void KvBuffer::resize(int64_t bytes) {
  size_ = (static_cast<size_t>(bytes) + 63) / 64 * 64;
  data_.reset(static_cast<uint8_t*>(std::aligned_alloc(64, size_)));
  if (!data_) throw std::bad_alloc();
}

void fill_random(DType type, KvBuffer& bytes, uint64_t seed) {
  std::mt19937_64 random(seed);
  auto* words = reinterpret_cast<uint64_t*>(bytes.data());
  const size_t count = bytes.size() / 8;
  // Sign and mantissa random, magnitude between 2^-3 and 2: masks keep the exponent in range.
  for (size_t i = 0; i < count; ++i) {
    const uint64_t word = random();
    switch (type) {
      case DType::kF32:
        words[i] = (word & 0x81ffffff81ffffff) | 0x3e0000003e000000;
        break;
      case DType::kBF16:
        words[i] = (word & 0x81ff81ff81ff81ff) | 0x3e003e003e003e00;
        break;
      case DType::kF16:
        words[i] = (word & 0x8fff8fff8fff8fff) | 0x3000300030003000;
        break;
      default:
        words[i] = word;
    }
  }
  if (type == DType::kQ8_0) {
    const uint16_t scale = 0x2000;  // 2^-7: int8 becomes -1 to 1
    for (size_t block = 0; block + 34 <= bytes.size(); block += 34) {
      std::memcpy(bytes.data() + block, &scale, sizeof(scale));
    }
  }
}

}  // namespace relay::bench
