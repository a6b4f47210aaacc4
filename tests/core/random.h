// Random numbers that are the same on every platform and standard library.
#pragma once

#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

namespace relay::test {

/// splitmix64: one word of state, so a case is named by one seed.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}

  uint64_t bits() {
    uint64_t z = (state_ += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return z ^ (z >> 31);
  }

  /// Uniform in [0, 1).
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }

  bool chance(double probability) { return uniform() < probability; }

  /// Uniform in [low, high].
  int64_t between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(bits() % static_cast<uint64_t>(high - low + 1));
  }

  /// In [low, high], each power of two equally likely: small sizes are where the edges are.
  int64_t log_between(int64_t low, int64_t high) {
    const double offset = 1.0 - static_cast<double>(low);
    const double value = std::exp(uniform() * std::log(static_cast<double>(high) + offset + 1));
    const int64_t result = static_cast<int64_t>(value - offset);
    return result < low ? low : (result > high ? high : result);
  }

  /// Mean 0, variance 1, bounded by 3.5: the sum of four uniform 16-bit numbers, near normal and
  /// cheap enough for millions of elements.
  float normal() {
    const uint64_t word = bits();
    const double sum = static_cast<double>(word & 0xffff) +
                       static_cast<double>(word >> 16 & 0xffff) +
                       static_cast<double>(word >> 32 & 0xffff) + static_cast<double>(word >> 48);
    constexpr double kSqrt3 = 1.7320508075688772;
    return static_cast<float>((sum / 65536.0 - 2.0) * kSqrt3);
  }

  template <typename T>
  const T& pick(const std::vector<T>& from) {
    return from[between(0, static_cast<int64_t>(from.size()) - 1)];
  }

  template <typename T>
  void shuffle(std::vector<T>& values) {
    for (size_t i = values.size(); i > 1; --i) {
      std::swap(values[i - 1], values[between(0, static_cast<int64_t>(i) - 1)]);
    }
  }

 private:
  uint64_t state_;
};

}  // namespace relay::test
