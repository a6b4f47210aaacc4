#include "cpu/plan/schedule.h"

#include <algorithm>
#include <functional>

#include "cpu/plan/cost_model.h"
#include "cpu/plan/merge_tree.h"
#include "cpu/plan/plan.h"
#include "cpu/plan/planner.h"

namespace relay {
namespace {

/// An item may take longer than predicted by this part of itself: cores are not alike, and others
/// use them too.
constexpr double kUncertainty = 0.1;

class Simulation {
 public:
  Simulation(const Plan& plan, ScheduleScratch& scratch)
      : plan_(plan),
        words_(head_words(plan.options.shape.kv_heads)),
        running_(scratch.running),
        half_there_(scratch.half_there) {
    half_there_.assign(static_cast<size_t>(plan.partials) * words_, 0);
  }

  /// `item_at(i)`: the i-th of all items to be taken. `seconds_of(item)` leaves out merging:
  /// `merge_seconds` for each two partials of one KV head.
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
      const double merging =
          item != nullptr ? merge_seconds * static_cast<double>(merges_due(*item)) : 0;
      schedule.busy += merging;
      schedule.merging += merging;
      schedule.seconds = std::max(schedule.seconds, end + merging);
      if (item != nullptr) {
        schedule.worst = std::max(schedule.worst, end + merging + kUncertainty * seconds_of(*item));
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

  /// How often the thread that ends `item` merges two partials of one KV head.
  int64_t merges_due(const WorkItem& item) {
    if (item.segment == WorkItem::kNoSegment) return 0;
    int64_t merges = 0;
    each_word(item.head_begin, item.head_end,
              [&](int32_t word, uint64_t heads) { merges += merges_due(item, word, heads); });
    return merges;
  }

  int64_t merges_due(const WorkItem& item, int32_t word, uint64_t heads) {
    const Plan::Block& block = plan_.blocks[item.block];
    int64_t merges = 0;
    // Nodes of this block's chunks alone are the same in all of its rows: the first stands for all.
    int64_t leaf = block.leaf + item.chunk;
    uint32_t width = 1;
    if (block.leaf >= 0 && block.chunks > 1) {
      const uint32_t row = plan_.row_index[item.row_begin];
      climb(static_cast<uint32_t>(leaf), plan_.partials_of(row),
            [&](uint32_t left, uint32_t right) {
              const int64_t end = int64_t{right} + (right - left);
              if (left < block.leaf || end > block.leaf + block.chunks) return false;
              merges += item.rows() * both_there(row, right, word, heads);
              leaf = left;
              width = 2 * (right - left);
              return heads != 0;
            });
    }
    uint32_t alike = 0;
    for (uint32_t i = 0; i < item.rows() && heads != 0; i += alike) {
      const uint32_t row = plan_.row_index[item.row_begin + i];
      alike = plan_.alike[row];
      const uint32_t partial = plan_.partial_of(item, i);
      if (partial == Plan::kDirect) continue;
      const uint32_t from =
          block.leaf >= 0 ? static_cast<uint32_t>(leaf) : partial - plan_.partial_begin[row];
      uint64_t of_row = heads;
      climb(
          from, plan_.partials_of(row),
          [&](uint32_t, uint32_t right) {
            merges += alike * both_there(row, right, word, of_row);
            return of_row != 0;
          },
          width);
    }
    return merges;
  }

  /// Delivers a half of a node; `heads` becomes those that have both, and it says how many.
  int64_t both_there(uint32_t row, uint32_t node, int32_t word, uint64_t& heads) {
    uint64_t& half_there = half_there_[(plan_.partial_begin[row] + size_t{node}) * words_ + word];
    half_there ^= heads;
    heads &= ~half_there;
    return std::popcount(heads);
  }

  const Plan& plan_;
  const size_t words_;
  std::vector<Running>& running_;
  std::vector<uint64_t>& half_there_;
};

}  // namespace

Schedule simulate(const Plan& plan, std::span<const ItemInOrder> order, ScheduleScratch& scratch) {
  return Simulation(plan, scratch)
      .run([&](size_t i) { return order[i].item; }, [](const WorkItem& item) { return item.cost; },
           plan.merge_seconds);
}

Schedule simulate(const Plan& plan) {
  ScheduleScratch scratch;
  return Simulation(plan, scratch)
      .run([](size_t i) { return i; }, [](const WorkItem& item) { return item.cost; },
           plan.merge_seconds);
}

Schedule simulate(const Plan& plan, const CostModel& costs) {
  ScheduleScratch scratch;
  const HeadShape& shape = plan.options.shape;
  return Simulation(plan, scratch)
      .run([](size_t i) { return i; },
           [&](const WorkItem& item) { return item_seconds(costs, item, shape); },
           merge_seconds(costs, shape));
}

}  // namespace relay
