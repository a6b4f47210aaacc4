// Planning on the device: four small kernels, one after the other in a stream.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/plan/plan_data.h"
#include "cuda/plan/planner.h"

namespace relay::cuda {

/// Device memory that planning keeps from step to step or needs in between.
struct PlanMemory {
  unsigned long long* owners;  ///< [cache_blocks] who listed a block first, and in which step
  uint32_t* epoch;             ///< number of this step, from 1
  uint32_t* faults;            ///< [2] what was wrong with block ids: PlanFault, ~request
  int32_t* run_counts;         ///< [max_requests]
  Run* runs;                   ///< [max_requests][kMaxRuns]
  int32_t* taken;              ///< AttendParams::taken
  char* scratch;               ///< PlannerScratch, where it does not fit into shared memory
};

/// Enqueues them; `sharing` false leaves out the first two. Returns the first error.
cudaError_t launch_plan(const PlanShape& shape, const PlanBatch& batch, const PlanView& view,
                        const PlanMemory& memory, bool sharing, bool check, cudaStream_t stream);

}  // namespace relay::cuda
