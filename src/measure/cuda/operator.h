// Measures the operator on the GPU, sharing on against off, as measure/operator.h does on the CPU.
// KV comes from memory: before each run the L2 cache is filled with other data. By reading: after
// writes, the timed kernels would wait for their way back to memory, which no layer of a model
// leaves behind.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "measure/problem.h"
#include "measure/timing.h"
#include "relay/cuda.h"

namespace relay::measure {

/// What this GPU can do at most, measured here and now.
struct GpuLimits {
  std::string gpu;  ///< "NVIDIA H100 80GB HBM3 (9.0, 132 SMs)"
  int64_t l2_bytes = 0;
  int64_t flush_bytes = 0;   ///< what is read before each run
  double read_bytes = 0;     ///< byte/s of a streaming read, median
  int64_t stream_bytes = 0;  ///< what was streamed for that
};

struct GpuMeasurement {
  Timing time;  ///< of one layer
  Timing plan_time;
  cuda::PlanSummary plan;
  double bytes_read = 0;  ///< of KV, by the plan
};

struct GpuOpResult {
  OpProblem problem;
  std::string path;  ///< the kernels, e.g. "wgmma"
  int rounds = 0;
  double ideal_bytes = 0;  ///< each KV slot once
  GpuMeasurement on;
  GpuMeasurement off;
  double difference = 0;  ///< largest between the outputs of on and off, relative to their rms

  double speedup() const { return off.time.median / on.time.median; }
};

struct GpuOpReport {
  GpuLimits limits;
  std::vector<GpuOpResult> results;
};

/// Runs all problems on the current GPU; `progress` is told what is being measured. Throws Error
/// for a problem that cannot be served, and where there is no GPU, as find_gpus() does.
GpuOpReport run_op_on_gpu(std::span<const OpProblem> problems, int rounds,
                          const std::function<void(const std::string&)>& progress);

std::string to_table(const GpuOpReport& report);
std::string to_json(const GpuOpReport& report);

}  // namespace relay::measure
