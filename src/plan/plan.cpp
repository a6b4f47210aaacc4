#include "plan/plan.h"

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>

#include "kernels/kernels.h"
#include "relay/state.h"

namespace relay {
namespace {

using kernels::padded_dim;

/// Queries and outputs of one KV head stay in the second-level cache while its KV streams by; rows
/// beyond that are another item, which reads the KV again.
constexpr int64_t kStateBytes = 512 * 1024;
/// Heads share an item while their queries and outputs together are this small: reading a slot's
/// heads in one run gains less than a crowded cache costs (measured: 96 KiB beats 192 to 512 by
/// 10 to 40 % for 32 to 128 query rows).
constexpr int64_t kHeadsStateBytes = 96 * 1024;
/// Items per thread to aim at: enough to even out the threads, few enough to keep merging small.
constexpr int kItemsPerThread = 16;
/// Shortest chunks worth a partial result of their own.
constexpr int64_t kMinChunkFew = 2 * kTileSlots;
constexpr int64_t kMinChunkMany = 4 * kTileSlots;

/// Estimated time of one slot of one KV head for `query_rows` (rows x group), in units of the time
/// of one f32 multiply-add lane group. Reading costs what it costs at memory speed; unpacking adds
/// a pass over the tile; arithmetic grows with the rows.
double slot_cost(const HeadShape& shape, int64_t query_rows, bool few) {
  const double elements = shape.qk_dim + shape.v_dim;
  return elements * ((few ? 3.0 : 5.0) + static_cast<double>(query_rows));
}

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

class Planner {
 public:
  Planner(Plan& plan, const Forest& forest, const PlanOptions& options) : plan_(plan) {
    plan_.options = options;
    plan_.forest = forest;
    plan_.row_index.assign(forest.row_index.begin(), forest.row_index.end());
    plan_.items.clear();
    plan_.partial_of.clear();
    plan_.max_states = 0;
    plan_.max_bias_rows = 0;
    const HeadShape& s = options.shape;
    const int64_t state = int64_t{4} * (padded_dim(s.qk_dim) + padded_dim(s.v_dim));
    rows_at_once_ = std::max<int64_t>(1, kStateBytes / state / s.group());
    states_together_ = kHeadsStateBytes / state;
    // Tiled KV needs no unpacking: one kernel serves any number of rows.
    few_rows_ = options.layout == KvLayout::kTiles ? 0 : kernels::active().few_rows;
  }

  void run() {
    double total = 0;
    for (const Segment& s : plan_.forest.segments) {
      const int64_t m = int64_t{s.rows()} * shape().group();
      total +=
          static_cast<double>(s.slots) * shape().kv_heads * slot_cost(shape(), m, m <= few_rows_);
    }
    target_ = total / (plan_.options.threads * kItemsPerThread);
    for (size_t i = 0; i < plan_.forest.segments.size(); ++i) cut(static_cast<uint32_t>(i));
    place_partials();
    add_empty_rows();
    // Longest first: what comes last is short, so threads finish near together. Ties by place,
    // since a stable sort would allocate.
    std::sort(plan_.items.begin(), plan_.items.end(), [](const WorkItem& a, const WorkItem& b) {
      return a.cost != b.cost ? a.cost > b.cost
                              : std::tie(a.partials, a.head_begin, a.row_begin) <
                                    std::tie(b.partials, b.head_begin, b.row_begin);
    });
  }

 private:
  const HeadShape& shape() const { return plan_.options.shape; }

  /// Cuts a segment by rows (only as far as their state must fit), then by heads and slots.
  void cut(uint32_t index) {
    const Segment segment = plan_.forest.segments[index];
    const int64_t tiles = (segment.rows() + rows_at_once_ - 1) / rows_at_once_;
    const int64_t rows_each = (segment.rows() + tiles - 1) / tiles;
    for (uint32_t row = segment.row_begin; row < segment.row_end; row += rows_each) {
      WorkItem item;
      item.segment = index;
      item.row_begin = row;
      item.row_end = std::min<uint32_t>(segment.row_end, row + rows_each);
      cut_tile(segment, item);
    }
  }

  void cut_tile(const Segment& segment, WorkItem item) {
    const int64_t query_rows = int64_t{item.rows()} * shape().group();
    item.few = query_rows <= few_rows_;
    const double per_slot = slot_cost(shape(), query_rows, item.few);
    const double per_head = per_slot * static_cast<double>(segment.slots);
    // Heads stay together as far as their states fit, since a slot's heads lie side by side in
    // memory and are read fastest in one go; slots are cut next; heads again where slots run out.
    const int64_t heads_that_fit =
        std::clamp<int64_t>(states_together_ / query_rows, 1, shape().kv_heads);
    const double wanted = target_ > 0 ? per_head * shape().kv_heads / target_ : 1;
    const int64_t min_chunk = item.few ? kMinChunkFew : kMinChunkMany;
    int64_t head_parts = (shape().kv_heads + heads_that_fit - 1) / heads_that_fit;
    const int64_t chunks = std::clamp<int64_t>(
        static_cast<int64_t>(std::ceil(wanted / static_cast<double>(head_parts))), 1,
        std::max<int64_t>(1, segment.slots / min_chunk));
    head_parts = std::clamp<int64_t>(std::llround(wanted / chunks), head_parts, shape().kv_heads);
    const int64_t chunk = round_up((segment.slots + chunks - 1) / chunks, kTileSlots);
    uint32_t span = segment.span_begin;
    int64_t offset = 0;
    for (int64_t first = 0; first < segment.slots; first += chunk) {
      item.slots = std::min(chunk, segment.slots - first);
      item.span = span;
      item.span_offset = offset;
      // One partial per row for the chunk, whichever item computes which heads of it.
      item.partials = static_cast<uint32_t>(plan_.partial_of.size());
      plan_.partial_of.resize(plan_.partial_of.size() + item.rows());
      for (int64_t p = 0; p < head_parts; ++p) {
        item.head_begin = static_cast<int32_t>(shape().kv_heads * p / head_parts);
        item.head_end = static_cast<int32_t>(shape().kv_heads * (p + 1) / head_parts);
        if (item.head_begin == item.head_end) continue;
        const int64_t heads = item.head_end - item.head_begin;
        item.cost = per_slot * static_cast<double>(item.slots * heads);
        plan_.max_states = std::max(plan_.max_states, query_rows * heads);
        plan_.max_bias_rows = std::max(plan_.max_bias_rows, query_rows);
        plan_.items.push_back(item);
      }
      int64_t left = item.slots;  // advance to the next chunk's first slot
      while (left > 0) {
        const int64_t here = plan_.forest.spans[span].count - offset;
        const int64_t step = std::min(left, here);
        left -= step;
        offset += step;
        if (offset == plan_.forest.spans[span].count) {
          ++span;
          offset = 0;
        }
      }
    }
  }

  /// Numbers the partials row by row, in the order of the items as cut.
  void place_partials() {
    const auto rows = static_cast<size_t>(plan_.forest.rows);
    plan_.partial_begin.assign(rows + 1, 0);
    const auto each_chunk = [&](auto visit) {
      uint32_t seen = UINT32_MAX;
      for (const WorkItem& item : plan_.items) {
        if (item.partials == seen) continue;  // further heads of the same chunk
        seen = item.partials;
        visit(item);
      }
    };
    each_chunk([&](const WorkItem& item) {
      for (uint32_t i = item.row_begin; i < item.row_end; ++i) {
        ++plan_.partial_begin[plan_.row_index[i] + 1];
      }
    });
    // A lone result needs no partial: mark the row by giving it none.
    plan_.next_partial.assign(rows, Plan::kDirect);
    for (size_t r = 0; r < rows; ++r) {
      uint32_t& end = plan_.partial_begin[r + 1];
      if (end == 0) plan_.next_partial[r] = Plan::kDirect - 1;  // attends nothing
      if (end <= 1) end = 0;
      end += plan_.partial_begin[r];
      if (end > plan_.partial_begin[r]) plan_.next_partial[r] = plan_.partial_begin[r];
    }
    plan_.partials = plan_.partial_begin[rows];
    each_chunk([&](const WorkItem& item) {
      for (uint32_t i = 0; i < item.rows(); ++i) {
        uint32_t& next = plan_.next_partial[plan_.row_index[item.row_begin + i]];
        plan_.partial_of[item.partials + i] = next;
        if (next != Plan::kDirect) ++next;
      }
    });
  }

  void add_empty_rows() {
    WorkItem item;
    item.row_begin = static_cast<uint32_t>(plan_.row_index.size());
    for (int32_t r = 0; r < plan_.forest.rows; ++r) {
      if (plan_.next_partial[r] == Plan::kDirect - 1) {
        plan_.row_index.push_back(static_cast<uint32_t>(r));
      }
    }
    item.row_end = static_cast<uint32_t>(plan_.row_index.size());
    if (item.rows() > 0) plan_.items.push_back(item);
  }

  Plan& plan_;
  double target_ = 0;
  int64_t rows_at_once_ = 0;
  int64_t states_together_ = 0;  ///< (query row, KV head) pairs of one item
  int64_t few_rows_ = 0;
};

void check_options(const PlanOptions& options) {
  const auto fail = [](const std::string& what) { throw Error("plan: " + what); };
  const HeadShape& s = options.shape;
  if (s.q_heads < 1 || s.kv_heads < 1 || s.q_heads % s.kv_heads != 0) {
    fail("q_heads (" + std::to_string(s.q_heads) + ") must be a positive multiple of kv_heads (" +
         std::to_string(s.kv_heads) + ")");
  }
  if (s.group() > kMaxGroup) fail("more than 1024 query heads share a KV head");
  if (s.qk_dim < 1 || s.qk_dim > 1024 || s.v_dim < 1 || s.v_dim > 1024) {
    fail("head sizes must be 1 to 1024");
  }
  if ((options.k_type == DType::kQ8_0 && s.qk_dim % 32 != 0) ||
      (options.v_type == DType::kQ8_0 && s.v_dim % 32 != 0)) {
    fail("q8_0 needs head sizes that are multiples of 32");
  }
  if (options.layout == KvLayout::kTiles) {
    if (options.k_type != options.v_type ||
        (options.k_type != DType::kF32 && options.k_type != DType::kF16 &&
         options.k_type != DType::kBF16)) {
      fail("tiled KV is f32, f16 or bf16, the same for K and V");
    }
    if (s.qk_dim % 16 != 0 || s.v_dim % 16 != 0) {
      fail("tiled KV needs head sizes that are multiples of 16");
    }
  }
  if (options.threads < 1) fail("threads must be positive");
}

/// The promises of a forest that planning relies on; relay::validate() also checks disjointness.
void check_ranges(const Forest& f, KvLayout layout) {
  for (const Segment& s : f.segments) {
    if (s.span_begin >= s.span_end || s.span_end > f.spans.size() || s.row_begin >= s.row_end ||
        s.row_end > f.row_index.size() ||
        (s.visibility == Visibility::kPositions &&
         f.positions.size() != static_cast<size_t>(f.rows))) {
      throw Error("plan: the forest is invalid (relay::validate tells where)");
    }
    int64_t slots = 0;
    for (const Span& span : f.spans_of(s)) {
      if (span.count <= 0 || span.slot < 0) throw Error("plan: the forest has a bad span");
      if (layout == KvLayout::kTiles && (span.slot % kTileSlots != 0 || slots % kTileSlots != 0)) {
        throw Error("plan: with tiled KV a segment consists of whole tiles, the last one apart");
      }
      slots += span.count;
    }
    if (slots != s.slots) throw Error("plan: a segment's slots are not the sum of its spans");
  }
  for (uint32_t row : f.row_index) {
    if (row >= static_cast<uint32_t>(f.rows)) throw Error("plan: the forest lists a row too many");
  }
}

}  // namespace

void PlanDeleter::operator()(Plan* plan) const { delete plan; }

PlanPtr make_plan(const Forest& forest, const PlanOptions& options) {
  PlanPtr plan(new Plan);
  remake_plan(*plan, forest, options);
  return plan;
}

void remake_plan(Plan& plan, const Forest& forest, const PlanOptions& options) {
  check_options(options);
  check_ranges(forest, options.layout);
  Planner(plan, forest, options).run();
}

WorkspaceLayout layout_of(const Plan& plan) {
  const HeadShape& s = plan.options.shape;
  WorkspaceLayout layout;
  layout.partial_states = plan.partials * s.q_heads;
  layout.partial_floats = layout.partial_states * padded_dim(s.v_dim);
  layout.counters = int64_t{plan.forest.rows} * s.kv_heads;
  int64_t at = 0;
  const auto take = [&at](int64_t floats) {
    const int64_t offset = at;
    at += round_up(floats, 16);
    return offset;
  };
  layout.q = take(plan.max_states * padded_dim(s.qk_dim));
  // One more vector than states: the merge accumulates there.
  layout.o = take((plan.max_states + 1) * padded_dim(s.v_dim));
  layout.max = take(plan.max_states);
  layout.sum = take(plan.max_states);
  layout.bias = take(plan.max_bias_rows * kTileSlots);
  const int64_t k = plan.options.k_type == DType::kCustom ? padded_dim(s.qk_dim) : 0;
  const int64_t v = plan.options.v_type == DType::kCustom ? padded_dim(s.v_dim) : 0;
  layout.unpacked = take((k + v) * kTileSlots);
  layout.kernel = take(kernels::scratch_floats(s.qk_dim, s.v_dim));
  layout.thread_floats = at;
  return layout;
}

int64_t WorkspaceLayout::bytes(int32_t threads) const {
  return 4 * (partial_floats + threads * thread_floats + counters) +
         static_cast<int64_t>(sizeof(SoftmaxState)) * partial_states;
}

const PlanOptions& options_of(const Plan& plan) { return plan.options; }

PlanSummary summarize(const Plan& plan) {
  const HeadShape& s = plan.options.shape;
  PlanSummary summary;
  summary.items = static_cast<int64_t>(plan.items.size());
  summary.partials = plan.partials * s.q_heads;
  summary.workspace_bytes = layout_of(plan).bytes(plan.options.threads);
  double head_slots = 0;
  for (const WorkItem& item : plan.items) {
    head_slots += static_cast<double>(item.slots) * (item.head_end - item.head_begin);
  }
  summary.kv_slots_read = std::llround(head_slots / s.kv_heads);
  summary.kv_slots_attended = plan.forest.slots_attended();
  summary.flops =
      2.0 * static_cast<double>(summary.kv_slots_attended) * s.q_heads * (s.qk_dim + s.v_dim);
  return summary;
}

}  // namespace relay
