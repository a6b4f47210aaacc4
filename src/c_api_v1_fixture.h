// The structs of relay/relay.h as the first version had them, word for word: programs that were
// compiled with them are still served. Never to be changed; enums are appended to, so the current
// ones do.
#pragma once

#include "relay/relay.h"

namespace relay_v1 {

/* A batch by its block tables. Request i owns the query rows [row_offsets[i], row_offsets[i + 1]),
 * the last ones of its kv_lengths[i] tokens; token t lies in slot
 * table[i * table_stride + t / block_size] * block_size + t % block_size. */
typedef struct {
  size_t size;
  int32_t requests;
  const int32_t* row_offsets; /* [requests + 1] */
  const int64_t* kv_lengths;  /* [requests] */
  const int32_t* table;
  int64_t table_stride;
  int64_t block_size;
  int64_t window; /* sliding window in tokens, 0 for none; needs causal */
  int32_t causal; /* 1: a row sees the tokens up to its own; 0: all tokens of its request */
} relay_batch;

typedef struct {
  size_t size;
  int32_t q_heads;
  int32_t kv_heads;
  int32_t qk_dim;
  int32_t v_dim;
  relay_dtype k_type;
  relay_dtype v_type;
  int32_t threads; /* how many threads will call relay_attend */
  int32_t sharing; /* 1: on, 0: off (the ablation), -1: as RELAY_SHARING says */
  relay_layout layout;
} relay_plan_options;

/* Strides in bytes; the elements of one vector are contiguous in RELAY_ROWS. In RELAY_TILES
 * slot_stride is the bytes of one vector, and a block's tiles follow one another. */
typedef struct {
  const void* data;
  int64_t block_stride;
  int64_t slot_stride;
  int64_t head_stride;
} relay_kv;

typedef struct {
  size_t size;
  relay_dtype q_type, out_type; /* f32, f16 or bf16 */
  const void* q;                /* [rows][q_heads][qk_dim] */
  void* out;                    /* [rows][q_heads][v_dim] */
  int64_t q_row_stride, q_head_stride;
  int64_t out_row_stride, out_head_stride;
  relay_kv k, v;
  float scale;
  float softcap;       /* 0: none */
  const float* slopes; /* [q_heads] ALiBi slopes, or null */
  const float* sinks;  /* [q_heads] or null */
  float* lse;          /* [rows][q_heads] natural log-sum-exp, or null */
} relay_inputs;

/* Tokens to be written into a KV cache: [tokens][kv_heads][dim], of the cache's types. */
typedef struct {
  size_t size;
  int32_t kv_heads;
  int32_t k_dim, v_dim;
  relay_dtype k_type, v_type;
  relay_layout layout;
  int64_t block_size;
  relay_kv k_cache, v_cache; /* written */
  const void* k;
  const void* v;
  int64_t k_row_stride, k_head_stride, v_row_stride, v_head_stride; /* bytes */
  int64_t tokens;
  const int64_t* slots; /* [tokens]; a negative slot is skipped */
} relay_kv_write;

}  // namespace relay_v1
