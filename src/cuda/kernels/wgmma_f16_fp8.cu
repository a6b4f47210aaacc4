#include "cuda/kernels/wgmma.cuh"

namespace relay::cuda::wgmma {

template cudaError_t launch_type<__half, true>(const AttendParams& params, const Maps& maps,
                                               cudaStream_t stream);

}  // namespace relay::cuda::wgmma
