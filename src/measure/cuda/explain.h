// What a batch shares and how the GPU plans it, with sharing and without. The plan is made on the
// device, so it takes a GPU even where nothing is measured.
#pragma once

#include <optional>
#include <string>

#include "measure/cuda/operator.h"
#include "measure/explain.h"
#include "relay/cuda.h"

namespace relay::measure {

/// One decode step of all layers, sharing on or off.
struct GpuStepCost {
  cuda::PlanSummary plan;
  double bytes_read = 0;     ///< of KV, by the plan
  double partial_bytes = 0;  ///< of partial states, written once and read once
  /// Seconds of reading that, all from memory. What several requests read at the same time comes in
  /// part from the L2 cache, so that without sharing it may take less.
  double read_seconds = 0;
  std::optional<double> measured;  ///< seconds
};

struct GpuExplanation {
  ExplainProblem problem;
  GpuLimits limits;
  std::string path;  ///< the kernels, e.g. "wgmma"
  KvStored stored;
  double formula = 1;  ///< the paper's b (s + c) / (s + b c)
  GpuStepCost on;
  GpuStepCost off;

  std::optional<double> measured_speedup() const;
};

/// On the current GPU; runs the operator too if `rounds` is not 0. Throws as run_op_on_gpu() does.
GpuExplanation explain_on_gpu(const ExplainProblem& problem, int rounds);

std::string to_table(const GpuExplanation& explanation);
std::string to_json(const GpuExplanation& explanation);

}  // namespace relay::measure
