// What one attention operator computes, and from what: the same on every machine.
//
// For row r and query head h, over the slots s that r attends (kv head h / group):
//   logit_s = softcap(scale * q . k_s) + bias,   softcap(x) = cap * tanh(x / cap) if cap > 0
//   bias    = slope_h * mask(r, s)              where a bias matrix is given (slope 1 if no slopes)
//           = slope_h * (column_s - position_r) with slopes alone (ALiBi)
//   out     = sum_s exp(logit_s) v_s / (sum_s exp(logit_s) + exp(sink_h))
#pragma once

#include <cstdint>

#include "relay/types.h"

namespace relay {

struct AttentionInputs {
  ConstRows q;  ///< [rows][q_heads][qk_dim], f32, f16 or bf16
  KvCache kv;
  MutableRows out;  ///< [rows][q_heads][v_dim], f32, f16 or bf16; must not overlap the inputs
  float scale = 1.0f;
  float softcap = 0.0f;           ///< 0: none
  int64_t window = 0;             ///< for Visibility::kPositions, 0: none
  const float* slopes = nullptr;  ///< [q_heads] or null
  const float* sinks = nullptr;   ///< [q_heads] logits without a value, or null
  /// For Visibility::kBias: f16 or f32, element c is column c; head_stride may be 0.
  ConstRows bias;
  /// Optional [rows][q_heads], natural log-sum-exp of the logits (with sink).
  float* lse = nullptr;
};

}  // namespace relay
