// Vector primitives for SVE with BF16, of 256 bits: 8 lanes. The length is fixed at compile time
// (-msve-vector-bits=256), so that vectors are ordinary types: the compiler's own, as in all sets.
// Included once per kernel set, inside its namespace; needs <arm_sve.h>. The generic operations
// (+, *, shuffles) are the compiler's.

inline constexpr int kLanes = 8;
inline constexpr int kPanel = 4;
inline constexpr int kBlockRows = 6;  // 24 accumulators of 32 registers
inline constexpr int kFewBlock = 8;
inline constexpr int kFewAccumulators = 16;

typedef float Vec __attribute__((vector_size(32)));
typedef int32_t VecI __attribute__((vector_size(32)));
typedef uint32_t VecU __attribute__((vector_size(32)));  // wraps where it overflows

inline svbool_t all_lanes() { return svptrue_b32(); }
inline svbool_t first_lanes(int n) { return svwhilelt_b32(0, n); }

// By memcpy: the words of a row are stored as f32 and read as pairs of bf16.
inline Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, Vec v) { std::memcpy(p, &v, sizeof(v)); }
inline Vec splat(float x) { return (Vec)svdup_n_f32(x); }
inline Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)svmla_f32_x(all_lanes(), (svfloat32_t)c, (svfloat32_t)a, (svfloat32_t)b);
}
inline Vec max(Vec a, Vec b) {
  return (Vec)svmax_f32_x(all_lanes(), (svfloat32_t)a, (svfloat32_t)b);
}
inline Vec min(Vec a, Vec b) {
  return (Vec)svmin_f32_x(all_lanes(), (svfloat32_t)a, (svfloat32_t)b);
}
/// if_below where x < limit, else otherwise.
inline Vec select_below(Vec x, Vec limit, Vec if_below, Vec otherwise) {
  return (Vec)svsel_f32(svcmplt_f32(all_lanes(), (svfloat32_t)x, (svfloat32_t)limit),
                        (svfloat32_t)if_below, (svfloat32_t)otherwise);
}
/// Nearest integer.
inline Vec round(Vec x) { return (Vec)svrintn_f32_x(all_lanes(), (svfloat32_t)x); }
/// p * 2^n; 0 where that is far below the smallest number, infinity where it is too large.
inline constexpr bool kPowersOverflow = true;
inline Vec times_power_of_two(Vec p, Vec n) {
  return (Vec)svscale_f32_x(all_lanes(), (svfloat32_t)p,
                            svcvt_s32_f32_x(all_lanes(), (svfloat32_t)n));
}

inline Vec load_f32_tail(const uint8_t* p, int n) {
  return (Vec)svld1_f32(first_lanes(n), reinterpret_cast<const float*>(p));
}
inline Vec load_f32(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
/// The lanes of `which` from 16-bit elements at p, the rest zero; reads nothing beyond them.
inline svuint32_t load_u16(const uint8_t* p, svbool_t which) {
  return svld1uh_u32(which, reinterpret_cast<const uint16_t*>(p));
}
inline Vec widen_f16(svuint32_t x) {
  return (Vec)svcvt_f32_f16_x(all_lanes(), svreinterpret_f16_u32(x));
}
inline Vec load_f16(const uint8_t* p) { return widen_f16(load_u16(p, all_lanes())); }
inline Vec load_f16_tail(const uint8_t* p, int n) { return widen_f16(load_u16(p, first_lanes(n))); }
inline Vec widen_bf16(svuint32_t x) { return (Vec)svlsl_n_u32_x(all_lanes(), x, 16); }
inline Vec load_bf16(const uint8_t* p) { return widen_bf16(load_u16(p, all_lanes())); }
inline Vec load_bf16_tail(const uint8_t* p, int n) {
  return widen_bf16(load_u16(p, first_lanes(n)));
}
inline Vec load_i8(const uint8_t* p) {
  return (Vec)svcvt_f32_s32_x(all_lanes(),
                              svld1sb_s32(all_lanes(), reinterpret_cast<const int8_t*>(p)));
}
#ifdef RELAY_HAS_BF16_DOT
// Pairs of bf16, the first in the low half of a lane.

/// Rounded to bf16, in the low halves of the lanes.
inline svbfloat16_t round_bf16(Vec x) { return svcvt_bf16_f32_x(all_lanes(), (svfloat32_t)x); }
/// 16 numbers rounded to bf16, as 8 pairs.
inline VecU bf16_pairs(Vec first8, Vec last8) {
  return (VecU)svreinterpret_u32_bf16(svuzp1_bf16(round_bf16(first8), round_bf16(last8)));
}
/// Stores 8 numbers rounded to bf16.
inline void store_bf16(uint16_t* p, Vec v) {
  svst1h_u32(all_lanes(), p, svreinterpret_u32_bf16(round_bf16(v)));
}
/// What load_bf16_pairs reads: the first n (<= 16), the rest becomes zero.
inline svbool_t first_bf16(int n) { return svwhilelt_b16(0, n); }
inline VecU load_bf16_pairs(const uint8_t* p, svbool_t which) {
  return (VecU)svreinterpret_u32_u16(svld1_u16(which, reinterpret_cast<const uint16_t*>(p)));
}
/// The first n (<= 8) bf16 at p as first halves of pairs, all else zero.
inline VecU load_bf16_halves(const uint8_t* p, int n) { return (VecU)load_u16(p, first_lanes(n)); }
/// sum + the dot product of the pair `a` and each pair of b.
inline Vec dot_pairs(Vec sum, uint32_t a, VecU b) {
  return (Vec)svbfdot_f32((svfloat32_t)sum, svreinterpret_bf16_u32((svuint32_t)b),
                          svreinterpret_bf16_u32(svdup_n_u32(a)));
}
/// sum + the dot products of pairs, lane by lane.
inline Vec dot_pairs(Vec sum, VecU a, VecU b) {
  return (Vec)svbfdot_f32((svfloat32_t)sum, svreinterpret_bf16_u32((svuint32_t)b),
                          svreinterpret_bf16_u32((svuint32_t)a));
}
/// Pairs of the 16 16-bit numbers in a and those in b: those of the first (low) or second (high)
/// half of the lanes.
inline constexpr int kZipLanes = kLanes;
inline void zip_words(VecU a, VecU b, VecU& low, VecU& high) {
  const svuint16_t x = svreinterpret_u16_u32((svuint32_t)a);
  const svuint16_t y = svreinterpret_u16_u32((svuint32_t)b);
  low = (VecU)svreinterpret_u32_u16(svzip1_u16(x, y));
  high = (VecU)svreinterpret_u32_u16(svzip2_u16(x, y));
}
/// sum + both numbers of each pair. No dot product with ones: GCC 12 writes a constant vector of
/// bf16 1.0 as one of f16.
inline Vec add_pairs(Vec sum, VecU pairs) {
  return sum + (Vec)(pairs << 16) + (Vec)(pairs & 0xffff0000u);
}
#endif
inline float f16_to_f32(uint16_t h) {
  __fp16 x;
  std::memcpy(&x, &h, sizeof(x));
  return x;
}
inline uint16_t f32_to_f16(float x) {
  const auto rounded = static_cast<__fp16>(x);
  uint16_t h;
  std::memcpy(&h, &rounded, sizeof(h));
  return h;
}
inline void store_f16(uint16_t* p, Vec v) {
  svst1h_u32(all_lanes(), p, svreinterpret_u32_f16(svcvt_f16_f32_x(all_lanes(), (svfloat32_t)v)));
}
