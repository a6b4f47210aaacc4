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

/// Transposes a kLanes x kLanes block: log2(kLanes) perfect shuffles.
template <int kStage = 1, typename V>
RELAY_INLINE void transpose(V (&v)[kLanes]) {
  V w[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes / 2; ++i) {
    w[2 * i] = RELAY_INTERLEAVE_LO(v[i], v[i + kLanes / 2]);
    w[2 * i + 1] = RELAY_INTERLEAVE_HI(v[i], v[i + kLanes / 2]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) v[i] = w[i];
  if constexpr (2 * kStage < kLanes) transpose<2 * kStage>(v);
}
