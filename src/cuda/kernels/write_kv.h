// Writing new tokens into a paged KV cache.
#pragma once

#include <cuda_runtime_api.h>

#include "relay/types.h"

namespace relay::cuda {

struct KvWriteParams {
  /// Strides in bytes, as in relay/cuda.h.
  struct Plane {
    char* data;
    int64_t block, slot, head;
  };
  const char* k;
  const char* v;
  int64_t k_row, k_head;
  int64_t v_row, v_head;
  Plane k_cache;
  Plane v_cache;
  const int64_t* slots;
  const float* k_scale;
  const float* v_scale;
  int32_t head_size;
  int32_t kv_heads;
  int32_t block_size;
  int32_t cache_blocks;
};

cudaError_t launch_write_kv(const KvWriteParams& params, DType q_type, DType kv_type,
                            int32_t tokens, cudaStream_t stream);

}  // namespace relay::cuda
