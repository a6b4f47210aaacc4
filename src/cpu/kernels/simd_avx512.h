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
/// sum + the dot products of pairs, lane by lane.
inline Vec dot_pairs(Vec sum, VecU a, VecU b) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}
/// Pairs of the 32 16-bit numbers in a and those in b: within each kZipLanes lanes those of the
/// first (low) or second (high) half of them.
inline constexpr int kZipLanes = 4;
inline void zip_words(VecU a, VecU b, VecU& low, VecU& high) {
  low = (VecU)_mm512_unpacklo_epi16((__m512i)a, (__m512i)b);
  high = (VecU)_mm512_unpackhi_epi16((__m512i)a, (__m512i)b);
}
/// sum + both numbers of each pair.
inline Vec add_pairs(Vec sum, VecU pairs) { return dot_pairs(sum, 0x3f803f80u, pairs); }
#endif
#ifdef RELAY_HAS_BYTE_DOT
inline VecU splat_word(uint32_t x) { return (VecU)_mm512_set1_epi32(static_cast<int>(x)); }
/// 32 bytes from each address; zero for none.
inline VecU load_bytes(const uint8_t* low, const uint8_t* high) {
  const __m512i x =
      _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low)));
  const __m256i y = high != nullptr ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high))
                                    : _mm256_setzero_si256();
  return (VecU)_mm512_inserti64x4(x, y, 1);
}
/// 32 signed bytes from each address, as pairs of 16 bits: elements 0 to 7 and 16 to 23 (low), and
/// the others.
inline void zip_bytes(const uint8_t* a, const uint8_t* b, VecU& low, VecU& high) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
  const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
  low = (VecU)_mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(x, y));
  high = (VecU)_mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(x, y));
}
/// sum + the dot product of 4 unsigned bytes in each lane of a and the 4 signed ones of b.
inline VecI dot_bytes(VecI sum, VecU a, uint32_t b) {
  return (VecI)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)a,
                                   _mm512_set1_epi32(static_cast<int>(b)));
}
/// sum + the dot product of the pair of signed 16-bit numbers `a` and each pair of b.
inline VecI dot_words(VecI sum, uint32_t a, VecU b) {
  return (VecI)_mm512_dpwssd_epi32((__m512i)sum, _mm512_set1_epi32(static_cast<int>(a)),
                                   (__m512i)b);
}
/// The larger of |a| and |b|; NaN is the largest.
inline Vec larger_magnitude(Vec a, Vec b) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  return (Vec)_mm512_max_epu32(_mm512_and_si512((__m512i)a, magnitude),
                               _mm512_and_si512((__m512i)b, magnitude));
}
/// Store 16 numbers rounded to the nearest integers of 8 bits or, two by two, of 16; those too
/// large as the largest.
inline void store_i8(uint32_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32((__m512)v)));
}
inline void store_i16(uint32_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32((__m512)v)));
}
#endif
inline float f16_to_f32(uint16_t h) { return _cvtsh_ss(h); }
inline uint16_t f32_to_f16(float x) { return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT); }
inline void store_f16(uint16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
