// Merges the partial states of rows whose attention was computed in more than one piece.
//
// Traffic of a (row, head) with n pieces: reads n x 4 (head size + 2) bytes, mostly from the L2
// cache, where attention has just put them, and writes head size x 2. The order of the pieces is
// the plan's, whoever computed them: the bits do not depend on timing.
#include <algorithm>

#include "cuda/kernels/common.cuh"
#include "cuda/kernels/kernels.h"
#include "cuda/launch.h"

namespace relay::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm = 4;

__device__ inline void add_scaled(float4& to, const float4& v, float factor) {
  to.x += v.x * factor;
  to.y += v.y * factor;
  to.z += v.z * factor;
  to.w += v.w * factor;
}

/// What the pieces of a row amount to: lane l holds the elements 4 (l + 32 i) and the next three.
template <int kQuads>
struct Total {
  float max;
  float sum;
  float4 out[kQuads];
};

/// The pieces' weighted sum, of which this warp adds every `team`-th from `member` on, and the
/// maximum and sum of all of them. Lane l has the l-th piece in `first`; those from the 32nd on are
/// read. Weights are computed while the first outputs are on their way.
template <int kQuads>
__device__ Total<kQuads> add_pieces(const AttendParams& p, int32_t member, int32_t team,
                                    PieceList list, int32_t first) {
  constexpr int kAhead = 4 / kQuads;
  const int32_t lane = threadIdx.x % 32;
  Total<kQuads> total{};
  total.max = -INFINITY;
  int32_t chunk = 0;
#pragma unroll 1
  do {
    const int32_t n = min(32, list.count - chunk);
    int32_t piece = first;
    if (chunk > 0) piece = lane < n ? p.plan.pieces[list.begin + chunk + lane] : -1;
    const auto read = [&](int32_t k, float4(&to)[kQuads]) {
      const int32_t its = __shfl_sync(~0u, piece, k % 32);
      const auto* from =
          reinterpret_cast<const float4*>(p.partial_out + int64_t{its} * p.head_size);
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        to[i] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (k < n && lane + 32 * i < p.head_size / 4) to[i] = from[lane + 32 * i];
      }
    };
    float4 ahead[kAhead][kQuads];
#pragma unroll
    for (int j = 0; j < kAhead; ++j) read(member + j * team, ahead[j]);

    float2 state = lane < n ? p.partial_state[piece] : float2{-INFINITY, 0.0f};
    if (!(state.y > 0.0f)) state.x = -INFINITY;
    float max = state.x;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, d));
    max = fmaxf(max, total.max);
    const float base = max == -INFINITY ? 0.0f : max;
    const float keep = exp2_fast(total.max - base);
    const float weight = exp2_fast(state.x - base);
    float sum = weight > 0.0f ? state.y * weight : 0.0f;
#pragma unroll
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    total.max = max;
    total.sum = total.sum * keep + sum;
    if (chunk > 0) {
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        total.out[i].x *= keep;
        total.out[i].y *= keep;
        total.out[i].z *= keep;
        total.out[i].w *= keep;
      }
    }
#pragma unroll 1
    for (int32_t k = member; k < n; k += kAhead * team) {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        const int32_t at = k + j * team;
        const float its = __shfl_sync(~0u, weight, at % 32);
        if (at < n && its > 0.0f) {  // else perhaps no numbers
#pragma unroll
          for (int i = 0; i < kQuads; ++i) add_scaled(total.out[i], ahead[j][i], its);
        }
      }
      if (k + kAhead * team < n) {
#pragma unroll
        for (int j = 0; j < kAhead; ++j) read(k + (kAhead + j) * team, ahead[j]);
      }
    }
    chunk += 32;
  } while (chunk < list.count);
  return total;
}

/// A (row, head) and its pieces.
struct Task {
  int32_t row;
  int32_t head;
  PieceList list;
  int32_t first;  ///< of lane l the l-th piece
};

/// Merges a task by a team of warps, of which this is one, and stores the result; all teams of a
/// block do so together. `outs` has room for a float4 of each lane, quad and member. A rehearsal
/// reads and writes no results: it brings the code from memory.
template <typename T, int kQuads>
__device__ void merge(const AttendParams& p, const Task& task, bool rehearsal, int32_t member,
                      int32_t team, float4* outs) {
  const int32_t lane = threadIdx.x % 32;
  const bool direct = task.list.count == kDirect;
  Total<kQuads> total{};
  if (!direct) {
    const PieceList list = rehearsal ? PieceList{0, 0} : task.list;
    total = add_pieces<kQuads>(p, member, team, list, task.first);
  }
  if (team > 1) {
    if (member > 0 && !direct && !rehearsal) {
#pragma unroll
      for (int i = 0; i < kQuads; ++i) outs[(member * kQuads + i) * 32 + lane] = total.out[i];
    }
    __syncthreads();
    if (member == 0 && !direct) {
#pragma unroll 1
      for (int32_t other = 1; other < (rehearsal ? 1 : team); ++other) {
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
          add_scaled(total.out[i], outs[(other * kQuads + i) * 32 + lane], 1.0f);
        }
      }
    }
  }
  if (member == 0 && !direct) {
    if (rehearsal) total.sum = 1.0f;
    const float factor =
        finish_row(p, task.row, task.head, total.max, total.sum, lane == 0 && !rehearsal);
    auto* to = reinterpret_cast<uint2*>(p.out + task.row * p.out_row + task.head * p.out_head);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (!rehearsal && lane + 32 * i < p.head_size / 4) {
        const float4 out = total.out[i];
        to[lane + 32 * i] = {Pair<T>::pack(out.x * factor, out.y * factor),
                             Pair<T>::pack(out.z * factor, out.w * factor)};
      }
    }
  }
  __syncwarp();
}

/// A team of 1, 2, 4 or 8 warps of a block merges one (row, head) after the other: the fewer there
/// are of these, the larger the teams.
template <typename T, int kQuads>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) merge_rows(AttendParams p) {
  __shared__ float4 memory[kWarps * 32 * kQuads];
  const int32_t warp = threadIdx.x / 32;
  const int32_t lane = threadIdx.x % 32;
  let_next_start();
  // The plan is there: the attention kernel lets this one start only when it has seen the plan.
  const int32_t tasks = p.plan.header->rows * p.q_heads;
  const int32_t warps = static_cast<int32_t>(gridDim.x) * kWarps;
  int32_t team = 1;
  while (team < kWarps && tasks * team * 2 <= warps) team *= 2;
  const int32_t teams = warps / team;
  const int32_t member = warp % team;
  float4* outs = memory + (warp - member) * 32 * kQuads;

  const auto wait_for_pieces = [&] {
    wait_for_previous();
    if (blockIdx.x == 0 && threadIdx.x == 0) *p.taken = 0;
  };
  bool waited = false;
  // Blocks take neighbouring tasks, and all teams of a block as many.
  for (int32_t number = blockIdx.x * (kWarps / team) + warp / team; number - warp / team < tasks;
       number += teams) {
    Task task{number / p.q_heads, number % p.q_heads, {0, kDirect}, -1};
    if (number < tasks) {
      task.list = p.plan.lists[number];
      if (lane < task.list.count) task.first = p.plan.pieces[task.list.begin + lane];
    }
    // The first time all of it is done twice, at first without any piece: by then the code has come
    // from memory, while the kernel before still works.
#pragma unroll 1
    for (bool rehearsal = !waited;; rehearsal = false) {
      if (!rehearsal && !waited) {
        wait_for_pieces();
        waited = true;
      }
      merge<T, kQuads>(p, task, rehearsal, member, team, outs);
      if (!rehearsal) break;
    }
    if (team > 1) __syncthreads();  // outputs have been read
  }
  if (!waited) wait_for_pieces();  // or the kernel after this one might begin too early
}

template <typename T>
cudaError_t launch_type(const AttendParams& p, int32_t blocks, cudaStream_t stream) {
  const auto run = [&](auto kernel) { return launch(kernel, blocks, kThreads, 0, stream, p); };
  return p.head_size <= 128 ? run(merge_rows<T, 1>) : run(merge_rows<T, 2>);
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
