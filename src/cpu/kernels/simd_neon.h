// Vector primitives for AArch64 NEON: 4 lanes. Included once per kernel set, inside its namespace;
// needs <arm_neon.h>. The generic operations (+, *, shuffles) are the compiler's.

inline constexpr int kLanes = 4;
inline constexpr int kPanel = 4;
inline constexpr int kBlockRows = 6;  // 24 accumulators of 32 registers
inline constexpr int kFewBlock = 4;
inline constexpr int kFewAccumulators = 16;

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t VecI __attribute__((vector_size(16)));
typedef uint32_t VecU __attribute__((vector_size(16)));  // wraps where it overflows

inline Vec load(const float* p) { return (Vec)vld1q_f32(p); }
inline void store(float* p, Vec v) { vst1q_f32(p, (float32x4_t)v); }
inline Vec splat(float x) { return (Vec)vdupq_n_f32(x); }
inline Vec fma(Vec a, Vec b, Vec c) {
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
}
inline Vec max(Vec a, Vec b) { return (Vec)vmaxq_f32((float32x4_t)a, (float32x4_t)b); }
inline Vec min(Vec a, Vec b) { return (Vec)vminq_f32((float32x4_t)a, (float32x4_t)b); }
/// if_below where x < limit, else otherwise.
inline Vec select_below(Vec x, Vec limit, Vec if_below, Vec otherwise) {
  return (Vec)vbslq_f32(vcltq_f32((float32x4_t)x, (float32x4_t)limit), (float32x4_t)if_below,
                        (float32x4_t)otherwise);
}
/// Nearest integer, for |x| < 2^22.
inline Vec round(Vec x) { return (x + splat(12582912.0f)) - splat(12582912.0f); }  // 1.5 * 2^23
/// p * 2^n for p in [0.5, 2) and an integer n <= 126; 0 where n < -126.
inline constexpr bool kPowersOverflow = false;
inline Vec times_power_of_two(Vec p, Vec n) {
  const VecU exponent = (VecU)(n + splat(12582912.0f)) << 23;  // n in the low bits
  return select_below(n, splat(-126.0f), splat(0.0f), (Vec)((VecU)p + exponent));
}

/// The first n (< N) elements, the rest zero; reads nothing beyond them.
template <typename T, size_t N>
inline const uint8_t* padded_copy(const uint8_t* p, int n, T (&buffer)[N]) {
  std::memset(buffer, 0, sizeof(buffer));
  std::memcpy(buffer, p, static_cast<size_t>(n) * sizeof(T));
  return reinterpret_cast<const uint8_t*>(buffer);
}

inline Vec load_f32(const uint8_t* p) { return (Vec)vreinterpretq_f32_u8(vld1q_u8(p)); }
inline Vec load_f32_tail(const uint8_t* p, int n) {
  float b[4];
  return load_f32(padded_copy(p, n, b));
}
inline Vec load_f16(const uint8_t* p) { return (Vec)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
inline Vec load_f16_tail(const uint8_t* p, int n) {
  uint16_t b[4];
  return load_f16(padded_copy(p, n, b));
}
inline Vec load_bf16(const uint8_t* p) {
  return (Vec)vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(p)), 16));
}
inline Vec load_bf16_tail(const uint8_t* p, int n) {
  uint16_t b[4];
  return load_bf16(padded_copy(p, n, b));
}
inline Vec load_i8(const uint8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, sizeof(four));
  const int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
  return (Vec)vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
#ifdef RELAY_HAS_BF16_DOT
// Pairs of bf16, the first in the low half of a lane.

/// 8 numbers rounded to bf16, as 4 pairs.
inline VecU bf16_pairs(Vec first4, Vec last4) {
  return (VecU)vcvtq_high_bf16_f32(vcvtq_low_bf16_f32((float32x4_t)first4), (float32x4_t)last4);
}
/// Stores 4 numbers rounded to bf16.
inline void store_bf16(uint16_t* p, Vec v) {
  vst1_u16(p, vreinterpret_u16_bf16(vcvt_bf16_f32((float32x4_t)v)));
}
/// What load_bf16_pairs reads: the first n (<= 8), the rest becomes zero.
inline int first_bf16(int n) { return n; }
inline VecU load_bf16_pairs(const uint8_t* p, int which) {
  uint16_t b[8];
  return (VecU)vld1q_u8(which == 8 ? p : padded_copy(p, which, b));
}
/// The first n (<= 4) bf16 at p as first halves of pairs, all else zero.
inline VecU load_bf16_halves(const uint8_t* p, int n) {
  uint16_t b[4];
  return (VecU)vmovl_u16(vreinterpret_u16_u8(vld1_u8(n == 4 ? p : padded_copy(p, n, b))));
}
/// sum + the dot product of the pair `a` and each pair of b.
inline Vec dot_pairs(Vec sum, uint32_t a, VecU b) {
  return (Vec)vbfdotq_lane_f32((float32x4_t)sum, (bfloat16x8_t)b, vcreate_bf16(a), 0);
}
/// sum + the dot products of pairs, lane by lane.
inline Vec dot_pairs(Vec sum, VecU a, VecU b) {
  return (Vec)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)b, (bfloat16x8_t)a);
}
/// Pairs of the 8 16-bit numbers in a and those in b: those of the first (low) or second (high)
/// half of the lanes.
inline constexpr int kZipLanes = kLanes;
inline void zip_words(VecU a, VecU b, VecU& low, VecU& high) {
  low = (VecU)vzip1q_u16((uint16x8_t)a, (uint16x8_t)b);
  high = (VecU)vzip2q_u16((uint16x8_t)a, (uint16x8_t)b);
}
/// sum + both numbers of each pair. No dot product with ones: GCC 12 writes a constant vector of
/// bf16 1.0 as one of f16.
inline Vec add_pairs(Vec sum, VecU pairs) {
  return sum + (Vec)(pairs << 16) + (Vec)(pairs & 0xffff0000u);
}
#endif
inline float f16_to_f32(uint16_t h) {
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0);
}
inline uint16_t f32_to_f16(float x) {
  return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0);
}
inline void store_f16(uint16_t* p, Vec v) {
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
}
