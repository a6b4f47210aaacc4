// The kernels, by name: each enqueues one layer's attention over the plan that lies in memory.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/kernels/params.h"
#include "relay/types.h"

namespace relay::cuda {

/// How a path cuts work, and how many thread blocks it keeps running.
struct PathShape {
  int32_t tile_rows;
  int32_t tile_slots;
  int32_t blocks_per_sm;
  int32_t tail_portions;  ///< for each of these, at most
  PlanCosts costs;
};

/// mma.sync and cp.async (compute capability 8.0).
PathShape mma_shape(int32_t head_size);
cudaError_t launch_mma(const AttendParams& params, DType q_type, DType kv_type,
                       cudaStream_t stream);

/// wgmma and TMA (compute capability 9.0). `read_rate`: bytes a nanosecond that each multiprocessor
/// gets from memory where all read; 0: unknown.
PathShape wgmma_shape(int32_t head_size, DType kv_type, double read_rate);
cudaError_t launch_wgmma(const AttendParams& params, DType q_type, DType kv_type,
                         cudaStream_t stream);

/// Merges the partial results of all rows that have more than one, and writes the rows that attend
/// nothing. `max_rows` is the most that the batch can have.
cudaError_t launch_merge(const AttendParams& params, DType q_type, int32_t max_rows,
                         int32_t multiprocessors, cudaStream_t stream);

}  // namespace relay::cuda
