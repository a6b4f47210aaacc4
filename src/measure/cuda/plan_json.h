// A GPU and a plan as the reports name them.
#pragma once

#include <nlohmann/json.hpp>

#include "measure/cuda/operator.h"
#include "relay/cuda.h"

namespace relay::measure {

inline nlohmann::json json_of(const GpuLimits& limits) {
  return {{"gpu", limits.gpu},
          {"l2_bytes", limits.l2_bytes},
          {"read_bytes_per_second", limits.read_bytes},
          {"streamed_bytes", limits.stream_bytes},
          {"flushed_bytes", limits.flush_bytes}};
}

inline nlohmann::json plan_json(const cuda::PlanSummary& plan) {
  return {{"segments", plan.segments},
          {"shared_segments", plan.shared_segments},
          {"workers", plan.workers},
          {"kv_slots_read", plan.kv_slots_read},
          {"kv_slots_attended", plan.kv_slots_attended},
          {"partial_rows", plan.partial_rows},
          {"partial_capacity", plan.partial_capacity}};
}

}  // namespace relay::measure
