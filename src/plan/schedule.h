// Foretells how a plan runs: its items, in their order, each to the thread that is free first.
#pragma once

#include <span>
#include <vector>

#include "plan/plan.h"

namespace relay {

struct Schedule {
  double seconds = 0;    ///< until the last thread has finished, by the plan's cost model
  double busy = 0;       ///< of all threads together
  size_t last_item = 0;  ///< which ends last
  int32_t threads = 1;

  /// Part of the threads' time that they wait for the last one.
  double idle_share() const { return seconds > 0 ? 1 - busy / (seconds * threads) : 0; }
};

/// Items of these costs in this order; `free_at` is scratch.
Schedule foretell(std::span<const double> costs, int32_t threads, std::vector<double>& free_at);
/// By the costs that the plan was made with.
Schedule foretell(const Plan& plan);
/// By other costs: of a plan made with coarse ones, what finer ones say of it.
Schedule foretell(const Plan& plan, const CostModel& costs);

}  // namespace relay
