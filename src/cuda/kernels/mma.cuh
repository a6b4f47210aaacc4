// Attention by mma.sync and cp.async: every GPU of compute capability 8.0 and newer.
//
// A block of 4 warps walks the steps of one worker. A step loads one tile of K and V (kSlots x head
// size each, into one of two stages while the other is worked on) and costs 4 x rows x kSlots x
// head size flops. A tile of up to 16 query rows is read by all four warps, each taking 16 of the
// slots; their states are merged at the item's end. In a larger one each warp has 16 rows and all
// slots. KV bytes are read once a step, so once per item; S and P never leave registers.
#pragma once

#include "cuda/kernels/common.cuh"
#include "cuda/kernels/kernels.h"
#include "cuda/launch.h"

namespace relay::cuda::mma {

constexpr int kThreads = 128;
constexpr int kWarps = 4;
constexpr int kTileRows = 64;

__host__ __device__ constexpr int tile_slots(int head_size) { return head_size > 128 ? 32 : 64; }

__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;"); }
template <int kLeft>
__device__ inline void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
__device__ inline void load_matrices(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}
__device__ inline void load_transposed(uint32_t (&r)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(at));
}
template <typename T>
__device__ inline void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

/// T: queries and products; kHead: the head size, or the next that there are kernels for; kByteKv:
/// KV in e4m3.
template <typename T, int kHead, bool kByteKv>
struct Kernel {
  static constexpr int kSlots = tile_slots(kHead);
  // One access of 16 bytes more than the row: eight rows lie in different banks.
  static constexpr int kStride = kHead + 8;
  static constexpr int kTileElements = kSlots * kStride;
  static constexpr int kChunks = kHead / 8;
  static constexpr int kSharedBytes =
      static_cast<int>(sizeof(T)) * (kTileRows * kStride + 4 * kTileElements);
  static constexpr int kDims = kHead / 8;  // blocks of 8 output columns

  struct Shared {
    T* q;
    T* k[2];
    T* v[2];
  };

  /// Softmax state and output of 16 rows: lane l holds rows l / 4 and l / 4 + 8.
  struct State {
    float max[2];
    float sum[2];
    float out[kDims][4];
  };

  __device__ static void load_queries(const AttendParams& p, const Item& item, T* q, int rows) {
    for (int i = threadIdx.x; i < rows * kChunks; i += kThreads) {
      const int m = i / kChunks;
      const int chunk = i % kChunks;
      const bool valid = m < item.rows && chunk * 8 < p.head_size;
      const bool bytes = byte_queries<kByteKv>(p);
      T* to = q + m * kStride + chunk * 8;
      const char* from = p.q;
      if (valid) {
        const RowHead at = row_head(p, item, m);
        from += at.row * p.q_row + at.head * p.q_head + chunk * (bytes ? 8 : 16);
      }
      if (bytes) {
        const uint2 narrow = valid ? __ldg(reinterpret_cast<const uint2*>(from)) : uint2{0, 0};
        *reinterpret_cast<uint4*>(to) = widen<T>(narrow);
      } else {
        copy_chunk(to, from, valid ? 16 : 0);
      }
    }
  }

  __device__ static void load_tile(const AttendParams& p, const Item& item, int step, T* k, T* v) {
    const Segment& s = item.segment;
    const int first = step * kSlots;
    constexpr int kPer = kByteKv ? 16 : 8;  // elements of one access
    constexpr int kAccesses = kHead / kPer;
    for (int i = threadIdx.x; i < kSlots * kAccesses; i += kThreads) {
      const int slot = i / kAccesses;
      const int access = i % kAccesses;
      bool valid = first + slot < s.slots && s.first + first + slot >= s.seen_from &&
                   access * kPer < p.head_size;
      const char* from_k = p.k;
      const char* from_v = p.v;
      if (valid) {
        const BlockSlot at = block_slot(p, s, s.first + first + slot);
        valid = at.block >= 0;
        if (valid) {
          from_k += at.block * p.k_block + at.slot * p.k_slot + item.kv_head * p.k_head;
          from_v += at.block * p.v_block + at.slot * p.v_slot + item.kv_head * p.v_head;
          from_k += access * 16;
          from_v += access * 16;
        }
      }
      T* to_k = k + slot * kStride + access * kPer;
      T* to_v = v + slot * kStride + access * kPer;
      if constexpr (kByteKv) {
        uint4 bytes[2] = {{0, 0, 0, 0}, {0, 0, 0, 0}};
        if (valid) {
          bytes[0] = __ldg(reinterpret_cast<const uint4*>(from_k));
          bytes[1] = __ldg(reinterpret_cast<const uint4*>(from_v));
        }
        reinterpret_cast<uint4*>(to_k)[0] = widen<T>({bytes[0].x, bytes[0].y});
        reinterpret_cast<uint4*>(to_k)[1] = widen<T>({bytes[0].z, bytes[0].w});
        reinterpret_cast<uint4*>(to_v)[0] = widen<T>({bytes[1].x, bytes[1].y});
        reinterpret_cast<uint4*>(to_v)[1] = widen<T>({bytes[1].z, bytes[1].w});
      } else {
        copy_chunk(to_k, from_k, valid ? 16 : 0);
        copy_chunk(to_v, from_v, valid ? 16 : 0);
      }
    }
  }

  /// The tile's slots [slot, slot + 8 kBlocks) for 16 rows whose queries begin at `q`.
  template <int kBlocks>
  __device__ static void attend_tile(const AttendParams& p, const Item& item, const Logits& logits,
                                     int step, int slot, const T* q, const T* k, const T* v,
                                     const RowInfo (&rows)[2], const float (&slopes)[2],
                                     State& state) {
    const int lane = threadIdx.x % 32;
    float s[kBlocks][4];
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) s[n][0] = s[n][1] = s[n][2] = s[n][3] = 0.0f;
    const uint32_t q_at = shared_address(q + (lane % 16) * kStride + lane / 16 * 8);
    // Matrices 0, 1: slots 0-7, dims 0-7 and 8-15; 2, 3: slots 8-15.
    const uint32_t k_at =
        shared_address(k + (slot + lane % 8 + lane / 16 * 8) * kStride + lane / 8 % 2 * 8);
#pragma unroll
    for (int d = 0; d < kHead / 16; ++d) {
      uint32_t a[4];
      load_matrices(a, q_at + d * 32);
#pragma unroll
      for (int n = 0; n < kBlocks; n += 2) {
        uint32_t b[4];
        load_matrices(b, k_at + (n * 8 * kStride + d * 16) * 2);
        multiply<T>(s[n], a, b[0], b[1]);
        multiply<T>(s[n + 1], a, b[2], b[3]);
      }
    }

    // Logits, and what the rows do not see.
    const Segment& segment = item.segment;
    const int column = segment.first + step * kSlots + slot;
    const int end = segment.first + segment.slots;
    const bool hidden = column < segment.visible_from ||
                        min(column + kBlocks * 8, end) > segment.visible_to ||
                        column + kBlocks * 8 > end;
    const bool plain = logits.softcap == 0.0f && p.slopes == nullptr;
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int c = column + n * 8 + lane % 4 * 2 + j % 2;
        float x = s[n][j];
        if (plain) {
          x *= logits.scale;
        } else {
          x = logits.softcap > 0.0f ? logits.capped(x) : x * logits.scale;
          x += slopes[j / 2] * static_cast<float>(c - rows[j / 2].position) * kLog2E;
        }
        if (hidden && (c < rows[j / 2].lo || c >= min(rows[j / 2].hi, end))) x = -INFINITY;
        s[n][j] = x;
        top[j / 2] = fmaxf(top[j / 2], x);
      }
    }
    float base[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 1));
      top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], 2));
      top[h] = fmaxf(top[h], state.max[h]);
      base[h] = top[h] == -INFINITY ? 0.0f : top[h];
      const float keep = exp2_fast(state.max[h] - base[h]);
      state.max[h] = top[h];
      state.sum[h] *= keep;
#pragma unroll
      for (int n = 0; n < kDims; ++n) {
        state.out[n][2 * h] *= keep;
        state.out[n][2 * h + 1] *= keep;
      }
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        s[n][j] = exp2_fast(s[n][j] - base[j / 2]);
        state.sum[j / 2] += s[n][j];
      }
    }

    // Matrices 0, 1: slots 0-7 and 8-15, dims 0-7; 2, 3: dims 8-15.
    const uint32_t v_at = shared_address(v + (slot + lane % 16) * kStride + lane / 16 * 8);
#pragma unroll
    for (int n = 0; n < kBlocks; n += 2) {
      const uint32_t a[4] = {Pair<T>::pack(s[n][0], s[n][1]), Pair<T>::pack(s[n][2], s[n][3]),
                             Pair<T>::pack(s[n + 1][0], s[n + 1][1]),
                             Pair<T>::pack(s[n + 1][2], s[n + 1][3])};
#pragma unroll
      for (int d = 0; d < kDims; d += 2) {
        uint32_t b[4];
        load_transposed(b, v_at + (n * 8 * kStride + d * 8) * 2);
        multiply<T>(state.out[d], a, b[0], b[1]);
        multiply<T>(state.out[d + 1], a, b[2], b[3]);
      }
    }
  }

  /// Writes 2 elements of a row's output: finished, or as a partial.
  __device__ static void put_pair(const AttendParams& p, const Item& item, RowHead at, int m, int d,
                                  float x, float y, float factor) {
    if (d >= p.head_size) return;
    if (item.partial < 0) {
      *reinterpret_cast<uint32_t*>(p.out + at.row * p.out_row + at.head * p.out_head + d * 2) =
          Pair<T>::pack(x * factor, y * factor);
    } else {
      *reinterpret_cast<float2*>(p.partial_out + int64_t{item.partial + m} * p.head_size + d) = {x,
                                                                                                 y};
    }
  }

  __device__ static void store_rows(const AttendParams& p, const Item& item, const State& state,
                                    int first) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = state.sum[h];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int m = first + lane / 4 + 8 * h;
      if (m >= item.rows) continue;
      const RowHead at = row_head(p, item, m);
      float factor = 1.0f;
      if (item.partial < 0) {
        factor = finish_row(p, at.row, at.head, state.max[h], sum, lane % 4 == 0);
      } else if (lane % 4 == 0) {
        p.partial_state[item.partial + m] = {state.max[h], sum};
      }
#pragma unroll
      for (int n = 0; n < kDims; ++n) {
        put_pair(p, item, at, m, n * 8 + lane % 4 * 2, state.out[n][2 * h], state.out[n][2 * h + 1],
                 factor);
      }
    }
  }

  /// Merges the states that the four warps have of the same 16 rows, and stores them.
  __device__ static void store_merged(const AttendParams& p, const Item& item, const State& state,
                                      float* buffer) {
    constexpr int kActive = kSlots / 16;
    static_assert(kActive * 16 * (kHead + 2) * 4 <= 4 * kTileElements * 2);
    float2* states = reinterpret_cast<float2*>(buffer + kActive * 16 * kHead);
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    __syncthreads();  // nobody reads tiles any more
    if (warp < kActive) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float sum = state.sum[h];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const int m = lane / 4 + 8 * h;
        if (m >= item.rows) continue;
        if (lane % 4 == 0) states[warp * 16 + m] = {state.max[h], sum};
#pragma unroll
        for (int n = 0; n < kDims; ++n) {
          *reinterpret_cast<float2*>(buffer + (warp * 16 + m) * kHead + n * 8 + lane % 4 * 2) = {
              state.out[n][2 * h], state.out[n][2 * h + 1]};
        }
      }
    }
    __syncthreads();
    for (int m = warp; m < item.rows; m += kWarps) {
      float max = -INFINITY;
      float weights[kActive];
#pragma unroll
      for (int w = 0; w < kActive; ++w) max = fmaxf(max, states[w * 16 + m].x);
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < kActive; ++w) {
        const float2 one = states[w * 16 + m];
        weights[w] = one.y > 0.0f ? exp2f(one.x - max) : 0.0f;
        sum += one.y * weights[w];
      }
      const RowHead at = row_head(p, item, m);
      float factor = 1.0f;
      if (item.partial < 0) {
        factor = finish_row(p, at.row, at.head, max, sum, lane == 0);
      } else if (lane == 0) {
        p.partial_state[item.partial + m] = {max, sum};
      }
      for (int d = lane * 2; d < kHead; d += 64) {
        float x = 0.0f;
        float y = 0.0f;
#pragma unroll
        for (int w = 0; w < kActive; ++w) {
          const float2 o = *reinterpret_cast<const float2*>(buffer + (w * 16 + m) * kHead + d);
          x += o.x * weights[w];
          y += o.y * weights[w];
        }
        put_pair(p, item, at, m, d, x, y, factor);
      }
    }
  }

  template <bool kFew>
  __device__ static void attend_item(const AttendParams& p, const Item& item, const Logits& logits,
                                     const Shared& shared) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    const int first = kFew ? 0 : warp * 16;
    __syncthreads();  // the item before is done with shared memory
    load_queries(p, item, shared.q, kFew ? 16 : kTileRows);
    load_tile(p, item, item.step_begin, shared.k[0], shared.v[0]);
    commit_copies();

    State state;
    RowInfo rows[2];
    float slopes[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      state.max[h] = -INFINITY;
      state.sum[h] = 0.0f;
#pragma unroll
      for (int n = 0; n < kDims; ++n) state.out[n][2 * h] = state.out[n][2 * h + 1] = 0.0f;
      const int m = first + lane / 4 + 8 * h;
      rows[h] = {0, 0, 0, 0};
      slopes[h] = 0.0f;
      if (m < item.rows) {
        const RowHead at = row_head(p, item, m);
        rows[h] = p.plan.rows[at.row];
        if (p.slopes != nullptr) slopes[h] = p.slopes[at.head];
      }
    }

    for (int step = item.step_begin; step < item.step_end; ++step) {
      const int stage = (step - item.step_begin) % 2;
      if (step + 1 < item.step_end) {
        load_tile(p, item, step + 1, shared.k[1 - stage], shared.v[1 - stage]);
      }
      commit_copies();
      wait_copies<1>();
      __syncthreads();
      if constexpr (kFew) {
        if (warp * 16 < kSlots) {
          attend_tile<2>(p, item, logits, step, warp * 16, shared.q, shared.k[stage],
                         shared.v[stage], rows, slopes, state);
        }
      } else if (first < item.rows) {
        attend_tile<kSlots / 8>(p, item, logits, step, 0, shared.q + first * kStride,
                                shared.k[stage], shared.v[stage], rows, slopes, state);
      }
      __syncthreads();
    }
    if constexpr (kFew) {
      store_merged(p, item, state, reinterpret_cast<float*>(shared.k[0]));
    } else {
      store_rows(p, item, state, first);
    }
  }
};

template <typename T, int kHead, bool kByteKv>
__global__ void __launch_bounds__(kThreads) attend(AttendParams p) {
  using K = Kernel<T, kHead, kByteKv>;
  extern __shared__ uint4 memory[];
  T* at = reinterpret_cast<T*>(memory);
  typename K::Shared shared;
  shared.q = at;
  at += kTileRows * K::kStride;
  for (int i = 0; i < 2; ++i, at += K::kTileElements) shared.k[i] = at;
  for (int i = 0; i < 2; ++i, at += K::kTileElements) shared.v[i] = at;

  wait_for_previous();
  let_next_start();  // only now: merging begins with reading the plan
  const Logits logits(p);
  Item item{};
  Walk walk;
  walk.begin(p, blockIdx.x, item);  // there is no tail
  while (walk.next(p, item)) {
    if (item.rows <= 16) {
      K::template attend_item<true>(p, item, logits, shared);
    } else {
      K::template attend_item<false>(p, item, logits, shared);
    }
  }
}

template <typename T, int kHead, bool kByteKv>
cudaError_t launch_one(const AttendParams& p, cudaStream_t stream) {
  using K = Kernel<T, kHead, kByteKv>;
  const auto kernel = attend<T, kHead, kByteKv>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, K::kSharedBytes);
  if (error != cudaSuccess) return error;
  return launch(kernel, p.workers, kThreads, K::kSharedBytes, stream, p);
}

template <typename T, bool kByteKv>
cudaError_t launch_type(const AttendParams& p, cudaStream_t stream) {
  if (p.head_size <= 64) return launch_one<T, 64, kByteKv>(p, stream);
  if (p.head_size <= 96) return launch_one<T, 96, kByteKv>(p, stream);
  if (p.head_size <= 128) return launch_one<T, 128, kByteKv>(p, stream);
  if (p.head_size <= 192) return launch_one<T, 192, kByteKv>(p, stream);
  return launch_one<T, 256, kByteKv>(p, stream);
}

}  // namespace relay::cuda::mma
