// Merges the partial states of rows whose attention was computed in more than one piece.
//
// Traffic of a (row, head) with n pieces: reads n x 4 (head size + 2) bytes, mostly from the L2
// cache, where the attention kernel has just put them, and writes head size x 2. A row is finished
// by the same thread in the same order whoever computed its pieces: the bits do not depend on timing.
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

/// One warp a (row, head); lane l holds the elements 2 (l + 32 i) and the one after.
template <typename T, int kPairs>
__device__ void merge_head(const AttendParams& p, const int32_t* cuts, const RequestInfo& info,
                           int32_t row, int32_t head) {
  const int32_t lane = threadIdx.x % 32;
  const int32_t kv_head = head / p.group;
  const int32_t pairs = p.head_size / 2;
  float max = -INFINITY;
  float sum = 0.0f;
  float2 out[kPairs];
#pragma unroll
  for (int i = 0; i < kPairs; ++i) out[i] = {0.0f, 0.0f};

  const int32_t local = row - info.row_begin;
  for (int32_t part = 0; part < info.parts; ++part) {
    RequestPart at;
    if (info.rows_per_segment > 0) {
      at = {info.segment + local / info.rows_per_segment, local % info.rows_per_segment};
    } else {
      at = p.plan.parts[(p.plan.rows[row].request) * kMaxParts + part];
      at.row += local;
    }
    const Segment segment = p.plan.segments[at.segment];
    if (segment.steps == 0) continue;
    const int32_t of_segment = at.row * p.group + head % p.group;
    const int32_t tile = of_segment / p.tile_rows;
    const int32_t begin =
        segment.step_base + (kv_head * segment.row_tiles + tile) * segment.steps;
    const int32_t end = begin + segment.steps;
    int32_t worker = worker_of(cuts, p.workers, begin);
    for (int32_t step = begin; step < end; ++worker) {
      const int32_t to = min(end, cuts[worker + 1]);
      if (to <= step) continue;
      const int32_t base = partial_row(p, segment, kv_head, tile * p.tile_rows, worker,
                                       step == begin, to == end);
      if (base < 0) return;  // the whole job: its results have gone straight out
      const int64_t at_row = base + of_segment % p.tile_rows;
      const float2 state = p.partial_state[at_row];
      const auto* from = reinterpret_cast<const float2*>(p.partial_out + at_row * p.head_size);
      float2 piece[kPairs];
#pragma unroll
      for (int i = 0; i < kPairs; ++i) {
        if (lane + 32 * i < pairs) piece[i] = from[lane + 32 * i];
      }
      if (state.y > 0.0f) {
        const float top = fmaxf(max, state.x);
        const float keep = sum > 0.0f ? exp2f(max - top) : 0.0f;
        const float take = exp2f(state.x - top);
        sum = sum * keep + state.y * take;
        max = top;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          if (lane + 32 * i < pairs) {
            out[i].x = out[i].x * keep + piece[i].x * take;
            out[i].y = out[i].y * keep + piece[i].y * take;
          }
        }
      }
      step = to;
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
}

template <typename T, int kPairs>
__global__ void __launch_bounds__(kThreads) merge_rows(AttendParams p) {
  extern __shared__ int32_t cuts[];
  let_next_start();
  wait_for_previous();
  const int32_t rows = p.plan.header->rows;
  const int32_t row = blockIdx.x;
  if (row >= rows) return;
  for (int32_t w = threadIdx.x; w <= p.workers; w += kThreads) cuts[w] = p.plan.cuts[w].step;
  const RowInfo at = p.plan.rows[row];
  const RequestInfo info = p.plan.requests[at.request];
  __syncthreads();
  for (int32_t head = blockIdx.y * kWarps + threadIdx.x / 32; head < p.q_heads;
       head += gridDim.y * kWarps) {
    merge_head<T, kPairs>(p, cuts, info, row, head);
  }
}

template <typename T>
cudaError_t launch_type(const AttendParams& p, int32_t max_rows, cudaStream_t stream) {
  const dim3 grid(max_rows, max_rows <= 1024 ? ceil_div(p.q_heads, kWarps) : 1);
  const size_t bytes = sizeof(int32_t) * (p.workers + 1);
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
