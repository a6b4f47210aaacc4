// Chooses the mma kernels by type; each is compiled in a file of its own.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "cuda/kernels/kernels.h"

namespace relay::cuda {
namespace mma {

template <typename T, bool kByteKv>
cudaError_t launch_type(const AttendParams& params, cudaStream_t stream);

}  // namespace mma

PathShape mma_shape(int32_t head_size) {
  const bool wide = head_size > 128;
  PathShape shape{64, wide ? 32 : 64, wide ? 1 : 2, 0, {}};
  // In units of 1/32 of reading a step's KV: two blocks share a multiprocessor's tensor cores.
  shape.costs = {.step_memory = 32,
                 .step_8 = 24,
                 .step_64 = 24,
                 .step_128 = 32,
                 .latency = 24,
                 .depth = 2,
                 .job = 16,
                 .rows = 3,
                 .worker = 96,
                 .portion = 96,
                 .tail = 0,
                 .snap = 2};
  return shape;
}

cudaError_t launch_mma(const AttendParams& params, DType q_type, DType kv_type,
                       cudaStream_t stream) {
  const bool bytes = kv_type == DType::kF8E4M3;
  if (q_type == DType::kBF16) {
    return bytes ? mma::launch_type<__nv_bfloat16, true>(params, stream)
                 : mma::launch_type<__nv_bfloat16, false>(params, stream);
  }
  return bytes ? mma::launch_type<__half, true>(params, stream)
               : mma::launch_type<__half, false>(params, stream);
}

}  // namespace relay::cuda
