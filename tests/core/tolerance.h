// How far an exact attention kernel may be from the double-precision oracle, derived and not tuned.
//
// Notation for one row and query head: slots s = 1..n with logits l_s, weights w_s = softmax(l)_s
// (a sink is one more weight without a value), m = max l_s, output o = sum_s w_s v_s. u = 2^-24 is
// the unit roundoff of f32, in which kernels compute; elements of f32, f16, bf16, q8_0 and unpacked
// custom KV are exact in f32, and products of them are rounded once. Where K and V are bf16 and the
// CPU multiplies bf16 pairs, Q and the weights P are first rounded to bf16, and P comes from an
// exponential of 1.1e-4 relative: u_q = 2^-8, u_p = 2^-8 + 1.1e-4 there. Where both factors of a
// product are sums of two bf16, the number rounded and what that leaves, each leaves out at most
// 2^-16 of itself, and the product without that of the low halves 2^-16: u_q = u_p = 3 2^-16. 0
// elsewhere.
//
// q8_0 where the CPU multiplies bytes. Many rows: Q and K are rounded to bf16, u_q = u_k = 2^-8.
// Few rows: Q is rounded to bytes, each element by at most u_b = 1/254 of the largest of its block
// of
// 32. Then P times the scales of V are 16-bit integers in units of u_w = 1/32767 of the largest in
// the tile, so each is off by at most half of one. A tile has at most 64 slots; what the unit
// belongs to, and the bytes of V, are at most P_s A_sb, A_sb the largest of slot s's block b: the
// output of a block is off by at most 32 u_w sum_s w_s A_sb, as a tile's largest is below its sum.
//
// 1. Logits. A dot product of length d in any order of summation errs by at most
//    d u sum_i |q_i k_i| <= d u |q||k| (Higham 2002, section 3.1; |q|, |k| are 2-norms, the step is
//    Cauchy-Schwarz); the scale, log2(e) and their product round a few times more, and rounding Q
//    adds |dq||k|, |dq| <= max((u_q + u_k) |q|, u_b (sum_b 32 max_b q^2)^(1/2)). The soft cap's
//    derivative is at most 1, so it passes errors on; tanh itself is allowed kTanh u absolute,
//    times the cap. Adding a bias rounds it and the sum:
//      e_s = ((d + 8) u |q| + |dq|) |scale| |k_s| + kTanh u cap + 4 u (|l_s| + |bias_s|).
//    Arm's BFDOT, which is not fused, keeps within that although it rounds to odd, by up to 2 u: a
//    product of two bf16 is exact in f32, so what rounds is the sum of a pair's two products and
//    the sums of at most d/2 + 1 pairs. A product passes through d/2 + 2 of them at most:
//    (d + 4) u. Like x86's it flushes numbers below 2^-126 to 0, see 2.
//
// 2. Weights. p_s = exp(l_s - m) relative to any number m, so the error of m itself does not
//    matter. Rounding the difference, its product with log2(e), and every later rescaling by
//    exp(m_old - m_new) acts on exponents that sum up to m - l_s; exp is allowed kExp u relative:
//      delta_s = e_s + 4 u (m - l_s) + kExp u,   E_s = exp(delta_s) - 1 + u_p
//    bounds the relative error of p_s. Their sum is then wrong by at most E = sum_s w_s E_s.
//    Weights below 2^-126 may be flushed to 0: 2^-100 absolute is more than that.
//
// 3. Sums. sum_s p_s v_sj and sum_s p_s are sums of n terms, scaled again at each of at most
//    n/8 + 64 steps of tiles and merges by factors of relative error (kExp + 1) u each: less than
//    g = (3 n + 640) u relative to sum_s w_s |v_sj|. BFDOT's pairs of slots, again, err by 2 u n/2
//    instead of u n.
//
// 4. Together, with u_out for storing the output (and its smallest step for f16):
//      |o'_j - o_j| <= (sum_s w_s (E_s + E) |v_sj| + (2 g + 4 u) sum_s w_s |v_sj|) / (1 - E)
//                      + 32 u_w sum_s w_s A_sb + u_out |o_j| + step
//      |lse' - lse| <= -log(1 - E) + g + kExp u + 4 u (|lse| + |m|).
//    Where E is not small (logits so large that f32 says little about them) what remains is that o'
//    is a convex combination too: |o'_j - o_j| <= 2 max_s |v_sj|.
//
// These are worst cases: errors all of one sign. Independent roundings add up like sqrt(n), and a
// bug can hide in the gap. So there is a second, statistical measure: the variance of o'_j when
// every rounding is an independent error, uniform within its bound (variance bound^2 / 3).
//    Var(l_s)  = scale^2 |k_s|^2 (|q|^2 u^2 / 3 + |dq|^2 / (3 d)) + scale^2 u^2 d (q.k_s)^2 / 9
//                + (the other terms of delta_s)^2 / 3
//    Var(o_j)  = sum_s w_s^2 Var(l_s) (v_sj - o_j)^2 + u_p^2/3 (sum_s w_s^2 (v_sj^2 + o_j^2))
//                + 4 u^2/3 (n/3 o_j^2 + n/2 sum_s w_s^2 v_sj^2) + 16 u^2 o_j^2
//                + 64 u_w^2 / 12 sum_s w_s^2 A_sb^2 + (u_out^2 o_j^2 + step^2) / 3
// (a partial sum of k of n terms has the mean k/n and a random walk's spread around it, hence the
// n/3 and n/2; u_q and u_k are independent, |dq|^2 = (u_q^2 + u_k^2) |q|^2; in |dq|^2/(3d)
// |dq_i||k_i| is spread evenly over i, which holds for random data only).
// Rounding to odd is unbiased, its error uniform in +-2 u: 4 times the variance, half as often. But
// u_q and u_p are there wherever BFDOT is, and beside them terms in u are nothing.
// The mean of squared errors over the elements of a row, relative to that variance, is near 1 or,
// where the model is generous, below. See checker.h for what is made of it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/operator_case.h"
#include "relay/reference.h"

namespace relay::test {

/// The roundings that a kernel set does beyond f32 arithmetic.
struct Arithmetic {
  double query_rounding = 0;   ///< u_q
  double key_rounding = 0;     ///< u_k
  double byte_rounding = 0;    ///< u_b
  double weight_rounding = 0;  ///< u_p
  double weight_unit = 0;      ///< u_w
  bool operator==(const Arithmetic&) const = default;
};

/// What kernel set `isa` is allowed to round, by the table of precision.h: all that its kernels for
/// few rows and for many may, as one row's slots may be dealt to both.
Arithmetic arithmetic_of(const std::string& isa, const HeadShape& shape, DType k_type,
                         DType v_type);

/// Bounds of one row and head. Those of the output leave out the rounding of storing it.
struct Bounds {
  std::vector<double> worst;     ///< [v_dim]
  std::vector<double> variance;  ///< [v_dim]
  double lse = 0;
  bool linear = true;  ///< E is small: the statistical measure means something
};

Bounds derive_bounds(const Arithmetic& arithmetic, const OperatorCase& op, int64_t row,
                     int64_t head, int64_t position, std::span<const AttendedSlot> slots,
                     std::span<const double> logits, std::span<const double> out, double lse);

double unit_roundoff(DType type);
double smallest_step(DType type);  ///< half the distance of subnormals

}  // namespace relay::test
