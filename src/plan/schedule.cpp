#include "plan/schedule.h"

#include <algorithm>
#include <functional>

#include "plan/cost_model.h"
#include "plan/plan.h"
#include "plan/planner.h"

namespace relay {
namespace {

/// Runs a plan on paper. A (row, KV head) is merged by the thread that ends the last chunk of the
/// last block with that row: so rows are looked at once per block, not once per item.
class Rehearsal {
 public:
  Rehearsal(const Plan& plan, ScheduleScratch& scratch)
      : plan_(plan),
        heads_(static_cast<size_t>(plan.options.shape.kv_heads)),
        rows_(static_cast<size_t>(plan.forest.rows)),
        running_(scratch.running),
        chunks_left_(scratch.chunks_left),
        blocks_left_(scratch.blocks_left) {
    chunks_left_.clear();
    for (const Plan::Block& block : plan.blocks) {
      chunks_left_.insert(chunks_left_.end(), heads_, block.chunks);
    }
    blocks_left_.clear();
    for (size_t h = 0; h < heads_; ++h) {
      blocks_left_.insert(blocks_left_.end(), plan.blocks_of.begin(), plan.blocks_of.end());
    }
  }

  /// `item_at(i)`: the i-th of all items to be taken. `seconds_of(item)` leaves out merging:
  /// `merge_seconds` for each partial of one KV head.
  template <typename ItemAt, typename SecondsOf>
  Schedule run(ItemAt item_at, SecondsOf seconds_of, double merge_seconds) {
    Schedule schedule;
    schedule.threads = plan_.options.threads;
    size_t next = 0;
    const auto take = [&](double now) {
      if (next == plan_.items.size()) return;
      const WorkItem& item = plan_.items[item_at(next++)];
      const double seconds = seconds_of(item);
      schedule.busy += seconds;
      push(now + seconds, &item);
    };
    running_.clear();
    for (int32_t t = 0; t < schedule.threads; ++t) take(0);
    while (!running_.empty()) {
      const auto [end, item] = pop();
      const double merging = item != nullptr ? merge_seconds * partials_due(*item) : 0;
      schedule.busy += merging;
      schedule.merging += merging;
      if (end + merging > schedule.seconds) {
        schedule.seconds = end + merging;
        if (item != nullptr) schedule.last_item = static_cast<size_t>(item - plan_.items.data());
      }
      if (merging == 0) {
        take(end);
      } else if (next < plan_.items.size()) {
        push(end + merging, nullptr);  // others may be free before
      }
    }
    return schedule;
  }

 private:
  using Running = std::pair<double, const WorkItem*>;

  void push(double end, const WorkItem* item) {
    running_.emplace_back(end, item);
    std::push_heap(running_.begin(), running_.end(), std::greater<>());
  }
  Running pop() {
    std::pop_heap(running_.begin(), running_.end(), std::greater<>());
    const Running first = running_.back();
    running_.pop_back();
    return first;
  }

  /// How many partials of one KV head the thread that ends `item` has to merge.
  double partials_due(const WorkItem& item) {
    if (item.segment == WorkItem::kNoSegment) return 0;
    const Plan::Block& block = plan_.blocks[item.block];
    int64_t partials = 0;
    for (int32_t h = item.head_begin; h < item.head_end; ++h) {
      if (--chunks_left_[item.block * heads_ + h] > 0) continue;
      if (block.shared_rows == 0) {
        partials += block.partials;
        continue;
      }
      uint32_t* blocks_left = &blocks_left_[h * rows_];
      for (uint32_t i = block.row_begin; i < block.row_end; ++i) {
        const uint32_t row = plan_.row_index[i];
        if (--blocks_left[row] == 0 && plan_.results[row] > 1) partials += plan_.results[row];
      }
    }
    return static_cast<double>(partials);
  }

  const Plan& plan_;
  const size_t heads_;
  const size_t rows_;
  std::vector<Running>& running_;
  std::vector<uint32_t>& chunks_left_;
  std::vector<uint32_t>& blocks_left_;
};

}  // namespace

Schedule foretell(const Plan& plan, std::span<const ItemInOrder> order, ScheduleScratch& scratch) {
  return Rehearsal(plan, scratch)
      .run([&](size_t i) { return order[i].item; }, [](const WorkItem& item) { return item.cost; },
           plan.merge_seconds);
}

Schedule foretell(const Plan& plan) {
  ScheduleScratch scratch;
  return Rehearsal(plan, scratch)
      .run([](size_t i) { return i; }, [](const WorkItem& item) { return item.cost; },
           plan.merge_seconds);
}

Schedule foretell(const Plan& plan, const CostModel& costs) {
  ScheduleScratch scratch;
  const HeadShape& shape = plan.options.shape;
  return Rehearsal(plan, scratch)
      .run([](size_t i) { return i; },
           [&](const WorkItem& item) { return item_seconds(costs, item, shape); },
           merge_seconds(costs, shape));
}

}  // namespace relay
