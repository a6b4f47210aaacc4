// What a decode step's attention costs with and without sharing, before anything is run: bytes and
// flops by counting, times by the planner's cost model on a machine whose rooflines were measured.
//
// For b requests of one row each over s shared slots and c of their own, per layer:
//   slots read with sharing   s + b c         (row tiles of a large batch read the prefix again)
//   slots read without        b (s + c)
//   flops either way          2 * b (s + c) * q_heads * (qk_dim + v_dim)
// The paper's speed-up (Zhu et al., 2024) is the ratio of the reads, b (s + c) / (s + b c): right
// where decode is bound by reading KV, an upper bound where arithmetic takes over.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "measure/operator.h"
#include "measure/roofline.h"

namespace relay::measure {

struct ExplainProblem {
  std::string name;  ///< of the model, for the heading; may be empty
  OpProblem op;
  int32_t layers = 1;
  int32_t threads = 1;
};

/// Throws Error for a problem without a layer.
void check_layers(const ExplainProblem& problem);

/// Bytes of KV in memory, of all layers.
struct KvStored {
  double shared = 0;  ///< each slot once
  double apart = 0;   ///< the prefix once per request
};
KvStored kv_stored(const ExplainProblem& problem);

/// One decode step of all layers, sharing on or off.
struct StepCost {
  double slots_read = 0;  ///< by the plan, of one layer
  double bytes_read = 0;  ///< of KV
  double flops = 0;       ///< multiply-adds counted twice
  double read_floor = 0;  ///< seconds of reading alone, at the measured bandwidth
  double arithmetic_floor = 0;
  double predicted = 0;            ///< seconds, by the cost model
  double idle_share = 0;           ///< of the threads, predicted
  std::optional<double> measured;  ///< seconds

  /// How far the prediction was off: (predicted - measured) / measured.
  std::optional<double> error() const;
  bool bound_by_reading() const { return read_floor >= arithmetic_floor; }
};

struct Explanation {
  ExplainProblem problem;
  Roofline roofline;
  std::string isa;
  KvStored stored;
  StepCost on;
  StepCost off;
  double formula = 1;  ///< the paper's b (s + c) / (s + b c)

  double predicted_speedup() const { return off.predicted / on.predicted; }
  std::optional<double> measured_speedup() const;
};

/// A roofline of `threads` threads from that of others of the same machine: arithmetic grows with
/// the threads, what memory gives does not.
Roofline scaled_to(const Roofline& roofline, int32_t threads);

/// Costs are those of the active kernel set; `roofline` is of the problem's threads.
Explanation explain(const ExplainProblem& problem, const Roofline& roofline);

/// Runs the operator as `relay bench op` does and notes what it took; the pool has the problem's
/// threads.
void measure(Explanation& explanation, ThreadPool& pool, int rounds);

std::string to_table(const Explanation& explanation);
std::string to_json(const Explanation& explanation);

}  // namespace relay::measure
