/* The stable C interface of librelay-cuda: attention over shared prefixes on an NVIDIA GPU. What
 * follows is described in relay/cuda.h; here it has C's shape. Structs begin with their size and
 * grow as those of relay/relay.h do: set it with sizeof, and the rest to 0 before anything else.
 *
 * All data is device memory, unless it says host. A stream is a cudaStream_t; null is the default
 * stream. Calls that take one only enqueue, and may be captured in a CUDA graph, unless they say
 * that they synchronise. One graph serves every later batch within the plan's limits. */
#ifndef RELAY_RELAY_CUDA_H_
#define RELAY_RELAY_CUDA_H_

#include "relay/relay.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What relay_dtype has no name for: 8 bits, 4 of exponent, 3 of mantissa. */
#define RELAY_CUDA_F8_E4M3 16

typedef struct relay_cuda_plan relay_cuda_plan;

/* Which kernels attend. */
enum {
  RELAY_CUDA_PATH_AUTO = 0, /* RELAY_CUDA_PATH (mma | wgmma) if set, else the fastest */
  RELAY_CUDA_PATH_MMA = 1,
  RELAY_CUDA_PATH_WGMMA = 2 /* compute capability 9.0 */
};

/* What stays the same from batch to batch: it decides the workspace and the kernels. */
typedef struct {
  size_t size;
  int32_t q_heads;
  int32_t kv_heads;
  int32_t head_dim;     /* 64, 80, 96, 128, 192 or 256 */
  int32_t q_type;       /* of queries and output: RELAY_BF16 or RELAY_F16 */
  int32_t kv_type;      /* the same, or RELAY_CUDA_F8_E4M3 */
  int32_t max_requests; /* most requests of a batch, at most 1024 */
  int32_t max_rows;     /* most query rows of a batch */
  int32_t max_blocks;   /* most blocks of a request */
  int32_t block_size;   /* slots of a block: a multiple of 16, at most 65536 */
  int32_t cache_blocks; /* blocks in the cache: ids are below this */
  int32_t causal;       /* 1: a row sees the tokens up to its own; 0: all tokens of its request */
  int32_t window;       /* sliding window in tokens, 0 for none; needs causal */
  int32_t sharing;      /* 1: on, 0: off (the ablation), -1: as RELAY_SHARING says */
  int32_t check;        /* 1: report bad batches, see relay_cuda_check_batch; 0: do not */
  int32_t path;         /* RELAY_CUDA_PATH_... */
  /* Runs of fewer slots are not shared. 0: RELAY_CUDA_MIN_SHARED_SLOTS if set, else as many as make
   * sharing faster in a batch of so many requests, at least 64. */
  int32_t min_shared_slots;
} relay_cuda_plan_options;

/* A batch by its block tables. Request i owns the query rows [query_starts[i], query_starts[i +
 * 1]), the last ones of its kv_lengths[i] tokens; token t lies in slot table[i * table_stride + t /
 * block_size] * block_size + t % block_size. A request without rows is padding: its length and
 * table are not read. */
typedef struct {
  size_t size;
  int32_t requests; /* at most max_requests */
  int32_t rows;     /* no fewer than query_starts[requests]; 0: unknown, max_rows. A graph
                       serves batches of up to the rows that it was captured with. */
  const int32_t* query_starts; /* [requests + 1] */
  const int32_t* kv_lengths;   /* [requests] */
  const int32_t* table;        /* [requests][table_stride] */
  int64_t table_stride;        /* in elements; at least max_blocks */
} relay_cuda_batch;

/* Operands of one layer. Strides in bytes, multiples of 16 as the data pointers are; the elements
 * of a vector are contiguous. */
typedef struct {
  size_t size;
  const void* q; /* [rows][q_heads][head_dim] of q_type, or see q_scale */
  void* out;     /* likewise, of q_type; must not overlap the inputs */
  int64_t q_row_stride, q_head_stride;
  int64_t out_row_stride, out_head_stride;
  relay_kv k, v; /* vectors as RELAY_ROWS places them */
  float scale;
  float softcap;        /* 0: none */
  const float* slopes;  /* [q_heads] ALiBi slopes, or null */
  const float* sinks;   /* [q_heads] logits without a value, or null */
  const float* k_scale; /* scalars that RELAY_CUDA_F8_E4M3 values are multiplied by, */
  const float* v_scale; /* or null for 1 */
  float* lse;           /* [rows][q_heads] natural log-sum-exp (with sink), or null */
  /* Not null: q is RELAY_CUDA_F8_E4M3, which needs KV of it too, and is multiplied by this
   * scalar. */
  const float* q_scale;
} relay_cuda_inputs;

/* Tokens to be written into a cache: [tokens][kv_heads][head_dim] of q_type, strides in bytes. */
typedef struct {
  size_t size;
  const void* k;
  const void* v;
  int64_t k_row_stride, k_head_stride;
  int64_t v_row_stride, v_head_stride;
  const int64_t* slots; /* [tokens]; a negative slot is skipped */
  int32_t tokens;
  int32_t reserved; /* 0 */
} relay_cuda_kv_write;

/* What a plan will do. */
typedef struct {
  size_t size;
  int32_t segments;
  int32_t shared_segments; /* those with rows of more than one request */
  int32_t workers;         /* thread blocks that got work */
  int32_t reserved;
  int64_t kv_slots_read;     /* slot reads, each of all KV heads */
  int64_t kv_slots_attended; /* what they would be without sharing */
  int64_t partial_rows;      /* (row, head) states that are merged */
  int64_t partial_capacity;
  double flops; /* multiply-adds counted twice, padding left out */
} relay_cuda_summary;

/* What to change, for this thread's last failure of a function of this header. Host. */
const char* relay_cuda_last_error(void);
/* The current GPU and its compute capability, or "" if there is none. Host. */
const char* relay_cuda_device_name(void);

/* Bytes of device memory that a plan with these options needs. */
relay_status relay_cuda_workspace_bytes(const relay_cuda_plan_options* options, size_t* bytes);
/* Makes *plan in `workspace`, 256-byte aligned and alive as long as the plan. */
relay_status relay_cuda_plan_create(relay_cuda_plan** plan, const relay_cuda_plan_options* options,
                                    void* workspace, size_t bytes, void* stream);
/* Not while work of the plan is enqueued. The workspace is the caller's to free. */
void relay_cuda_plan_free(relay_cuda_plan* plan);
/* The kernels in use, e.g. "wgmma". Host. */
const char* relay_cuda_path(const relay_cuda_plan* plan);

/* Finds the sharing of a batch and plans its work: once per step. */
relay_status relay_cuda_plan_batch(const relay_cuda_plan* plan, const relay_cuda_batch* batch,
                                   void* stream);
/* Attends the batch that was planned last, whose arrays must still be there: in every layer. */
relay_status relay_cuda_attend(const relay_cuda_plan* plan, const relay_cuda_inputs* inputs,
                               void* stream);
/* Writes tokens into the cache that k and v of `cache` are (and k_scale and v_scale). */
relay_status relay_cuda_write_kv(const relay_cuda_plan* plan, const relay_cuda_kv_write* write,
                                 const relay_cuda_inputs* cache, void* stream);

/* For reports and tests; set summary->size first. Synchronises. */
relay_status relay_cuda_summarize(const relay_cuda_plan* plan, relay_cuda_summary* summary,
                                  void* stream);
/* With check = 1: RELAY_INVALID if the batch planned last held lengths or block ids out of range.
 * Synchronises. */
relay_status relay_cuda_check_batch(const relay_cuda_plan* plan, void* stream);

#ifdef __cplusplus
}
#endif

#endif /* RELAY_RELAY_CUDA_H_ */
