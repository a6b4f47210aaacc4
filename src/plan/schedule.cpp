#include "plan/schedule.h"

#include <algorithm>
#include <functional>

#include "plan/planner.h"

namespace relay {

Schedule foretell(std::span<const double> costs, int32_t threads, std::vector<double>& free_at) {
  Schedule schedule;
  schedule.threads = threads;
  // A heap of the times at which the threads are free, the earliest on top.
  free_at.assign(static_cast<size_t>(threads), 0.0);
  for (size_t i = 0; i < costs.size(); ++i) {
    std::pop_heap(free_at.begin(), free_at.end(), std::greater<>());
    const double end = free_at.back() += costs[i];
    std::push_heap(free_at.begin(), free_at.end(), std::greater<>());
    schedule.busy += costs[i];
    if (end > schedule.seconds) {
      schedule.seconds = end;
      schedule.last_item = i;
    }
  }
  return schedule;
}

Schedule foretell(const Plan& plan) {
  std::vector<double> costs, free_at;
  for (const WorkItem& item : plan.items) costs.push_back(item.cost);
  return foretell(costs, plan.options.threads, free_at);
}

Schedule foretell(const Plan& plan, const CostModel& model) {
  std::vector<double> costs, free_at;
  for (const WorkItem& item : plan.items) {
    costs.push_back(item_seconds(model, item, plan.options.shape));
  }
  return foretell(costs, plan.options.threads, free_at);
}

}  // namespace relay
