// A problem in GPU memory as vLLM lays it out: block tables over a paged cache whose blocks lie in
// no order, as in a cache that has been in use for a while. What the operator, its plan and the
// list of GPUs run.
#pragma once

#include "measure/cuda/block_layout.h"
#include "measure/cuda/runtime.h"
#include "measure/problem.h"
#include "relay/cuda.h"

namespace relay::measure {

/// Of queries and outputs: as KV, and bf16 for KV of 8 bits.
DType query_type(DType kv_type);
/// For exactly this problem.
cuda::PlanOptions plan_options(const OpProblem& problem, Sharing sharing);

/// The block tables, and plans for them.
class DeviceBatch {
 public:
  /// Throws Error for a batch that makes no sense.
  explicit DeviceBatch(const OpProblem& problem);

  const BlockLayout& layout() const { return layout_; }

  struct Plan {
    DeviceBuffer workspace;
    cuda::PlanPtr plan;
  };
  /// Throws Error for a problem that the GPU or the operator does not serve.
  Plan make_plan(Sharing sharing, const DeviceStream& stream) const;
  void plan(const Plan& plan, const DeviceStream& stream) const;

 private:
  OpProblem problem_;
  BlockLayout layout_;
  DeviceBuffer query_starts_;
  DeviceBuffer kv_lengths_;
  DeviceBuffer table_;
};

/// Queries and KV of random values, and outputs.
class DeviceOperands {
 public:
  DeviceOperands(const OpProblem& problem, const DeviceBatch& batch, const DeviceStream& stream);

  /// Of a batch that was planned with sharing on or off; each has outputs of its own.
  cuda::Inputs inputs(Sharing sharing) const;
  /// The largest difference between the two outputs, relative to their root of the mean square.
  double difference() const;

 private:
  OpProblem problem_;
  DeviceBuffer q_;
  DeviceBuffer kv_;
  DeviceBuffer out_on_;
  DeviceBuffer out_off_;
};

}  // namespace relay::measure
