// Vector primitives for AVX-512 (F, BW, VL, DQ): 16 lanes. Included once per kernel set, inside its
// namespace; needs <immintrin.h>. The generic operations (+, *, shuffles) are the compiler's.

inline constexpr int kLanes = 16;
inline constexpr int kPanel = 4;      // vectors of a register block's columns
inline constexpr int kBlockRows = 6;  // query rows of a register block: 24 accumulators of 32
inline constexpr int kFewBlock = 8;   // query rows that attend_few takes at once
inline constexpr int kFewAccumulators = 16;

typedef float Vec __attribute__((vector_size(64)));
typedef int32_t VecI __attribute__((vector_size(64)));
typedef uint32_t VecU __attribute__((vector_size(64)));  // wraps where it overflows

inline Vec load(const float* p) { return (Vec)_mm512_loadu_ps(p); }
inline void store(float* p, Vec v) { _mm512_storeu_ps(p, (__m512)v); }
inline Vec splat(float x) { return (Vec)_mm512_set1_ps(x); }
inline Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}
inline Vec max(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
inline Vec min(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
/// if_below where x < limit, else otherwise.
inline Vec select_below(Vec x, Vec limit, Vec if_below, Vec otherwise) {
  const __mmask16 m = _mm512_cmp_ps_mask((__m512)x, (__m512)limit, _CMP_LT_OQ);
  return (Vec)_mm512_mask_blend_ps(m, (__m512)otherwise, (__m512)if_below);
}
/// Nearest integer.
inline Vec round(Vec x) {
  return (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/// p * 2^n; 0 where that is far below the smallest number, infinity where it is too large.
inline constexpr bool kPowersOverflow = true;
inline Vec times_power_of_two(Vec p, Vec n) { return (Vec)_mm512_scalef_ps((__m512)p, (__m512)n); }

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline Vec load_f32(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
inline Vec load_f32_tail(const uint8_t* p, int n) {
  return (Vec)_mm512_maskz_loadu_ps(first_lanes(n), p);
}
inline Vec load_f16(const uint8_t* p) {
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_f16_tail(const uint8_t* p, int n) {
  return (Vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
inline Vec widen_bf16(__m256i x) {
  return (Vec)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline Vec load_bf16(const uint8_t* p) {
  return widen_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Vec load_bf16_tail(const uint8_t* p, int n) {
  return widen_bf16(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
inline Vec load_i8(const uint8_t* p) {
  return (Vec)_mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
#ifdef RELAY_HAS_BF16_DOT
// Pairs of bf16, the first in the low half of a lane.

/// 32 numbers rounded to bf16, as 16 pairs.
inline VecU bf16_pairs(Vec first16, Vec last16) {
  return (VecU)_mm512_cvtne2ps_pbh((__m512)last16, (__m512)first16);
}
/// Stores 16 numbers rounded to bf16.
inline void store_bf16(uint16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
/// What load_bf16_pairs reads: the first n (<= 32), the rest becomes zero.
inline __mmask32 first_bf16(int n) { return n == 32 ? ~0u : (1u << n) - 1u; }
inline VecU load_bf16_pairs(const uint8_t* p, __mmask32 which) {
  return (VecU)_mm512_maskz_loadu_epi16(which, p);
}
/// The first n (<= 16) bf16 at p as first halves of pairs, all else zero.
inline VecU load_bf16_halves(const uint8_t* p, int n) {
  return (VecU)_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first_lanes(n), p));
}
/// sum + the dot product of the pair `a` and each pair of b.
inline Vec dot_pairs(Vec sum, uint32_t a, VecU b) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)),
                               (__m512bh)b);
}
#endif
#ifdef RELAY_HAS_AMX
/// Each number rounded to bf16, as f32.
inline Vec high_half(Vec x) { return (Vec)(((VecU)x + 0x8000u) & 0xffff0000u); }
/// Stores 32 numbers as QueryLayout::kBF16Halves. What the two halves leave out is at most 2^-16 of
/// a number.
inline void store_halves(float* p, Vec first16, Vec last16) {
  const Vec first_high = high_half(first16);
  const Vec last_high = high_half(last16);
  store(p, (Vec)bf16_pairs(first_high, last_high));
  store(p + 16, (Vec)bf16_pairs(first16 - first_high, last16 - last_high));
}
#endif
inline float f16_to_f32(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t f32_to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
inline void store_f16(uint16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
