// Launches the wgmma kernels: describes K and V to TMA, chooses by type.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

#include "cuda/kernels/kernels.h"
#include "cuda/kernels/wgmma_shape.h"

namespace relay::cuda {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

/// The driver's function, found at run time: nothing links the driver's library.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &result);
    return error == cudaSuccess && result == cudaDriverEntryPointSuccess
               ? reinterpret_cast<EncodeTiled>(found)
               : nullptr;
  }();
  return function;
}

struct Plane {
  const char* data;
  int64_t block, slot, head;  ///< strides in bytes
};

/// What TMA is to see of a page (`sizes`, and `strides` of all dimensions but the first), and how
/// much of it a copy brings.
struct PageMap {
  std::array<cuuint64_t, 4> sizes;
  std::array<cuuint64_t, 3> strides;
  std::array<cuuint32_t, 4> box;
};

PageMap page_map(const Plane& plane, int32_t head_size, DType type, bool by_atoms) {
  constexpr cuuint32_t kSpan = wgmma::kSpan;
  const auto slot = static_cast<cuuint64_t>(plane.slot);
  const auto head = static_cast<cuuint64_t>(head_size);
  if (type == DType::kF8E4M3) {
    // A row of the tile may be longer than the head: the rest is zeros.
    const auto row = static_cast<cuuint32_t>(wgmma::tile_head(head_size));
    return {{head, wgmma::kPageSlots, 1, 1}, {slot, slot, slot}, {row, wgmma::kPageSlots, 1, 1}};
  }
  const cuuint32_t spans = by_atoms ? 1 : static_cast<cuuint32_t>(head_size) / kSpan;
  return {{by_atoms ? head : kSpan, 8, spans, 2},
          {slot, kSpan * 2, slot * 8},
          {kSpan, 8, spans, by_atoms ? 1U : 2U}};
}

/// False where TMA cannot describe it. Strides need not ascend with the dimensions.
bool describe(CUtensorMap& map, wgmma::Units& units, const AttendParams& p, DType type,
              const Plane& plane, bool by_atoms) {
  const int64_t pages = p.block_size / wgmma::kPageSlots;
  const int64_t page = plane.slot * wgmma::kPageSlots;
  // The strides of what there is but one of do not matter.
  int64_t unit = 0;
  if (p.cache_blocks > 1) unit = std::gcd(unit, plane.block);
  if (p.kv_heads > 1) unit = std::gcd(unit, plane.head);
  if (pages > 1) unit = std::gcd(unit, page);
  if (unit == 0) unit = 16;
  const int64_t last =
      (plane.block * (p.cache_blocks - 1) + plane.head * (p.kv_heads - 1) + page * (pages - 1)) /
      unit;
  if (last > INT32_MAX) return false;
  units = {static_cast<int32_t>(plane.block / unit), static_cast<int32_t>(plane.head / unit),
           static_cast<int32_t>(page / unit)};
  const PageMap of_page = page_map(plane, p.head_size, type, by_atoms);
  const auto& [sizes, strides, box] = of_page;
  const cuuint64_t all_sizes[5] = {sizes[0], sizes[1], sizes[2], sizes[3],
                                   static_cast<cuuint64_t>(last + 1)};
  const cuuint64_t all_strides[4] = {strides[0], strides[1], strides[2],
                                     static_cast<cuuint64_t>(unit)};
  const cuuint32_t whole_box[5] = {box[0], box[1], box[2], box[3], 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  const bool is_byte = type == DType::kF8E4M3;
  return encode_tiled()(&map,
                        is_byte                ? CU_TENSOR_MAP_DATA_TYPE_UINT8
                        : type == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                               : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                        5, const_cast<char*>(plane.data), all_sizes, all_strides, whole_box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE,
                        is_byte ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <typename T>
cudaError_t launch_type(const AttendParams& p, const wgmma::Maps& maps, bool is_byte,
                        cudaStream_t stream) {
  return is_byte ? wgmma::launch_type<T, true>(p, maps, stream)
                 : wgmma::launch_type<T, false>(p, maps, stream);
}

}  // namespace

PathShape wgmma_shape(int32_t head_size, DType kv_type, double read_rate) {
  PathShape shape{wgmma::kTileRows, wgmma::tile_slots(head_size), 1, 5, {}};
  // In units of some 80 ns: 1/32 of reading a step's KV in bf16 on an H100, where all
  // multiprocessors read.
  constexpr double kReadRate = 25.4;
  const double reading = read_rate > 0 ? 32 * kReadRate / read_rate : 32;
  // Within what real cards have, whatever a driver says.
  const auto memory = static_cast<int32_t>(std::lround(std::clamp(reading, 8.0, 128.0)));
  shape.costs = {.step_memory = kv_type == DType::kF8E4M3 ? memory / 2 : memory,
                 .step_8 = 6,
                 .step_64 = 16,
                 .step_128 = 23,
                 .latency = 24,
                 .depth = wgmma::kept_steps(head_size),
                 .job = 8,
                 .rows = 8,
                 .worker = 2 * memory,
                 .portion = 32,
                 .tail = 288,
                 .snap = 2};
  return shape;
}

cudaError_t launch_wgmma(const AttendParams& p, DType q_type, DType kv_type, cudaStream_t stream) {
  if (encode_tiled() == nullptr) return cudaErrorNotSupported;
  wgmma::Maps maps{};
  const bool is_byte = kv_type == DType::kF8E4M3;
  const bool by_atoms = p.head_size % wgmma::kSpan != 0 && !is_byte;
  maps.by_atoms = by_atoms ? 1 : 0;
  const Plane k{p.k, p.k_block, p.k_slot, p.k_head};
  const Plane v{p.v, p.v_block, p.v_slot, p.v_head};
  if (!describe(maps.k, maps.k_units, p, kv_type, k, by_atoms) ||
      !describe(maps.v, maps.v_units, p, kv_type, v, by_atoms)) {
    return cudaErrorInvalidValue;
  }
  maps.block_pages = p.block_size / wgmma::kPageSlots;
  if (maps.block_pages > 1) {
    maps.reciprocal = static_cast<uint32_t>(((uint64_t{1} << 32) - 1) / maps.block_pages + 1);
  }
  return q_type == DType::kBF16 ? launch_type<__nv_bfloat16>(p, maps, is_byte, stream)
                                : launch_type<__half>(p, maps, is_byte, stream);
}

}  // namespace relay::cuda
