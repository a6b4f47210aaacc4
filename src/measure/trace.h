// What sharing saves on a recorded trace of requests, on paper: which requests decode at once
// follows from their arrivals and a given time per token; who shares what is found in their block
// tables, as for vLLM; times are the cost model's.
//
// Level 1 is the first run of blocks that a request shares, level 2 the one that some of those
// requests share after it, and so on.
#pragma once

#include <cstdint>
#include <istream>
#include <string>
#include <vector>

#include "measure/roofline.h"
#include "relay/types.h"

namespace relay::measure {

struct TraceRequest {
  double arrival = 0;  ///< seconds
  int64_t prompt = 0;  ///< tokens
  int64_t answer = 0;
  std::vector<int32_t> blocks;  ///< of the prompt; equal leading ids are equal prefixes
};

struct Trace {
  int64_t block_size = 512;
  std::vector<TraceRequest> requests;  ///< by arrival
};

/// Mooncake's format: a JSON object a line, with timestamp (ms), input_length, output_length and
/// hash_ids. Throws Error that names the line and the field.
Trace read_trace(std::istream& lines, int64_t block_size);

struct TraceProblem {
  HeadShape shape;
  DType kv_type = DType::kF16;
  int32_t layers = 1;
  int32_t threads = 1;
  double token_seconds = 0.05;  ///< of a decode step
  double every = 10;            ///< seconds from one step that is looked at to the next
  int32_t max_batch = 0;        ///< requests at once, later ones wait; 0: no limit
};

/// KV slots of one layer, as the trace has them: a plan reads what is shared by too few tokens more
/// often (cpu/plan/fold.h).
struct SlotReads {
  double attended = 0;  ///< read by each request for itself
  double read = 0;      ///< once
};

/// One decode step, or the mean of many.
struct TraceStep {
  double time = 0;  ///< seconds from the first arrival
  double batch = 0;
  SlotReads all;
  std::vector<SlotReads> levels;  ///< what is shared, level 1 first
  double seconds_on = 0;          ///< attention of all layers, predicted
  double seconds_off = 0;
};

struct TraceReport {
  TraceProblem problem;
  Roofline roofline;
  std::string isa;
  int64_t requests = 0;
  std::vector<TraceStep> steps;
  TraceStep mean;
};

/// Steps without a request are left out. `roofline` is of the problem's threads.
TraceReport analyse(const Trace& trace, const TraceProblem& problem, const Roofline& roofline);

std::string to_table(const TraceReport& report);
std::string to_json(const TraceReport& report);

}  // namespace relay::measure
