#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace relay::fuzz {

/// Numbers from the input; 0 once it has ended.
class Reader {
 public:
  Reader(const uint8_t* data, size_t size) : data_(data), size_(size) {}

  template <typename T>
  T take() {
    T value{};
    const size_t bytes = std::min(sizeof(T), size_);
    if (bytes > 0) std::memcpy(&value, data_, bytes);  // data may be null
    data_ += bytes;
    size_ -= bytes;
    return value;
  }
  /// Small numbers mostly: one byte, of which 255 says that all eight follow.
  int64_t number() {
    const auto byte = take<uint8_t>();
    return byte == 255 ? take<int64_t>() : byte;
  }

 private:
  const uint8_t* data_;
  size_t size_;
};

}  // namespace relay::fuzz
