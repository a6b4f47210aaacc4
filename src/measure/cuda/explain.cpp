#include "measure/cuda/explain.h"

#include "measure/cuda/batch.h"
#include "measure/cuda/gpu.h"
#include "measure/cuda/timer.h"

namespace relay::measure {

GpuExplanation explain_on_gpu(const ExplainProblem& problem, int rounds) {
  const OpProblem& op = problem.op;
  check_layers(problem);
  require_gpu();
  const DeviceBatch batch(op);
  GpuTimer timer;
  GpuExplanation e;
  e.problem = problem;
  e.limits = timer.limits();
  e.stored = kv_stored(problem);
  e.stored.shared = problem.layers * static_cast<double>(batch.layout().slots) *
                    static_cast<double>(slot_bytes(op));
  e.formula = relay_speedup(op);
  const auto cost_of = [&](Sharing sharing) {
    const DeviceBatch::Plan plan = batch.make_plan(sharing, timer.stream());
    batch.plan(plan, timer.stream());
    e.path = cuda::path_of(*plan.plan);
    GpuStepCost cost;
    cost.plan = cuda::summarize(*plan.plan, timer.stream().get());
    cost.bytes_read = problem.layers * static_cast<double>(cost.plan.kv_slots_read) *
                      static_cast<double>(slot_bytes(op));
    // An output in f32, its maximum and its sum; written, and read by the merge.
    const double state_bytes = 4.0 * (op.shape.v_dim + 2);
    cost.partial_bytes =
        problem.layers * 2 * static_cast<double>(cost.plan.partial_rows) * state_bytes;
    cost.read_seconds = cost.bytes_read / e.limits.read_bytes;
    return cost;
  };
  e.on = cost_of(Sharing::kOn);
  e.off = cost_of(Sharing::kOff);
  if (rounds > 0) {
    const GpuOpResult result = run_op(op, timer, rounds);
    e.on.measured = problem.layers * result.on.time.median;
    e.off.measured = problem.layers * result.off.time.median;
  }
  return e;
}

}  // namespace relay::measure
