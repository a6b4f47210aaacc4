// How a batch is cut. Threads take items from one list, so it must be cut such that they finish
// near together while little has to be merged:
//   0. A shared segment that is too short to pay for its partial results is folded into the
//   segments
//      below it (fold.h).
//   1. A segment is cut by rows only as far as their states must stay in the cache, or where they
//      are many, since each row tile reads the KV again. What comes out is a block.
//   2. A block is cut by slots into chunks, at the cost of a partial result for each row and chunk,
//      and a chunk by heads into items, at the cost of reading memory in shorter runs where a
//      slot's heads lie side by side.
//   3. Whoever ends last has still to merge, as often as its rows' trees are high (merge_tree.h).
//      Were that one thread for all rows and heads, the others would wait: so the last chunk of a
//      block that is cut, its tail, is small and its heads are spread over the threads, as far as
//      there are heads.
//   4. There are several ways to choose the sizes (Way), and none is best for all batches: each is
//      tried, and the one that is predicted to finish first is kept, even if one of its items takes
//      longer than it should.
#include "cpu/plan/planner.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/plan/block_costs.h"
#include "cpu/plan/fold.h"
#include "cpu/plan/merge_tree.h"
#include "cpu/plan/schedule.h"

namespace relay {
namespace {

/// Chunks are multiples of this many slots (KvLayout::kRows): a short last tile costs less than
/// uneven threads.
constexpr int64_t kRowsUnit = 8;

/// Where there are more threads than KV heads, rows go apart too while so many query rows stay
/// together: beside their products, reading the KV again costs less than partials of all of them.
constexpr int64_t kRowsWorthReading = 256;
/// Where the heads of a slot lie side by side but are read by several items, those follow one
/// another, and a chunk of all heads is not more than this many times a core's cache: what one of
/// them brings into the shared cache and the TLB, the others still find there (measured: 20 % for
/// 128 query rows over 16384 slots of bf16).
constexpr double kChunkOfHeads = 8;
/// A plan this near to an even share of the bare work is not worth improving.
constexpr double kGoodEnough = 1.03;

struct Way {
  /// Items per thread, all alike; small blocks fill the gaps. 0: sizes decrease, as in factoring
  /// (Hummel, Schonberg and Flynn, 1992): an item is at most half of a thread's even share of what
  /// is left, so most of the work is in few large items, and what is open at the end is small.
  int32_t items_per_thread;
  int64_t head_parts;  ///< a chunk's heads go into so many items, if there is work for them
};
constexpr int32_t kMostItemsPerThread = 2;
/// An item of a tail takes so many times what it would without any slots: enough to be the last to
/// end where the items before it are all alike.
constexpr double kTailItem = 3;
/// A piece that falls short by this part of an item is not made.
constexpr double kRest = 0.25;
/// Likewise where items are all alike and meant to fit together.
constexpr double kLeastRoom = 0.03;

class Planner {
 public:
  Planner(Plan& plan, const Forest& forest, const PlanOptions& options, const CostModel& costs)
      : plan_(plan),
        costs_(costs),
        block_costs_(costs, options.shape),
        shape_(options.shape),
        threads_(options.threads) {
    plan_.options = options;
    fold_short_segments(forest, options, costs, plan_.folding, plan_.forest);
    plan_.merge_seconds = merge_seconds(costs, shape_);
    plan_.row_index.assign(plan_.forest.row_index.begin(), plan_.forest.row_index.end());
    unit_ = options.layout == KvLayout::kTiles ? kTileSlots : kRowsUnit;
    if (options.layout == KvLayout::kRows) {
      const auto chunk = static_cast<double>(costs.cache_bytes) * kChunkOfHeads;
      const auto slot = static_cast<double>(costs.slot_bytes * shape_.kv_heads);
      most_units_ = std::max<int64_t>(1, static_cast<int64_t>(chunk / slot) / unit_);
    }
  }

  void run() {
    make_blocks();
    cut_best();
    sort_items();
    add_empty_rows();
  }

 private:
  using Block = Plan::Block;

  // --- Blocks ------------------------------------------------------------------------------------

  void make_blocks() {
    plan_.blocks.clear();
    plan_.unit_rows.clear();
    const int64_t rows_at_once = block_costs_.rows_at_once();
    for (size_t i = 0; i < plan_.forest.segments.size(); ++i) {
      const Segment& segment = plan_.forest.segments[i];
      const int64_t tiles =
          std::max((segment.rows() + rows_at_once - 1) / rows_at_once,
                   std::min<int64_t>((threads_ + shape_.kv_heads - 1) / shape_.kv_heads,
                                     query_rows(segment.rows()) / kRowsWorthReading));
      const auto rows_each = static_cast<uint32_t>((segment.rows() + tiles - 1) / tiles);
      for (uint32_t row = segment.row_begin; row < segment.row_end; row += rows_each) {
        Block block;
        block.segment = static_cast<uint32_t>(i);
        block.row_begin = row;
        block.row_end = std::min<uint32_t>(segment.row_end, row + rows_each);
        block.slots = segment.slots;
        if (segment.visibility == Visibility::kPositions) count_unit_rows(block);
        if (block.slots > 0) plan_.blocks.push_back(block);
      }
    }
    count_blocks_of_rows();
    total_ = 0;
    for (Block& block : plan_.blocks) {
      block.parts = block_costs_.least_parts(block.rows());
      block.overhead = block_costs_.overhead(block.rows(), block.parts);
      block.cost = block.overhead + seconds_of(block, 0, units_of(block));
      total_ += block.cost;
    }
    // Large ones first: they are cut while much is left, and so into large items.
    std::sort(plan_.blocks.begin(), plan_.blocks.end(), [](const Block& a, const Block& b) {
      return a.cost != b.cost ? a.cost > b.cost : a.row_begin < b.row_begin;
    });
  }

  /// Notes how many query rows see something of each unit, if positions ascend (else all may).
  /// Slots after the last that any row sees are left out: no item will hold them.
  void count_unit_rows(Block& block) {
    const auto position = [&](uint32_t row) {
      return plan_.forest.positions[plan_.row_index[row]];
    };
    for (uint32_t row = block.row_begin + 1; row < block.row_end; ++row) {
      if (position(row) < position(row - 1)) return;
    }
    block.unit_rows = static_cast<int64_t>(plan_.unit_rows.size());
    const Segment& segment = plan_.forest.segments[block.segment];
    uint32_t span = segment.span_begin;
    int64_t offset = 0;
    uint32_t row = block.row_begin;  // the first that sees the unit
    for (int64_t slot = 0; slot < block.slots; slot += unit_) {
      const int64_t column = plan_.forest.spans[span].column + offset;
      while (row < block.row_end && position(row) < column) ++row;
      if (row == block.row_end) {
        block.slots = slot;
        return;
      }
      plan_.unit_rows.push_back(query_rows(block.row_end - row));
      advance(unit_, span, offset);
    }
  }

  void advance(int64_t slots, uint32_t& span, int64_t& offset) const {
    offset += slots;
    while (span < plan_.forest.spans.size() && offset >= plan_.forest.spans[span].count) {
      offset -= plan_.forest.spans[span++].count;
    }
  }

  /// Counts the rows of each block that other blocks list too: their results are always partial.
  /// And finds runs of rows that follow one another in the same blocks: what holds for the trees of
  /// one (schedule.cpp) holds for all.
  void count_blocks_of_rows() {
    const auto rows = static_cast<size_t>(plan_.forest.rows);
    plan_.blocks_of.assign(rows, 0);
    const auto each_row = [&](const Block& block, auto visit) {
      for (uint32_t i = block.row_begin; i < block.row_end; ++i) {
        visit(plan_.blocks_of[plan_.row_index[i]]);
      }
    };
    for (const Block& block : plan_.blocks) {
      each_row(block, [](uint32_t& blocks) { ++blocks; });
    }
    for (Block& block : plan_.blocks) {
      each_row(block, [&](uint32_t blocks) { block.shared_rows += blocks > 1; });
    }
    plan_.alike.assign(rows, 0);  // first: in how many blocks a row follows the one before
    for (const Block& block : plan_.blocks) {
      for (uint32_t i = block.row_begin + 1; i < block.row_end; ++i) {
        const uint32_t row = plan_.row_index[i];
        if (row == plan_.row_index[i - 1] + 1) ++plan_.alike[row];
      }
    }
    uint32_t run = 0;
    for (size_t row = rows; row-- > 0;) {
      const uint32_t blocks = plan_.blocks_of[row];
      const bool as_before =
          row > 0 && plan_.alike[row] == blocks && plan_.blocks_of[row - 1] == blocks;
      plan_.alike[row] = ++run;
      if (!as_before) run = 0;
    }
  }

  int64_t query_rows(uint32_t rows) const { return block_costs_.query_rows(rows); }
  int64_t query_rows(const Block& block) const { return query_rows(block.rows()); }

  int64_t units_of(const Block& block) const { return (block.slots + unit_ - 1) / unit_; }
  int64_t slots_of(const Block& block, int64_t first, int64_t last) const {
    return std::min(last * unit_, block.slots) - first * unit_;
  }
  int64_t row_slots_of(const Block& block, int64_t first, int64_t last) const {
    if (block.unit_rows < 0) return slots_of(block, first, last) * query_rows(block);
    int64_t sum = 0;
    for (int64_t unit = first; unit < last; ++unit) {
      sum += slots_of(block, unit, unit + 1) * plan_.unit_rows[block.unit_rows + unit];
    }
    return sum;
  }
  /// Seconds of the units [first, last) for all heads, `block.parts` items together.
  double seconds_of(const Block& block, int64_t first, int64_t last) const {
    return block_costs_.kv_seconds(block.rows(), block.parts, slots_of(block, first, last),
                                   row_slots_of(block, first, last));
  }

  // --- Cutting -----------------------------------------------------------------------------------

  /// Cuts and orders in the way whose threads are predicted to finish first.
  void cut_best() {
    Way best{1, 1};
    if (threads_ > 1 && !plan_.blocks.empty()) {  // else there is nothing to balance
      double least = std::numeric_limits<double>::infinity();
      const int64_t most_parts = std::min<int64_t>(shape_.kv_heads, threads_);
      const int64_t more = most_parts > 8 ? 4 : 2;  // about four numbers of parts are tried
      for (int32_t items = 0; items <= kMostItemsPerThread; ++items) {
        for (int64_t parts = 1;; parts *= more) {
          const Way way{items, std::min(parts, most_parts)};
          cut(way);
          // No order makes up for what this way costs, and more parts cost more.
          if (std::max(longest_, busy_ / threads_) >= least) break;
          const double seconds = predicted_seconds();
          if (seconds < least) {
            best = way;
            least = seconds;
          }
          if (least <= kGoodEnough * total_ / threads_) return;
          if (!parts_matter_ || parts >= most_parts) break;
        }
      }
    }
    cut(best);
    order_items();
  }

  double predicted_seconds() {
    order_items();
    return simulate(plan_, plan_.order, plan_.schedule).worst;
  }

  /// Longest first, with all that they may have to merge: what comes last is short, so threads
  /// finish near together. Ties in the order as cut.
  void order_items() {
    plan_.order.clear();
    for (uint32_t i = 0; i < plan_.items.size(); ++i) {
      const WorkItem& item = plan_.items[i];
      const double merging = static_cast<double>(plan_.blocks[item.block].merges) *
                             (item.head_end - item.head_begin) * plan_.merge_seconds;
      plan_.order.push_back({.item = i, .seconds = item.cost + merging});
    }
    std::sort(plan_.order.begin(), plan_.order.end(),
              [](const ItemInOrder& a, const ItemInOrder& b) {
                return a.seconds != b.seconds ? a.seconds > b.seconds : a.item < b.item;
              });
  }

  void sort_items() {
    plan_.as_cut.assign(plan_.items.begin(), plan_.items.end());
    for (size_t i = 0; i < plan_.order.size(); ++i) {
      plan_.items[i] = plan_.as_cut[plan_.order[i].item];
    }
  }

  void cut(const Way& way) {
    plan_.items.clear();
    plan_.max_states = 0;
    plan_.max_bias_rows = 0;
    parts_matter_ = false;
    left_ = total_;
    const int32_t items = way.items_per_thread * threads_;
    size_ = items > 0 ? even_size(items) : 0;
    room_ = size_;
    for (Block& block : plan_.blocks) set_tail_apart(block, way);
    if (items > 0) size_ -= (total_ - left_) / items;
    room_ = size_;
    for (Block& block : plan_.blocks) cut(block, way);
    count_results();
  }

  /// Into how many items the heads of a tail go.
  int64_t tail_parts(const Block& block) const { return head_parts(block, threads_); }

  /// Notes which units are the tail of a block that is large enough to be cut.
  void set_tail_apart(Block& block, const Way& way) {
    block.tail_units = 0;
    if (block.cost <= item_size(block, way) * static_cast<double>(block.parts)) return;
    const auto states = static_cast<double>(query_rows(block));
    const double wanted = kTailItem * static_cast<double>(tail_parts(block)) *
                          (costs_.item + states * (costs_.state + costs_.store));
    if (wanted > block.cost / 2) return;
    const int64_t units = units_of(block);
    double seconds = 0;
    while (seconds < wanted && block.tail_units < units - 1) {
      const int64_t unit = units - ++block.tail_units;
      seconds += seconds_of(block, unit, unit + 1);
    }
    left_ -= seconds;
  }

  void cut(Block& block, const Way& way) {
    WorkItem item;
    item.block = static_cast<uint32_t>(&block - plan_.blocks.data());
    item.segment = block.segment;
    item.row_begin = block.row_begin;
    item.row_end = block.row_end;
    item.few = block_costs_.few(block.rows());
    item.span = plan_.forest.segments[block.segment].span_begin;
    block.first_item = static_cast<uint32_t>(plan_.items.size());
    block.chunks = 0;
    const int64_t units = units_of(block);
    const int64_t body = units - block.tail_units;
    double body_left = seconds_of(block, 0, body);
    for (int64_t first = 0; first < body;) {
      const double size = item_size(block, way);
      const double items_left = body_left / size;
      const auto most_parts = static_cast<double>(way.head_parts);
      parts_matter_ |= most_parts < items_left && block.parts < shape_.kv_heads;
      const int64_t parts = head_parts(block, std::min(most_parts, items_left));
      const double wanted =
          std::max(size * static_cast<double>(parts) - block.overhead, block.overhead);
      const int64_t last = chunk_end(block, first, body, chunk_seconds(body_left, wanted, way));
      const double seconds = seconds_of(block, first, last);
      // Where slots have run out before the items are small, heads go apart.
      const int64_t most = std::max(parts, head_parts(block, std::ceil(seconds / size - kRest)));
      add_chunk(block, first, last, most, item);
      body_left -= seconds;
      left_ -= seconds;
      room_ -= (seconds + block.overhead) / static_cast<double>(most);
      first = last;
    }
    if (body < units) add_chunk(block, body, units, tail_parts(block), item);
    left_ -= block.overhead;
  }

  /// Items of the units [first, last). `item` has their place, and after that of the next chunk.
  void add_chunk(Block& block, int64_t first, int64_t last, int64_t parts, WorkItem& item) {
    item.slots = slots_of(block, first, last);
    item.row_slots = static_cast<double>(row_slots_of(block, first, last));
    item.chunk = block.chunks++;
    emit(item, parts);
    advance(item.slots, item.span, item.span_offset);
  }

  /// Notes how many results each row has and where they go, and so what items cost.
  void count_results() {
    const auto rows = static_cast<size_t>(plan_.forest.rows);
    plan_.results.assign(rows, 0);
    plan_.first_partial.clear();
    for (Block& block : plan_.blocks) {
      block.rows_at = static_cast<uint32_t>(plan_.first_partial.size());
      for (uint32_t i = block.row_begin; i < block.row_end; ++i) {
        uint32_t& results = plan_.results[plan_.row_index[i]];
        plan_.first_partial.push_back(results);
        results += block.chunks;
      }
    }
    busy_ = 0;
    longest_ = 0;
    plan_.partial_begin.assign(rows + 1, 0);
    for (size_t r = 0; r < rows; ++r) {
      const uint32_t results = plan_.results[r];
      plan_.partial_begin[r + 1] = plan_.partial_begin[r] + (results > 1 ? results : 0);
      if (results > 1) busy_ += (results - 1) * plan_.merge_seconds * shape_.kv_heads;
    }
    plan_.partials = plan_.partial_begin[rows];
    for (size_t b = 0; b < plan_.blocks.size(); ++b) {
      Block& block = plan_.blocks[b];
      block.merges = 0;
      for (uint32_t i = 0; i < block.rows(); ++i) {
        const uint32_t row = plan_.row_index[block.row_begin + i];
        uint32_t& first = plan_.first_partial[block.rows_at + i];
        block.leaf = i == 0 || block.leaf == int64_t{first} ? int64_t{first} : -1;
        first = plan_.results[row] > 1 ? plan_.partial_begin[row] + first : Plan::kDirect;
        block.merges += tree_height(plan_.results[row]);
      }
      const size_t end =
          b + 1 < plan_.blocks.size() ? plan_.blocks[b + 1].first_item : plan_.items.size();
      for (size_t i = block.first_item; i < end; ++i) {
        WorkItem& item = plan_.items[i];
        item.partial_rows = block.chunks > 1 ? block.rows() : block.shared_rows;
        item.cost = item_seconds(costs_, item, shape_);
        busy_ += item.cost;
        longest_ = std::max(longest_, item.cost);
      }
    }
  }

  /// Seconds that the next item should take. With T seconds of work on n threads, an overhead of o
  /// per item and items of a seconds, the threads finish after some T/n + (T/n) o/a + a/2, which is
  /// least for a = sqrt(2 o T/n): smaller ones are not worth having.
  double item_size(const Block& block, const Way& way) {
    const double share = total_ / threads_;
    if (way.items_per_thread > 0) {
      if (room_ < kLeastRoom * size_) room_ = size_;
      return room_;
    }
    return std::max(std::sqrt(2 * block.overhead / static_cast<double>(block.parts) * share),
                    left_ / static_cast<double>(2 * std::max<int64_t>(threads_, block.parts)));
  }

  /// Seconds of each of so many items, the overhead of cutting included. Merging is not, here and
  /// in total_: it comes when the items that are all alike have ended.
  double even_size(int32_t items) const {
    double seconds = total_;
    for (const Block& block : plan_.blocks) {
      seconds +=
          block.overhead * std::max(0.0, std::ceil(block.cost / total_ * items / block.parts) - 1);
    }
    return seconds / items;
  }

  /// Seconds of the next chunk, of a block that has `left` and where `wanted` would be right.
  static double chunk_seconds(double left, double wanted, const Way& way) {
    // A little left over is better spread than made a piece of its own.
    if (way.items_per_thread > 0) return left < (1 + kLeastRoom) * wanted ? left : wanted;
    return left / std::max(1.0, std::ceil(left / wanted - kRest));
  }

  /// Parts of the heads: at least as many as wanted, and no fewer than their states need.
  int64_t head_parts(const Block& block, double wanted) const {
    if (wanted <= static_cast<double>(block.parts)) return block.parts;
    auto parts = static_cast<int64_t>(
        std::ceil(std::min<double>(wanted, static_cast<double>(shape_.kv_heads))));
    while (shape_.kv_heads % parts != 0) ++parts;
    return parts;
  }

  /// End of the chunk that begins with unit `first`, ends by `units` and takes about `seconds`.
  int64_t chunk_end(const Block& block, int64_t first, int64_t units, double seconds) const {
    if (block.parts > 1 && units - first > most_units_) {
      // Evenly, so that no small rest remains.
      const int64_t chunks = (units - first + most_units_ - 1) / most_units_;
      units = first + (units - first + chunks - 1) / chunks;
    }
    if (block.unit_rows < 0) {
      const double unit = seconds_of(block, 0, 1);
      return std::clamp<int64_t>(first + static_cast<int64_t>(std::ceil(seconds / unit)), first + 1,
                                 units);
    }
    // Up to the unit whose middle passes the mark.
    int64_t last = first;
    double cost = 0;
    while (last < units) {
      const double unit = seconds_of(block, last, last + 1);
      if (last > first && cost + unit / 2 > seconds) break;
      cost += unit;
      ++last;
    }
    return last;
  }

  void emit(WorkItem& item, int64_t parts) {
    const int64_t m = query_rows(item.rows());
    for (int64_t p = 0; p < parts; ++p) {
      item.head_begin = static_cast<int32_t>(shape_.kv_heads * p / parts);
      item.head_end = static_cast<int32_t>(shape_.kv_heads * (p + 1) / parts);
      plan_.max_states = std::max(plan_.max_states, m * (item.head_end - item.head_begin));
      plan_.items.push_back(item);
    }
    plan_.max_bias_rows = std::max(plan_.max_bias_rows, m);
  }

  void add_empty_rows() {
    WorkItem item;
    item.row_begin = static_cast<uint32_t>(plan_.row_index.size());
    for (int32_t r = 0; r < plan_.forest.rows; ++r) {
      if (plan_.results[r] == 0) {
        plan_.row_index.push_back(static_cast<uint32_t>(r));
      }
    }
    item.row_end = static_cast<uint32_t>(plan_.row_index.size());
    if (item.rows() > 0) plan_.items.push_back(item);
  }

  Plan& plan_;
  const CostModel& costs_;
  const BlockCosts block_costs_;
  const HeadShape shape_;
  const int32_t threads_;
  int64_t unit_ = kRowsUnit;        ///< slots
  int64_t most_units_ = INT64_MAX;  ///< of a chunk whose heads are not all in one item
  double total_ = 0;                ///< seconds of all blocks, uncut
  double left_ = 0;                 ///< of what is not yet cut, tails apart
  bool parts_matter_ = false;       ///< whether more head_parts would make a difference
  double busy_ = 0;                 ///< of all items as cut, and of merging
  double longest_ = 0;              ///< of one item
  double size_ = 0;                 ///< of items that are all alike
  double room_ = 0;                 ///< left in the one that is being filled
};

}  // namespace

double item_seconds(const CostModel& costs, const WorkItem& item, const HeadShape& shape) {
  const double heads = item.head_end - item.head_begin;
  const double states = static_cast<double>(item.rows()) * shape.group();
  const double partials = static_cast<double>(item.partial_rows) * shape.group();
  return costs.item + heads * (states * costs.state + partials * costs.store) +
         costs.kv_seconds(item.few, heads, item.slots, item.row_slots);
}

double merge_seconds(const CostModel& costs, const HeadShape& shape) {
  return shape.group() * costs.merge;
}

void cut_plan(Plan& plan, const Forest& forest, const PlanOptions& options,
              const CostModel& costs) {
  Planner(plan, forest, options, costs).run();
}

}  // namespace relay
