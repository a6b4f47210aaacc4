// An explanation as a table for people, and as JSON for machines.
#include <nlohmann/json.hpp>

#include "measure/explain.h"
#include "measure/format.h"
#include "measure/problem_json.h"
#include "measure/step_table.h"

namespace relay::measure {
namespace {

std::string percent(double share) { return format("%.1f %%", 100 * share); }

std::string signed_percent(double share) { return format("%+.0f %%", 100 * share); }

const char* bound(const StepCost& cost) {
  return cost.bound_by_reading() ? "reading" : "arithmetic";
}

nlohmann::json json_of(const StepCost& cost) {
  nlohmann::json json = {{"kv_slots_read_per_layer", cost.slots_read},
                         {"kv_bytes_read", cost.bytes_read},
                         {"flops", cost.flops},
                         {"read_floor_seconds", cost.read_floor},
                         {"arithmetic_floor_seconds", cost.arithmetic_floor},
                         {"bound_by", bound(cost)},
                         {"predicted_seconds", cost.predicted},
                         {"predicted_idle_share", cost.idle_share}};
  if (cost.measured) {
    json["measured_seconds"] = *cost.measured;
    json["prediction_error"] = *cost.error();
  }
  return json;
}

}  // namespace

std::string to_table(const Explanation& e) {
  const ExplainProblem& p = e.problem;
  const OpProblem& op = p.op;
  std::string text = step_heading(p);
  text += format("%s, %d threads, kernels %s: f32 %.0f GFLOP/s", cpu_model().c_str(), p.threads,
                 e.isa.c_str(), e.roofline.f32_flops * 1e-9);
  if (e.roofline.bf16_flops > 0) text += format(", bf16 %.0f", e.roofline.bf16_flops * 1e-9);
  text += format(", read %.1f GB/s\n\n", e.roofline.read_bytes * 1e-9);

  text += step_columns();
  text += step_line("KV stored", bytes(e.stored.shared), bytes(e.stored.apart),
                    e.stored.apart / e.stored.shared);
  text += step_line("KV read", bytes(e.on.bytes_read), bytes(e.off.bytes_read),
                    e.off.bytes_read / e.on.bytes_read);
  text += step_line("arithmetic", format("%.2f GFLOP", e.on.flops * 1e-9),
                    format("%.2f GFLOP", e.off.flops * 1e-9), e.off.flops / e.on.flops);
  text += step_line("reading takes at least", duration(e.on.read_floor), duration(e.off.read_floor),
                    e.off.read_floor / e.on.read_floor);
  text +=
      step_line("arithmetic at least", duration(e.on.arithmetic_floor),
                duration(e.off.arithmetic_floor), e.off.arithmetic_floor / e.on.arithmetic_floor);
  text += step_line("bound by", bound(e.on), bound(e.off));
  text += step_line("predicted", duration(e.on.predicted), duration(e.off.predicted),
                    e.predicted_speedup());
  text += step_line("threads idle", percent(e.on.idle_share), percent(e.off.idle_share));
  if (e.on.measured && e.off.measured) {
    text += step_line("measured", duration(*e.on.measured), duration(*e.off.measured),
                      *e.measured_speedup());
    text += step_line("prediction was off by", signed_percent(*e.on.error()),
                      signed_percent(*e.off.error()));
  }
  text += formula_line(e.formula);
  if (op.batch == 1) {
    text += "One request shares with nobody: both are planned alike.\n";
  } else if (!e.on.bound_by_reading() && e.off.bound_by_reading()) {
    text += "Shared, it is arithmetic that counts: the formula promises more than can be had.\n";
  } else if (!e.on.bound_by_reading()) {
    text += "Arithmetic counts more than reading here, with sharing and without.\n";
  }
  return text;
}

std::string to_json(const Explanation& e) {
  nlohmann::json json = json_of(e.problem.op);
  json.update({{"model", e.problem.name},
               {"layers", e.problem.layers},
               {"threads", e.problem.threads},
               {"cpu", cpu_model()},
               {"isa", e.isa},
               {"roofline",
                {{"f32_flops_per_second", e.roofline.f32_flops},
                 {"bf16_flops_per_second", e.roofline.bf16_flops},
                 {"read_bytes_per_second", e.roofline.read_bytes}}},
               {"kv_bytes_stored_shared", e.stored.shared},
               {"kv_bytes_stored_apart", e.stored.apart},
               {"sharing_on", json_of(e.on)},
               {"sharing_off", json_of(e.off)},
               {"formula_speedup", e.formula},
               {"predicted_speedup", e.predicted_speedup()}});
  if (const std::optional<double> speedup = e.measured_speedup()) {
    json["measured_speedup"] = *speedup;
  }
  return json.dump(2);
}

}  // namespace relay::measure
