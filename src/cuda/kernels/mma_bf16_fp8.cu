#include "cuda/kernels/mma.cuh"

namespace relay::cuda::mma {

template cudaError_t launch_type<__nv_bfloat16, true>(const AttendParams& params,
                                                      cudaStream_t stream);

}  // namespace relay::cuda::mma
