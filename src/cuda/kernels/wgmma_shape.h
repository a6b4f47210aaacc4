// How the wgmma path cuts work, and its launcher per type; each type is compiled in a file of its
// own.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include "cuda/kernels/params.h"

namespace relay::cuda::wgmma {

/// Where K and V lie, for TMA: dimensions (element, head, slot in block, block), the middle two in
/// the order of their strides.
struct Maps {
  CUtensorMap k;
  CUtensorMap v;
  int32_t slots_first;
};

inline constexpr int kTileRows = 128;
inline constexpr int kPageSlots = 16;  // slots of one TMA copy: the smallest block
inline constexpr int kSpan = 64;       // elements of one: 128 bytes, the widest swizzle

constexpr int tile_slots(int head_size) { return head_size > 128 ? 64 : 128; }

template <typename T>
cudaError_t launch_type(const AttendParams& params, const Maps& maps, cudaStream_t stream);

}  // namespace relay::cuda::wgmma
