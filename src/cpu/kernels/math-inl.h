// Arithmetic on vectors: exponentials, and reductions of several vectors at once.

inline constexpr float kInf = __builtin_inff();

/// 2^x for finite x <= 126 (where larger, times_power_of_two says what); 0 below -126, where the
/// result would be subnormal. 2^0 is exactly 1. Minimax polynomials on [-0.5, 0.5]: relative error
/// below 2.5e-7, or (kCoarse, for weights that are rounded to bf16, up to 3.9e-3 off) below 1.1e-4.
template <bool kCoarse = false>
RELAY_INLINE Vec exp2_finite(Vec x) {
  const Vec n = round(x);
  const Vec f = x - n;
  Vec p;
  if constexpr (kCoarse) {
    p = fma(splat(0.055008933f), f, splat(0.24221095f));
    p = fma(p, f, splat(0.6932829f));
  } else {
    p = fma(splat(0.0013264727f), f, splat(0.009671513f));
    p = fma(p, f, splat(0.055507336f));
    p = fma(p, f, splat(0.24022242f));
    p = fma(p, f, splat(0.693147f));
  }
  p = fma(p, f, splat(1.0f));
  return times_power_of_two(p, n);
}
/// As exp2_finite, and 0 at -inf.
template <bool kCoarse = false>
RELAY_INLINE Vec exp2(Vec x) {
  return exp2_finite<kCoarse>(max(x, splat(-200.0f)));
}

/// tanh(x) = 1 - 2 / (1 + e^2x), absolute error below 3e-7.
RELAY_INLINE Vec tanh(Vec x) {
  const Vec limited = min(x, splat(43.0f));  // e^86 is still finite, tanh(43) is 1 in f32
  const Vec e = exp2(limited * splat(2.0f * kLog2e));
  return splat(1.0f) - splat(2.0f) / (splat(1.0f) + e);
}

#ifdef RELAY_HAS_BF16_DOT
inline VecU load_words(const uint32_t* p) { return (VecU)load(reinterpret_cast<const float*>(p)); }
inline void store_words(uint32_t* p, VecU v) { store(reinterpret_cast<float*>(p), (Vec)v); }
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

// Recursion, not loops, over the stages: the compiler then keeps the vectors in registers.

template <int... I>
struct Lanes {};
template <int N, int... I>
struct MakeLanes : MakeLanes<N - 1, N - 1, I...> {};
template <int... I>
struct MakeLanes<0, I...> {
  using type = Lanes<I...>;
};
using AllLanes = typename MakeLanes<kLanes>::type;

/// op of a's lanes that lie kHalf apart, where a lane's number lacks the bit kHalf; elsewhere of
/// b's.
template <int kHalf, typename Op, int... I>
RELAY_INLINE Vec fold(Vec a, Vec b, Op op, Lanes<I...>) {
  return op(__builtin_shufflevector(a, b, ((I & kHalf) ? kLanes + I : I)...),
            __builtin_shufflevector(a, b, ((I & kHalf) ? kLanes + (I ^ kHalf) : (I ^ kHalf))...));
}

/// Reduces N vectors (a power of two up to kLanes) at once: lane i of the result, and every N
/// lanes on, is op over all lanes of v[i]. Overwrites v.
template <int N, int kHalf = kLanes / 2, typename Op>
RELAY_INLINE Vec reduce_each(Vec* v, Op op) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else if constexpr (N == 2 * kHalf) {
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) v[i] = fold<kHalf>(v[i], v[i + kHalf], op, AllLanes{});
    return reduce_each<N / 2, kHalf / 2>(v, op);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < N; ++i) v[i] = fold<kHalf>(v[i], v[i], op, AllLanes{});
    return reduce_each<N, kHalf / 2>(v, op);
  }
}
struct Add {
  RELAY_INLINE Vec operator()(Vec a, Vec b) const { return a + b; }
};
struct Max {
  RELAY_INLINE Vec operator()(Vec a, Vec b) const { return max(a, b); }
};

/// Within each block of 4 lanes, units of N lanes by turns from a's first (kHigh: second) half and
/// from b's.
template <int N, bool kHigh, typename V, int... I>
RELAY_INLINE V zip(V a, V b, Lanes<I...>) {
  return __builtin_shufflevector(a, b,
                                 (I / 4 * 4 + (kHigh ? 2 : 0) + (N == 1 ? I % 4 / 2 : I % 2) +
                                  ((N == 1 ? I % 2 : I % 4 / 2) != 0 ? kLanes : 0))...);
}
/// a's even (kOdd: odd) blocks of 4 lanes, then b's.
template <bool kOdd, typename V, int... I>
RELAY_INLINE V blocks(V a, V b, Lanes<I...>) {
  return __builtin_shufflevector(a, b, ((2 * (I / 4) + (kOdd ? 1 : 0)) * 4 + I % 4)...);
}

/// Transposes a kLanes x kLanes block: log2(kLanes) shuffles of each vector, of which the first two
/// stay within 4 lanes (processors do those fastest).
template <typename V>
RELAY_INLINE void transpose(V (&v)[kLanes]) {
  constexpr AllLanes kAll;
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    const V a = zip<1, false>(v[i], v[i + 1], kAll);
    const V b = zip<1, true>(v[i], v[i + 1], kAll);
    const V c = zip<1, false>(v[i + 2], v[i + 3], kAll);
    const V d = zip<1, true>(v[i + 2], v[i + 3], kAll);
    v[i] = zip<2, false>(a, c, kAll);
    v[i + 1] = zip<2, true>(a, c, kAll);
    v[i + 2] = zip<2, false>(b, d, kAll);
    v[i + 3] = zip<2, true>(b, d, kAll);
  }
  if constexpr (kLanes == 8) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const V a = v[i];
      const V b = v[i + 4];
      v[i] = blocks<false>(a, b, kAll);
      v[i + 4] = blocks<true>(a, b, kAll);
    }
  }
  if constexpr (kLanes == 16) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const V a = blocks<false>(v[i], v[i + 4], kAll);
      const V b = blocks<true>(v[i], v[i + 4], kAll);
      const V c = blocks<false>(v[i + 8], v[i + 12], kAll);
      const V d = blocks<true>(v[i + 8], v[i + 12], kAll);
      v[i] = blocks<false>(a, c, kAll);
      v[i + 4] = blocks<false>(b, d, kAll);
      v[i + 8] = blocks<true>(a, c, kAll);
      v[i + 12] = blocks<true>(b, d, kAll);
    }
  }
}

/// Units of N lanes by turns from a and from b, the first (kSecond: second) half of them.
template <int N, bool kSecond, typename V, int... I>
RELAY_INLINE V weave(V a, V b, Lanes<I...>) {
  constexpr int kStart = kSecond ? kLanes / N : 0;
  return __builtin_shufflevector(
      a, b, ((kStart + I / N) / 2 * N + I % N + ((kStart + I / N) % 2 != 0 ? kLanes : 0))...);
}
