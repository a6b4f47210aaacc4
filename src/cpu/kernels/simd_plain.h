// Vector primitives in plain C++ with the compiler's vector types: 4 lanes, for any CPU.
// Included once per kernel set, inside its namespace.

inline constexpr int kLanes = 4;
inline constexpr int kPanel = 2;
inline constexpr int kBlockRows = 4;
inline constexpr int kFewBlock = 4;
inline constexpr int kFewAccumulators = 8;

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t VecI __attribute__((vector_size(16)));
typedef uint32_t VecU __attribute__((vector_size(16)));  // wraps where it overflows

inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
inline Vec splat(float x) { return Vec{x, x, x, x}; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec blend(VecI mask, Vec if_set, Vec otherwise) {
  return (Vec)((mask & (VecI)if_set) | (~mask & (VecI)otherwise));
}
inline Vec max(Vec a, Vec b) { return blend((VecI)(a > b), a, b); }
inline Vec min(Vec a, Vec b) { return blend((VecI)(a < b), a, b); }
/// if_below where x < limit, else otherwise.
inline Vec select_below(Vec x, Vec limit, Vec if_below, Vec otherwise) {
  return blend((VecI)(x < limit), if_below, otherwise);
}
/// Nearest integer, for |x| < 2^22.
inline Vec round(Vec x) { return (x + splat(12582912.0f)) - splat(12582912.0f); }  // 1.5 * 2^23
/// p * 2^n for p in [0.5, 2) and an integer n <= 126; 0 where n < -126.
inline constexpr bool kPowersOverflow = false;
inline Vec times_power_of_two(Vec p, Vec n) {
  const VecU exponent = (VecU)(n + splat(12582912.0f)) << 23;  // n in the low bits
  return select_below(n, splat(-126.0f), splat(0.0f), (Vec)((VecU)p + exponent));
}

inline float bits_to_f32(uint32_t u) {
  float f;
  std::memcpy(&f, &u, sizeof(f));
  return f;
}
inline uint32_t f32_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, sizeof(u));
  return u;
}
/// Exact: binary16 numbers are multiples of 2^-24, which f32 holds.
inline float f16_to_f32(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t exponent = (h >> 10) & 31u;
  const uint32_t mantissa = h & 1023u;
  if (exponent == 31) return bits_to_f32(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return bits_to_f32(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  return bits_to_f32(sign | f32_to_bits(static_cast<float>(mantissa) * 0x1p-24f));
}
/// Round to nearest, ties to even.
inline uint16_t f32_to_f16(float x) {
  const uint32_t bits = f32_to_bits(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // overflows
  if (magnitude < 0x38800000u) {  // subnormal: let f32 addition round at 2^-24
    const float shifted = bits_to_f32(magnitude) + 0.5f;  // ulp(0.5) = 2^-24
    return static_cast<uint16_t>(sign | (f32_to_bits(shifted) - f32_to_bits(0.5f)));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

/// kLanes elements of T from p (n of them, the rest zero), each through `convert`.
template <typename T, typename Convert>
inline Vec gather_lanes(const uint8_t* p, int n, Convert convert) {
  T x[kLanes] = {};
  std::memcpy(x, p, static_cast<size_t>(n) * sizeof(T));
  return Vec{convert(x[0]), convert(x[1]), convert(x[2]), convert(x[3])};
}
inline Vec load_f32_tail(const uint8_t* p, int n) {
  return gather_lanes<float>(p, n, [](float f) { return f; });
}
inline Vec load_f32(const uint8_t* p) { return load_f32_tail(p, kLanes); }
inline Vec load_f16_tail(const uint8_t* p, int n) {
  return gather_lanes<uint16_t>(p, n, f16_to_f32);
}
inline Vec load_f16(const uint8_t* p) { return load_f16_tail(p, kLanes); }
inline Vec load_bf16_tail(const uint8_t* p, int n) {
  return gather_lanes<uint16_t>(
      p, n, [](uint16_t h) { return bits_to_f32(static_cast<uint32_t>(h) << 16); });
}
inline Vec load_bf16(const uint8_t* p) { return load_bf16_tail(p, kLanes); }
inline Vec load_i8(const uint8_t* p) {
  return gather_lanes<int8_t>(p, kLanes, [](int8_t i) { return static_cast<float>(i); });
}
inline void store_f16(uint16_t* p, Vec v) {
  for (int i = 0; i < kLanes; ++i) p[i] = f32_to_f16(v[i]);
}
