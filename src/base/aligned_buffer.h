// Memory that begins on a cache line, for vectors that kernels load whole.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

namespace relay {

/// Room for plain numbers; grows with its contents lost.
template <typename T>
class AlignedBuffer {
  static_assert(std::is_trivial_v<T>);

 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(int64_t count) { reserve(count); }

  void reserve(int64_t count) {
    if (count <= size_) return;
    constexpr size_t kLine = 64;
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + kLine - 1) / kLine * kLine;
    T* grown = static_cast<T*>(std::aligned_alloc(kLine, bytes));
    if (grown == nullptr) throw std::bad_alloc();
    data_.reset(grown);
    size_ = count;
  }
  T* data() { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  std::unique_ptr<T, Free> data_;
  int64_t size_ = 0;
};

}  // namespace relay
