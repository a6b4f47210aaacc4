#include "measure/cuda/memory_kernels.h"

namespace relay::measure {
namespace {

constexpr int kThreads = 512;
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kLoads = 8;  // in flight for each thread

__global__ void __launch_bounds__(kThreads) read(const uint4* data, size_t count, uint32_t* sink) {
  uint32_t seen = 0;
  const size_t step = size_t{kThreads} * kLoads;
  for (size_t begin = blockIdx.x * step; begin < count; begin += gridDim.x * step) {
    uint4 words[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const size_t at = begin + size_t{kThreads} * i + threadIdx.x;
      words[i] = at < count ? data[at] : uint4{};
    }
#pragma unroll
    for (const uint4& word : words) seen ^= word.x ^ word.y ^ word.z ^ word.w;
  }
  // Hardly ever: each thread writes only if all that it has read comes to this very word.
  if (seen == 0x52454c41) *sink = seen;
}

/// The finaliser of splitmix64: every bit of the result depends on every bit of `x`.
__device__ uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

__global__ void fill(uint64_t* words, size_t count, RandomBits bits, uint64_t seed) {
  const size_t step = size_t{gridDim.x} * blockDim.x;
  for (size_t i = size_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step) {
    words[i] = bits.of(mix(mix(seed) + (i + 1) * 0x9e3779b97f4a7c15));
  }
}

}  // namespace

cudaError_t launch_read(const void* data, size_t bytes, uint32_t* sink, int multiprocessors,
                        cudaStream_t stream) {
  read<<<multiprocessors * kBlocksPerMultiprocessor, kThreads, 0, stream>>>(
      static_cast<const uint4*>(data), bytes / sizeof(uint4), sink);
  return cudaGetLastError();
}

cudaError_t launch_fill(void* data, size_t bytes, RandomBits bits, uint64_t seed,
                        cudaStream_t stream) {
  fill<<<1024, 256, 0, stream>>>(static_cast<uint64_t*>(data), bytes / sizeof(uint64_t), bits,
                                 seed);
  return cudaGetLastError();
}

}  // namespace relay::measure
