// Simulates how a plan runs: each item, in their order, goes to the thread that is idle first, and
// each merge to the thread that delivers the second half (merge_tree.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace relay {

class Plan;
struct CostModel;
struct WorkItem;

/// A simulated run. An item takes as long as the cost model says; then its thread does the merges
/// that are now possible, and only then takes its next item.
struct Schedule {
  double seconds = 0;  ///< from the common start until the last thread is done
  double worst = 0;    ///< likewise, if the one item where it matters most took a tenth longer
  double busy = 0;     ///< all threads' time in items and in merging, added up
  double merging = 0;  ///< part of `busy`
  int32_t threads = 1;

  /// The part of threads * seconds in which a thread has nothing to do and waits for the others.
  double idle_share() const { return seconds > 0 ? 1 - busy / (seconds * threads) : 0; }
};

/// The order in which threads take items, while it is being sought.
struct ItemInOrder {
  uint32_t item = 0;   ///< Plan::items[item]
  double seconds = 0;  ///< by which it has its place
};

/// Memory of simulate(), for those who call it again and again.
struct ScheduleScratch {
  std::vector<std::pair<double, const WorkItem*>> running;  ///< a heap of threads: (end, item)
  std::vector<uint64_t> half_there;                         ///< [partial][head_words]
};

/// By the costs that the plan was made with: what the planner itself goes by.
Schedule simulate(const Plan& plan);
/// Likewise, if the items were taken in another order.
Schedule simulate(const Plan& plan, std::span<const ItemInOrder> order, ScheduleScratch& scratch);
/// By other costs: what measured ones say of a plan that was made with coarse ones.
Schedule simulate(const Plan& plan, const CostModel& costs);

}  // namespace relay
