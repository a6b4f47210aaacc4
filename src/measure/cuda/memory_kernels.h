// Reading and filling GPU memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "measure/kv_buffer.h"

namespace relay::measure {

/// Enqueues reading `bytes` (a multiple of 16) of `data` as fast as memory gives them. `sink` is
/// one word that the compiler has to believe in.
cudaError_t launch_read(const void* data, size_t bytes, uint32_t* sink, int multiprocessors,
                        cudaStream_t stream);

/// Enqueues filling `bytes` (a multiple of 8) of `data` with random values.
cudaError_t launch_fill(void* data, size_t bytes, RandomBits bits, uint64_t seed,
                        cudaStream_t stream);

}  // namespace relay::measure
