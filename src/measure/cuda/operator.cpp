#include "measure/cuda/operator.h"

#include <utility>

#include "measure/cuda/batch.h"
#include "measure/cuda/gpu.h"
#include "measure/cuda/timer.h"
#include "measure/format.h"

namespace relay::measure {
namespace {

/// One way of running a problem, and what it took.
struct Way {
  Sharing sharing;
  DeviceBatch::Plan plan;
  std::vector<double> seconds;
  std::vector<double> plan_seconds;
};

GpuMeasurement measurement_of(const OpProblem& p, const Way& way, const DeviceStream& stream) {
  GpuMeasurement m;
  m.time = timing_of(way.seconds);
  m.plan_time = timing_of(way.plan_seconds);
  m.plan = cuda::summarize(*way.plan.plan, stream.get());
  m.bytes_read = static_cast<double>(m.plan.kv_slots_read) * static_cast<double>(slot_bytes(p));
  return m;
}

}  // namespace

GpuOpResult run_op(const OpProblem& p, GpuTimer& timer, int rounds) {
  if (rounds < 1) throw Error("bench op: needs at least one round");
  const DeviceStream& stream = timer.stream();
  const DeviceBatch batch(p);
  const auto make_way = [&](Sharing sharing) {
    return Way{.sharing = sharing,
               .plan = batch.make_plan(sharing, stream),
               .seconds = {},
               .plan_seconds = {}};
  };
  Way on = make_way(Sharing::kOn), off = make_way(Sharing::kOff);
  const DeviceOperands operands(p, batch, stream);
  const auto plan = [&](const Way& way) { batch.plan(way.plan, stream); };
  const auto attend = [&](const Way& way) {
    cuda::attend(*way.plan.plan, operands.inputs(way.sharing), stream.get());
  };
  for (const Way* way : {&on, &off}) {  // warm up: code, clocks
    plan(*way);
    attend(*way);
    stream.wait();
  }
  for (int round = 0; round < rounds; ++round) {
    // Take turns in going first.
    Way* order[2] = {&on, &off};
    if (round % 2 == 1) std::swap(order[0], order[1]);
    for (Way* way : order) {
      way->plan_seconds.push_back(timer.cold_seconds([&] { plan(*way); }));
      way->seconds.push_back(timer.cold_seconds([&] { attend(*way); }));
    }
  }

  GpuOpResult result;
  result.problem = p;
  result.path = cuda::path_of(*on.plan.plan);
  result.rounds = rounds;
  result.ideal_bytes =
      static_cast<double>(batch.layout().slots) * static_cast<double>(slot_bytes(p));
  result.on = measurement_of(p, on, stream);
  result.off = measurement_of(p, off, stream);
  result.difference = operands.difference();
  return result;
}

GpuOpReport run_op_on_gpu(std::span<const OpProblem> problems, int rounds,
                          const std::function<void(const std::string&)>& progress) {
  require_gpu();
  // All are looked at first, so that a wrong one costs no measurement.
  for (const OpProblem& p : problems) cuda::workspace_bytes(plan_options(p, Sharing::kOn));
  GpuOpReport report;
  progress("how fast memory is read");
  GpuTimer timer;
  report.limits = timer.limits();
  for (const OpProblem& p : problems) {
    progress(to_string(p));
    report.results.push_back(run_op(p, timer, rounds));
  }
  return report;
}

}  // namespace relay::measure
