// The state of one query row over the KV slots seen so far, and its merge law.
//
// Over a set S of slots with logits x_s (in base 2: natural logits times log2 e):
//   max = max x_s,  sum = sum 2^(x_s - max),  and beside it the vector o = sum 2^(x_s - max) v_s.
// States over disjoint sets merge; the law is associative and commutative (up to rounding), and the
// empty state is its identity. So a forest may be cut anywhere, at any depth.
#pragma once

#include <cmath>
#include <limits>

namespace relay {

struct SoftmaxState {
  float max = -std::numeric_limits<float>::infinity();
  float sum = 0.0f;

  bool empty() const { return sum == 0.0f; }
  /// Natural log-sum-exp of the logits; -inf when empty.
  float log_sum_exp() const {
    return empty() ? -std::numeric_limits<float>::infinity()
                   : (max + std::log2(sum)) * 0.693147180559945309417f;
  }
};

/// Factors of the two o vectors in a merge.
struct MergeWeights {
  float into = 1.0f;
  float part = 0.0f;
};

/// Merges `part` into `state`; the caller then sets o = weights.into * o + weights.part * o_part.
/// Two empty states merge to the empty one, without NaN.
inline MergeWeights merge(SoftmaxState& state, const SoftmaxState& part) {
  if (part.empty()) return {1.0f, 0.0f};
  if (state.empty()) {
    state = part;
    return {0.0f, 1.0f};
  }
  const float max = part.max > state.max ? part.max : state.max;
  const MergeWeights w{std::exp2(state.max - max), std::exp2(part.max - max)};
  state.sum = state.sum * w.into + part.sum * w.part;
  state.max = max;
  return w;
}

}  // namespace relay
