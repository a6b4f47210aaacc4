// Merges the partial states of rows whose attention was computed in more than one piece.
//
// Traffic of a (row, head) with n pieces: reads n x 4 (head size + 2) bytes, mostly from the L2
// cache, where the attention kernel has just put them, and writes head size x 2. A row is finished
// by the same threads in the same order whoever computed its pieces: the bits do not depend on
// timing.
#include "cuda/kernels/common.cuh"
#include "cuda/kernels/kernels.h"
#include "cuda/launch.h"

namespace relay::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

/// The last worker that begins at or before a step.
__device__ int32_t worker_of(const int32_t* cuts, int32_t workers, int32_t step) {
  int32_t low = 0;
  for (int32_t high = workers; high - low > 1;) {
    const int32_t middle = (low + high) / 2;
    (cuts[middle] <= step ? low : high) = middle;
  }
  return low;
}

/// Lists the partial rows of a (row, head) in `pieces`, in the order of columns, -1 for none;
/// returns how many. `direct`: its results have gone straight out, and there are none.
__device__ int32_t list_pieces(const AttendParams& p, const int32_t* cuts, const RequestInfo& info,
                               int32_t request, int32_t row, int32_t head, int32_t* pieces,
                               bool& direct) {
  const int32_t kv_head = head / p.group;
  const int32_t local = row - info.row_begin;
  int32_t count = 0;
  direct = false;
  for (int32_t part = 0; part < info.parts; ++part) {
    RequestPart at;
    if (info.rows_per_segment > 0) {
      at = {info.segment + local / info.rows_per_segment, local % info.rows_per_segment};
    } else {
      at = p.plan.parts[request * kMaxParts + part];
      at.row += local;
    }
    const Segment segment = p.plan.segments[at.segment];
    if (segment.steps == 0) continue;
    const int32_t of_segment = at.row * p.group + head % p.group;
    const int32_t tile = of_segment / p.tile_rows;
    const int32_t begin = segment.step_base + (tile * p.kv_heads + kv_head) * segment.steps;
    const int32_t end = begin + segment.steps;
    const int32_t first = worker_of(cuts, p.workers, begin);
    const int32_t workers = worker_of(cuts, p.workers, end - 1) - first + 1;
    if (workers == 1 && segment.partial_base < 0) {
      direct = true;
      return 0;
    }
    for (int32_t i = threadIdx.x % 32; i < workers; i += 32) {
      const int32_t from = max(begin, cuts[first + i]);
      const int32_t to = min(end, cuts[first + i + 1]);
      pieces[count + i] = from < to ? partial_row(p, segment, kv_head, tile * p.tile_rows,
                                                  first + i, from == begin, to == end) +
                                          of_segment % p.tile_rows
                                    : -1;
    }
    count += workers;
  }
  __syncwarp();
  return count;
}

/// One warp a (row, head); lane l holds the elements 2 (l + 32 i) and the one after. `weights`
/// is scratch of the same length as `pieces`.
template <typename T, int kPairs>
__device__ void merge_pieces(const AttendParams& p, int32_t row, int32_t head, int32_t count,
                             const int32_t* pieces, float* weights) {
  const int32_t lane = threadIdx.x % 32;
  const int32_t pairs = p.head_size / 2;
  float max = -INFINITY;
  for (int32_t i = lane; i < count; i += 32) {
    const int32_t piece = pieces[i];
    const float2 state = piece >= 0 ? p.partial_state[piece] : float2{-INFINITY, 0.0f};
    weights[i] = state.y > 0.0f ? state.x : -INFINITY;
    max = fmaxf(max, weights[i]);
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, d));
  float sum = 0.0f;
  for (int32_t i = lane; i < count; i += 32) {
    const float weight = weights[i] == -INFINITY ? 0.0f : exp2f(weights[i] - max);
    sum += weight > 0.0f ? p.partial_state[pieces[i]].y * weight : 0.0f;
    weights[i] = weight;
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  __syncwarp();

  float2 out[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) out[i] = {0.0f, 0.0f};
#pragma unroll 4
  for (int32_t k = 0; k < count; ++k) {
    const float weight = weights[k];
    const auto* from = reinterpret_cast<const float2*>(
        p.partial_out + int64_t{pieces[k] < 0 ? 0 : pieces[k]} * p.head_size);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      if (lane + 32 * i < pairs) {
        const float2 piece = from[lane + 32 * i];
        // Of no weight, and perhaps no number.
        out[i].x += weight > 0.0f ? piece.x * weight : 0.0f;
        out[i].y += weight > 0.0f ? piece.y * weight : 0.0f;
      }
    }
  }
  const float factor = finish_row(p, row, head, max, sum, lane == 0);
  auto* to = reinterpret_cast<uint32_t*>(p.out + row * p.out_row + head * p.out_head);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) {
    if (lane + 32 * i < pairs) {
      to[lane + 32 * i] = Pair<T>::pack(out[i].x * factor, out[i].y * factor);
    }
  }
  __syncwarp();
}

/// Pieces of a row at most: its parts, and one more for each worker, empty or not.
__host__ __device__ constexpr int32_t max_pieces(int32_t workers) { return kMaxParts + workers; }

template <typename T, int kPairs>
__global__ void __launch_bounds__(kThreads) merge_rows(AttendParams p) {
  extern __shared__ int32_t memory[];
  int32_t* cuts = memory;
  const int32_t warp = threadIdx.x / 32;
  int32_t* pieces = memory + p.workers + 1 + warp * 2 * max_pieces(p.workers);
  auto* weights = reinterpret_cast<float*>(pieces + max_pieces(p.workers));
  let_next_start();
  // The plan is there: the attention kernel lets this one start only when it has seen the plan.
  const int32_t rows = p.plan.header->rows;
  const int32_t row = blockIdx.x;
  if (row >= rows) {
    wait_for_previous();  // or the kernel after this one might begin too early
    return;
  }
  for (int32_t w = threadIdx.x; w <= p.workers; w += kThreads) cuts[w] = p.plan.cuts[w].step;
  const int32_t request = p.plan.rows[row].request;
  const RequestInfo info = p.plan.requests[request];
  __syncthreads();
  bool waited = false;
  for (int32_t head = blockIdx.y * kWarps + warp; head < p.q_heads; head += gridDim.y * kWarps) {
    bool direct = false;
    const int32_t count = list_pieces(p, cuts, info, request, row, head, pieces, direct);
    if (direct) continue;
    if (!waited) wait_for_previous();
    waited = true;
    merge_pieces<T, kPairs>(p, row, head, count, pieces, weights);
  }
  if (!waited) wait_for_previous();
}

template <typename T>
cudaError_t launch_type(const AttendParams& p, int32_t max_rows, cudaStream_t stream) {
  const dim3 grid(max_rows, max_rows <= 1024 ? ceil_div(p.q_heads, kWarps) : 1);
  const size_t bytes =
      sizeof(int32_t) * (p.workers + 1 + size_t{2} * kWarps * max_pieces(p.workers));
  if (p.head_size <= 64) return launch(merge_rows<T, 1>, grid, kThreads, bytes, stream, p);
  if (p.head_size <= 128) return launch(merge_rows<T, 2>, grid, kThreads, bytes, stream, p);
  return launch(merge_rows<T, 4>, grid, kThreads, bytes, stream, p);
}

}  // namespace

cudaError_t launch_merge(const AttendParams& params, DType q_type, int32_t max_rows,
                         cudaStream_t stream) {
  return q_type == DType::kBF16 ? launch_type<__nv_bfloat16>(params, max_rows, stream)
                                : launch_type<__half>(params, max_rows, stream);
}

}  // namespace relay::cuda
