// Attention by wgmma and TMA: Hopper (compute capability 9.0).
//
// A block is one warpgroup that loads and two that compute. The loaders run ahead through all of
// their worker's items: K and V tiles (kSlots x head size each) stream through a ring in shared
// memory without a gap between one item and the next, so that a step of few rows costs the time of
// reading its KV bytes once. A tile of up to 64 query rows is one warpgroup's; the two take such
// items in turn. In a larger tile each has 64 rows, and both read the same KV: 4 x rows x kSlots x
// head size flops a step. Which items it has and their queries, a warpgroup is told by a loading
// warp of its own, so that it waits for memory itself only to mask rows and to store.
//
// Each block begins with a portion of the plan of its own; then it takes what is left of the tail,
// one short portion after the other, until there is none.
//
// Within a warpgroup the products of the next scores and of the present weights with V run while it
// computes the next weights. S, P and O never leave registers. For up to 8 query rows (the contexts
// that requests have for themselves) these would be 56 empty rows of 64: there the products are
// transposed, K Q^T and V^T P^T, so that slots and head size are what a product has 64 of.
//
// KV in fp8 (e4m3) is copied to a ring of its own, half as large a tile. A fourth warpgroup widens
// K to the queries' type and V to f16, both exactly, and fills the ring that the others compute
// from.
#pragma once

#include <cfloat>
#include <climits>

#include "cuda/kernels/common.cuh"
#include "cuda/kernels/wgmma_instructions.cuh"
#include "cuda/kernels/wgmma_shape.h"
#include "cuda/launch.h"

namespace relay::cuda::wgmma {

constexpr int kGroupThreads = 128;
constexpr int kGroupRows = 64;
constexpr int kHalfRows = kGroupRows / 2;
constexpr int kFewRows = 8;
constexpr int kAtomBytes = 8 * 128;  // eight rows of a span
constexpr int kSharedBytes = 227 * 1024;

// --- Instructions --------------------------------------------------------------------------------

__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals));
}
__device__ inline void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// The next three are done by one lane of a warp, but called by all with the same values: were they
// in a branch of one lane, the compiler would move each operand to a uniform register in a loop
// over lanes.

/// Arrives at two barriers, at each of which so many bytes are to be copied.
__device__ inline void arrive_expecting(uint32_t keys_full, uint32_t values_full, int bytes) {
  asm volatile(
      "{\n.reg .pred one;\n"
      "elect.sync _|one, 0xffffffff;\n"
      "@one mbarrier.arrive.expect_tx.shared.b64 _, [%0], %2;\n"
      "@one mbarrier.arrive.expect_tx.shared.b64 _, [%1], %2;\n}" ::"r"(keys_full),
      "r"(values_full), "r"(bytes)
      : "memory");
}
/// What copy_boxes() copies, of the dimensions of Maps; rows and spans begin at 0.
struct Box {
  uint32_t to;
  uint64_t map;
  uint32_t barrier;
  int unit;
};
/// Copies a box of K and one of V.
__device__ inline void copy_boxes(const Box& k, const Box& v, int element, int eight_rows) {
  asm volatile(
      "{\n.reg .pred one;\n"
      "elect.sync _|one, 0xffffffff;\n"
      "@one cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%8, 0, 0, %9, %3}], [%2];\n"
      "@one cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%4], "
      "[%5, {%8, 0, 0, %9, %7}], [%6];\n}" ::"r"(k.to),
      "l"(k.map), "r"(k.barrier), "r"(k.unit), "r"(v.to), "l"(v.map), "r"(v.barrier), "r"(v.unit),
      "r"(element), "r"(eight_rows)
      : "memory");
}
/// Copies two boxes of K and two of V: the second ones are of the units `k_unit` and `v_unit`, and
/// go to kBytes behind the first. This takes fewer instructions than one by one.
template <int kBytes>
__device__ inline void copy_two_boxes(const Box& k, int k_unit, const Box& v, int v_unit) {
  asm volatile(
      "{\n.reg .pred one;\n.reg .b32 to_k, to_v;\n"
      "elect.sync _|one, 0xffffffff;\n"
      "add.u32 to_k, %0, %10;\n"
      "add.u32 to_v, %4, %10;\n"
      "@one cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], "
      "[%1, {0, 0, 0, 0, %3}], [%2];\n"
      "@one cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%4], "
      "[%5, {0, 0, 0, 0, %7}], [%6];\n"
      "@one cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [to_k], "
      "[%1, {0, 0, 0, 0, %8}], [%2];\n"
      "@one cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [to_v], "
      "[%5, {0, 0, 0, 0, %9}], [%6];\n}" ::"r"(k.to),
      "l"(k.map), "r"(k.barrier), "r"(k.unit), "r"(v.to), "l"(v.map), "r"(v.barrier), "r"(v.unit),
      "r"(k_unit), "r"(v_unit), "n"(kBytes)
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
/// Arrives once all that this thread has asked copy_chunk() for is there.
__device__ inline void arrive_when_copied(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory");
}
/// Stores 8 x 8 matrices of 16-bit numbers transposed: lane l holds the columns 2 (l % 4) and the
/// next of row l / 4 of each, and has the address of row l % 8 of the transposed matrix l / 8.
__device__ inline void store_transposed(uint32_t address, const uint32_t (&m)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
      "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
      : "memory");
}
__device__ inline void store_transposed(uint32_t address, const uint32_t (&m)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(address),
               "r"(m[0]), "r"(m[1])
               : "memory");
}
/// Brings a line of 128 bytes into the L2 cache.
__device__ inline void prefetch(const void* at) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(at));
}
/// What was written to shared memory by stores is from here on seen by wgmma and TMA.
__device__ inline void fence_stores() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ inline void sync_group(int group) {
  asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(kGroupThreads) : "memory");
}
/// Between a warpgroup that has read an assignment and the warp that writes the next to its place.
/// They do not need it: queries_empty says so later, by one lane of each warp, after all of its
/// lanes have read. compute-sanitizer's racecheck takes that for the word of this lane alone. As it
/// costs up to 3 %, only a build for racecheck has it.
#ifdef RELAY_CUDA_RACECHECK
constexpr bool kForRacecheck = true;
#else
constexpr bool kForRacecheck = false;
#endif
__device__ inline void arrive_read(int group, int half) {
  asm volatile("bar.arrive %0, %1;" ::"r"(3 + group * 2 + half), "n"(kGroupThreads + 32)
               : "memory");
}
__device__ inline void await_read(int group, int half) {
  asm volatile("bar.sync %0, %1;" ::"r"(3 + group * 2 + half), "n"(kGroupThreads + 32) : "memory");
}

/// A matrix in shared memory for wgmma, in rows of 128 bytes whose 16-byte pieces are swizzled.
/// kEightRows: bytes from eight rows to the next eight. `leading`: those from one span of 64
/// columns to the next, where those are not what is summed.
template <int kEightRows>
class Matrix {
 public:
  /// The same for all threads of a warp, and the compiler is to see it: else it computes each
  /// descriptor in a chain of vector instructions that takes longer than the product.
  __device__ Matrix(uint32_t address, uint32_t leading)
      : low_(__shfl_sync(~0u, (leading & 0x3ffff) >> 4 << 16 | (address & 0x3ffff) >> 4, 0)) {}

  __device__ uint64_t descriptor(uint32_t offset) const {
    constexpr uint32_t kSwizzle128 = 1u << 30;
    return uint64_t{kSwizzle128 | kEightRows >> 4} << 32 | (low_ + (offset >> 4));
  }

 private:
  uint32_t low_;
};

// --- The kernel ----------------------------------------------------------------------------------

/// kPlain: no soft cap and no slopes. Their code would be long, and a kernel begins by fetching its
/// code from memory.
/// kByteKv: KV in e4m3.
template <typename T, int kHead, bool kPlain, bool kByteKv>
struct Kernel {
  /// Of weights and V. e4m3 widens to f16 by one instruction where bf16 takes more, and weights, 0
  /// to 1, are more exact in it.
  using Value = std::conditional_t<kByteKv, __half, T>;
  static constexpr int kThreads = (kByteKv ? 4 : 3) * kGroupThreads;
  static constexpr int kSlots = tile_slots(kHead);
  static constexpr int kSpans = kHead / kSpan;
  // A tile of K or V: [slot / 8][span][slot % 8][64 elements]. So a page is one piece.
  static constexpr int kEightSlots = kSpans * kAtomBytes;
  static constexpr int kPageAtoms = kPageSlots / 8 * kSpans;
  static constexpr int kPageBytes = kPageAtoms * kAtomBytes;
  static constexpr int kTileBytes = kSlots / 8 * kEightSlots;
  static constexpr int kQueryBytes = kGroupRows * kHead * 2;
  static constexpr int kControlBytes = kByteKv ? 2048 : 1536;  // what Shared has behind the tiles
  static constexpr int kRingBytes = kSharedBytes - 1024 - 2 * kQueryBytes - kControlBytes;
  static constexpr int kStages = !kByteKv ? kRingBytes / kTileBytes : kHead == 64 ? 8 : 4;
  // What is copied: these tiles, or those of e4m3, [slot][element].
  static constexpr int kCopiedPageBytes = kPageBytes / (kByteKv ? 2 : 1);
  static constexpr int kCopiedTileBytes = kTileBytes / (kByteKv ? 2 : 1);
  static constexpr int kByteStages =
      kByteKv ? (kRingBytes - kStages * kTileBytes) / kCopiedTileBytes : 0;
  static constexpr int kCopiedStages = kByteKv ? kByteStages : kStages;
  static constexpr int kScoreBlocks = kSlots / 8;
  static constexpr int kOutBlocks = kHead / 8;
  static constexpr int kPages = kSlots / kPageSlots;
  static constexpr int kShortSlots = 2 * kPageSlots;  // of a few rows' V, where no more is there
  static constexpr int kPortionsAhead = 4;
  // Of a thread. The block is launched with as many for each, which are shared out anew: a
  // warpgroup that asked for more than the others have left would wait for ever.
  static constexpr int kLaunchRegisters = kByteKv ? 128 : 168;
  static constexpr int kLoaderRegisters = 56;
  static constexpr int kWideningRegisters = !kByteKv ? 0 : kHead == 256 ? 40 : 56;
  static constexpr int kComputeRegisters = !kByteKv ? 224 : kHead == 256 ? 208 : 200;
  static_assert(kLoaderRegisters + kWideningRegisters + 2 * kComputeRegisters <=
                kThreads / kGroupThreads * kLaunchRegisters);
  static_assert(kStages >= 4 && kStages <= 16 && kCopiedStages >= 2);
  using Queries = Matrix<kAtomBytes>;
  using Tile = Matrix<kEightSlots>;

  /// What a warpgroup is to do next.
  struct Assignment {
    Item item;       // of no rows: only to pass tiles, or to end
    int32_t first;   // of its query rows, in the item's tile
    int32_t passed;  // tiles of the other warpgroup's since this one's last item
    bool is_last;

    __device__ int32_t rows() const { return min(kGroupRows, item.rows - first); }
  };

  /// What each warp of a warpgroup has found of each row.
  using Reduction = float[kGroupThreads / 32][kFewRows];

  /// Addresses in shared memory. A warpgroup's queries have two halves, so that those of one item
  /// of few rows can arrive while another is computed.
  struct Shared {
    char* base;
    uint32_t address;

    static constexpr int kTiles = 2 * kQueryBytes;
    static constexpr int kByteTiles = kTiles + kStages * kTileBytes;
    static constexpr int kBarriers = kByteTiles + kByteStages * kCopiedTileBytes;
    static constexpr int kByteBarriers = kBarriers + 2 * kStages * 8;
    static constexpr int kQueryBarriers = kByteBarriers + 2 * kByteStages * 8;
    static constexpr int kPortionBarriers = kQueryBarriers + 8 * 8;
    static constexpr int kRehearsalBarrier = kPortionBarriers + 2 * kPortionsAhead * 8;
    static constexpr int kPortions = kRehearsalBarrier + 8;
    static constexpr int kAssignments = kPortions + kPortionsAhead * sizeof(int32_t);
    static constexpr int kReductions = kAssignments + 4 * sizeof(Assignment);
    static constexpr int kCopiedPages = kReductions + 4 * sizeof(Reduction);
    static_assert(kCopiedPages + kByteStages * sizeof(int2) <= kBarriers + kControlBytes);

    __device__ char* queries(int group, int half) const {
      return base + group * kQueryBytes + half * kHalfRows * 128;
    }
    __device__ char* tile(int stage) const { return base + kTiles + stage * kTileBytes; }
    __device__ uint32_t full(int stage) const { return address + kBarriers + stage * 8; }
    __device__ uint32_t empty(int stage) const { return full(stage) + kStages * 8; }
    // The same of the tiles that are copied.
    __device__ char* copied_tile(int stage) const {
      return kByteKv ? base + kByteTiles + stage * kCopiedTileBytes : tile(stage);
    }
    __device__ uint32_t copied_full(int stage) const {
      return kByteKv ? address + kByteBarriers + stage * 8 : full(stage);
    }
    __device__ uint32_t copied_empty(int stage) const {
      return copied_full(stage) + kCopiedStages * 8;
    }
    /// How many pages each loading warp has copied of a tile of e4m3; negative behind the last.
    __device__ int32_t* copied_pages(int stage) const {
      return reinterpret_cast<int32_t*>(base + kCopiedPages) + 2 * stage;
    }
    __device__ uint32_t queries_full(int group, int half) const {
      return address + kQueryBarriers + (group * 2 + half) * 8;
    }
    __device__ uint32_t queries_empty(int group, int half) const {
      return queries_full(group, half) + 4 * 8;
    }
    __device__ uint32_t portion_full(int slot) const {
      return address + kPortionBarriers + slot * 8;
    }
    __device__ uint32_t portion_empty(int slot) const {
      return portion_full(slot) + kPortionsAhead * 8;
    }
    __device__ uint32_t rehearsed() const { return address + kRehearsalBarrier; }
    __device__ int32_t* portion(int slot) const {
      return reinterpret_cast<int32_t*>(base + kPortions) + slot;
    }
    /// Weights of up to kFewRows rows, [slot / 64][row][slot % 64] with swizzled pieces of 16
    /// bytes: where their half has no queries.
    __device__ char* weights(int group, int half) const {
      static_assert(kFewRows * 128 * (1 + kSlots / 64) <= kHalfRows * 128);
      return queries(group, half) + kFewRows * 128;
    }
    __device__ Reduction& maxima(int group) const { return *reduction(group * 2); }
    __device__ Reduction& sums(int group) const { return *reduction(group * 2 + 1); }
    __device__ Reduction* reduction(int number) const {
      return reinterpret_cast<Reduction*>(base + kReductions) + number;
    }
    __device__ Assignment* assignment(int group, int half) const {
      return reinterpret_cast<Assignment*>(base + kAssignments) + group * 2 + half;
    }
  };

  /// Where a warpgroup's next queries lie: in the first half and the second by turns. More than
  /// kHalfRows lie in both, from the first on.
  struct Halves {
    uint32_t count = 0;  // halves filled so far

    __device__ int half() const { return count & 1; }
    __device__ uint32_t phase() const { return count >> 1 & 1; }
    __device__ static int taken(int rows) { return rows > kHalfRows ? 2 : 1; }
    __device__ int begin(int rows) const { return rows > kHalfRows ? 0 : half(); }
  };

  /// A place in a ring.
  template <int kOfStages>
  struct RingOf {
    int stage = 0;
    uint32_t phase = 0;
    __device__ void advance(int n) {
      stage += n;
      const int laps = stage / kOfStages;
      stage -= laps * kOfStages;
      phase ^= laps & 1;
    }
    __device__ RingOf ahead(int n) const {
      RingOf r = *this;
      r.advance(n);
      return r;
    }
  };
  using Ring = RingOf<kStages>;
  using CopyRing = RingOf<kCopiedStages>;

  // --- Loading ---

  /// The portions of this block, for each of the four loading warps: its own, then those of the
  /// tail that it takes. One warp takes them; the others are told.
  class Portions {
   public:
    __device__ Portions(const AttendParams& p, bool takes)
        : portions_(p.plan.header->portions), takes_(takes) {}

    /// Asks for the next one: some time before it is needed, as the answer takes a while.
    __device__ void take(const AttendParams& p) {
      if (takes_ && threadIdx.x % 32 == 0) taken_ = p.workers + atomicAdd(p.taken, 1);
    }
    /// The first of the tail: not before this block's own portion ends, as another may be faster.
    __device__ void take_first(const AttendParams& p) {
      if (at_ == 0 && portions_ > p.workers) take(p);
    }

    /// The portion that was taken last; -1: there was none left.
    __device__ int32_t next(const AttendParams& p, const Shared& shared) {
      if (portions_ <= p.workers) return -1;  // there is no tail
      const int lane = threadIdx.x % 32;
      const int slot = at_ % kPortionsAhead;
      const uint32_t phase = at_ / kPortionsAhead & 1;
      ++at_;
      int32_t portion = __shfl_sync(~0u, taken_, 0);
      if (takes_) {
        wait(shared.portion_empty(slot), phase ^ 1);
        if (lane == 0) {
          *shared.portion(slot) = portion;
          arrive(shared.portion_full(slot));
        }
        __syncwarp();
      } else {
        wait(shared.portion_full(slot), phase);
        portion = *shared.portion(slot);
        arrive(shared.portion_empty(slot));
      }
      return portion < portions_ ? portion : -1;
    }

   private:
    int32_t portions_;
    int32_t taken_ = 0;
    uint32_t at_ = 0;
    bool takes_;
  };

  /// The addresses of the tensor maps, which the compiler would else compute for each copy anew.
  struct MapAddresses {
    __device__ explicit MapAddresses(const Maps& maps) : by_atoms(maps.by_atoms != 0) {
      k = __shfl_sync(~0u, reinterpret_cast<uint64_t>(&maps.k), 0);
      v = __shfl_sync(~0u, reinterpret_cast<uint64_t>(&maps.v), 0);
    }
    uint64_t k;
    uint64_t v;
    bool by_atoms;
  };

  static constexpr int kWarpPages = kPages / 2;  // of a step, for each of the two loading warps
  static_assert(kWarpPages % 2 == 0);            // copied by twos

  /// Loads this warp's half of a step's K and V: lane l knows where the l-th page of both lies, of
  /// which `pages` are there. Page by page, as a token's K and V are neighbours in most caches. A
  /// rehearsal has none: it brings the code from memory, but for that of the copies themselves.
  __device__ static void load_step(const Shared& shared, const CopyRing& keys,
                                   const MapAddresses& addresses, int warp, int pages, int key_unit,
                                   int value_unit, bool rehearsal) {
    const CopyRing values = keys.ahead(1);
    wait(shared.copied_empty(keys.stage), keys.phase ^ 1);
    wait(shared.copied_empty(values.stage), values.phase ^ 1);
    // From one lane, so that the compiler sees that they are the same in all.
    const auto same = [](uint32_t value) { return __shfl_sync(~0u, value, 0); };
    const int own = warp * kWarpPages * kCopiedPageBytes;
    const uint32_t to_keys = same(shared_address(shared.copied_tile(keys.stage)) + own);
    const uint32_t to_values = same(shared_address(shared.copied_tile(values.stage)) + own);
    const uint32_t rehearsed = shared.rehearsed();
    const uint32_t keys_full = same(rehearsal ? rehearsed : shared.copied_full(keys.stage));
    const uint32_t values_full = same(rehearsal ? rehearsed : shared.copied_full(values.stage));
    const int mine = same(max(0, min(kWarpPages, pages)));
    if constexpr (kByteKv) {
      if (threadIdx.x % 32 == 0) {
        shared.copied_pages(keys.stage)[warp] = shared.copied_pages(values.stage)[warp] = mine;
      }
      __syncwarp();
    }
    arrive_expecting(keys_full, values_full, mine * kCopiedPageBytes);
    if (kHead == 128 && !kByteKv && addresses.by_atoms) {
#pragma unroll 4
      for (int i = 0; i < kWarpPages * kPageAtoms; ++i) {
        const int page = i / kPageAtoms;
        if (page >= mine) break;
        const int key = __shfl_sync(~0u, key_unit, page);
        const int value = __shfl_sync(~0u, value_unit, page);
        copy_boxes({to_keys + i * kAtomBytes, addresses.k, keys_full, key},
                   {to_values + i * kAtomBytes, addresses.v, values_full, value},
                   i % kSpans * kSpan, i / kSpans % 2);
      }
    } else {
      const auto key = [&](int i) {
        return Box{to_keys + i * kCopiedPageBytes, addresses.k, keys_full,
                   __shfl_sync(~0u, key_unit, i)};
      };
      const auto value = [&](int i) {
        return Box{to_values + i * kCopiedPageBytes, addresses.v, values_full,
                   __shfl_sync(~0u, value_unit, i)};
      };
      if (mine == kWarpPages) {
#pragma unroll
        for (int i = 0; i < kWarpPages; i += 2) {
          copy_two_boxes<kCopiedPageBytes>(key(i), __shfl_sync(~0u, key_unit, i + 1), value(i),
                                           __shfl_sync(~0u, value_unit, i + 1));
        }
      } else {
#pragma unroll 1
        for (int i = 0; i < mine; ++i) copy_boxes(key(i), value(i), 0, 0);
      }
    }
  }

  /// Several steps of one item: lane l knows the block of the (l % kWarpPages)-th page of the
  /// loading warp's half of step l / kWarpPages.
  struct Batch {
    int kv_head;
    int pages;  // of both warps
    int block;  // -1: none
    int page;   // within the block
  };
  static constexpr int kBatchPages = 32 / kWarpPages * kPages;

  /// Where a batch's pages lie, in the unit of a tensor map; -1: outside of the cache, which TMA
  /// fills with zeros, or behind the batch's, which are not copied.
  __device__ static int unit_of(const AttendParams& p, const Batch& batch, const Units& units) {
    if (batch.block < 0 || batch.block >= p.cache_blocks) return -1;
    return batch.block * units.block + batch.kv_head * units.head + batch.page * units.page;
  }

  /// Two warps do this, since handing out copies takes time. The numbers of the blocks are asked
  /// for a batch ahead of their use, across items.
  __device__ static void load_items(const AttendParams& p, const Maps& maps, int warp,
                                    const Shared& shared) {
    const int lane = threadIdx.x % 32;
    const int lane_page = lane / kWarpPages * kPages + warp * kWarpPages + lane % kWarpPages;
    const MapAddresses addresses(maps);
    Portions portions(p, warp == 0);
    Item item{};
    Walk walk;
    walk.begin(p, blockIdx.x, item);
    if (walk.is_done()) portions.take_first(p);
    int at = 0;  // page of the item's segment
    int end = 0;
    // The first batch is one step: as all blocks begin together, it would else arrive as late as
    // the steps behind it.
    const auto fetch = [&](Batch& batch, bool is_first) {
      if (at == end) {
        while (!walk.next(p, item)) {
          const int32_t portion = portions.next(p, shared);
          if (portion < 0) return false;
          walk.begin(p, portion, item);
          portions.take(p);  // short as they are, one is held in reserve
        }
        at = item.step_begin * kPages;
        end = min(item.step_end * kPages, ceil_div(item.segment.slots, kPageSlots));
      }
      batch.kv_head = item.kv_head;
      batch.pages = min(is_first ? kPages : kBatchPages, end - at);
      const int page = item.segment.first / kPageSlots + at + lane_page;
      const int column = maps.column_of(page);
      batch.page = page - column * maps.block_pages;
      batch.block = -1;
      if (lane_page < batch.pages) {
        batch.block = __ldg(p.table + item.segment.request * p.table_stride + column);
      }
      at += batch.pages;
      if (at == end && walk.is_done()) portions.take_first(p);
      return true;
    };
    // While one warp finds the first pages, the other rehearses loading, by a step none of whose
    // pages is its own. Turn kFind finds the first batch, kLoad only loads it; each later turn
    // finds the next batch and then loads the one before.
    enum { kRehearsal = -1, kFind, kLoad };
    CopyRing ring;
    Batch batch{};
    int turn = kFind;
    if (warp == 1) {
      turn = kRehearsal;
      batch.pages = 1;
    }
    for (bool more = true; more; ++turn) {
      Batch next{};
      if (turn == kFind || turn > kLoad) more = fetch(next, turn == kFind);
      int keys = unit_of(p, batch, maps.k_units);
      int values = unit_of(p, batch, maps.v_units);
#pragma unroll 1
      for (int pages = batch.pages; pages > 0; pages -= kPages) {
        load_step(shared, ring, addresses, warp, pages - warp * kWarpPages, keys, values,
                  turn == kRehearsal);
        if (turn != kRehearsal) ring.advance(2);
        keys = __shfl_down_sync(~0u, keys, kWarpPages);
        values = __shfl_down_sync(~0u, values, kWarpPages);
      }
      batch = next;
    }
    if constexpr (kByteKv) {
      wait(shared.copied_empty(ring.stage), ring.phase ^ 1);
      if (lane == 0) {
        shared.copied_pages(ring.stage)[warp] = -1;
        arrive(shared.copied_full(ring.stage));
      }
    }
  }

  // --- Widening ---

  static constexpr int kChunks = kHead / 8;  // of a row, 8 elements each
  static constexpr int kThreadChunks = kPageSlots * kChunks / kGroupThreads;  // of a page
  static_assert(kPageSlots * kChunks % kGroupThreads == 0);

  /// A thread's part of some pages: all is read before anything is written, so that it waits once.
  template <typename To, int kCount>
  __device__ static void widen_pages(const char* from, char* to,
                                     const int (&places)[kThreadChunks]) {
    uint2 narrow[kCount][kThreadChunks];
#pragma unroll
    for (int page = 0; page < kCount; ++page) {
#pragma unroll
      for (int i = 0; i < kThreadChunks; ++i) {
        narrow[page][i] =
            *reinterpret_cast<const uint2*>(from + page * kCopiedPageBytes + i * kGroupThreads * 8);
      }
    }
#pragma unroll
    for (int page = 0; page < kCount; ++page) {
#pragma unroll
      for (int i = 0; i < kThreadChunks; ++i) {
        *reinterpret_cast<uint4*>(to + page * kPageBytes + places[i]) = widen<To>(narrow[page][i]);
      }
    }
  }

  /// The two loading warps have copied `pages` of their halves of a tile.
  template <typename To>
  __device__ static void widen_tile(const char* from, char* to, const int2& pages,
                                    const int (&places)[kThreadChunks]) {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int there = half == 0 ? pages.x : pages.y;
      if (there == kWarpPages) {
        widen_pages<To, kWarpPages>(from, to, places);
      } else {
#pragma unroll 1
        for (int page = 0; page < there; ++page) {
          widen_pages<To, 1>(from + page * kCopiedPageBytes, to + page * kPageBytes, places);
        }
      }
      from += kWarpPages * kCopiedPageBytes;
      to += kWarpPages * kPageBytes;
    }
  }

  /// Widens the tiles of e4m3, each thread the same elements of each page. One warpgroup.
  __device__ static void widen_tiles(const Shared& shared) {
    const int thread = threadIdx.x % kGroupThreads;
    int places[kThreadChunks];  // in a page of the wide tile
#pragma unroll
    for (int i = 0; i < kThreadChunks; ++i) {
      const int slot = (i * kGroupThreads + thread) / kChunks;
      const int chunk = (i * kGroupThreads + thread) % kChunks;
      places[i] = slot / 8 * kEightSlots + chunk / 8 * kAtomBytes + slot % 8 * 128 +
                  (chunk % 8 ^ slot % 8) * 16;
    }
    CopyRing from;
    Ring to;
    for (bool is_v = false;; is_v = !is_v, from.advance(1), to.advance(1)) {
      wait(shared.copied_full(from.stage), from.phase);
      const auto pages = *reinterpret_cast<const int2*>(shared.copied_pages(from.stage));
      if (pages.x < 0) break;
      wait(shared.empty(to.stage), to.phase ^ 1);
      const char* bytes = shared.copied_tile(from.stage) + thread * 8;
      if (is_v) {
        widen_tile<Value>(bytes, shared.tile(to.stage), pages, places);
      } else {
        widen_tile<T>(bytes, shared.tile(to.stage), pages, places);
      }
      fence_stores();
      __syncwarp();
      if (threadIdx.x % 32 == 0) {
        arrive(shared.full(to.stage));
        arrive(shared.copied_empty(from.stage));
      }
    }
  }

  /// Brings what the loader will ask for next into the L2 cache, where the weights of the layer
  /// before may have driven it out.
  __device__ static void prefetch_plan(const AttendParams& p) {
    const int lane = threadIdx.x % 32;
    const int workers = p.plan.header->workers;
    const int portions = p.plan.header->portions;
    const int segments = p.plan.header->segments;
    // The segments [from, to) of a portion of a worker's own, and a share of the tail's.
    const auto prefetch_segments = [&](int from, int to, int step) {
      constexpr int kLine = 128 / sizeof(int32_t);
#pragma unroll 1
      for (int s = from; s < to; s += step) {
        const Segment segment = p.plan.segments[s];
        if (segment.first_row < 0) prefetch(p.plan.row_index + segment.row_begin);
        const int32_t* table = p.table + segment.request * p.table_stride;
        const int last = (segment.first + segment.slots - 1) / p.block_size;
#pragma unroll 1
        for (int i = segment.first / p.block_size; i <= last; i += kLine) prefetch(table + i);
      }
    };
    const Cut begin = p.plan.cuts[blockIdx.x];
    const Cut end = p.plan.cuts[blockIdx.x + 1];
    if (static_cast<int>(blockIdx.x) < workers) {
      prefetch_segments(begin.segment + lane, min(end.segment + 1, segments), 32);
    }
    if (portions == workers) return;
    const int all = gridDim.x * 32;
    const int mine = blockIdx.x * 32 + lane;
    prefetch_segments(p.plan.cuts[workers].segment + mine, segments, all);
    for (int i = workers + mine; i < portions; i += all) {
      prefetch(p.plan.begins + i);
      prefetch(p.plan.cuts + i);
    }
  }

  /// The same for what merging will ask for first, each block a share.
  __device__ static void prefetch_merging(const AttendParams& p) {
    const int lists = p.plan.header->rows * p.q_heads;
    const int pieces = p.plan.header->pieces;
    const int mine = blockIdx.x * 32 + threadIdx.x % 32;
    const int all = gridDim.x * 32;
    constexpr int kListsLine = 128 / sizeof(PieceList);
    constexpr int kPiecesLine = 128 / sizeof(int32_t);
#pragma unroll 1
    for (int i = mine * kListsLine; i < lists; i += all * kListsLine) prefetch(p.plan.lists + i);
#pragma unroll 1
    for (int i = mine * kPiecesLine; i < pieces; i += all * kPiecesLine) {
      prefetch(p.plan.pieces + i);
    }
  }

  /// Where piece `piece` of 16 bytes of a query row lies.
  __device__ static char* query_place(char* to, int row, int piece) {
    return to + piece / 8 * (kGroupRows * 128) + row * 128 + (piece % 8 ^ row % 8) * 16;
  }

  /// Copies query rows [first, first + rows) of an item's tile; those of e4m3 fill the front of
  /// their places, for widen_queries(). One warp.
  __device__ static void copy_queries(const AttendParams& p, const Item& item, char* to, int first,
                                      int rows) {
    constexpr int kAtOnce = 32 / kChunks;
    const int lane = threadIdx.x % 32;
    const int chunk = lane % kChunks;
    const bool is_there = chunk * (byte_queries<kByteKv>(p) ? 16 : 8) < p.head_size;
    for (int begin = 0; begin < rows; begin += 32) {
      // Lane l looks up row l, as otherwise each copy would wait for a look-up of its own.
      uint32_t row = 0;  // in pieces of 16 bytes
      if (begin + lane < rows) {
        const RowHead at = row_head(p, item, first + begin + lane);
        row = static_cast<uint32_t>((at.row * p.q_row + at.head * p.q_head) / 16);
      }
      const int end = min(32, rows - begin);
#pragma unroll 4
      for (int of = 0; of < end; of += kAtOnce) {
        const int mine = of + lane / kChunks;
        const uint32_t from = __shfl_sync(~0u, row, mine);
        if (lane < kAtOnce * kChunks && mine < end) {
          copy_chunk(query_place(to, begin + mine, chunk),
                     p.q + (is_there ? int64_t{from} + chunk : 0) * 16, is_there ? 16 : 0);
        }
      }
    }
  }

  /// Awaits copied rows of e4m3 and widens each in its place. One warp.
  __device__ static void widen_queries(const AttendParams& p, char* to, int rows) {
    constexpr int kAtOnce = 32 / kChunks;
    constexpr int kReads = 4;
    const int lane = threadIdx.x % 32;
    const int chunk = lane % kChunks;
    const int live = lane < kAtOnce * kChunks ? rows : 0;
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncwarp();
#pragma unroll 1
    for (int begin = lane / kChunks; begin - lane / kChunks < rows; begin += kReads * kAtOnce) {
      uint2 narrow[kReads] = {};
#pragma unroll
      for (int i = 0; i < kReads; ++i) {
        const int row = begin + i * kAtOnce;
        if (row < live && chunk * 8 < p.head_size) {
          narrow[i] =
              *reinterpret_cast<const uint2*>(query_place(to, row, chunk / 2) + chunk % 2 * 8);
        }
      }
      __syncwarp();  // a row's lanes have read before any of them writes
#pragma unroll
      for (int i = 0; i < kReads; ++i) {
        const int row = begin + i * kAtOnce;
        if (row < live) {
          *reinterpret_cast<uint4*>(query_place(to, row, chunk)) = widen<T>(narrow[i]);
        }
      }
    }
  }

  /// Hands a warpgroup its items one after the other, with their queries. One warp does this for
  /// each.
  __device__ static void assign_items(const AttendParams& p, const Shared& shared, int group) {
    const int lane = threadIdx.x % 32;
    Halves at;
    Assignment next{};
    Portions portions(p, false);
    Walk walk;
    walk.begin(p, blockIdx.x, next.item);
    int turn = 0;
    [[maybe_unused]] uint32_t filled = 0;  // halves that have had an assignment
    do {
      const bool is_there = walk.next(p, next.item);
      if (is_there) {
        const bool one_group = next.item.rows <= kGroupRows;
        const bool is_mine = !one_group || turn == group;
        turn ^= one_group;
        if (!is_mine) {
          next.passed += 2 * (next.item.step_end - next.item.step_begin);
          continue;
        }
      } else {
        // The other warpgroup's tiles are to be passed before the next portion is there, as the
        // loaders, who need their places, are those who take it.
        if (next.passed == 0) {
          const int32_t portion = portions.next(p, shared);
          next.is_last = portion < 0;
          if (!next.is_last) {
            walk.begin(p, portion, next.item);
            continue;
          }
        }
        next.item.rows = 0;
      }
      next.first = next.item.rows <= kGroupRows ? 0 : group * kGroupRows;
      const int rows = next.rows();
      Halves to = at;
      for (int taken = Halves::taken(rows); taken > 0; --taken, ++to.count) {
        wait(shared.queries_empty(group, to.half()), to.phase() ^ 1);
      }
      char* queries = shared.queries(group, at.begin(rows));
      copy_queries(p, next.item, queries, next.first, rows);
      if (byte_queries<kByteKv>(p)) widen_queries(p, queries, rows);
      if constexpr (kForRacecheck) {
        if ((filled >> at.half() & 1) != 0) await_read(group, at.half());
        filled |= 1u << at.half();
      }
      if (lane == 0) *shared.assignment(group, at.half()) = next;
      const bool is_first = at.count == 0;
      for (; at.count != to.count; ++at.count) {
        if (byte_queries<kByteKv>(p)) {
          arrive(shared.queries_full(group, at.half()));
        } else {
          arrive_when_copied(shared.queries_full(group, at.half()));
        }
        if (lane == 0) arrive(shared.queries_full(group, at.half()));
      }
      next.passed = 0;
      if (is_first) group == 0 ? prefetch_plan(p) : prefetch_merging(p);
    } while (!next.is_last);
    if constexpr (kForRacecheck) {
      // The last one has no reader that arrives, the one before has.
      if ((filled >> at.half() & 1) != 0) await_read(group, at.half());
    }
  }

  /// And the queries, each block a share, before K and V of all blocks queue up for memory. Of
  /// requests with one row each these are all; for others some.
  __device__ static void prefetch_queries(const AttendParams& p) {
    const int lines = p.requests * p.q_heads;
    for (int i = blockIdx.x * 32 + threadIdx.x % 32; i < lines; i += gridDim.x * 32) {
      const char* at = p.q + i / p.q_heads * p.q_row + i % p.q_heads * p.q_head;
      const int bytes = p.head_size * (byte_queries<kByteKv>(p) ? 1 : 2);
      for (int of = 0; of < bytes; of += 128) prefetch(at + of);
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

  /// How many slots of a step's tile are the segment's.
  __device__ static int slots_of(const Segment& segment, int step) {
    return min(kSlots, segment.slots - step * kSlots);
  }

  /// Awaits a step's V and zeros what may not be read into sums: of its first `read` slots those
  /// before `seen_from` and those behind the segment's end. Whether it has written.
  __device__ static bool await_values(const Shared& shared, const Segment& segment, const Ring& at,
                                      int step, int read) {
    constexpr int kChunks = kSpans * 8;
    const int end = slots_of(segment, step);
    const int begin = max(0, min(end, segment.seen_from - segment.first - step * kSlots));
    const int slots = begin + read - end;
    char* tile = shared.tile(at.stage);
    await_tile(shared, at);
#pragma unroll 1
    for (int i = threadIdx.x % kGroupThreads; i < slots * kChunks; i += kGroupThreads) {
      const int slot = i / kChunks + (i / kChunks < begin ? 0 : end - begin);
      const int span = i / 8 % kSpans;
      *reinterpret_cast<uint4*>(tile + slot / 8 * kEightSlots + span * kAtomBytes + slot % 8 * 128 +
                                i % 8 * 16) = {0, 0, 0, 0};
    }
    return slots > 0;
  }

  __device__ static void multiply_keys(float (&s)[kScoreBlocks][4], const Queries& q,
                                       const Tile& k) {
#pragma unroll
    for (int d = 0; d < kHead / 16; ++d) {
      wgmma_shared<T, kScoreBlocks>(s, q.descriptor(d / 4 * (kGroupRows * 128) + d % 4 * 32),
                                    k.descriptor(d / 4 * kAtomBytes + d % 4 * 32), d > 0);
    }
    wgmma_commit();
  }

  __device__ static void multiply_values(State& state, const uint32_t (&weights)[kSlots / 16][4],
                                         const Tile& v) {
    // ptxas refuses an instruction of more registers than a thread is launched with.
    constexpr int kBlocks = kByteKv && kOutBlocks == 32 ? 16 : kOutBlocks;
#pragma unroll
    for (int n = 0; n < kSlots / 16; ++n) {
#pragma unroll
      for (int block = 0; block < kOutBlocks; block += kBlocks) {
        wgmma_registers<Value, kBlocks>(
            reinterpret_cast<float(&)[kBlocks][4]>(state.out[block]), weights[n],
            v.descriptor(n * 2 * kEightSlots + block * 8 / kSpan * kAtomBytes), true);
      }
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
        weights[n][i] = Pair<Value>::pack(block[i % 2 * 2], block[i % 2 * 2 + 1]);
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

  /// Tells the loading warp that this warp has done with an item's queries.
  __device__ static void release_queries(const Shared& shared, int group, int rows,
                                         Halves& queries) {
    for (int taken = Halves::taken(rows); taken > 0; --taken, ++queries.count) {
      if (threadIdx.x % 32 == 0) arrive(shared.queries_empty(group, queries.half()));
    }
  }

  /// Where every row sees everything, nothing of a row matters.
  __device__ static bool sees_all(const AttendParams& p, const Segment& segment) {
    return segment.visible_from <= segment.first &&
           segment.visible_to >= segment.first + segment.slots && p.slopes == nullptr;
  }

  /// `ring`: where the item's tiles begin; `queries`: where its queries lie.
  __device__ static void attend_item(const AttendParams& p, const Assignment& assigned,
                                     const Logits& logits, const Shared& shared, int group,
                                     Halves& queries, Ring& ring) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x % kGroupThreads / 32;
    const Item& item = assigned.item;
    const int live = assigned.rows();
    const bool busy = warp * 16 < live;  // has this warp rows that count?
    const Segment& segment = item.segment;
    const uint32_t q_address = shared_address(shared.queries(group, queries.begin(live)));
    const bool alike = sees_all(p, segment);
    RowInfo rows[2] = {{0, 0, 0, INT_MAX}, {0, 0, 0, INT_MAX}};
    float slopes[2] = {0.0f, 0.0f};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int m = warp * 16 + lane / 4 + 8 * h;
      if (!alike && m < live) {
        const RowHead at = row_head(p, item, assigned.first + m);
        rows[h] = p.plan.rows[at.row];
        if (p.slopes != nullptr) slopes[h] = p.slopes[at.head];
      }
    }

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

    const auto prepare_values = [&](const Ring& at, int step) {
      if (await_values(shared, segment, at, step, kSlots)) {
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
      const Queries q(q_address, 16);
      const Tile k(shared_address(shared.tile(keys.stage)), 16);
      await_tile(shared, keys);
      wgmma_fence();
      multiply_keys(scores, q, k);
      if (later) {
        const Tile v(shared_address(shared.tile(values.stage)), kAtomBytes);
        prepare_values(values, step - 1);
        wgmma_fence();
        multiply_values(state, weights, v);
        wgmma_wait<1>();
      } else {
        wgmma_wait<0>();
      }
      release(shared, keys);
      if (step + 1 == item.step_end) release_queries(shared, group, live, queries);
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
    const Tile v(shared_address(shared.tile(values.stage)), kAtomBytes);
    prepare_values(values, step - 1);
    wgmma_fence();
    multiply_values(state, weights, v);
    wgmma_wait<0>();
    release(shared, values);
    ring = keys;
    store(p, item, state, assigned.first);
  }

  // --- Few rows ---

  struct FewState {
    float max[2];          // of the rows 2 (l % 4) and the next
    float sum[2];          // of this thread's slots
    float out[kSpans][4];  // [head size / 64], transposed
  };

  /// K Q^T: slots x rows.
  __device__ static void multiply_few_keys(float (&s)[kSlots / 64][4], const Queries& q,
                                           const Tile& k) {
#pragma unroll
    for (int d = 0; d < kHead / 16; ++d) {
#pragma unroll
      for (int n = 0; n < kSlots / 64; ++n) {
        wgmma_few<T, false>(s[n],
                            k.descriptor(d / 4 * kAtomBytes + n * 8 * kEightSlots + d % 4 * 32),
                            q.descriptor(d / 4 * (kGroupRows * 128) + d % 4 * 32), d > 0);
      }
    }
    wgmma_commit();
  }

  /// V^T P^T: head size x rows, of the tile's first slots.
  template <int kRead>
  __device__ static void multiply_few_values(FewState& state, const Queries& weights,
                                             const Tile& v) {
    wgmma_fence();
#pragma unroll
    for (int n = 0; n < kRead / 16; ++n) {
#pragma unroll
      for (int span = 0; span < kSpans; ++span) {
        wgmma_few<Value, true>(state.out[span],
                               v.descriptor(span * kAtomBytes + n * 2 * kEightSlots),
                               weights.descriptor(n / 4 * (kFewRows * 128) + n % 4 * 32), true);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
  }

  /// Scores to weights, in place.
  __device__ static void soften_few(const Item& item, const Logits& logits, int step,
                                    const RowInfo (&rows)[2], const float (&slopes)[2],
                                    Reduction& maxima, float (&s)[kSlots / 64][4],
                                    FewState& state) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x % kGroupThreads / 32;
    const Segment& segment = item.segment;
    const int column = segment.first + step * kSlots + warp * 16 + lane / 4;
    const int end = segment.first + segment.slots;
    float top[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int n = 0; n < kSlots / 64; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = column + n * 64 + i / 2 * 8;
        const int j = i % 2;
        float x = s[n][i];
        x = !kPlain && logits.softcap > 0.0f ? logits.capped(x) : x * logits.scale;
        if constexpr (!kPlain) x += slopes[j] * static_cast<float>(c - rows[j].position) * kLog2E;
        if (c < rows[j].lo || c >= min(rows[j].hi, end)) x = -INFINITY;
        s[n][i] = x;
        top[j] = fmaxf(top[j], x);
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int d = 4; d < 32; d *= 2) top[j] = fmaxf(top[j], __shfl_xor_sync(~0u, top[j], d));
    }
    if (lane < 4) *reinterpret_cast<float2*>(&maxima[warp][2 * lane]) = {top[0], top[1]};
    sync_group(threadIdx.x / kGroupThreads - 1);
#pragma unroll
    for (int w = 0; w < kGroupThreads / 32; ++w) {
      const auto of_warp = *reinterpret_cast<const float2*>(&maxima[w][lane % 4 * 2]);
      top[0] = fmaxf(top[0], of_warp.x);
      top[1] = fmaxf(top[1], of_warp.y);
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      top[j] = fmaxf(top[j], state.max[j]);
      const float base = top[j] == -INFINITY ? 0.0f : top[j];
      const float keep = exp2_fast(state.max[j] - base);
      state.max[j] = top[j];
      state.sum[j] *= keep;
#pragma unroll
      for (int span = 0; span < kSpans; ++span) {
        state.out[span][j] *= keep;
        state.out[span][2 + j] *= keep;
      }
#pragma unroll
      for (int n = 0; n < kSlots / 64; ++n) {
#pragma unroll
        for (int i = j; i < 4; i += 2) {
          s[n][i] = exp2_fast(s[n][i] - base);
          state.sum[j] += s[n][i];
        }
      }
    }
  }

  /// Weights to shared memory, for the product with V.
  __device__ static void store_weights(char* to, const float (&s)[kSlots / 64][4]) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x % kGroupThreads / 32;
    uint32_t packed[kSlots / 32];
#pragma unroll
    for (int n = 0; n < kSlots / 64; ++n) {
      packed[2 * n] = Pair<Value>::pack(s[n][0], s[n][1]);
      packed[2 * n + 1] = Pair<Value>::pack(s[n][2], s[n][3]);
    }
    const int row = lane % 8;
    const int block = lane / 8 % (kSlots / 32);
    const int chunk = warp * 2 + block % 2;
    store_transposed(
        shared_address(to) + block / 2 * (kFewRows * 128) + row * 128 + (chunk ^ row) * 16, packed);
  }

  __device__ static void store_few(const AttendParams& p, const Item& item, const Shared& shared,
                                   int group, const FewState& state) {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x % kGroupThreads / 32;
    Reduction& sums = shared.sums(group);
    float sum[2] = {state.sum[0], state.sum[1]};
#pragma unroll
    for (int j = 0; j < 2; ++j) {
#pragma unroll
      for (int d = 4; d < 32; d *= 2) sum[j] += __shfl_xor_sync(~0u, sum[j], d);
    }
    if (lane < 4) *reinterpret_cast<float2*>(&sums[warp][2 * lane]) = {sum[0], sum[1]};
    sync_group(group);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int m = lane % 4 * 2 + j;
      if (m >= item.rows) continue;
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kGroupThreads / 32; ++w) total += sums[w][m];
      const bool writes = warp == 0 && lane < 4;
      const int d = warp * 16 + lane / 4;  // and 8 and 64 further
      if (item.partial < 0) {
        const RowHead at = row_head(p, item, m);
        const float factor = finish_row(p, at.row, at.head, state.max[j], total, writes);
        auto* to = reinterpret_cast<T*>(p.out + at.row * p.out_row + at.head * p.out_head) + d;
#pragma unroll
        for (int n = 0; n < 2 * kSpans; ++n) {
          if (d + n / 2 * 64 + n % 2 * 8 < p.head_size) {
            to[n / 2 * 64 + n % 2 * 8] = Pair<T>::one(state.out[n / 2][n % 2 * 2 + j] * factor);
          }
        }
      } else {
        const int64_t row = item.partial + m;
        if (writes) p.partial_state[row] = {state.max[j], total};
        float* to = p.partial_out + row * p.head_size + d;
#pragma unroll
        for (int n = 0; n < 2 * kSpans; ++n) {
          if (d + n / 2 * 64 + n % 2 * 8 < p.head_size) {
            to[n / 2 * 64 + n % 2 * 8] = state.out[n / 2][n % 2 * 2 + j];
          }
        }
      }
    }
  }

  __device__ static void attend_few(const AttendParams& p, const Assignment& assigned,
                                    const Logits& logits, const Shared& shared, int group,
                                    Halves& queries, Ring& ring) {
    const int lane = threadIdx.x % 32;
    const Item& item = assigned.item;
    const uint32_t q_address = shared_address(shared.queries(group, queries.half()));
    char* weights = shared.weights(group, queries.half());
    RowInfo rows[2];
    float slopes[2] = {0.0f, 0.0f};
    FewState state;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      rows[j] = {0, 0, 0, INT_MAX};
      if (!sees_all(p, item.segment) && lane % 4 * 2 + j < item.rows) {
        const RowHead at = row_head(p, item, lane % 4 * 2 + j);
        rows[j] = p.plan.rows[at.row];
        if (p.slopes != nullptr) slopes[j] = p.slopes[at.head];
      }
      state.max[j] = -INFINITY;
      state.sum[j] = 0.0f;
    }
#pragma unroll
    for (int span = 0; span < kSpans; ++span) {
      state.out[span][0] = state.out[span][1] = state.out[span][2] = state.out[span][3] = 0.0f;
    }
#pragma unroll 1
    for (int step = item.step_begin; step < item.step_end; ++step) {
      const Ring values = ring.ahead(1);
      float s[kSlots / 64][4];
      {
        const Queries q(q_address, 16);
        const Tile k(shared_address(shared.tile(ring.stage)), 16);
        await_tile(shared, ring);
        wgmma_fence();
        multiply_few_keys(s, q, k);
        wgmma_wait<0>();
      }
      release(shared, ring);
      soften_few(item, logits, step, rows, slopes, shared.maxima(group), s, state);
      store_weights(weights, s);
      const bool is_short = slots_of(item.segment, step) <= kShortSlots;
      await_values(shared, item.segment, values, step, is_short ? kShortSlots : kSlots);
      fence_stores();
      sync_group(group);
      const Queries w(shared_address(weights), 16);
      const Tile v(shared_address(shared.tile(values.stage)), kAtomBytes);
      if (is_short) {
        multiply_few_values<kShortSlots>(state, w, v);
      } else {
        multiply_few_values<kSlots>(state, w, v);
      }
      release(shared, values);
      ring.advance(2);
    }
    release_queries(shared, group, item.rows, queries);
    store_few(p, item, shared, group, state);
  }

  __device__ static void compute_items(const AttendParams& p, const Shared& shared, int group) {
    const Logits logits(p);
    Ring ring;
    Halves queries;
    bool is_last = false;
    while (!is_last) {
      wait(shared.queries_full(group, queries.half()), queries.phase());
      fence_stores();  // the queries were not copied by TMA
      const Assignment assigned = *shared.assignment(group, queries.half());
      __syncwarp();  // all lanes have read it before one of them says so
      is_last = assigned.is_last;
      if (kForRacecheck && !is_last) arrive_read(group, queries.half());
      pass(shared, ring, assigned.passed);
      const int rows = assigned.item.rows;
      if (rows > kFewRows) {
        attend_item(p, assigned, logits, shared, group, queries, ring);
      } else if (rows > 0) {
        attend_few(p, assigned, logits, shared, group, queries, ring);
      } else if (!is_last) {
        release_queries(shared, group, 0, queries);
      }
    }
  }
};

template <typename T, int kHead, bool kPlain, bool kByteKv>
__global__ void __launch_bounds__(Kernel<T, kHead, kPlain, kByteKv>::kThreads, 1)
    attend(const __grid_constant__ AttendParams p, const __grid_constant__ Maps maps) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using K = Kernel<T, kHead, kPlain, kByteKv>;
  constexpr int kWarps = kGroupThreads / 32;  // of a warpgroup
  extern __shared__ char memory[];
  typename K::Shared shared;
  shared.base = memory + (1024 - shared_address(memory) % 1024) % 1024;
  shared.address = shared_address(shared.base);
  if (threadIdx.x == 0) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&maps.k));
    asm volatile("prefetch.tensormap [%0];" ::"l"(&maps.v));
    for (int i = 0; i < K::kStages; ++i) {
      init_barrier(shared.full(i), kByteKv ? kWarps : 2);  // those that widen, or the loading warps
      init_barrier(shared.empty(i), 2 * kWarps);
    }
    for (int i = 0; i < K::kByteStages; ++i) {
      init_barrier(shared.copied_full(i), 2);
      init_barrier(shared.copied_empty(i), kWarps);
    }
    for (int i = 0; i < K::kPortionsAhead; ++i) {
      init_barrier(shared.portion_full(i), 1);
      init_barrier(shared.portion_empty(i), 3 * 32);
    }
    init_barrier(shared.rehearsed(), 2);
    for (int i = 0; i < 4; ++i) {
      init_barrier(shared.queries_full(i / 2, i % 2), 32 + 1);  // copies, and the assignment
      init_barrier(shared.queries_empty(i / 2, i % 2), kWarps);
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
    } else {
      K::assign_items(p, shared, warp - 2);
    }
    return;
  }
  if constexpr (kByteKv) {
    if (threadIdx.x >= 3 * kGroupThreads) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(K::kWideningRegisters));
      K::widen_tiles(shared);
      return;
    }
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(K::kComputeRegisters));
  if (threadIdx.x / 32 == kWarps) K::prefetch_queries(p);
  K::compute_items(p, shared, threadIdx.x / kGroupThreads - 1);
#endif
}

template <typename T, int kHead, bool kByteKv>
cudaError_t launch_one(const AttendParams& p, const Maps& maps, cudaStream_t stream) {
  const bool plain = p.softcap == 0.0f && p.slopes == nullptr;
  const auto kernel = plain ? attend<T, kHead, true, kByteKv> : attend<T, kHead, false, kByteKv>;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  if (error != cudaSuccess) return error;
  return launch(kernel, p.workers, Kernel<T, kHead, true, kByteKv>::kThreads, kSharedBytes, stream,
                p, maps);
}

template <typename T, bool kByteKv>
cudaError_t launch_type(const AttendParams& p, const Maps& maps, cudaStream_t stream) {
  if (p.head_size <= 64) return launch_one<T, 64, kByteKv>(p, maps, stream);
  if (p.head_size <= 128) return launch_one<T, 128, kByteKv>(p, maps, stream);
  if (p.head_size <= 192) return launch_one<T, 192, kByteKv>(p, maps, stream);
  return launch_one<T, 256, kByteKv>(p, maps, stream);
}

}  // namespace relay::cuda::wgmma
