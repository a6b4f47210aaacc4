/* The stable C interface of librelay: for engines in other languages. Everything that follows is
 * described in relay/types.h, relay/forest.h, relay/inputs.h and relay/attention.h; here it has C's
 * shape.
 *
 * Structs begin with their size, since later versions append fields: clear a struct, then set its
 * size with sizeof. 0 is the default of every appended field. So an older program's shorter structs
 * are served as ever, and a newer program's longer ones too unless they set a field that this
 * library does not know, which is RELAY_INVALID. (An appended field begins at or behind the sizeof
 * of the version before, never in its padding.) */
#ifndef RELAY_RELAY_H_
#define RELAY_RELAY_H_

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define RELAY_ABI_VERSION 1

/* 0 is success. On failure relay_last_error() says, for this thread, what to change. */
typedef enum {
  RELAY_OK = 0,
  RELAY_INVALID = 1, /* an argument is wrong; nothing was done */
  RELAY_INTERNAL = 2 /* out of memory or a bug */
} relay_status;

typedef enum { RELAY_F32 = 0, RELAY_F16 = 1, RELAY_BF16 = 2, RELAY_Q8_0 = 3 } relay_dtype;

/* How the vectors of a block's slots lie: KvLayout in relay/types.h. */
typedef enum { RELAY_ROWS = 0, RELAY_TILES = 1 } relay_layout;

typedef struct relay_plan relay_plan;           /* one batch: who shares what, cut into work */
typedef struct relay_workspace relay_workspace; /* scratch of one running operator */

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
  /* Appended since the first version: */
  int64_t cache_slots; /* that k and v have, for relay_check to compare; 0: unknown */
} relay_inputs;

const char* relay_version(void);
const char* relay_last_error(void);
/* The kernel set in use, e.g. "avx512bf16". */
const char* relay_isa(void);

/* Plans a batch. *plan may be null (a new one is made) or an older plan, whose memory is reused; if
 * that fails, the older plan must be planned again before it is used. */
relay_status relay_plan_batch(relay_plan** plan, const relay_batch* batch,
                              const relay_plan_options* options);
void relay_plan_free(relay_plan* plan);
/* KV slots that the plan reads, and that it would read if nothing were shared. */
relay_status relay_plan_slots(const relay_plan* plan, int64_t* read, int64_t* attended);
/* How many threads the plan was made for. */
relay_status relay_plan_threads(const relay_plan* plan, int32_t* threads);

relay_status relay_workspace_create(relay_workspace** workspace);
/* After each relay_plan_batch, before the first relay_attend (which is RELAY_INVALID otherwise);
 * not while one is running. */
relay_status relay_workspace_fit(relay_workspace* workspace, const relay_plan* plan);
void relay_workspace_free(relay_workspace* workspace);

/* Checks `inputs` against the plan: once per layer, from one thread, before relay_attend. */
relay_status relay_check(const relay_plan* plan, const relay_inputs* inputs);
/* One thread's share, 0 <= thread < threads; the output is complete when all have returned. */
relay_status relay_attend(const relay_plan* plan, const relay_inputs* inputs,
                          relay_workspace* workspace, int32_t thread);

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
  /* Appended since the first version: */
  int64_t cache_slots; /* that the cache has: no token goes beyond; 0: unknown */
} relay_kv_write;

/* Writes the KV heads [head_begin, head_end) of all tokens; threads may share the heads. */
relay_status relay_write_kv(const relay_kv_write* write, int32_t head_begin, int32_t head_end);

#ifdef __cplusplus
}
#endif

#endif /* RELAY_RELAY_H_ */
