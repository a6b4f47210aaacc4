// Random numbers addressed by position: element i of a stream is a function of (key, i) alone, so
// any number of threads fills a tensor in any order and the bytes are the same. Only integer
// arithmetic and one exact float conversion are used: no libm, whose last digit differs between
// systems.
#pragma once

#include <cstdint>
#include <string_view>

namespace relay::synth {

/// SplitMix64's output function: a bijection of 64 bits that passes the usual statistical suites.
constexpr uint64_t mix64(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

/// 64 random bits: element `index` of the stream `key`.
constexpr uint64_t random_bits(uint64_t key, uint64_t index) {
  return mix64(key + (index + 1) * 0x9E3779B97F4A7C15u);
}

/// The key of the stream that fills the tensor `name` of the model made with `seed`.
constexpr uint64_t stream_key(uint64_t seed, std::string_view name) {
  uint64_t hash = 0xCBF29CE484222325u;  // FNV-1a
  for (const char c : name) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
  }
  return mix64(mix64(seed) ^ hash);
}

/// A number of mean 0 and standard deviation 1, nearly normal: the sum of four uniform ones. Its
/// range ends at 3.46 standard deviations, which spares the block-quantised types lone outliers.
constexpr float random_normal(uint64_t key, uint64_t index) {
  const uint64_t bits = random_bits(key, index);
  const int32_t sum = static_cast<int32_t>((bits & 0xFFFF) + (bits >> 16 & 0xFFFF) +
                                           (bits >> 32 & 0xFFFF) + (bits >> 48)) -
                      2 * 65535;
  // Four uniform integers below 65536: variance 4 * (65536^2 - 1) / 12.
  constexpr float kInverseDeviation = 1.0f / 37837.2265625f;
  return static_cast<float>(sum) * kInverseDeviation;
}

/// A number in [0, 1).
constexpr float random_uniform(uint64_t key, uint64_t index) {
  return static_cast<float>(random_bits(key, index) >> 40) / static_cast<float>(1 << 24);
}

}  // namespace relay::synth
