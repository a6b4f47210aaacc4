// Foretells how a plan runs: its items, in their order, each to the thread that is free first; and
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

/// A plan on paper. An item takes the seconds that a cost model says, and then its thread merges
/// what it has delivered with all that is there; only then it takes the next.
struct Schedule {
  double seconds = 0;  ///< from the common start until the last thread has nothing left to do
  double worst = 0;    ///< likewise, if the one item where it matters most took a tenth longer
  double busy = 0;     ///< of all threads together, in items and in merging
  double merging = 0;  ///< part of `busy`
  int32_t threads = 1;

  /// Idle share: the part of threads * seconds in which a thread has neither an item nor something
  /// to merge, since it waits for the others to finish.
  double idle_share() const { return seconds > 0 ? 1 - busy / (seconds * threads) : 0; }
};

/// The order in which threads take items, while it is being sought.
struct ItemInOrder {
  uint32_t item = 0;   ///< Plan::items[item]
  double seconds = 0;  ///< by which it has its place
};

/// Memory of foretell(), for those who call it again and again.
struct ScheduleScratch {
  std::vector<std::pair<double, const WorkItem*>> running;  ///< a heap of threads: (end, item)
  std::vector<uint64_t> half_there;                         ///< [partial][head_words]
};

/// By the costs that the plan was made with. What the planner itself goes by.
Schedule foretell(const Plan& plan);
/// Likewise, if the items were taken in another order.
Schedule foretell(const Plan& plan, std::span<const ItemInOrder> order, ScheduleScratch& scratch);
/// By other costs: of a plan made with coarse ones, what finer ones say of it.
Schedule foretell(const Plan& plan, const CostModel& costs);

}  // namespace relay
