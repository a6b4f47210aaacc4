// What every attention kernel is given: a plan and the operands of one layer.
#pragma once

#include "cuda/plan/plan_data.h"

namespace relay::cuda {

/// Strides in bytes.
struct AttendParams {
  PlanView plan;
  int32_t* taken;  ///< portions of the tail, by the attention under way; 0 before it
  const int32_t* table;
  int64_t table_stride;  ///< elements
  const char* q;
  const char* k;
  const char* v;
  char* out;
  int64_t q_row, q_head;
  int64_t out_row, out_head;
  int64_t k_block, k_slot, k_head;
  int64_t v_block, v_slot, v_head;
  int32_t head_size;
  int32_t block_size;
  int32_t cache_blocks;
  int32_t requests;
  int32_t q_heads, kv_heads, group;
  int32_t tile_rows;
  int32_t workers;
  int32_t max_portions;
  int32_t partial_capacity;
  float scale;
  float softcap;
  const float* slopes;
  const float* sinks;
  const float* q_scale;  ///< not null: queries in e4m3
  const float* k_scale;
  const float* v_scale;
  float* lse;
  /// Partial results: partial_capacity rows of whole jobs, then tile_rows for each worker of the
  /// job whose end its portion has, then as many of the job whose begin; then the same with
  /// kTailRows for each portion of the tail (cut_partial_row()).
  float* partial_out;     ///< [rows][head_size], not divided by the sum
  float2* partial_state;  ///< [rows] maximum (of logits times log2 e) and sum
};

}  // namespace relay::cuda
