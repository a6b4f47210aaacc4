// Launches the wgmma kernels: describes K and V to TMA, chooses by type.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

/// False where TMA cannot describe it. Strides need not ascend with the dimensions.
bool describe(CUtensorMap& map, wgmma::Units& units, const AttendParams& p, DType type,
              const Plane& plane, bool by_atoms) {
  const auto n = [](int64_t v) { return static_cast<cuuint64_t>(v); };
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
  const cuuint64_t spans = by_atoms ? 1 : n(p.head_size / wgmma::kSpan);
  const cuuint64_t sizes[5] = {by_atoms ? n(p.head_size) : wgmma::kSpan, 8, spans, 2, n(last + 1)};
  const cuuint64_t strides[4] = {n(plane.slot), wgmma::kSpan * 2, n(plane.slot * 8), n(unit)};
  const cuuint32_t box[5] = {wgmma::kSpan, 8, static_cast<cuuint32_t>(spans), by_atoms ? 1u : 2u,
                             1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  return encode_tiled()(&map,
                        type == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                        5, const_cast<char*>(plane.data), sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

PathShape wgmma_shape(int32_t head_size) {
  PathShape shape{wgmma::kTileRows, wgmma::tile_slots(head_size), 1, 5, {}};
  // In units of 1/32 of reading a step's KV where all multiprocessors read: some 90 ns.
  shape.costs = {.step_memory = 32,
                 .step_8 = 6,
                 .step_64 = 16,
                 .step_128 = 21,
                 .job = 8,
                 .rows = 4,
                 .worker = 64,
                 .portion = 32,
                 .tail = 288,
                 .snap = 2};
  return shape;
}

cudaError_t launch_wgmma(const AttendParams& p, DType type, cudaStream_t stream) {
  if (encode_tiled() == nullptr) return cudaErrorNotSupported;
  wgmma::Maps maps{};
  const bool by_atoms = p.head_size % wgmma::kSpan != 0;
  maps.by_atoms = by_atoms ? 1 : 0;
  if (!describe(maps.k, maps.k_units, p, type, {p.k, p.k_block, p.k_slot, p.k_head}, by_atoms) ||
      !describe(maps.v, maps.v_units, p, type, {p.v, p.v_block, p.v_slot, p.v_head}, by_atoms)) {
    return cudaErrorInvalidValue;
  }
  maps.block_pages = p.block_size / wgmma::kPageSlots;
  if (maps.block_pages > 1) {
    maps.reciprocal = static_cast<uint32_t>(((uint64_t{1} << 32) - 1) / maps.block_pages + 1);
  }
  return type == DType::kBF16 ? wgmma::launch_type<__nv_bfloat16>(p, maps, stream)
                              : wgmma::launch_type<__half>(p, maps, stream);
}

}  // namespace relay::cuda
