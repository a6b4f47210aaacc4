// Attention by wgmma and TMA: Hopper (compute capability 9.0).
//
// A block is one warp that loads and two warpgroups that compute. The loader runs ahead through all
// of its worker's items: K and V tiles (kSlots x head size each) stream through a ring in shared
// memory without a gap between one item and the next, so that a step of few rows costs the time of
// reading its KV bytes once. A tile of up to 64 query rows is one warpgroup's; the two take such
// items in turn, and one prepares while the other computes. In a larger tile each has 64 rows, and
// both read the same KV: 4 x rows x kSlots x head size flops a step.
//
// Within a warpgroup the products of the next scores and of the present weights with V run while it
// computes the next weights. S, P and O never leave registers.
#pragma once

#include <cfloat>
#include <climits>

#include "cuda/kernels/common.cuh"
#include "cuda/kernels/wgmma_instructions.cuh"
#include "cuda/kernels/wgmma_shape.h"
#include "cuda/launch.h"

namespace relay::cuda::wgmma {

constexpr int kGroupThreads = 128;
constexpr int kThreads = 3 * kGroupThreads;
constexpr int kGroupRows = 64;
constexpr int kSharedBytes = 227 * 1024;

// --- Instructions --------------------------------------------------------------------------------

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ inline void wait(uint32_t barrier, uint32_t phase) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@done bra ready;\n"
      "bra again;\n"
      "ready:\n}" ::"r"(barrier),
      "r"(phase)
      : "memory");
}
__device__ inline void copy_page(uint32_t to, const CUtensorMap& map, uint32_t barrier, int c0,
                                 int c1, int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%3, %4, %5, %6}], [%2];" ::"r"(to),
      "l"(&map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}
/// 16 bytes to shared memory, of which the first `bytes` are read, the rest 0.
__device__ inline void copy_chunk(const void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}
/// What was written to shared memory by stores is from here on seen by wgmma and TMA.
__device__ inline void fence_stores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void sync_group(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kGroupThreads) : "memory");
}

/// A matrix in shared memory for wgmma, in rows of 128 bytes whose 16-byte pieces are swizzled.
/// `leading`: bytes from one span of 64 columns to the next, where those are not what is summed.
__device__ inline uint64_t descriptor(uint32_t address, uint32_t leading) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62;
  constexpr uint64_t kEightRows = uint64_t{1024 >> 4} << 32;
  return kSwizzle128 | kEightRows | uint64_t{(leading & 0x3ffff) >> 4} << 16 |
         ((address & 0x3ffff) >> 4);
}

// --- The kernel
// ------------------------------------------------------------------------------------

/// kPlain: no soft cap and no slopes. Their code would be long, and a kernel begins by fetching its
/// code from memory.
template <typename T, int kHead, bool kPlain>
struct Kernel {
  static constexpr int kSlots = tile_slots(kHead);
  static constexpr int kSpans = kHead / kSpan;
  static constexpr int kSpanBytes = kSlots * 128;
  static constexpr int kTileBytes = kSpans * kSpanBytes;
  static constexpr int kQueryBytes = kGroupRows * kHead * 2;
  static constexpr int kStages = (kSharedBytes - 1024 - 2 * kQueryBytes - 256) / kTileBytes;
  static constexpr int kScoreBlocks = kSlots / 8;
  static constexpr int kOutBlocks = kHead / 8;
  static constexpr int kPages = kSlots / kPageSlots;
  // Of a thread. The block is launched with 168 for each, which are shared out anew: a warpgroup
  // that asked for more than the others have left would wait for ever.
  static constexpr int kLoaderRegisters = kHead > 128 ? 40 : 56;
  static constexpr int kComputeRegisters = kHead > 128 ? 232 : 224;
  static_assert(kLoaderRegisters + 2 * kComputeRegisters <= 3 * 168);
  static_assert(kStages >= 4 && kStages <= 16);
  static_assert(kPages * kSpans <= 32, "a lane of a loading warp a page, span and K or V");

  /// Addresses in shared memory.
  struct Shared {
    char* base;
    uint32_t address;

    __device__ char* queries(int group) const { return base + group * kQueryBytes; }
    __device__ char* tile(int stage) const { return base + 2 * kQueryBytes + stage * kTileBytes; }
    __device__ uint32_t full(int stage) const {
      return address + 2 * kQueryBytes + kStages * kTileBytes + stage * 8;
    }
    __device__ uint32_t empty(int stage) const { return full(stage) + kStages * 8; }
  };

  /// A place in the ring.
  struct Ring {
    int stage = 0;
    uint32_t phase = 0;
    __device__ void advance(int n) {
      stage += n;
      const int laps = stage / kStages;
      stage -= laps * kStages;
      phase ^= laps & 1;
    }
    __device__ Ring ahead(int n) const {
      Ring r = *this;
      r.advance(n);
      return r;
    }
  };

  // --- Loading ---

  /// Loads a step's K and V. Each of the two loading warps has half of the pages; its lanes go page
  /// by page, as a token's K and V are neighbours in most caches.
  __device__ static void load_step(const Shared& shared, Ring& ring, const Maps& maps, int warp,
                                   int kv_head, int pages, int block, int slot) {
    constexpr int kWarpPages = kPages / 2;
    const int lane = threadIdx.x % 32;
    const Ring values = ring.ahead(1);
    wait(shared.empty(ring.stage), ring.phase ^ 1);
    wait(shared.empty(values.stage), values.phase ^ 1);
    if (lane == 0) {
      const int mine = max(0, min(kWarpPages, pages - warp * kWarpPages));
      const int bytes = mine * kSpans * kPageSlots * 128;
      arrive_expecting(shared.full(ring.stage), bytes);
      arrive_expecting(shared.full(values.stage), bytes);
    }
    __syncwarp();
    const int page = warp * kWarpPages + lane / (2 * kSpans);
    const int span = lane % kSpans;
    const bool is_value = lane / kSpans % 2 == 1;
    if (lane < kWarpPages * 2 * kSpans && page < pages) {
      const Ring& at = is_value ? values : ring;
      const uint32_t to =
          shared_address(shared.tile(at.stage)) + span * kSpanBytes + page * kPageSlots * 128;
      // A block outside of the cache is filled with zeros.
      copy_page(to, is_value ? maps.v : maps.k, shared.full(at.stage), span * kSpan,
                maps.slots_first ? slot : kv_head, maps.slots_first ? kv_head : slot, block);
    }
    ring.advance(2);
  }

  /// Up to 32 pages of one item: lane l knows the block of page l.
  struct Batch {
    int kv_head;
    int column;  // of the first page
    int pages;
    int block;
  };

  /// Two warps do this, since handing out copies takes about as long as they do. The numbers of the
  /// blocks are asked for a batch ahead of their use, across items.
  __device__ static void load_items(const AttendParams& p, const Maps& maps, int warp,
                                    const Shared& shared) {
    const int lane = threadIdx.x % 32;
    Item item;
    Walk walk(p, blockIdx.x);
    int at = 0;  // page of the item's segment
    int end = 0;
    const auto fetch = [&](Batch& batch) {
      if (at == end) {
        if (!walk.next(p, item)) return false;
        at = item.step_begin * kPages;
        end = min(item.step_end * kPages, ceil_div(item.segment.slots, kPageSlots));
      }
      batch.kv_head = item.kv_head;
      batch.column = item.segment.first + at * kPageSlots;
      batch.pages = min(32, end - at);
      batch.block = -1;
      if (lane < batch.pages) {
        batch.block = __ldg(p.table + item.segment.request * p.table_stride +
                            (batch.column + lane * kPageSlots) / p.block_size);
      }
      at += batch.pages;
      return true;
    };
    Ring ring;
    Batch batch{};
    bool more = fetch(batch);
    while (more) {
      Batch next{};
      more = fetch(next);
      for (int first = 0; first < batch.pages; first += kPages) {
        const int page = first + warp * (kPages / 2) + lane / (2 * kSpans);
        const int block = __shfl_sync(~0u, batch.block, page % 32);
        const int slot = (batch.column + page * kPageSlots) % p.block_size;
        const int pages = min(kPages, batch.pages - first);
        load_step(shared, ring, maps, warp, batch.kv_head, pages, block, slot);
      }
      batch = next;
    }
  }

  /// Brings what the loader will ask for next into the L2 cache, where the weights of the layer
  /// before may have driven it out.
  __device__ static void prefetch_plan(const AttendParams& p) {
    const auto prefetch = [](const void* at) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
    };
    const Cut begin = p.plan.cuts[blockIdx.x];
    const Cut end = p.plan.cuts[blockIdx.x + 1];
    if (begin.step == end.step) return;
    const int last = min(end.segment, p.plan.header->segments - 1);
    constexpr int kLine = 128 / sizeof(int32_t);
    for (int s = begin.segment + threadIdx.x % 32; s <= last; s += 32) {
      const Segment segment = p.plan.segments[s];
      if (segment.first_row < 0) prefetch(p.plan.row_index + segment.row_begin);
      const int32_t* table = p.table + segment.request * p.table_stride;
      const int to = (segment.first + segment.slots - 1) / p.block_size;
      for (int i = segment.first / p.block_size; i <= to; i += kLine) prefetch(table + i);
    }
  }

  /// The same for what merging will ask for first, each block a share.
  __device__ static void prefetch_merging(const AttendParams& p) {
    const auto prefetch = [](const void* at) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
    };
    const int lane = threadIdx.x % 32;
    const int rows = p.plan.header->rows;
    for (int i = (blockIdx.x * 32 + lane) * 8; i < rows; i += gridDim.x * 32 * 8) {
      prefetch(p.plan.rows + i);
    }
    for (int i = blockIdx.x * 32 + lane; i < p.requests; i += gridDim.x * 32) {
      prefetch(p.plan.requests + i);
      prefetch(p.plan.parts + i * kMaxParts);
    }
    const int segments = p.plan.header->segments;
    for (int i = blockIdx.x * 32 + lane; i < segments; i += gridDim.x * 32) {
      prefetch(p.plan.segments + i);
    }
  }

  // --- Computing ---

  struct State {
    float max[2];
    float sum[2];
    float out[kOutBlocks][4];
  };

  __device__ static void await_tile(const Shared& shared, const Ring& at) {
    wait(shared.full(at.stage), at.phase);
  }

  /// Tells the loader that this warp has done with a tile.
  __device__ static void release(const Shared& shared, const Ring& at) {
    if (threadIdx.x % 32 == 0) arrive(shared.empty(at.stage));
  }

  /// Passes the tiles of an item that is the other warpgroup's. Each is awaited, as otherwise this
  /// one might be laps ahead of the loader, where a phase's parity says nothing.
  __device__ static void pass(const Shared& shared, Ring& ring, int tiles) {
    for (; tiles > 0; --tiles) {
      await_tile(shared, ring);
      release(shared, ring);
      ring.advance(1);
    }
  }

  /// Calls `meanwhile` while they are on their way.
  template <typename F>
  __device__ static void load_queries(const AttendParams& p, const Item& item, char* to, int first,
                                      int rows, F meanwhile) {
    // Lane l looks up the warp's row l, as otherwise each copy would wait for a look-up of its own.
    constexpr int kChunks = kHead / 8;
    constexpr int kWarps = kGroupThreads / 32;
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x % kGroupThreads / 32;
    const int mine = lane * kWarps + warp;  // the warp's rows are every kWarps-th
    const char* row = p.q;
    if (mine < rows) {
      const RowHead at = row_head(p, item, first + mine);
      row += at.row * p.q_row + at.head * p.q_head;
    }
    const int chunks = (rows - warp + kWarps - 1) / kWarps * kChunks;
#pragma unroll 1
    for (int begin = 0; begin < chunks; begin += 32) {
      const int i = begin + lane;
      const auto from = reinterpret_cast<const char*>(
          __shfl_sync(~0u, reinterpret_cast<unsigned long long>(row), i / kChunks % 32));
      const int m = i / kChunks * kWarps + warp;
      const int chunk = i % kChunks;
      if (i < chunks) {
        const bool is_there = chunk * 8 < p.head_size;
        copy_chunk(to + chunk / 8 * (kGroupRows * 128) + m * 128 + ((chunk % 8) ^ (m % 8)) * 16,
                   is_there ? from + chunk * 16 : p.q, is_there ? 16 : 0);
      }
    }
    meanwhile();
    asm volatile("cp.async.wait_all;" ::: "memory");
  }

  /// Zeros V where nothing may be read into sums: slots that are not the segment's.
  __device__ static void clear_slots(char* tile, int begin, int end) {
    for (int i = threadIdx.x % kGroupThreads; i < (end - begin) * kSpans * 8; i += kGroupThreads) {
      const int slot = begin + i / (kSpans * 8);
      const int span = i / 8 % kSpans;
      *reinterpret_cast<uint4*>(tile + span * kSpanBytes + slot * 128 + i % 8 * 16) = {0, 0, 0, 0};
    }
  }

  __device__ static void multiply_keys(float (&s)[kScoreBlocks][4], uint32_t q, uint32_t k) {
#pragma unroll
    for (int d = 0; d < kHead / 16; ++d) {
      const uint64_t a = descriptor(q + d / 4 * (kGroupRows * 128) + d % 4 * 32, 16);
      const uint64_t b = descriptor(k + d / 4 * kSpanBytes + d % 4 * 32, 16);
      wgmma_shared<T, kScoreBlocks>(s, a, b, d > 0);
    }
    wgmma_commit();
  }

  __device__ static void multiply_values(State& state, const uint32_t (&weights)[kSlots / 16][4],
                                         uint32_t v) {
#pragma unroll
    for (int n = 0; n < kSlots / 16; ++n) {
      wgmma_registers<T, kOutBlocks>(state.out, weights[n], descriptor(v + n * 2048, kSpanBytes),
                                     true);
    }
    wgmma_commit();
  }

  /// Scores to weights, in place; `keep` is what the output so far is to be multiplied by.
  __device__ static void soften(const AttendParams& p, const Item& item, const Logits& logits,
                                int step, const RowInfo (&rows)[2], const float (&slopes)[2],
                                float (&s)[kScoreBlocks][4], State& state, float (&keep)[2]) {
    const int lane = threadIdx.x % 32;
    const Segment& segment = item.segment;
    const int column = segment.first + step * kSlots;
    const int end = segment.first + segment.slots;
    const bool hidden = column < segment.visible_from ||
                        min(column + kSlots, end) > segment.visible_to || column + kSlots > end;
    // Without soft cap and slopes the scale is applied with the subtraction of the maximum.
    // Never 0, which times -inf is no number.
    float scale = fmaxf(logits.scale, FLT_MIN);
    if constexpr (!kPlain) {
      scale = 1.0f;
#pragma unroll
      for (int n = 0; n < kScoreBlocks; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int c = column + n * 8 + lane % 4 * 2 + j % 2;
          float x = s[n][j];
          x = logits.softcap > 0.0f ? logits.capped(x) : x * logits.scale;
          s[n][j] = x + slopes[j / 2] * static_cast<float>(c - rows[j / 2].position) * kLog2E;
        }
      }
    }
    if (hidden) {
      const int from[2] = {rows[0].lo - column, rows[1].lo - column};
      const int to[2] = {min(rows[0].hi, end) - column, min(rows[1].hi, end) - column};
#pragma unroll
      for (int n = 0; n < kScoreBlocks; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int c = n * 8 + lane % 4 * 2 + j % 2;
          if (c < from[j / 2] || c >= to[j / 2]) s[n][j] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top = -INFINITY;
#pragma unroll
      for (int n = 0; n < kScoreBlocks; ++n) top = fmaxf(top, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
      top *= scale;
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      top = fmaxf(top, state.max[h]);
      const float base = top == -INFINITY ? 0.0f : top;
      keep[h] = exp2_fast(state.max[h] - base);
      state.max[h] = top;
      float sum = 0.0f;
#pragma unroll
      for (int n = 0; n < kScoreBlocks; ++n) {
#pragma unroll
        for (int j = 2 * h; j < 2 * h + 2; ++j) {
          s[n][j] = exp2_fast(fmaf(s[n][j], scale, -base));
          sum += s[n][j];
        }
      }
      state.sum[h] = state.sum[h] * keep[h] + sum;
    }
  }

  __device__ static void pack(const float (&s)[kScoreBlocks][4],
                              uint32_t (&weights)[kSlots / 16][4]) {
#pragma unroll
    for (int n = 0; n < kSlots / 16; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&block)[4] = s[2 * n + i / 2];
        weights[n][i] = Pair<T>::pack(block[i % 2 * 2], block[i % 2 * 2 + 1]);
      }
    }
  }

  __device__ static void store(const AttendParams& p, const Item& item, const State& state,
                               int first) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x % kGroupThreads / 32;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = state.sum[h];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      const int m = first + warp * 16 + lane / 4 + 8 * h;
      if (m >= item.rows) continue;
      const RowHead at = row_head(p, item, m);
      if (item.partial < 0) {
        const float factor = finish_row(p, at.row, at.head, state.max[h], sum, lane % 4 == 0);
        char* to = p.out + at.row * p.out_row + at.head * p.out_head;
#pragma unroll
        for (int n = 0; n < kOutBlocks; ++n) {
          const int d = n * 8 + lane % 4 * 2;
          if (d < p.head_size) {
            *reinterpret_cast<uint32_t*>(to + d * 2) =
                Pair<T>::pack(state.out[n][2 * h] * factor, state.out[n][2 * h + 1] * factor);
          }
        }
      } else {
        const int64_t row = item.partial + m;
        if (lane % 4 == 0) p.partial_state[row] = {state.max[h], sum};
#pragma unroll
        for (int n = 0; n < kOutBlocks; ++n) {
          const int d = n * 8 + lane % 4 * 2;
          if (d < p.head_size) {
            *reinterpret_cast<float2*>(p.partial_out + row * p.head_size + d) = {
                state.out[n][2 * h], state.out[n][2 * h + 1]};
          }
        }
      }
    }
  }

  /// `ring`: where the item's tiles begin, after `passed` tiles of the other warpgroup's.
  __device__ static void attend_item(const AttendParams& p, const Item& item, const Logits& logits,
                                     const Shared& shared, int group, int first, int passed,
                                     Ring& ring) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x % kGroupThreads / 32;
    const int live = min(kGroupRows, item.rows - first);
    const bool busy = warp * 16 < live;  // has this warp rows that count?
    const Segment& segment = item.segment;
    const int segment_end = segment.first + segment.slots;

    sync_group(group);  // the queries of the item before are done with
    load_queries(p, item, shared.queries(group), first, live, [&] { pass(shared, ring, passed); });
    const uint32_t q = shared_address(shared.queries(group));
    // Where every row sees everything, nothing of a row matters.
    const bool alike = segment.visible_from <= segment.first && segment.visible_to >= segment_end &&
                       p.slopes == nullptr;
    RowInfo rows[2] = {{0, 0, 0, INT_MAX}, {0, 0, 0, INT_MAX}};
    float slopes[2] = {0.0f, 0.0f};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = warp * 16 + lane / 4 + 8 * h;
      if (!alike && m < live) {
        const RowHead at = row_head(p, item, first + m);
        rows[h] = p.plan.rows[at.row];
        if (p.slopes != nullptr) slopes[h] = p.slopes[at.head];
      }
    }
    fence_stores();
    sync_group(group);

    State state;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      state.max[h] = -INFINITY;
      state.sum[h] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kOutBlocks; ++n) {
      state.out[n][0] = state.out[n][1] = state.out[n][2] = state.out[n][3] = 0.0f;
    }
    float scores[kScoreBlocks][4];
    uint32_t weights[kSlots / 16][4];
    float keep[2] = {1.0f, 1.0f};

    const auto await_values = [&](const Ring& at, int step) {
      await_tile(shared, at);
      const int column = segment.first + step * kSlots;
      const int begin = max(0, min(kSlots, segment.seen_from - column));
      const int end = min(kSlots, segment_end - column);
      if (begin > 0 || end < kSlots) {
        clear_slots(shared.tile(at.stage), 0, begin);
        clear_slots(shared.tile(at.stage), end, kSlots);
        fence_stores();
        sync_group(group);
      }
    };

    // One copy of the code for all steps: the first has no values before it to multiply.
    int step = item.step_begin;
    Ring keys = ring;
    Ring values = ring;
#pragma unroll 1
    for (; step < item.step_end; ++step) {
      const bool later = step > item.step_begin;
      await_tile(shared, keys);
      wgmma_fence();
      multiply_keys(scores, q, shared_address(shared.tile(keys.stage)));
      if (later) {
        await_values(values, step - 1);
        wgmma_fence();
        multiply_values(state, weights, shared_address(shared.tile(values.stage)));
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      release(shared, keys);
      if (busy) soften(p, item, logits, step, rows, slopes, scores, state, keep);
      if (later) {
        wgmma_wait<0>();
        release(shared, values);
        // Maxima seldom grow.
        if (__any_sync(~0u, keep[0] != 1.0f || keep[1] != 1.0f)) {
#pragma unroll
          for (int n = 0; n < kOutBlocks; ++n) {
#pragma unroll
            for (int j = 0; j < 4; ++j) state.out[n][j] *= keep[j / 2];
          }
        }
      }
      pack(scores, weights);
      values = keys.ahead(1);
      keys.advance(2);
    }
    await_values(values, step - 1);
    wgmma_fence();
    multiply_values(state, weights, shared_address(shared.tile(values.stage)));
    wgmma_wait<0>();
    release(shared, values);
    ring = keys;
    store(p, item, state, first);
  }

  __device__ static void compute_items(const AttendParams& p, const Shared& shared, int group) {
    const Logits logits(p);
    Item item;
    Walk walk(p, blockIdx.x);
    Ring ring;
    int turn = 0;
    int passed = 0;  // tiles of the other warpgroup's since this one's last item
    while (walk.next(p, item)) {
      const bool few = item.rows <= kGroupRows;
      if (!few || turn == group) {
        attend_item(p, item, logits, shared, group, few ? 0 : group * kGroupRows, passed, ring);
        passed = 0;
      } else {
        passed += 2 * (item.step_end - item.step_begin);
      }
      if (few) turn ^= 1;
    }
    pass(shared, ring, passed);
  }
};

template <typename T, int kHead, bool kPlain>
__global__ void __launch_bounds__(kThreads, 1)
    attend(const __grid_constant__ AttendParams p, const __grid_constant__ Maps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using K = Kernel<T, kHead, kPlain>;
  extern __shared__ char memory[];
  typename K::Shared shared;
  shared.base = memory + (1024 - shared_address(memory) % 1024) % 1024;
  shared.address = shared_address(shared.base);
  if (threadIdx.x == 0) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&maps.k));
    asm volatile("prefetch.tensormap [%0];" ::"l"(&maps.v));
    for (int i = 0; i < K::kStages; ++i) {
      init_barrier(shared.full(i), 2);  // both loading warps
      init_barrier(shared.empty(i), 2 * kGroupThreads / 32);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  wait_for_previous();
  let_next_start();  // only now: merging begins with reading the plan
  if (threadIdx.x < kGroupThreads) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(K::kLoaderRegisters));
    const int warp = threadIdx.x / 32;
    if (warp < 2) {
      K::load_items(p, maps, warp, shared);
    } else if (warp == 2) {
      K::prefetch_plan(p);
    } else {
      K::prefetch_merging(p);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(K::kComputeRegisters));
    K::compute_items(p, shared, threadIdx.x / kGroupThreads - 1);
  }
#endif
}

template <typename T, int kHead>
cudaError_t launch_one(const AttendParams& p, const Maps& maps, cudaStream_t stream) {
  const bool plain = p.softcap == 0.0f && p.slopes == nullptr;
  const auto kernel = plain ? attend<T, kHead, true> : attend<T, kHead, false>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  return launch(kernel, p.workers, kThreads, kSharedBytes, stream, p, maps);
}

template <typename T>
cudaError_t launch_type(const AttendParams& p, const Maps& maps, cudaStream_t stream) {
  if (p.head_size <= 64) return launch_one<T, 64>(p, maps, stream);
  if (p.head_size <= 128) return launch_one<T, 128>(p, maps, stream);
  if (p.head_size <= 192) return launch_one<T, 192>(p, maps, stream);
  return launch_one<T, 256>(p, maps, stream);
}

}  // namespace relay::cuda::wgmma
