// Merges the partial states of rows whose attention was computed in more than one piece.
//
// Traffic of a (row, head) with n pieces: reads n x 4 (head size + 2) bytes, mostly from the L2
// cache, where the attention kernel has just put them, and writes head size x 2. A row is finished
// by as many threads in the same order whoever computed its pieces: the bits do not depend on
// timing.
#include <algorithm>

#include "cuda/kernels/common.cuh"
#include "cuda/kernels/kernels.h"
#include "cuda/launch.h"

namespace relay::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm = 4;

/// The last worker that begins at or before a step.
__device__ int32_t worker_of(const int32_t* cuts, int32_t workers, int32_t step) {
  int32_t low = 0;
#pragma unroll 1
  for (int32_t high = workers; high - low > 1;) {
    const int32_t middle = (low + high) / 2;
    (cuts[middle] <= step ? low : high) = middle;
  }
  return low;
}

/// Lists the partial rows of a (row, head) in `pieces`, in the order of columns, -1 for none;
/// returns how many. `direct`: its results have gone straight out, and there are none.
__device__ int32_t list_pieces(const AttendParams& p, const int32_t* cuts, int32_t row,
                               int32_t head, int32_t* pieces, bool& direct) {
  const int32_t request = p.plan.rows[row].request;
  const RequestInfo info = p.plan.requests[request];
  const int32_t kv_head = head / p.group;
  const int32_t local = row - info.row_begin;
  int32_t count = 0;
  direct = false;
#pragma unroll 1
  for (int32_t number = 0; number < info.parts; ++number) {
    RequestPart part;
    if (info.rows_per_segment > 0) {
      const int32_t segment = info.segment + local / info.rows_per_segment;
      part = part_of(segment, local % info.rows_per_segment, p.plan.segments[segment]);
    } else {
      part = p.plan.parts[request * kMaxParts + number];
      part.row += local;
    }
    if (part.steps == 0) continue;
    const int32_t of_segment = part.row * p.group + head % p.group;
    const int32_t tile = of_segment / p.tile_rows;
    const int32_t begin = part.step_base + (tile * p.kv_heads + kv_head) * part.steps;
    const int32_t end = begin + part.steps;
    const int32_t first = worker_of(cuts, p.workers, begin);
    const int32_t workers = worker_of(cuts, p.workers, end - 1) - first + 1;
    if (workers == 1 && part.partial_base < 0) {
      direct = true;
      return 0;
    }
#pragma unroll 1
    for (int32_t i = threadIdx.x % 32; i < workers; i += 32) {
      const int32_t from = max(begin, cuts[first + i]);
      const int32_t to = min(end, cuts[first + i + 1]);
      pieces[count + i] =
          from < to ? partial_row(p, part.segment_rows, part.partial_base, kv_head,
                                  tile * p.tile_rows, first + i, from == begin, to == end) +
                          of_segment % p.tile_rows
                    : -1;
    }
    count += workers;
  }
  __syncwarp();
  return count;
}

/// What the pieces of a row amount to.
struct Total {
  float max;
  float sum;
};

/// Replaces the maxima of a row's pieces by what their outputs are to be multiplied by. One warp.
__device__ Total weigh_pieces(const AttendParams& p, int32_t count, const int32_t* pieces,
                              float* weights) {
  const int32_t lane = threadIdx.x % 32;
  float max = -INFINITY;
#pragma unroll 1
  for (int32_t i = lane; i < count; i += 32) {
    const int32_t piece = pieces[i];
    const float2 state = piece >= 0 ? p.partial_state[piece] : float2{-INFINITY, 0.0f};
    weights[i] = state.y > 0.0f ? state.x : -INFINITY;
    max = fmaxf(max, weights[i]);
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, d));
  float sum = 0.0f;
#pragma unroll 1
  for (int32_t i = lane; i < count; i += 32) {
    const float weight = weights[i] == -INFINITY ? 0.0f : exp2_fast(weights[i] - max);
    sum += weight > 0.0f ? p.partial_state[pieces[i]].y * weight : 0.0f;
    weights[i] = weight;
  }
#pragma unroll
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
  __syncwarp();
  return {max, sum};
}

/// The weighted sum of every `team`-th piece from `member` on, and what all of them amount to; the
/// pieces' weights are computed while the first outputs are on their way. Lane l holds the elements
/// 2 (l + 32 i) and the one after.
template <int kPairs>
__device__ Total add_pieces(const AttendParams& p, int32_t member, int32_t team, int32_t count,
                            const int32_t* pieces, float* weights, float2 (&out)[kPairs]) {
  constexpr int kAhead = kPairs > 2 ? 2 : 4;
  const int32_t lane = threadIdx.x % 32;
  const auto read = [&](int32_t k, float2(&to)[kPairs]) {
    const int32_t piece = k < count ? pieces[k] : -1;
    const auto* from =
        reinterpret_cast<const float2*>(p.partial_out + int64_t{piece} * p.head_size);
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      to[i] = {0.0f, 0.0f};
      if (piece >= 0 && lane + 32 * i < p.head_size / 2) to[i] = from[lane + 32 * i];
    }
  };
  const auto add = [&](int32_t k, const float2(&piece)[kPairs]) {
    const float weight = k < count ? weights[k] : 0.0f;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      // Of no weight, and perhaps no number.
      out[i].x += weight > 0.0f ? piece[i].x * weight : 0.0f;
      out[i].y += weight > 0.0f ? piece[i].y * weight : 0.0f;
    }
  };
  float2 ahead[kAhead][kPairs];
#pragma unroll
  for (int j = 0; j < kAhead; ++j) read(member + j * team, ahead[j]);
  const Total total = weigh_pieces(p, count, pieces, weights);
#pragma unroll
  for (int i = 0; i < kPairs; ++i) out[i] = {0.0f, 0.0f};
#pragma unroll 1
  for (int32_t k = member; k < count; k += kAhead * team) {
#pragma unroll
    for (int j = 0; j < kAhead; ++j) add(k + j * team, ahead[j]);
#pragma unroll
    for (int j = 0; j < kAhead; ++j) read(k + (kAhead + j) * team, ahead[j]);
  }
  return total;
}

/// Pieces of a row at most: its parts, and one more for each worker, empty or not.
__host__ __device__ constexpr int32_t max_pieces(int32_t workers) { return kMaxParts + workers; }

/// Shared memory: the cuts, then for each warp pieces, weights and an output.
size_t shared_bytes(const AttendParams& p, int pairs) {
  return sizeof(int32_t) * (p.workers + 1 + 1) / 2 * 2 +
         kWarps * (sizeof(int32_t) * 2 * max_pieces(p.workers) + sizeof(float2) * 32 * pairs);
}

/// A team of 1, 2, 4 or 8 warps of a block merges one (row, head) after the other: the fewer there
/// are of these, the larger the teams.
template <typename T, int kPairs>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) merge_rows(AttendParams p) {
  extern __shared__ int32_t memory[];
  __shared__ int32_t counts[kWarps];  // of a team, -1: direct
  int32_t* cuts = memory;
  const int32_t warp = threadIdx.x / 32;
  const int32_t lane = threadIdx.x % 32;
  auto* outs = reinterpret_cast<float2*>(memory + (p.workers + 1 + 1) / 2 * 2);  // [kWarps][...]
  int32_t* lists = reinterpret_cast<int32_t*>(outs + kWarps * 32 * kPairs);
  let_next_start();
  // The plan is there: the attention kernel lets this one start only when it has seen the plan.
  const int32_t tasks = p.plan.header->rows * p.q_heads;
  const int32_t warps = static_cast<int32_t>(gridDim.x) * kWarps;
  int32_t team = 1;
  while (team < kWarps && tasks * team * 2 <= warps) team *= 2;
  const int32_t teams = warps / team;
  const int32_t member = warp % team;
  int32_t* pieces = lists + (warp - member) * 2 * max_pieces(p.workers);
  auto* weights =
      reinterpret_cast<float*>(lists + (warp * 2 + 1) * max_pieces(p.workers));  // a warp's own

#pragma unroll 1
  for (int32_t w = threadIdx.x; w <= p.workers; w += kThreads) cuts[w] = p.plan.cuts[w].step;
  __syncthreads();
  bool waited = false;
  // Blocks take neighbouring tasks, and all teams of a block as many.
  for (int32_t task = blockIdx.x * (kWarps / team) + warp / team; task - warp / team < tasks;
       task += teams) {
    const int32_t row = task / p.q_heads;
    const int32_t head = task % p.q_heads;
    int32_t count = 0;
    bool direct = true;
    if (task < tasks && member == 0) count = list_pieces(p, cuts, row, head, pieces, direct);
    if (team > 1) {
      if (lane == 0 && member == 0) counts[warp] = direct ? -1 : count;
      __syncthreads();
      count = counts[warp - member];
      direct = count < 0;
    }
    // The first time all of it is done twice, at first without any piece: by then the code has come
    // from memory, while the kernel before still works.
#pragma unroll 1
    for (bool rehearsal = !waited;; rehearsal = false) {
      if (!rehearsal && !waited) {
        wait_for_previous();
        waited = true;
      }
      if (team == 1 && direct) break;
      float2 out[kPairs];
      Total total{};
      if (!direct) {
        total = add_pieces(p, member, team, rehearsal ? 0 : count, pieces, weights, out);
      }
      if (team > 1) {
        if (member > 0 && !direct && !rehearsal) {
#pragma unroll
          for (int i = 0; i < kPairs; ++i) outs[(warp * kPairs + i) * 32 + lane] = out[i];
        }
        __syncthreads();
        if (member == 0 && !direct) {
#pragma unroll 1
          for (int32_t other = 1; other < (rehearsal ? 1 : team); ++other) {
#pragma unroll
            for (int i = 0; i < kPairs; ++i) {
              const float2 more = outs[((warp + other) * kPairs + i) * 32 + lane];
              out[i].x += more.x;
              out[i].y += more.y;
            }
          }
        }
      }
      if (member == 0 && !direct) {
        if (rehearsal) total = {0.0f, 1.0f};
        const float factor =
            finish_row(p, row, head, total.max, total.sum, lane == 0 && !rehearsal);
        auto* to = reinterpret_cast<uint32_t*>(p.out + row * p.out_row + head * p.out_head);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          if (!rehearsal && lane + 32 * i < p.head_size / 2) {
            to[lane + 32 * i] = Pair<T>::pack(out[i].x * factor, out[i].y * factor);
          }
        }
      }
      __syncwarp();
      if (!rehearsal) break;
    }
  }
  if (!waited) wait_for_previous();  // or the kernel after this one might begin too early
}

template <typename T>
cudaError_t launch_type(const AttendParams& p, int32_t blocks, cudaStream_t stream) {
  const auto run = [&](auto kernel, int pairs) {
    return launch(kernel, blocks, kThreads, shared_bytes(p, pairs), stream, p);
  };
  if (p.head_size <= 64) return run(merge_rows<T, 1>, 1);
  if (p.head_size <= 128) return run(merge_rows<T, 2>, 2);
  return run(merge_rows<T, 4>, 4);
}

}  // namespace

cudaError_t launch_merge(const AttendParams& params, DType q_type, int32_t max_rows,
                         int32_t multiprocessors, cudaStream_t stream) {
  // A block for each (row, head), as long as all of them fit.
  const int64_t most = int64_t{max_rows} * params.q_heads;
  const auto blocks =
      static_cast<int32_t>(std::min<int64_t>(most, int64_t{kBlocksPerSm} * multiprocessors));
  return q_type == DType::kBF16 ? launch_type<__nv_bfloat16>(params, blocks, stream)
                                : launch_type<__half>(params, blocks, stream);
}

}  // namespace relay::cuda
