// A GPU's plan as a table for people, and as JSON for machines.
#include <nlohmann/json.hpp>

#include "measure/cuda/explain.h"
#include "measure/cuda/plan_json.h"
#include "measure/format.h"
#include "measure/problem_json.h"
#include "measure/step_table.h"

namespace relay::measure {
namespace {

std::string counts(const char* name, int64_t on, int64_t off) {
  return step_line(name, std::to_string(on), std::to_string(off));
}

nlohmann::json json_of(const GpuStepCost& cost) {
  nlohmann::json json = {{"plan", plan_json(cost.plan)},
                         {"kv_bytes_read", cost.bytes_read},
                         {"partial_bytes", cost.partial_bytes},
                         {"read_seconds", cost.read_seconds}};
  if (cost.measured) json["measured_seconds"] = *cost.measured;
  return json;
}

}  // namespace

std::optional<double> GpuExplanation::measured_speedup() const {
  if (!on.measured || !off.measured) return std::nullopt;
  return *off.measured / *on.measured;
}

std::string to_table(const GpuExplanation& e) {
  std::string text = step_heading(e.problem);
  text += format("%s, kernels %s: read %.1f GB/s\n\n", e.limits.gpu.c_str(), e.path.c_str(),
                 e.limits.read_bytes * 1e-9);
  text += step_columns();
  text += step_line("KV stored", bytes(e.stored.shared), bytes(e.stored.apart),
                    e.stored.apart / e.stored.shared);
  text += step_line("KV read", bytes(e.on.bytes_read), bytes(e.off.bytes_read),
                    e.off.bytes_read / e.on.bytes_read);
  text += step_line("partial results moved", bytes(e.on.partial_bytes), bytes(e.off.partial_bytes));
  text += step_line("all from memory takes", duration(e.on.read_seconds),
                    duration(e.off.read_seconds), e.off.read_seconds / e.on.read_seconds);
  if (const std::optional<double> speedup = e.measured_speedup()) {
    text += step_line("measured", duration(*e.on.measured), duration(*e.off.measured), *speedup);
  }
  text += "\n  the plan, of every layer\n";
  text += counts("segments", e.on.plan.segments, e.off.plan.segments);
  text += counts("  of several requests", e.on.plan.shared_segments, e.off.plan.shared_segments);
  text += counts("slots attended", e.on.plan.kv_slots_attended, e.off.plan.kv_slots_attended);
  text += counts("slots read", e.on.plan.kv_slots_read, e.off.plan.kv_slots_read);
  text += counts("workers", e.on.plan.workers, e.off.plan.workers);
  text += counts("partial results", e.on.plan.partial_rows, e.off.plan.partial_rows);
  text += formula_line(e.formula);
  text +=
      "What several requests read at the same time comes in part from the L2 cache: without "
      "sharing\n"
      "it may take less than from memory.\n";
  if (e.problem.op.batch == 1) {
    text += "One request shares with nobody: both are planned alike.\n";
  } else if (e.on.plan.shared_segments == 0) {
    text += "Nothing is shared: what the requests have in common is too short to pay.\n";
  }
  return text;
}

std::string to_json(const GpuExplanation& e) {
  nlohmann::json json = json_of(e.problem.op);
  json.update({{"device", "cuda"},
               {"model", e.problem.name},
               {"layers", e.problem.layers},
               {"machine", json_of(e.limits)},
               {"kernels", e.path},
               {"kv_bytes_stored_shared", e.stored.shared},
               {"kv_bytes_stored_apart", e.stored.apart},
               {"sharing_on", json_of(e.on)},
               {"sharing_off", json_of(e.off)},
               {"formula_speedup", e.formula}});
  if (const std::optional<double> speedup = e.measured_speedup()) {
    json["measured_speedup"] = *speedup;
  }
  return json.dump(2);
}

}  // namespace relay::measure
