// Foretells how a plan runs: its items, in their order, each to the thread that is free first; and
// each row's merge to the thread that delivers the last of its partials.
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

/// A plan on paper. An item takes the seconds that a cost model says, and then its thread merges,
/// at once, every (row, KV head) whose last partial it has delivered; only then it takes the next.
struct Schedule {
  double seconds = 0;    ///< from the common start until the last thread has nothing left to do
  double busy = 0;       ///< of all threads together, in items and in merging
  double merging = 0;    ///< part of `busy`
  size_t last_item = 0;  ///< of Plan::items, whose end, its merges included, is the end of all
  int32_t threads = 1;

  /// Idle share: the part of threads * seconds in which a thread has neither an item nor a row to
  /// merge, since it waits for the others to finish.
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
  std::vector<uint32_t> chunks_left;                        ///< [block][KV head]
  std::vector<uint32_t> blocks_left;                        ///< [KV head][row]
};

/// By the costs that the plan was made with. What the planner itself goes by.
Schedule foretell(const Plan& plan);
/// Likewise, if the items were taken in another order.
Schedule foretell(const Plan& plan, std::span<const ItemInOrder> order, ScheduleScratch& scratch);
/// By other costs: of a plan made with coarse ones, what finer ones say of it.
Schedule foretell(const Plan& plan, const CostModel& costs);

}  // namespace relay
