// Time on the GPU, from cold caches.
#pragma once

#include <functional>

#include "measure/cuda/operator.h"
#include "measure/cuda/runtime.h"

namespace relay::measure {

class GpuTimer {
 public:
  /// Measures the limits; throws Error where there is no GPU.
  GpuTimer();

  const DeviceStream& stream() const { return stream_; }
  const GpuLimits& limits() const { return limits_; }
  /// Seconds of what `enqueue` puts into the stream, with an L2 cache full of other data.
  double cold_seconds(const std::function<void()>& enqueue);

 private:
  void read(const DeviceBuffer& buffer);

  DeviceStream stream_;
  DeviceEvent start_;
  DeviceEvent end_;
  DeviceBuffer sink_;
  DeviceBuffer flush_;
  int multiprocessors_ = 0;
  GpuLimits limits_;
};

/// One problem; see run_op_on_gpu().
GpuOpResult run_op(const OpProblem& problem, GpuTimer& timer, int rounds);

}  // namespace relay::measure
