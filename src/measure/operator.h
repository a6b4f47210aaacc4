// Measures the operator as an engine would run it: a batch of decode rows over one shared prefix,
// each with a context of its own; planned once, then run layer after layer on threads that stay.
//
// Every "layer" has KV of its own, together several times the last-level cache, so that KV comes
// from memory as it does in a model. Sharing on and off alternate round by round.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/kernels/kernels.h"
#include "measure/problem.h"
#include "measure/roofline.h"
#include "measure/thread_pool.h"
#include "measure/timing.h"
#include "relay/attention.h"
#include "relay/forest.h"

namespace relay::measure {

/// Throws Error for a problem that no plan can be made for.
void check(const OpProblem& problem);
/// Whether kernel set `isa` multiplies it by instructions for bf16: which of the peaks counts.
inline bool uses_bf16(const OpProblem& problem, const std::string& isa) {
  return kernels::product_layout(isa, problem.kv_type, problem.kv_type) !=
         kernels::QueryLayout::kF32;
}
/// The batch as a prefix tree: slots [0, prefix) shared, then the contexts one after the other.
void build_batch(const OpProblem& problem, Sharing sharing, Forest& forest);

/// One way of running a problem, sharing on or off.
struct OpMeasurement {
  Timing time;
  double build_seconds = 0;  ///< finding the sharing, median
  double plan_seconds = 0;   ///< planning, median
  double flops = 0;
  double bytes_read = 0;  ///< of KV, by the plan
  double idle_share = 0;  ///< of the threads' time, until the last has finished: median of layers
  double predicted_idle_share = 0;  ///< the same, by the plan's cost model
  double predicted_seconds = 0;     ///< by the cost model; 0 where no bandwidth was given
  PlanSummary plan;
};

struct OpResult {
  OpProblem problem;
  int layers = 0;  ///< copies of the KV
  int rounds = 0;
  double ideal_bytes = 0;  ///< each KV slot once
  OpMeasurement on;
  OpMeasurement off;
  double predicted = 0;   ///< the paper's b(s+c)/(s+bc)
  double difference = 0;  ///< largest between the outputs of on and off, relative to their rms

  double speedup() const { return off.time.median / on.time.median; }
};

/// `read_bytes`: bytes per second that memory gives, for predictions; 0: none are made.
OpResult run_op(const OpProblem& problem, ThreadPool& pool, int rounds, double read_bytes = 0);

/// The measured machine and build, for reports.
struct OpReport {
  Roofline roofline;
  std::string isa;
  /// The system's load average before measuring: others at work spoil all numbers.
  double load = 0;
  std::vector<OpResult> results;
};

std::string to_table(const OpReport& report);
std::string to_json(const OpReport& report);

}  // namespace relay::measure
