// Launches the wgmma kernels: describes K and V to TMA, chooses by type.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

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

bool describe(CUtensorMap& map, const AttendParams& p, DType type, const char* data, int64_t block,
              int64_t slot, int64_t head, bool slots_first) {
  const auto n = [](int64_t v) { return static_cast<cuuint64_t>(v); };
  // The stride of a dimension of one element is never used, but checked.
  if (p.kv_heads == 1) head = slot;
  if (p.cache_blocks == 1) block = 16;
  const cuuint64_t inner = n(slots_first ? p.block_size : p.kv_heads);
  const cuuint64_t outer = n(slots_first ? p.kv_heads : p.block_size);
  const cuuint64_t sizes[4] = {n(p.head_size), inner, outer, n(p.cache_blocks)};
  const cuuint64_t strides[3] = {n(slots_first ? slot : head), n(slots_first ? head : slot),
                                 n(block)};
  const cuuint32_t page = wgmma::kPageSlots;
  const cuuint32_t box[4] = {wgmma::kSpan, slots_first ? page : 1, slots_first ? 1 : page, 1};
  const cuuint32_t steps[4] = {1, 1, 1, 1};
  return encode_tiled()(&map,
                        type == DType::kBF16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16
                                             : CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                        4, const_cast<char*>(data), sizes, strides, box, steps,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                        CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace

PathShape wgmma_shape(int32_t head_size) {
  PathShape shape{wgmma::kTileRows, wgmma::tile_slots(head_size), 1, {}};
  // In units of 1/32 of reading a step's KV where all multiprocessors read: some 90 ns.
  shape.costs = {.step_memory = 32,
                 .step_8 = 6,
                 .step_64 = 16,
                 .step_128 = 21,
                 .job = 8,
                 .rows = 4,
                 .worker = 64,
                 .snap = 2};
  return shape;
}

cudaError_t launch_wgmma(const AttendParams& p, DType type, cudaStream_t stream) {
  if (encode_tiled() == nullptr) return cudaErrorNotSupported;
  wgmma::Maps maps{};
  // K and V may differ in their strides, not in their order.
  const bool slots_first = p.k_slot < p.k_head;
  maps.slots_first = slots_first ? 1 : 0;
  if (!describe(maps.k, p, type, p.k, p.k_block, p.k_slot, p.k_head, slots_first) ||
      !describe(maps.v, p, type, p.v, p.v_block, p.v_slot, p.v_head, slots_first)) {
    return cudaErrorInvalidValue;
  }
  return type == DType::kBF16 ? wgmma::launch_type<__nv_bfloat16>(p, maps, stream)
                              : wgmma::launch_type<__half>(p, maps, stream);
}

}  // namespace relay::cuda
