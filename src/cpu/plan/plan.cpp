#include "cpu/plan/plan.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>

#include "cpu/kernels/kernels.h"
#include "cpu/plan/cost_model.h"
#include "cpu/plan/merge_tree.h"
#include "cpu/plan/planner.h"
#include "relay/state.h"

namespace relay {
namespace {

using kernels::padded_dim;

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/// No two plannings of a process have the same; 0 is none's.
uint64_t next_serial() {
  static std::atomic<uint64_t> last{0};
  return last.fetch_add(1, std::memory_order_relaxed) + 1;
}

/// The promises of a forest that planning relies on; relay::validate() also checks disjointness.
/// Returns Plan::slots_end.
int64_t check_ranges(const Forest& f, KvLayout layout) {
  int64_t slots_end = 0;
  for (const Segment& s : f.segments) {
    if (s.span_begin >= s.span_end || s.span_end > f.spans.size() || s.row_begin >= s.row_end ||
        s.row_end > f.row_index.size() ||
        (s.visibility == Visibility::kPositions &&
         f.positions.size() != static_cast<size_t>(f.rows))) {
      throw Error("plan: the forest is invalid (relay::validate tells where)");
    }
    int64_t slots = 0;
    for (const Span& span : f.spans_of(s)) {
      if (span.count <= 0 || span.slot < 0 || span.slot > INT64_MAX - span.count) {
        throw Error("plan: the forest has a bad span");
      }
      if (layout == KvLayout::kTiles && (span.slot % kTileSlots != 0 || slots % kTileSlots != 0)) {
        throw Error("plan: with tiled KV a segment consists of whole tiles, the last one apart");
      }
      if (span.count > s.slots - slots) break;  // too many, were they added up
      slots += span.count;
      slots_end = std::max(slots_end, span.slot + span.count);
    }
    if (slots != s.slots) throw Error("plan: a segment's slots are not the sum of its spans");
  }
  for (uint32_t row : f.row_index) {
    if (row >= static_cast<uint32_t>(f.rows)) throw Error("plan: the forest lists a row too many");
  }
  return slots_end;
}

}  // namespace

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
  if (options.k_type == DType::kF8E4M3 || options.v_type == DType::kF8E4M3) {
    fail("f8_e4m3 KV is served on GPUs only");
  }
  if ((options.k_type == DType::kQ8_0 && s.qk_dim % 32 != 0) ||
      (options.v_type == DType::kQ8_0 && s.v_dim % 32 != 0)) {
    fail("q8_0 needs head sizes that are multiples of 32");
  }
  if (options.layout == KvLayout::kTiles) {
    const char* obstacle = obstacle_to_tiles(s, options.k_type, options.v_type);
    if (obstacle != nullptr) fail(obstacle);
  }
  if (options.threads < 1) fail("threads must be positive");
}

void PlanDeleter::operator()(Plan* plan) const { delete plan; }

PlanPtr make_plan(const Forest& forest, const PlanOptions& options) {
  PlanPtr plan(new Plan);
  remake_plan(*plan, forest, options);
  return plan;
}

void remake_plan(Plan& plan, const Forest& forest, const PlanOptions& options) {
  check_options(options);
  remake_plan(plan, forest, options, planning_costs(options));
}

void remake_plan(Plan& plan, const Forest& forest, const PlanOptions& options,
                 const CostModel& costs) {
  check_options(options);
  const int64_t slots_end = check_ranges(forest, options.layout);
  plan.serial = next_serial();  // first: what was fitted to the older plan never runs on a torn one
  plan.slots_end = slots_end;
  cut_plan(plan, forest, options, costs);
}

WorkspaceLayout layout_of(const Plan& plan) {
  const HeadShape& s = plan.options.shape;
  WorkspaceLayout layout;
  layout.partial_states = plan.partials * s.q_heads;
  layout.partial_floats = layout.partial_states * padded_dim(s.v_dim);
  layout.nodes = plan.partials * head_words(s.kv_heads);
  int64_t at = 0;
  const auto take = [&at](int64_t floats) {
    const int64_t offset = at;
    at += round_up(floats, 16);
    return offset;
  };
  layout.q = take(plan.max_states * padded_dim(s.qk_dim));
  layout.o = take(plan.max_states * padded_dim(s.v_dim));
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
  return 4 * (partial_floats + threads * thread_floats) + 8 * nodes +
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
