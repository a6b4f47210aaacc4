#include "measure/explain.h"

#include "cpu/plan/cost_model.h"
#include "cpu/plan/schedule.h"

namespace relay::measure {
namespace {

StepCost cost_of(const ExplainProblem& problem, const Roofline& roofline, bool bf16,
                 Sharing sharing) {
  const OpProblem& op = problem.op;
  const PlanOptions options = {
      .shape = op.shape, .k_type = op.kv_type, .v_type = op.kv_type, .threads = problem.threads};
  Forest forest;
  build_batch(op, sharing, forest);
  // Planned as an engine would, priced as measured.
  const PlanPtr plan = make_plan(forest, options);
  const Schedule schedule = simulate(*plan, measured_costs(options, roofline.read_bytes));
  const PlanSummary summary = summarize(*plan);
  const double layers = problem.layers;
  StepCost cost;
  cost.slots_read = static_cast<double>(summary.kv_slots_read);
  cost.bytes_read = layers * cost.slots_read * static_cast<double>(slot_bytes(op));
  cost.flops = layers * summary.flops;
  cost.read_floor = cost.bytes_read / roofline.read_bytes;
  cost.arithmetic_floor = roofline.time_floor(cost.flops, 0, bf16);
  cost.predicted = layers * schedule.seconds;
  cost.idle_share = schedule.idle_share();
  return cost;
}

}  // namespace

void check_layers(const ExplainProblem& problem) {
  if (problem.layers < 1) throw Error("explain: needs at least one layer");
}

KvStored kv_stored(const ExplainProblem& problem) {
  const OpProblem& op = problem.op;
  const double batch = op.batch;
  const auto prefix = static_cast<double>(op.prefix);
  const auto context = static_cast<double>(op.context);
  const double bytes_of_slot = problem.layers * static_cast<double>(slot_bytes(op));
  return {.shared = (prefix + batch * context) * bytes_of_slot,
          .apart = batch * (prefix + context) * bytes_of_slot};
}

std::optional<double> StepCost::error() const {
  if (!measured) return std::nullopt;
  return (predicted - *measured) / *measured;
}

std::optional<double> Explanation::measured_speedup() const {
  if (!on.measured || !off.measured) return std::nullopt;
  return *off.measured / *on.measured;
}

Roofline scaled_to(const Roofline& roofline, int32_t threads) {
  Roofline scaled = roofline;
  const double factor = static_cast<double>(threads) / roofline.threads;
  scaled.threads = threads;
  scaled.f32_flops *= factor;
  scaled.bf16_flops *= factor;
  if (factor < 1) scaled.read_bytes *= factor;
  return scaled;
}

Explanation explain(const ExplainProblem& problem, const Roofline& roofline) {
  const OpProblem& op = problem.op;
  check(op);
  check_layers(problem);
  if (problem.threads < 1) throw Error("explain: needs at least one thread");
  Explanation e;
  e.problem = problem;
  e.roofline = roofline;
  e.isa = current_isa();
  e.stored = kv_stored(problem);
  e.formula = relay_speedup(op);
  const bool bf16 = uses_bf16(op, e.isa);
  e.on = cost_of(problem, roofline, bf16, Sharing::kOn);
  e.off = cost_of(problem, roofline, bf16, Sharing::kOff);
  return e;
}

void measure(Explanation& e, ThreadPool& pool, int rounds) {
  const OpResult result = run_op(e.problem.op, pool, rounds);
  e.on.measured = e.problem.layers * result.on.time.median;
  e.off.measured = e.problem.layers * result.off.time.median;
}

}  // namespace relay::measure
