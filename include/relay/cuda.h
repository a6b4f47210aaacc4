// Attention over shared prefixes on an NVIDIA GPU: plan once per batch, attend once per layer. All
// of it runs in a stream: sharing is found and work is planned on the device, nothing is copied to
// the host, nothing synchronises, nothing allocates. So both calls can be captured in a CUDA graph,
// and one graph serves every later batch within the plan's limits.
//
//   cuda::PlanOptions options{.shape = shape, .max_requests = 64, ...};
//   void* workspace = ...;  // cuda::workspace_bytes(options) bytes of device memory
//   cuda::PlanPtr plan = cuda::make_plan(options, workspace, bytes, stream);
//   cuda::plan_batch(*plan, batch, stream);    // once per step
//   cuda::attend(*plan, inputs, stream);       // in every layer
//
// The formula is that of relay/attention.h. Requests share a block of KV where their block tables
// hold the same id in the same column; the rows of all of them go over it together, as one matrix
// product, and each one's parts are merged by their log-sum-exp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "relay/forest.h"
#include "relay/types.h"

namespace relay::cuda {

/// A cudaStream_t; null is the default stream. The current device is the one that is used.
using Stream = void*;

/// Which kernels attend. Every path serves everything that `validate` lets through.
enum class Path : uint8_t {
  kAuto,   ///< RELAY_CUDA_PATH (mma | wgmma) if set, else the fastest that serves the options
  kMma,    ///< mma.sync and cp.async: compute capability 8.0 and newer
  kWgmma,  ///< wgmma and TMA: compute capability 9.0
};

/// What stays the same from batch to batch: it decides the workspace and the kernels.
struct PlanOptions {
  HeadShape shape;                 ///< qk_dim == v_dim: 64, 80, 96, 128, 192 or 256
  DType q_type = DType::kBF16;     ///< of queries and output: kBF16 or kF16
  DType kv_type = DType::kBF16;    ///< the same, or kF8E4M3
  int32_t max_requests = 0;        ///< most requests of a batch, at most kMaxRequests
  int32_t max_rows = 0;            ///< most query rows of a batch
  int32_t max_blocks = 0;          ///< most blocks of a request: used columns of the block table
  int32_t block_size = 16;         ///< slots of a block: a multiple of 16, at most 65536
  int32_t cache_blocks = 0;        ///< blocks in the cache: ids are below this
  bool causal = true;              ///< a row sees the tokens up to its own, else all of its request
  int32_t window = 0;              ///< sliding window in tokens, 0 for none; needs causal
  Sharing sharing = Sharing::kOn;  ///< kOff: the same kernels, each request for itself
  bool check = false;              ///< report bad batches, see check_batch()
  Path path = Path::kAuto;
  /// Runs of fewer slots are not shared. 0: RELAY_CUDA_MIN_SHARED_SLOTS if set, else as many as
  /// make sharing faster in a batch of so many requests, at least 64.
  int32_t min_shared_slots = 0;
};

inline constexpr int32_t kMaxRequests = 1024;

/// A batch by its block tables, in device memory. Request i owns the query rows
/// [query_starts[i], query_starts[i + 1]), the last of its kv_lengths[i] tokens; token t lies in
/// slot table[i * table_stride + t / block_size] * block_size + t % block_size.
/// A request without rows is padding: its length and table are not read.
struct Batch {
  int32_t requests = 0;  ///< at most max_requests
  /// No fewer than query_starts[requests], where the caller knows a bound below max_rows: fewer
  /// thread blocks are launched. A graph serves batches of up to the rows that it was captured
  /// with. 0: unknown.
  int32_t rows = 0;
  const int32_t* query_starts = nullptr;  ///< [requests + 1]
  const int32_t* kv_lengths = nullptr;    ///< [requests]; at least the request's rows
  const int32_t* table = nullptr;         ///< [requests][table_stride]
  int64_t table_stride = 0;               ///< in elements; at least max_blocks
};

/// Operands of one layer, in device memory. Strides in bytes, multiples of 16 as the data pointers
/// are; elements of a vector are contiguous.
struct Inputs {
  const void* q = nullptr;  ///< [rows][q_heads][dim] of q_type, or see q_scale
  int64_t q_row_stride = 0;
  int64_t q_head_stride = 0;
  void* out = nullptr;  ///< likewise, of q_type; must not overlap the inputs
  int64_t out_row_stride = 0;
  int64_t out_head_stride = 0;
  /// K and V of slot s, KV head h: data + (s / block_size) * block_stride
  ///                                    + (s % block_size) * slot_stride + h * head_stride.
  const void* k = nullptr;
  const void* v = nullptr;
  int64_t k_block_stride = 0, k_slot_stride = 0, k_head_stride = 0;
  int64_t v_block_stride = 0, v_slot_stride = 0, v_head_stride = 0;
  float scale = 1.0f;              ///< not negative
  float softcap = 0.0f;            ///< 0: none
  const float* slopes = nullptr;   ///< [q_heads] ALiBi slopes, or null
  const float* sinks = nullptr;    ///< [q_heads] logits without a value, or null
  const float* k_scale = nullptr;  ///< device scalars that kF8E4M3 values are multiplied by,
  const float* v_scale = nullptr;  ///< or null for 1
  float* lse = nullptr;            ///< [rows][q_heads] natural log-sum-exp (with sink), or null
  /// Not null: q is kF8E4M3, which needs KV of it too, and is multiplied by this device scalar.
  const float* q_scale = nullptr;
};

class Plan;
struct PlanDeleter {
  void operator()(Plan* plan) const;
};
using PlanPtr = std::unique_ptr<Plan, PlanDeleter>;

/// Bytes of device memory that a plan with these options needs; throws Error where they are wrong.
size_t workspace_bytes(const PlanOptions& options);

/// Lays a plan out in `workspace` (256-byte aligned device memory, alive as long as the plan), and
/// enqueues its first clearing. Throws Error for options or a GPU that cannot be served, and for a
/// workspace that is too small.
PlanPtr make_plan(const PlanOptions& options, void* workspace, size_t bytes, Stream stream);

/// Enqueues finding the sharing of `batch` and planning its work. Throws Error for null pointers
/// and sizes beyond the limits, before anything is launched.
void plan_batch(const Plan& plan, const Batch& batch, Stream stream);

/// Enqueues attention over the batch that was planned last, whose block tables must still be there.
/// Throws Error for inputs that cannot be served, before anything is launched.
void attend(const Plan& plan, const Inputs& inputs, Stream stream);

/// Tokens to be written into a cache of a plan: [tokens][kv_heads][dim], strides in bytes.
struct KvWrite {
  const void* k = nullptr;  ///< of q_type; kF8E4M3 caches are divided by the scales and rounded
  const void* v = nullptr;
  int64_t k_row_stride = 0, k_head_stride = 0;
  int64_t v_row_stride = 0, v_head_stride = 0;
  int32_t tokens = 0;
  const int64_t* slots = nullptr;  ///< [tokens]; negative ones are skipped (padding)
};
/// Enqueues writing `write` into the cache that `cache` names (its k, v and strides; scales).
void write_kv(const Plan& plan, const KvWrite& write, const Inputs& cache, Stream stream);

/// What a plan will do. Synchronises with the stream: for reports and tests.
struct PlanSummary {
  int32_t segments = 0;
  int32_t shared_segments = 0;    ///< those with rows of more than one request
  int32_t workers = 0;            ///< thread blocks that got work
  int64_t kv_slots_read = 0;      ///< slot reads, each of all KV heads
  int64_t kv_slots_attended = 0;  ///< what they would be without sharing
  int64_t partial_rows = 0;       ///< (row, head) states that are merged
  int64_t partial_capacity = 0;
  double flops = 0;  ///< multiply-adds counted twice, padding left out
};
PlanSummary summarize(const Plan& plan, Stream stream);

/// With PlanOptions::check: throws Error if the batch planned last held lengths or block ids out
/// of range. Whether checked or not, nothing is read or written beyond the cache: lengths
/// are cut to what the table has room for, and blocks outside of the cache count as zeros.
/// Synchronises.
void check_batch(const Plan& plan, Stream stream);

const PlanOptions& options_of(const Plan& plan);
/// The kernels in use, e.g. "wgmma".
const char* path_of(const Plan& plan);

/// The current GPU, e.g. "NVIDIA H100 80GB HBM3 (9.0, 132 SMs)"; throws Error if there is none.
std::string device_name();

}  // namespace relay::cuda
