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

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kBlocksPerSm = 2;
constexpr int kPiecesAtOnce = 10;  // of 128 elements, for each warp: two blocks fit compute 8.0

__device__ inline float4 scaled(const float4& v, float factor) {
  return {v.x * factor, v.y * factor, v.z * factor, v.w * factor};
}
__device__ inline void add_scaled(float4& to, const float4& v, float factor) {
  to.x += v.x * factor;
  to.y += v.y * factor;
  to.z += v.z * factor;
  to.w += v.w * factor;
}

/// Those of this thread, who alone reads what it has copied.
__device__ inline void await_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

/// What some pieces of a row amount to: lane l holds the elements 4 (l + 32 i) and the next three.
template <int kQuads>
struct Total {
  float max;
  float sum;
  float4 out[kQuads];
};

/// The outputs of as many pieces as a warp reads at once; then what it tells its team.
template <int kQuads>
struct Outs {
  static constexpr int kAtOnce = kPiecesAtOnce / kQuads;
  float4 of[kAtOnce][kQuads][32];
};

/// The pieces' weighted sum, by one warp. Lane l has the l-th piece in `first`, of which as many
/// are used as are read at once. Weights are computed while the outputs are on their way.
template <int kQuads>
__device__ Total<kQuads> add_pieces(const AttendParams& p, PieceList list, int32_t first,
                                    Outs<kQuads>& outs) {
  constexpr int kAtOnce = Outs<kQuads>::kAtOnce;
  const int32_t lane = threadIdx.x % 32;
  Total<kQuads> total{};
  total.max = -INFINITY;
  int32_t chunk = 0;
#pragma unroll 1
  do {
    const int32_t n = min(kAtOnce, list.count - chunk);
    int32_t piece = first;
    if (chunk > 0) piece = lane < n ? p.plan.pieces[list.begin + chunk + lane] : -1;
#pragma unroll 1
    for (int32_t k = 0; k < n; ++k) {
      const int32_t its = __shfl_sync(~0u, piece, k);
      const char* from = reinterpret_cast<const char*>(p.partial_out + int64_t{its} * p.head_size);
#pragma unroll
      for (int i = 0; i < kQuads; ++i) {
        if (lane + 32 * i < p.head_size / 4) {
          copy_chunk(&outs.of[k][i][lane], from + (lane + 32 * i) * 16, 16);
        }
      }
    }
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
#pragma unroll
    for (int i = 0; i < kQuads; ++i) total.out[i] = scaled(total.out[i], keep);
    await_copies();
#pragma unroll 4
    for (int32_t k = 0; k < n; ++k) {
      const float its = __shfl_sync(~0u, weight, k);
      if (its > 0.0f) {  // else perhaps no numbers
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
          if (lane + 32 * i < p.head_size / 4) add_scaled(total.out[i], outs.of[k][i][lane], its);
        }
      }
    }
    chunk += kAtOnce;
  } while (chunk < list.count);
  return total;
}

/// A block's shared memory.
template <int kQuads>
struct Memory {
  Outs<kQuads> outs[kWarps];
  float2 states[kWarps];  ///< maximum and sum of a member's share
};

/// A warp in a team of 1, 2, 4, 8 or 16 of its block.
struct Member {
  int32_t warp;    ///< of the block
  int32_t number;  ///< of the team
  int32_t team;    ///< members
};

/// Merges a row's head by a team, of which this warp adds the pieces of `list`, and stores the
/// result; all teams of a block do so together. A rehearsal reads and writes no results: it brings
/// the code from memory.
template <typename T, int kQuads>
__device__ void merge(const AttendParams& p, const Member& member, int32_t task, PieceList list,
                      int32_t first, bool rehearsal, Memory<kQuads>& memory) {
  const int32_t lane = threadIdx.x % 32;
  const bool direct = list.count == kDirect;
  if (rehearsal) list.count = 0;
  Total<kQuads> total{};
  if (!direct) total = add_pieces<kQuads>(p, list, first, memory.outs[member.warp]);
  if (member.team > 1) {
    if (member.number > 0 && !direct) {
      if (lane == 0) memory.states[member.warp] = {total.max, total.sum};
#pragma unroll
      for (int i = 0; i < kQuads; ++i) memory.outs[member.warp].of[0][i][lane] = total.out[i];
    }
    __syncthreads();
    if (member.number == 0 && !direct) {
#pragma unroll 1
      for (int32_t other = 1; other < (rehearsal ? 2 : member.team); ++other) {
        const float2 state = memory.states[member.warp + other];
        const float max = fmaxf(total.max, state.x);
        const float base = max == -INFINITY ? 0.0f : max;
        const float keep = exp2_fast(total.max - base);
        const float weight = exp2_fast(state.x - base);
        total.max = max;
        total.sum = total.sum * keep + state.y * weight;
#pragma unroll
        for (int i = 0; i < kQuads; ++i) {
          total.out[i] = scaled(total.out[i], keep);
          if (weight > 0.0f) {  // else perhaps no numbers
            add_scaled(total.out[i], memory.outs[member.warp + other].of[0][i][lane], weight);
          }
        }
      }
    }
    __syncthreads();  // the members go on to write
  }
  if (member.number == 0 && !direct) {
    const int32_t row = task / p.q_heads;
    const int32_t head = task % p.q_heads;
    if (rehearsal) total.sum = 1.0f;
    const float factor = finish_row(p, row, head, total.max, total.sum, lane == 0 && !rehearsal);
    auto* to = reinterpret_cast<uint2*>(p.out + row * p.out_row + head * p.out_head);
#pragma unroll
    for (int i = 0; i < kQuads; ++i) {
      if (!rehearsal && lane + 32 * i < p.head_size / 4) {
        const float4 out = scaled(total.out[i], factor);
        to[lane + 32 * i] = {Pair<T>::pack(out.x, out.y), Pair<T>::pack(out.z, out.w)};
      }
    }
  }
  __syncwarp();
}

/// A team of warps of a block merges one (row, head) after the other: the fewer there are of these,
/// the larger the teams. Each member adds a share of the pieces. The lists of the next two are
/// asked for while one is merged.
template <typename T, int kQuads>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm) merge_rows(AttendParams p) {
  extern __shared__ float4 dynamic_memory[];
  auto& memory = *reinterpret_cast<Memory<kQuads>*>(dynamic_memory);
  const int32_t lane = threadIdx.x % 32;
  let_next_start();
  // The plan is there: the attention kernel lets this one start only when it has seen the plan.
  const int32_t tasks = p.plan.header->rows * p.q_heads;
  const int32_t warps = static_cast<int32_t>(gridDim.x) * kWarps;
  Member member{static_cast<int32_t>(threadIdx.x) / 32, 0, 1};
  while (member.team < kWarps && tasks * member.team * 2 <= warps) member.team *= 2;
  member.number = member.warp % member.team;
  const int32_t teams = warps / member.team;

  const auto wait_for_pieces = [&] {
    wait_for_previous();
    if (blockIdx.x == 0 && threadIdx.x == 0) *p.taken = 0;
  };
  const auto share_of = [&](int32_t task) {
    PieceList list{0, kDirect};
    if (task < tasks) list = p.plan.lists[task];
    if (list.count == kDirect || member.team == 1) return list;
    const int32_t share = ceil_div(list.count, member.team);
    const int32_t begin = min(list.count, share * member.number);
    return PieceList{list.begin + begin, min(share, list.count - begin)};
  };
  const auto first_of = [&](const PieceList& list) {
    return lane < list.count ? p.plan.pieces[list.begin + lane] : -1;
  };
  // Blocks take neighbouring tasks, and all teams of a block as many.
  int32_t task = blockIdx.x * (kWarps / member.team) + member.warp / member.team;
  PieceList list = share_of(task);
  PieceList next = share_of(task + teams);
  int32_t first = first_of(list);
  bool waited = false;
  for (; task - member.warp / member.team < tasks; task += teams) {
    const PieceList after = share_of(task + 2 * teams);
    const int32_t next_first = first_of(next);
    // The first time all of it is done twice, at first without any piece: by then the code has come
    // from memory, while the kernel before still works.
#pragma unroll 1
    for (bool rehearsal = !waited;; rehearsal = false) {
      if (!rehearsal && !waited) {
        wait_for_pieces();
        waited = true;
      }
      merge<T, kQuads>(p, member, task, list, first, rehearsal, memory);
      if (!rehearsal) break;
    }
    list = next;
    next = after;
    first = next_first;
  }
  if (!waited) wait_for_pieces();  // or the kernel after this one might begin too early
}

template <typename T>
cudaError_t launch_type(const AttendParams& p, int32_t blocks, cudaStream_t stream) {
  const auto run = [&](auto kernel, size_t memory) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(memory));
    if (error != cudaSuccess) return error;
    return launch(kernel, blocks, kThreads, memory, stream, p);
  };
  return p.head_size <= 128 ? run(merge_rows<T, 1>, sizeof(Memory<1>))
                            : run(merge_rows<T, 2>, sizeof(Memory<2>));
}

}  // namespace

cudaError_t launch_merge(const AttendParams& params, DType q_type, int32_t max_rows,
                         int32_t multiprocessors, cudaStream_t stream) {
  // As blocks find room where attention has ended, and so late where it ends last, half of what
  // would fit is launched where that gives each (row, head) a warp.
  const int64_t most = int64_t{max_rows} * params.q_heads;
  const auto blocks = static_cast<int32_t>(most <= int64_t{multiprocessors} * kWarps
                                               ? std::min<int64_t>(most, multiprocessors)
                                               : int64_t{kBlocksPerSm} * multiprocessors);
  return q_type == DType::kBF16 ? launch_type<__nv_bfloat16>(params, blocks, stream)
                                : launch_type<__half>(params, blocks, stream);
}

}  // namespace relay::cuda
