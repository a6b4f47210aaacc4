// Memory for KV and what to fill it with.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "relay/types.h"

namespace relay::bench {

/// A KV buffer that begins with a cache line, as engines allocate it.
class KvBuffer {
 public:
  /// Loses the contents. Throws std::bad_alloc.
  void resize(int64_t bytes);
  uint8_t* data() { return data_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> data_;
  size_t size_ = 0;
};

/// Fills a KV buffer with vectors of moderate random values, whatever the type.
void fill_random(DType type, KvBuffer& bytes, uint64_t seed);

}  // namespace relay::bench
