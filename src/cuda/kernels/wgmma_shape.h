// How the wgmma path cuts work, and its launcher per type; each type is compiled in a file of its
// own.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/kernels/params.h"

namespace relay::cuda::wgmma {

/// How far one block, KV head or page of a block is from the next.
struct Units {
  int32_t block;
  int32_t head;
  int32_t page;
};

/// Where K and V lie, for TMA, in dimensions (element of a span, row of eight, span, eight rows of
/// a page, unit). Units are as long as the largest stride that divides those of blocks, heads and
/// pages, so that one copy brings any page. Where the head size is no multiple of a span, the first
/// dimension has all of its elements, and a copy brings eight rows of a span. In e4m3 the
/// dimensions are (element, slot of a page, 1, 1, unit), and a copy brings a page.
struct Maps {
  CUtensorMap k;
  CUtensorMap v;
  Units k_units;
  Units v_units;
  int32_t by_atoms;
  int32_t block_pages;  ///< pages of a block
  uint32_t reciprocal;  ///< 2^32 / block_pages, rounded up; 0 for one

  /// The column of a request's block table in which its page lies. Exact for up to 2^20 pages and
  /// 2^12 pages a block.
  RELAY_HD int32_t column_of(int32_t page) const {
    if (reciprocal == 0) return page;
    return static_cast<int32_t>(uint64_t{static_cast<uint32_t>(page)} * reciprocal >> 32);
  }
};

inline constexpr int kTileRows = 128;
inline constexpr int kPageSlots = 16;  // slots of a page: the smallest block
inline constexpr int kSpan = 64;       // elements of a row of 128 bytes, the widest swizzle

/// Elements of a tile's row: the head size, or the next that there are kernels for.
constexpr int tile_head(int head_size) { return (head_size + kSpan - 1) / kSpan * kSpan; }
constexpr int tile_slots(int head_size) { return head_size > 128 ? 64 : 128; }
/// How many steps' KV a worker has room for, about.
constexpr int kept_steps(int head_size) { return head_size > 192 ? 2 : (head_size > 64 ? 3 : 6); }

/// kByteKv: KV in e4m3, else in T.
template <typename T, bool kByteKv>
cudaError_t launch_type(const AttendParams& params, const Maps& maps, cudaStream_t stream);

}  // namespace relay::cuda::wgmma
