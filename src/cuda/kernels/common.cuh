// What the attention kernels share: the way through a portion's steps, element types, the softmax.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <type_traits>

#include "cuda/kernels/params.h"
#include "cuda/plan/pieces.h"

namespace relay::cuda {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.69314718055994530942f;

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
/// Asks for 16 bytes in shared memory, of which the first `bytes` are read, the rest 0.
__device__ inline void copy_chunk(const void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

/// One piece of a job: steps [step_begin, step_end) of one KV head and one tile of query rows.
struct Item {
  Segment segment;
  int32_t kv_head;
  int32_t first_row;  ///< of the tile, among the segment's rows x group
  int32_t rows;       ///< of the tile, rows x group
  int32_t step_begin;
  int32_t step_end;
  int32_t partial;  ///< where the tile's first partial row lies; -1: results go straight out
};

/// A portion's items, in order. The same in every thread.
class Walk {
 public:
  /// `item` is to be the one that next() is called with. The first segment stands where its portion
  /// is known, so that nothing waits for its number.
  __device__ void begin(const AttendParams& p, int32_t portion, Item& item) {
    portion_ = portion;
    const Cut from = p.plan.cuts[portion];
    end_ = p.plan.cuts[portion + 1].step;
    item.segment = p.plan.begins[portion];
    at_ = from.step;
    number_ = from.segment;
    began_ = false;
  }

  __device__ bool is_done() const { return at_ >= end_; }

  /// `item`: the one before, or, at first, what begin() made of it.
  __device__ bool next(const AttendParams& p, Item& item) {
    if (is_done()) return false;
    Segment& s = item.segment;
    item.step_begin = 0;
    item.kv_head += 1;
    if (!began_) {
      began_ = true;
      const int32_t local = at_ - s.step_base;
      const int32_t job = s.steps > 0 ? local / s.steps : 0;
      item.step_begin = local - job * s.steps;
      tile_ = job / p.kv_heads;
      item.kv_head = job - tile_ * p.kv_heads;
    } else if (item.kv_head == p.kv_heads) {
      item.kv_head = 0;
      tile_ += 1;
    }
    while (s.steps == 0 || tile_ >= s.row_tiles) {
      s = p.plan.segments[++number_];
      tile_ = item.kv_head = item.step_begin = 0;
    }
    item.first_row = tile_ * p.tile_rows;
    item.rows = min(p.tile_rows, s.rows * p.group - item.first_row);
    item.step_end = min(s.steps, item.step_begin + end_ - at_);
    item.partial = partial_row(p, s.rows, s.partial_base, item.kv_head, item.first_row, portion_,
                               item.step_begin == 0, item.step_end == s.steps);
    at_ += item.step_end - item.step_begin;
    return true;
  }

 private:
  int32_t portion_ = 0;
  int32_t at_ = 0;  // the step after the last item's
  int32_t end_ = 0;
  int32_t number_ = 0;
  int32_t tile_ = 0;
  bool began_ = false;
};

/// The query row and head of row m of an item's tile.
struct RowHead {
  int32_t row;
  int32_t head;
};
__device__ inline RowHead row_head(const AttendParams& p, const Item& item, int32_t m) {
  const int32_t of_segment = item.first_row + m;
  const int32_t row = of_segment / p.group;
  return {item.segment.first_row < 0 ? p.plan.row_index[item.segment.row_begin + row]
                                     : item.segment.first_row + row,
          item.kv_head * p.group + of_segment % p.group};
}

/// A column's block and the slot in it; block -1 where the table names none of the cache.
struct BlockSlot {
  int32_t block;
  int32_t slot;
};
__device__ inline BlockSlot block_slot(const AttendParams& p, const Segment& segment,
                                       int32_t column) {
  const int32_t id = p.table[segment.request * p.table_stride + column / p.block_size];
  return {id >= 0 && id < p.cache_blocks ? id : -1, column % p.block_size};
}

template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  __device__ static __nv_bfloat16 one(float x) { return __float2bfloat16_rn(x); }
  __device__ static uint32_t pack(float low, float high) {
    const __nv_bfloat162 v = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  __device__ static float2 unpack(uint32_t v) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&v));
  }
};
template <>
struct Pair<__half> {
  __device__ static __half one(float x) { return __float2half_rn(x); }
  __device__ static uint32_t pack(float low, float high) {
    const __half2 v = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&v);
  }
  __device__ static float2 unpack(uint32_t v) {
    return __half22float2(*reinterpret_cast<const __half2*>(&v));
  }
};

/// 8 values of e4m3, exactly, as T.
template <typename T>
__device__ inline uint4 widen(uint2 bytes) {
  const uint32_t words[2] = {bytes.x, bytes.y};
  uint32_t out[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto pair = static_cast<__nv_fp8x2_storage_t>(words[i / 2] >> (16 * (i % 2)));
    const __half2_raw raw = __nv_cvt_fp8x2_to_halfraw2(pair, __NV_E4M3);
    if constexpr (std::is_same_v<T, __half>) {
      out[i] = *reinterpret_cast<const uint32_t*>(&raw);
    } else {
      const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&raw));
      out[i] = Pair<T>::pack(f.x, f.y);
    }
  }
  return {out[0], out[1], out[2], out[3]};
}

/// Queries in e4m3, which only KV in e4m3 has.
template <bool kByteKv>
__device__ inline bool byte_queries(const AttendParams& p) {
  return kByteKv && p.q_scale != nullptr;
}

/// 2^x; flushes results below 2^-126 to 0, and 2^-inf is 0.
__device__ inline float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// How raw products q.k become logits in base 2.
struct Logits {
  float scale;    ///< of products; includes log2 e where there is no soft cap
  float softcap;  ///< 0: none

  __device__ Logits(const AttendParams& p) {
    scale = p.scale * (p.q_scale != nullptr ? *p.q_scale : 1.0f) *
            (p.k_scale != nullptr ? *p.k_scale : 1.0f);
    softcap = p.softcap;
    if (softcap == 0.0f) scale *= kLog2E;
  }
  __device__ float capped(float product) const {
    return softcap * tanhf(product * scale / softcap) * kLog2E;
  }
};

/// Ends one row: its sink, its log-sum-exp; returns what its output is to be multiplied by.
__device__ inline float finish_row(const AttendParams& p, int32_t row, int32_t head, float max,
                                   float sum, bool writes) {
  float factor = 1.0f;
  if (p.sinks != nullptr) {
    const float sink = p.sinks[head] * kLog2E;
    if (sink > max) {
      factor = max == -INFINITY ? 0.0f : exp2f(max - sink);
      sum = sum * factor + 1.0f;
      max = sink;
    } else if (max != -INFINITY) {
      sum += exp2f(sink - max);
    }
  }
  if (writes && p.lse != nullptr) {
    p.lse[int64_t{row} * p.q_heads + head] = sum > 0.0f ? (max + log2f(sum)) * kLn2 : -INFINITY;
  }
  const float v_scale = p.v_scale != nullptr ? *p.v_scale : 1.0f;
  return sum > 0.0f ? factor * v_scale / sum : 0.0f;
}

}  // namespace relay::cuda
