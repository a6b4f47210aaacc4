// Memory for KV and what to fill it with.
#pragma once

#include <cstddef>
#include <cstdint>

#include "base/aligned_buffer.h"
#include "relay/types.h"

namespace relay::measure {

/// A KV buffer that begins with a cache line, as engines allocate it.
class KvBuffer {
 public:
  /// Loses the contents. Throws std::bad_alloc.
  void resize(int64_t bytes);
  uint8_t* data() { return data_.data(); }
  size_t size() const { return size_; }

 private:
  AlignedBuffer<uint8_t> data_;
  size_t size_ = 0;
};

/// Makes random bits vectors of moderate values: sign and mantissa stay random, and the exponent is
/// kept in a range, so that magnitudes are between 2^-3 and 2.
struct RandomBits {
  uint64_t keep = ~uint64_t{0};
  uint64_t set = 0;

  constexpr uint64_t of(uint64_t random) const { return (random & keep) | set; }
};
/// Of a float type; all bits for others.
RandomBits random_bits(DType type);

/// Fills a KV buffer with vectors of moderate random values, whatever the type.
void fill_random(DType type, KvBuffer& bytes, uint64_t seed);

}  // namespace relay::measure
