// Vector primitives for AVX2 with FMA and F16C: 8 lanes. Included once per kernel set, inside its
// namespace; needs <immintrin.h>. The generic operations (+, *, shuffles) are the compiler's.

inline constexpr int kLanes = 8;
inline constexpr int kPanel = 2;
inline constexpr int kBlockRows = 6;  // 12 accumulators of 16 registers
inline constexpr int kFewBlock = 4;
inline constexpr int kFewAccumulators = 8;

typedef float Vec __attribute__((vector_size(32)));
typedef int32_t VecI __attribute__((vector_size(32)));
typedef uint32_t VecU __attribute__((vector_size(32)));  // wraps where it overflows

inline Vec load(const float* p) { return (Vec)_mm256_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm256_storeu_ps(p, (__m256)v); }
inline Vec splat(float x) { return (Vec)_mm256_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
}
inline Vec max(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
/// if_below where x < limit, else otherwise.
inline Vec select_below(Vec x, Vec limit, Vec if_below, Vec otherwise) {
  const __m256 m = _mm256_cmp_ps((__m256)x, (__m256)limit, _CMP_LT_OQ);
  return (Vec)_mm256_blendv_ps((__m256)otherwise, (__m256)if_below, m);
}
/// Nearest integer, for |x| < 2^22.
inline Vec round(Vec x) { return (x + splat(12582912.0f)) - splat(12582912.0f); }  // 1.5 * 2^23
/// p * 2^n for p in [0.5, 2) and an integer n <= 126; 0 where n < -126.
inline constexpr bool kPowersOverflow = false;
inline Vec times_power_of_two(Vec p, Vec n) {
  const VecU exponent = (VecU)(n + splat(12582912.0f)) << 23;  // n in the low bits
  return select_below(n, splat(-126.0f), splat(0.0f), (Vec)((VecU)p + exponent));
}

/// The first n (< 8) elements of `size` bytes each, the rest zero; reads nothing beyond them.
template <typename T>
inline const T* padded_copy(const uint8_t* p, int n, T (&buffer)[8]) {
  std::memset(buffer, 0, sizeof(buffer));
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return buffer;
}

inline Vec load_f32(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
inline Vec load_f32_tail(const uint8_t* p, int n) {
  float b[8];
  return load(padded_copy(p, n, b));
}
inline Vec load_f16(const uint8_t* p) {
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Vec load_f16_tail(const uint8_t* p, int n) {
  uint16_t b[8];
  return load_f16(reinterpret_cast<const uint8_t*>(padded_copy(p, n, b)));
}
inline Vec load_bf16(const uint8_t* p) {
  const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec)_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline Vec load_bf16_tail(const uint8_t* p, int n) {
  uint16_t b[8];
  return load_bf16(reinterpret_cast<const uint8_t*>(padded_copy(p, n, b)));
}
inline Vec load_i8(const uint8_t* p) {
  return (Vec)_mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline float f16_to_f32(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t f32_to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
inline void store_f16(uint16_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
