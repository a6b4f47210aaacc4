// The planner on the host: random batches of prefix trees, every plan checked row by row against
// what batch and shape say.
#include "cuda/plan/planner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "core/random.h"
#include "cuda/plan/pieces.h"

namespace relay::cuda {
namespace {

using test::Random;

/// One thread; kReverse: in the other order, which no plan may depend on.
template <bool kReverse>
struct HostTeam {
  template <typename F>
  void each(int n, F f) {
    for (int i = 0; i < n; ++i) f(kReverse ? n - 1 - i : i);
  }
  template <int kArrays>
  void scan(int32_t* const (&arrays)[kArrays], int32_t n, int32_t* sums) {
    for (int a = 0; a < kArrays; ++a) {
      sums[a] = 0;
      for (int i = 0; i < n; ++i) sums[a] += std::exchange(arrays[a][i], sums[a]);
    }
  }
  bool any(bool b) { return b; }
  template <int kValues>
  void sum(int32_t (&)[kValues]) {}
  template <int kValues>
  void greatest(int32_t (&)[kValues]) {}
  void min(int32_t* p, int32_t v) { *p = std::min(*p, v); }
  void max(int32_t* p, int32_t v) { *p = std::max(*p, v); }
  void add(int32_t* p, int32_t v) { *p += v; }
  void set_bits(uint32_t* p, uint32_t v) { *p |= v; }
};

struct Batch {
  PlanShape shape{};
  int32_t tail = 5;  ///< portions of it for each worker, at most
  std::vector<int32_t> starts{0};
  std::vector<int32_t> lengths;
  std::vector<std::vector<int32_t>> ids;  ///< blocks of each request
  std::vector<int32_t> table;

  int32_t requests() const { return static_cast<int32_t>(lengths.size()); }
  int32_t rows(int32_t i) const { return starts[i + 1] - starts[i]; }
  PlanBatch view() const {
    return {requests(), starts.data(), lengths.data(), table.data(), shape.max_blocks};
  }
  void add(int32_t rows, int32_t length, std::vector<int32_t> blocks) {
    starts.push_back(starts.back() + rows);
    lengths.push_back(length);
    ids.push_back(std::move(blocks));
  }
  /// Fresh ids up to the request's length.
  void fill(std::vector<int32_t>& blocks, int32_t length) {
    while (static_cast<int32_t>(blocks.size()) * shape.block_size < length) {
      blocks.push_back(shape.cache_blocks++);
    }
  }
  /// Limits as the operator sets them; the table is written.
  void finish(int32_t spare = 0) {
    PlanShape& s = shape;
    s.q_heads = s.kv_heads * s.group;
    s.max_requests = requests() + spare;
    s.max_rows = starts.back() + spare;
    for (const auto& blocks : ids) {
      s.max_blocks = std::max(s.max_blocks, static_cast<int32_t>(blocks.size()) + spare);
    }
    s.min_shared_blocks = ceil_div(64, s.block_size);
    s.max_portions = s.workers * (1 + tail);
    s.max_segments = static_cast<int32_t>(PlannerScratch::max_segments(s));
    const int32_t sharing = std::min(s.max_rows, s.max_requests * rows_per_tile(s));
    s.max_row_index = sharing * kMaxParts;
    table.assign(int64_t{requests()} * s.max_blocks, -1);
    for (int32_t i = 0; i < requests(); ++i) {
      std::copy(ids[i].begin(), ids[i].end(), table.begin() + int64_t{i} * s.max_blocks);
    }
  }
};

/// What plan_kernels.cu finds in the block tables.
void find_runs(const Batch& b, std::vector<int32_t>& counts, std::vector<Run>& runs) {
  const PlanShape& s = b.shape;
  const PlanBatch batch = b.view();
  counts.assign(b.requests(), 0);
  runs.assign(int64_t{b.requests()} * kMaxRuns, Run{});
  const auto columns = [&](int32_t i) -> std::pair<int32_t, int32_t> {
    const RequestShape r = request_shape(s, batch, i);
    if (!sharable(s, r.rows) || r.faults != 0) return {0, 0};
    return {r.first / s.block_size, r.length / s.block_size};
  };
  const auto id = [&](int32_t i, int32_t column) {
    return b.table[int64_t{i} * s.max_blocks + column];
  };
  for (int32_t i = 0; i < b.requests(); ++i) {
    const auto [begin, end] = columns(i);
    const auto owner = [&](int32_t column) {
      int32_t best = i;
      for (int32_t j = 0; j < b.requests() && id(i, column) >= 0; ++j) {
        const auto [from, to] = columns(j);
        if (column < from || column >= to || id(j, column) != id(i, column)) continue;
        if (owner_key(to, j) > owner_key(columns(best).second, best)) best = j;
      }
      return best;
    };
    for (int32_t at = begin; at < end && counts[i] < kMaxRuns;) {
      Run run{at, at, owner(at), i};
      while (run.end < end && owner(run.end) == run.owner) ++run.end;
      at = run.end;
      const int32_t raster = s.window / (4 * s.block_size);
      if (raster > 1) run.begin = ceil_div(run.begin, raster) * raster;
      if (run.owner == i || run.end - run.begin < s.min_shared_blocks) continue;
      runs[i * kMaxRuns + counts[i]++] = run;
    }
  }
}

/// A plan and its memory, of the sizes that the operator provides.
struct HostPlan {
  PlanHeader header{};
  std::vector<Segment> segments;
  std::vector<int32_t> row_index;
  std::vector<RowInfo> rows;
  std::vector<RequestInfo> requests;
  std::vector<RequestPart> parts;
  std::vector<Cut> cuts;
  std::vector<Segment> begins;

  template <bool kReverse = false>
  static HostPlan make(const Batch& b) {
    HostPlan p;
    PlanShape shape = b.shape;
    const auto garbage = [](auto& v, int64_t count) {
      v.resize(count);
      if (count > 0) std::memset(v.data(), 0x7b, count * sizeof(v[0]));
    };
    garbage(p.segments, shape.max_segments);
    garbage(p.row_index, shape.max_row_index);
    garbage(p.rows, shape.max_rows);
    garbage(p.requests, shape.max_requests);
    garbage(p.parts, int64_t{shape.max_requests} * kMaxParts);
    garbage(p.cuts, shape.max_portions + 1);
    garbage(p.begins, shape.max_portions);
    shape.max_requests = std::max(1, b.requests());  // scratch is laid out for the batch
    std::vector<char> memory;
    garbage(memory, PlannerScratch::lay_out(shape, nullptr, nullptr));
    PlannerScratch scratch{};
    PlannerScratch::lay_out(shape, memory.data(), &scratch);
    std::vector<int32_t> counts;
    std::vector<Run> runs;
    find_runs(b, counts, runs);
    HostTeam<kReverse> team;
    const PlanBatch batch = b.view();
    const PlanView view = p.view();
    Planner<HostTeam<kReverse>>(team, shape, batch, scratch, view).plan(counts.data(), runs.data());
    return p;
  }

  /// Without lists of pieces.
  PlanView view() {
    return {&header,      segments.data(), row_index.data(), rows.data(), requests.data(),
            parts.data(), cuts.data(),     begins.data(),    nullptr,     nullptr};
  }

  /// Where the rows of request i are, for its row `local`.
  std::vector<RequestPart> parts_of(int32_t i, int32_t local) const {
    const RequestInfo& info = requests[i];
    if (info.rows_per_segment > 0) {
      const int32_t k = info.segment + local / info.rows_per_segment;
      return {{k, local % info.rows_per_segment}};
    }
    std::vector<RequestPart> result(parts.begin() + i * kMaxParts,
                                    parts.begin() + i * kMaxParts + info.parts);
    for (RequestPart& part : result) part.row += local;
    return result;
  }

  /// The query row that is row r of segment k.
  int32_t row_of(int32_t k, int32_t r) const {
    const Segment& g = segments[k];
    return g.first_row < 0 ? row_index[g.row_begin + r] : g.first_row + r;
  }
};

template <typename T>
bool same(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// --- What is true of every plan
// -------------------------------------------------------------------

/// Every index is in its range, whatever the batch was.
void check_ranges(const Batch& b, const HostPlan& p) {
  const PlanShape& s = b.shape;
  ASSERT_GE(p.header.segments, 0);
  ASSERT_LE(p.header.segments, s.max_segments);
  ASSERT_GE(p.header.rows, 0);
  ASSERT_LE(p.header.rows, s.max_rows);
  for (int32_t k = 0; k < p.header.segments; ++k) {
    const Segment& g = p.segments[k];
    ASSERT_TRUE(g.request >= 0 && g.request < b.requests()) << k;
    ASSERT_TRUE(g.first >= 0 && g.slots >= 0) << k;
    ASSERT_LE(int64_t{g.first} + g.slots, int64_t{s.max_blocks} * s.block_size) << k;
    ASSERT_GT(g.rows, 0) << k;
    if (g.first_row < 0) {
      ASSERT_TRUE(g.row_begin >= 0 && g.row_begin + g.rows <= s.max_row_index) << k;
    }
    ASSERT_EQ(g.steps, ceil_div(g.slots, s.tile_slots)) << k;
    ASSERT_EQ(g.row_tiles, ceil_div(g.rows * s.group, s.tile_rows)) << k;
    for (int32_t r = 0; r < g.rows; ++r) {
      const int32_t row = p.row_of(k, r);
      ASSERT_TRUE(row >= 0 && row < p.header.rows) << k << " row " << row;
    }
  }
  for (int32_t row = 0; row < p.header.rows; ++row) {
    // What merging looks up.
    const int32_t i = p.rows[row].request;
    ASSERT_TRUE(i >= 0 && i < b.requests()) << row;
    ASSERT_TRUE(p.requests[i].parts >= 0 && p.requests[i].parts <= kMaxParts) << i;
    for (const RequestPart& at : p.parts_of(i, row - p.requests[i].row_begin)) {
      ASSERT_TRUE(at.segment >= 0 && at.segment < p.header.segments) << row;
      const Segment& g = p.segments[at.segment];
      ASSERT_TRUE(at.row >= 0 && at.row < g.rows) << row;
    }
  }
}

void check_rows(const Batch& b, const HostPlan& p) {
  const PlanShape& s = b.shape;
  std::vector<int32_t> max_lo(p.header.segments, 0);
  std::vector<int32_t> min_lo(p.header.segments, INT_MAX);
  std::vector<int32_t> min_hi(p.header.segments, INT_MAX);
  std::vector<bool> only_part(p.header.segments, true);
  std::vector<std::vector<bool>> listed;  // of each segment's rows
  for (int32_t k = 0; k < p.header.segments; ++k) listed.emplace_back(p.segments[k].rows, false);
  for (int32_t i = 0; i < b.requests(); ++i) {
    for (int32_t local = 0; local < b.rows(i); ++local) {
      const int32_t row = b.starts[i] + local;
      SCOPED_TRACE(testing::Message() << "request " << i << " row " << row);
      const int32_t position = b.lengths[i] - b.rows(i) + local;
      const int32_t lo = s.window > 0 ? std::max(0, position - s.window + 1) : 0;
      const int32_t hi = s.causal ? position + 1 : b.lengths[i];
      const RowInfo& info = p.rows[row];
      ASSERT_EQ(info.request, i);
      ASSERT_EQ(info.position, position);
      ASSERT_EQ(info.lo, lo);
      ASSERT_EQ(info.hi, hi);
      const std::vector<RequestPart> parts = p.parts_of(i, local);
      int32_t end = 0;    // of the part before
      int32_t seen = lo;  // what the row sees is covered up to here
      for (const RequestPart& at : parts) {
        const Segment& g = p.segments[at.segment];
        ASSERT_EQ(p.row_of(at.segment, at.row), row);
        ASSERT_FALSE(listed[at.segment][at.row]);
        listed[at.segment][at.row] = true;
        ASSERT_GE(g.first, end);
        end = g.first + g.slots;
        if (g.first < hi && end > lo) {
          ASSERT_EQ(std::max(g.first, lo), seen);
          seen = std::min(end, hi);
        }
        for (int32_t c = g.first / s.block_size; c * s.block_size < end; ++c) {
          ASSERT_EQ(b.table[int64_t{g.request} * s.max_blocks + c],
                    b.table[int64_t{i} * s.max_blocks + c]);
        }
        ASSERT_TRUE(g.shared != 0 || g.request == i);
        max_lo[at.segment] = std::max(max_lo[at.segment], lo);
        min_lo[at.segment] = std::min(min_lo[at.segment], lo);
        min_hi[at.segment] = std::min(min_hi[at.segment], hi);
        if (parts.size() != 1) only_part[at.segment] = false;
      }
      ASSERT_EQ(seen, hi);
      ASSERT_LE(end, b.lengths[i]);
    }
  }
  std::map<int64_t, int64_t> partials;  // from, to
  for (int32_t k = 0; k < p.header.segments; ++k) {
    const Segment& g = p.segments[k];
    SCOPED_TRACE(testing::Message() << "segment " << k);
    ASSERT_EQ(g.shared != 0, k < p.header.shared_segments);
    for (int32_t r = 0; r < g.rows; ++r) ASSERT_TRUE(listed[k][r]);
    ASSERT_EQ(g.seen_from, min_lo[k]);
    ASSERT_EQ(std::max(0, g.visible_from), max_lo[k]);
    ASSERT_EQ(g.visible_to, min_hi[k]);
    if (g.partial_base < 0) {
      ASSERT_EQ(g.partial_base, -1);
      ASSERT_TRUE(only_part[k]);
    } else {
      partials[g.partial_base] = g.partial_base + int64_t{g.rows} * s.q_heads;
    }
  }
  int64_t used = 0;
  size_t with_partials = 0;
  for (const auto& [from, to] : partials) {
    ASSERT_GE(from, used);
    used = to;
  }
  for (int32_t k = 0; k < p.header.segments; ++k) with_partials += p.segments[k].partial_base >= 0;
  ASSERT_EQ(with_partials, partials.size());
  ASSERT_LE(used, s.partial_capacity);
  ASSERT_LE(p.header.partial_rows, s.partial_capacity);
}

int32_t products(const PlanShape& s, const Segment& g) {
  const int32_t rows = g.rows * s.group;
  return rows > 64 ? s.costs.step_128 : (rows > 8 ? s.costs.step_64 : s.costs.step_8);
}

int32_t job_cost(const PlanShape& s, const Segment& g) {
  return s.costs.job + s.costs.rows * ceil_div(g.rows * s.group, std::max(g.row_tiles, 1)) / 16;
}

int32_t reading(const PlanShape& s, const Segment& g) {
  return s.costs.step_memory / std::max(g.row_tiles, 1);
}

/// How long copies of KV take, so that all steps wait long enough for all reading.
int32_t latency(const PlanShape& s, const HostPlan& p) {
  int64_t wanted = 0;
  for (int32_t k = 0; k < p.header.segments; ++k) {
    const Segment& g = p.segments[k];
    const int64_t jobs = int64_t{g.row_tiles} * s.kv_heads;
    wanted += jobs * g.steps * (reading(s, g) - products(s, g)) - jobs * job_cost(s, g) / 2;
  }
  int32_t found = s.costs.latency;
  for (; found < s.costs.depth * s.costs.step_memory; ++found) {
    int64_t waiting = 0;
    for (int32_t k = 0; k < p.header.segments; ++k) {
      const Segment& g = p.segments[k];
      const int64_t steps = int64_t{g.row_tiles} * s.kv_heads * g.steps;
      waiting += steps * std::max(0, found - products(s, g));
    }
    if (waiting >= wanted * s.costs.depth) break;
  }
  return found;
}

int32_t step_cost(const PlanShape& s, const Segment& g, int32_t latency) {
  return products(s, g) + std::max(0, latency - products(s, g)) / s.costs.depth;
}

int32_t job_lead(const PlanShape& s, const Segment& g, int32_t latency) {
  const int32_t waiting = g.steps * (step_cost(s, g, latency) - products(s, g));
  return job_cost(s, g) - std::min(waiting, job_cost(s, g) / 2);
}

/// Cost of all steps before this one.
int64_t cost_before(const PlanShape& s, const HostPlan& p, int32_t step) {
  const int32_t late = latency(s, p);
  int64_t cost = 0;
  for (int32_t k = 0; k < p.header.segments; ++k) {
    const Segment& g = p.segments[k];
    const int32_t steps = std::min(step - g.step_base, g.row_tiles * s.kv_heads * g.steps);
    if (steps > 0) {
      cost += int64_t{ceil_div(steps, g.steps)} * job_lead(s, g, late) +
              int64_t{steps} * step_cost(s, g, late);
    }
  }
  return cost;
}

struct Load {
  int32_t wide = 0;     ///< segments whose tiles have workers of their own
  int32_t tail = 0;     ///< portions that are handed out late
  double worst = 0.0;   ///< largest load of a worker, as a multiple of the mean
  double excess = 0.0;  ///< the same less what snapping explains
};

void check_cuts(const Batch& b, const HostPlan& p, Load& load) {
  const PlanShape& s = b.shape;
  int32_t steps = 0;
  for (int32_t k = 0; k < p.header.segments; ++k) {
    ASSERT_EQ(p.segments[k].step_base, steps) << k;
    steps += p.segments[k].row_tiles * s.kv_heads * p.segments[k].steps;
  }
  ASSERT_EQ(p.header.steps, steps);
  ASSERT_EQ(p.cuts[0].step, 0);
  ASSERT_EQ(p.cuts[p.header.portions].step, steps);
  ASSERT_LE(p.header.workers, p.header.portions);
  ASSERT_LE(p.header.portions, s.max_portions);
  const int32_t workers = p.header.workers;
  if (p.header.portions > workers) {
    ASSERT_EQ(workers, s.workers) << "results of the tail lie behind those of all workers";
  }
  const int32_t written = std::max(s.workers, p.header.portions);
  ASSERT_EQ(p.cuts[written].step, steps);
  for (int32_t w = 0; w < written; ++w) {
    const Cut cut = p.cuts[w];
    ASSERT_LE(cut.step, p.cuts[w + 1].step) << w;
    ASSERT_TRUE(cut.segment >= 0 && cut.segment <= p.header.segments) << w;
    if (cut.segment == p.header.segments) {
      ASSERT_EQ(cut.step, steps) << w;
    } else {
      // Walking forward from there finds the step, which is in it, or at its end.
      const Segment& g = p.segments[cut.segment];
      ASSERT_GE(cut.step, g.step_base) << w;
      ASSERT_LE(cut.step, g.step_base + g.row_tiles * s.kv_heads * g.steps) << w;
      ASSERT_EQ(std::memcmp(&p.begins[w], &g, sizeof(g)), 0) << w;
    }
  }
  if (steps == 0) return;
  // The tail has no place for many results of a job that is cut, and short jobs are not.
  const auto cost_of = [&](int32_t from, int32_t to) {
    return cost_before(s, p, to) - cost_before(s, p, from);
  };
  const int32_t late = p.header.portions - workers;
  const int64_t portion = late > 0 ? cost_of(p.cuts[workers].step, steps) / late : 0;
  int64_t uncut = 0;  // cost of the longest of these
  for (int32_t i = workers; i < p.header.portions; ++i) {
    ASSERT_LT(p.cuts[i].segment, p.header.segments) << i;
    const Segment& g = p.segments[p.cuts[i].segment];
    ASSERT_EQ(g.shared, 0) << i;
    if (g.rows * s.group > kTailRows) {
      ASSERT_EQ((p.cuts[i].step - g.step_base) % g.steps, 0) << i;
    }
    const int64_t whole = g.steps > 0 ? cost_of(g.step_base, g.step_base + g.steps) : 0;
    if (g.rows * s.group > kTailRows || whole < 2 * portion + 2) uncut = std::max(uncut, whole);
  }
  load.tail = late;

  // Wide segments come first. With workers of their own, as many for each tile, all tiles of one
  // are cut in the same places.
  int32_t wide = 0;
  while (wide < p.header.shared_segments && p.segments[wide].row_tiles > 1) ++wide;
  for (int32_t k = wide; k < p.header.shared_segments; ++k) ASSERT_EQ(p.segments[k].row_tiles, 1);
  bool teamed = true;
  std::vector<int32_t> first(wide + 1, 0);                       // worker of each wide segment
  std::vector<std::vector<std::vector<int32_t>>> cuts_of(wide);  // by tile, within it
  for (int32_t k = 0; k < wide; ++k) {
    const Segment& g = p.segments[k];
    const int32_t line = s.kv_heads * g.steps;
    cuts_of[k].resize(g.row_tiles);
    for (int32_t w = 0; w < workers; ++w) {
      const Cut cut = p.cuts[w];
      const int32_t at = cut.step - g.step_base;
      if (at >= 0 && at < g.row_tiles * line) cuts_of[k][at / line].push_back(at % line);
    }
    for (const auto& cuts : cuts_of[k]) {
      teamed &= cuts.size() == cuts_of[k][0].size() && !cuts.empty() && cuts[0] == 0;
    }
    first[k + 1] = first[k] + g.row_tiles * static_cast<int32_t>(cuts_of[k][0].size());
  }
  for (int32_t k = 0; k < wide && teamed; ++k) {
    for (const auto& cuts : cuts_of[k]) ASSERT_EQ(cuts, cuts_of[k][0]) << "segment " << k;
  }
  int32_t snap = 0;  // cost by which a cut may lie off
  for (int32_t k = 0; k < p.header.segments; ++k) {
    const int32_t off = std::min(s.costs.snap, p.segments[k].steps) + 1;
    snap = std::max(snap,
                    off * step_cost(s, p.segments[k], latency(s, p)) + job_cost(s, p.segments[k]));
  }
  load.wide = teamed ? wide : 0;

  // Shares are equal but for snapping: among all, or among a wide segment's and among the others.
  const auto share = [&](int32_t from, int32_t to) {
    return static_cast<double>(cost_before(s, p, p.cuts[to].step) -
                               cost_before(s, p, p.cuts[from].step));
  };
  const double mean = share(0, p.header.portions) / workers;
  std::vector<double> loads;
  for (int32_t w = 0, k = 0; w < workers; ++w) {
    while (k < load.wide && w >= first[k + 1]) ++k;
    const int32_t from = load.wide > 0 ? first[k] : 0;
    const int32_t to = k < load.wide ? first[k + 1] : workers;
    const int64_t rounded = late > 0 && w + 1 == workers ? uncut : 0;
    ASSERT_LE(share(w, w + 1), share(from, to) / (to - from) + 2 * snap + rounded)
        << "worker " << w;
    loads.push_back(share(w, w + 1));
  }
  // Whoever has done first takes the next portion of the tail.
  for (int32_t i = workers; i < p.header.portions; ++i) {
    ASSERT_LE(share(i, i + 1), share(workers, p.header.portions) / load.tail + uncut + 2 * snap)
        << i;
    *std::min_element(loads.begin(), loads.end()) += share(i, i + 1);
  }
  const double most = *std::max_element(loads.begin(), loads.end());
  load.worst = most / mean;
  load.excess = (most - 2 * snap) / mean;
}

void check_plan(const Batch& b, const HostPlan& p, Load& load) {
  ASSERT_EQ(p.header.faults, 0u);
  ASSERT_EQ(p.header.fault_request, INT_MAX);
  ASSERT_EQ(p.header.rows, b.starts.back());
  ASSERT_NO_FATAL_FAILURE(check_ranges(b, p));
  ASSERT_NO_FATAL_FAILURE(check_rows(b, p));
  ASSERT_NO_FATAL_FAILURE(check_cuts(b, p, load));
}

/// No two results lie in the same place, and what goes straight out does so once.
void check_pieces(const Batch& b, const HostPlan& p) {
  const PlanShape& s = b.shape;
  std::set<int32_t> written;  // partial rows
  std::map<std::pair<int32_t, int32_t>, int32_t> direct;
  std::vector<int32_t> steps;
  for (int32_t i = 0; i <= p.header.portions; ++i) steps.push_back(p.cuts[i].step);
  for (int32_t i = 0; i < p.header.portions; ++i) {
    int32_t k = 0;
    for (int32_t at = steps[i]; at < steps[i + 1];) {
      while (at >=
             p.segments[k].step_base + p.segments[k].row_tiles * s.kv_heads * p.segments[k].steps) {
        ++k;
      }
      const Segment& g = p.segments[k];
      const int32_t job = (at - g.step_base) / g.steps;
      const int32_t from = (at - g.step_base) % g.steps;
      const int32_t to = std::min(g.steps, from + steps[i + 1] - at);
      const int32_t kv_head = job % s.kv_heads;
      const int32_t first = job / s.kv_heads * s.tile_rows;
      const int32_t partial =
          partial_row(s, g.rows, g.partial_base, kv_head, first, i, from == 0, to == g.steps);
      const int32_t rows = std::min(s.tile_rows, g.rows * s.group - first);
      ASSERT_TRUE(i < s.workers || partial < 0 || rows <= kTailRows || from == 0) << i;
      for (int32_t m = 0; m < rows; ++m) {
        const int32_t row = p.row_of(k, (first + m) / s.group);
        const int32_t head = kv_head * s.group + (first + m) % s.group;
        if (partial < 0) {
          ++direct[{row, head}];
        } else {
          ASSERT_TRUE(written.insert(partial + m).second) << "portion " << i;
        }
      }
      at += to - from;
    }
  }
  ASSERT_TRUE(written.empty() || *written.rbegin() < all_partial_rows(s));
  for (const auto& [where, times] : direct) ASSERT_EQ(times, 1);
}

/// A wide segment gets a multiple of its tiles in workers: so uneven may that make the shares.
constexpr double kMostOfMean = 1.5;

// --- Batches
// --------------------------------------------------------------------------------------

constexpr PlanCosts kMmaCosts{32, 24, 24, 32, 24, 2, 16, 3, 96, 96, 0, 2};
constexpr PlanCosts kWgmmaCosts{32, 6, 16, 23, 24, 3, 8, 8, 64, 32, 288, 2};

Batch batch_of(int32_t kv_heads, int32_t group) {
  Batch b;
  b.shape.block_size = 16;
  b.shape.kv_heads = kv_heads;
  b.shape.group = group;
  b.shape.causal = 1;
  b.shape.tile_rows = 64;
  b.shape.tile_slots = 64;
  b.shape.workers = 132;
  b.shape.partial_capacity = 1 << 20;
  b.shape.costs = kWgmmaCosts;
  return b;
}

/// Requests under the nodes of a prefix tree, with some blocks of their own in between.
Batch random_batch(Random& random) {
  Batch b = batch_of(static_cast<int32_t>(random.between(1, 8)),
                     static_cast<int32_t>(random.between(1, 8)));
  PlanShape& s = b.shape;
  s.block_size = random.chance(0.5) ? 16 : 32;
  s.causal = random.chance(0.7);
  s.window = random.chance(0.3) ? static_cast<int32_t>(random.log_between(1, 3000)) : 0;
  s.tile_rows = random.chance(0.5) ? 64 : 128;
  s.tile_slots = random.chance(0.5) ? 64 : 128;
  s.workers = static_cast<int32_t>(random.chance(0.4) ? 132 : random.log_between(1, 132));
  b.tail = static_cast<int32_t>(random.between(0, 5));
  if (random.chance(0.3)) s.partial_capacity = static_cast<int32_t>(random.log_between(0, 4000));
  if (random.chance(0.5)) {
    s.costs = kMmaCosts;
    b.tail = 0;  // that path has none
  } else {
    // From KV in fp8 on an H200 to bf16 on an H100.
    s.costs.step_memory = static_cast<int32_t>(random.between(11, 32));
    s.costs.depth = random.chance(0.5) ? 3 : 6;
  }
  std::vector<std::vector<int32_t>> nodes(1);  // the blocks from the root to each node
  std::vector<int32_t> depths(1, 0);
  const auto count = static_cast<int32_t>(random.between(1, 64));
  const double branching = random.uniform();
  for (int32_t i = 0; i < count; ++i) {
    auto node = static_cast<size_t>(random.between(0, static_cast<int64_t>(nodes.size()) - 1));
    if (depths[node] < 4 && (nodes.size() == 1 || random.chance(branching * 0.4))) {
      std::vector<int32_t> blocks = nodes[node];
      const auto more = static_cast<int32_t>(blocks.size() + random.log_between(1, 60));
      b.fill(blocks, more * s.block_size);
      nodes.push_back(std::move(blocks));
      depths.push_back(depths[node] + 1);
      node = nodes.size() - 1;
    }
    std::vector<int32_t> blocks = nodes[node];
    const bool prefill = random.chance(0.06);
    auto rows = static_cast<int32_t>(random.chance(0.7) ? 1 : random.between(0, 6));
    if (prefill) rows = static_cast<int32_t>(random.between(60, 500));
    const auto tail = static_cast<int32_t>(random.log_between(0, 900));
    const auto prefix = static_cast<int32_t>(blocks.size()) * s.block_size;
    const int32_t length = std::max(rows, prefix + tail);
    b.fill(blocks, length);
    // A stretch of another request's blocks, or of fresh ones, in the same columns.
    for (int32_t change = 0; change < 2 && !b.ids.empty() && random.chance(0.3); ++change) {
      const std::vector<int32_t>& other = random.pick(b.ids);
      const auto most = static_cast<int64_t>(std::min(other.size(), blocks.size()));
      const int64_t from = random.between(0, most);
      const int64_t to = random.between(from, most);
      const bool fresh = random.chance(0.5);
      for (int64_t c = from; c < to; ++c) blocks[c] = fresh ? s.cache_blocks++ : other[c];
    }
    b.add(rows, length, std::move(blocks));
  }
  // Blocks before a window may have gone back to the cache.
  for (int32_t i = 0; i < count && s.window > 0; ++i) {
    const int32_t hidden = (b.lengths[i] - b.rows(i) - s.window + 1) / s.block_size;
    for (int32_t c = 0; c < hidden; ++c) b.ids[i][c] = random.chance(0.5) ? -1 : c;
  }
  b.finish(static_cast<int32_t>(random.between(0, 3)));
  return b;
}

TEST(Planner, RandomBatches) {
  int32_t shared = 0;
  int32_t coarser = 0;
  int32_t wide = 0;
  int32_t tail = 0;
  for (uint64_t seed = 1; seed <= 500; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Random random(seed);
    Batch b = random_batch(random);
    HostPlan p = HostPlan::make(b);
    Load load;
    ASSERT_NO_FATAL_FAILURE(check_plan(b, p, load));
    EXPECT_LE(load.excess, kMostOfMean);
    if (seed % 4 == 0) {
      ASSERT_NO_FATAL_FAILURE(check_pieces(b, p));
    }
    const HostPlan other = HostPlan::make<true>(b);
    ASSERT_EQ(std::memcmp(&p.header, &other.header, sizeof(p.header)), 0);
    ASSERT_TRUE(same(p.segments, other.segments) && same(p.row_index, other.row_index) &&
                same(p.rows, other.rows) && same(p.requests, other.requests) &&
                same(p.parts, other.parts) && same(p.cuts, other.cuts) &&
                same(p.begins, other.begins));
    shared += p.header.shared_segments > 0 ? 1 : 0;
    wide += load.wide > 0 ? 1 : 0;
    tail += load.tail > 0 ? 1 : 0;
    // Too little room for partial results: coarser, and still right.
    b.shape.partial_capacity = static_cast<int32_t>(random.between(0, p.header.partial_rows));
    const HostPlan tight = HostPlan::make(b);
    Load ignored;
    ASSERT_NO_FATAL_FAILURE(check_plan(b, tight, ignored));
    coarser += tight.header.partial_rows < p.header.partial_rows ? 1 : 0;
  }
  // The batches are such that there is something to check.
  EXPECT_GE(shared, 100);
  EXPECT_GE(coarser, 100);
  EXPECT_GE(wide, 20);
  EXPECT_GE(tail, 20);
}

// --- Plans that are known
// -------------------------------------------------------------------------

/// `prompts` x `samples` requests of 2 rows under one prefix of 1000 tokens and prompts of 512.
Batch sampled(int32_t prompts, int32_t samples) {
  Batch b = batch_of(8, 8);
  std::vector<int32_t> prefix;
  b.fill(prefix, 992);  // its whole blocks
  for (int32_t i = 0; i < prompts; ++i) {
    std::vector<int32_t> prompt = prefix;
    if (prompts > 1) b.fill(prompt, 992 + 512);
    for (int32_t k = 0; k < samples; ++k) {
      std::vector<int32_t> blocks = prompt;
      const int32_t length = static_cast<int32_t>(prompt.size()) * 16 + 8 + k;
      b.fill(blocks, length);
      b.add(2, length, std::move(blocks));
    }
  }
  b.finish();
  return b;
}

void expect_segment(const Segment& g, int32_t request, int32_t first, int32_t slots, int32_t rows) {
  EXPECT_EQ(g.request, request);
  EXPECT_EQ(g.first, first);
  EXPECT_EQ(g.slots, slots);
  EXPECT_EQ(g.rows, rows);
}

TEST(Planner, OnePrefixIsOneSegment) {
  const Batch b = sampled(1, 64);
  const HostPlan p = HostPlan::make(b);
  Load load;
  ASSERT_NO_FATAL_FAILURE(check_plan(b, p, load));
  ASSERT_EQ(p.header.shared_segments, 1);
  EXPECT_EQ(p.header.segments, 65);
  expect_segment(p.segments[0], 56, 0, 992, 128);  // the first that has a block more
  EXPECT_EQ(p.segments[0].row_tiles, 16);
  EXPECT_EQ(load.wide, 1);
}

TEST(Planner, SamplesOfPromptsAreTwoLevels) {
  const Batch b = sampled(8, 8);
  const HostPlan p = HostPlan::make(b);
  Load load;
  ASSERT_NO_FATAL_FAILURE(check_plan(b, p, load));
  ASSERT_EQ(p.header.shared_segments, 9);
  EXPECT_EQ(p.header.segments, 9 + 64);
  expect_segment(p.segments[0], 0, 0, 992, 128);
  for (int32_t i = 0; i < 8; ++i) expect_segment(p.segments[1 + i], 8 * i, 992, 512, 16);
}

TEST(Planner, RequestsThatShareEverMoreAreOneGroup) {
  for (const bool rising : {true, false}) {
    Batch b = batch_of(8, 4);
    std::vector<int32_t> text;
    b.fill(text, 120 * 16);
    for (int32_t i = 0; i < 6; ++i) {
      const int32_t shared = 20 * (rising ? i + 1 : 6 - i);
      std::vector<int32_t> blocks(text.begin(), text.begin() + shared);
      b.fill(blocks, shared * 16 + 8);
      b.add(1, shared * 16 + 8, std::move(blocks));
    }
    b.finish();
    const HostPlan p = HostPlan::make(b);
    Load load;
    ASSERT_NO_FATAL_FAILURE(check_plan(b, p, load));
    ASSERT_EQ(p.header.shared_segments, 5);
    for (int32_t k = 0; k < 5; ++k) {
      expect_segment(p.segments[k], rising ? 5 : 0, 320 * k, 320, 6 - k);
    }
  }
}

TEST(Planner, LongJobsAreSharedOutEvenly) {
  for (const int32_t requests : {1, 3, 8, 50}) {
    Batch b = batch_of(4, 4);
    for (int32_t i = 0; i < requests; ++i) {
      std::vector<int32_t> blocks;
      const int32_t length = 40000 + 1000 * i;
      b.fill(blocks, length);
      b.add(1, length, std::move(blocks));
    }
    b.finish();
    const HostPlan p = HostPlan::make(b);
    Load load;
    ASSERT_NO_FATAL_FAILURE(check_plan(b, p, load));
    EXPECT_EQ(p.header.workers, 132);
    EXPECT_LE(load.worst, 1.3);
  }
}

/// `requests` of one row over a prefix, each with `own` tokens behind it.
Batch decoding(int32_t requests, int32_t prefix, int32_t own) {
  Batch b = batch_of(8, 4);
  b.shape.tile_rows = 128;
  b.shape.tile_slots = 128;
  std::vector<int32_t> shared;
  b.fill(shared, prefix);
  for (int32_t i = 0; i < requests; ++i) {
    std::vector<int32_t> blocks = shared;
    b.fill(blocks, prefix + own);
    b.add(1, prefix + own, std::move(blocks));
  }
  b.finish();
  return b;
}

TEST(Planner, ShortJobsHaveAWorkerEach) {
  for (const int32_t requests : {1, 8, 16}) {
    const Batch b = decoding(requests, 0, 1);
    const HostPlan p = HostPlan::make(b);
    Load load;
    ASSERT_NO_FATAL_FAILURE(check_plan(b, p, load));
    EXPECT_EQ(p.header.workers, 8 * requests);
    for (int32_t w = 0; w < p.header.workers; ++w) EXPECT_EQ(p.cuts[w].step, w);
  }
}

TEST(Planner, StepsOfManyRowsWaitWhereReadingIsTheBound) {
  // All alike: a step takes as long as reading it does.
  const Batch alone = decoding(128, 0, 4096);
  const HostPlan p = HostPlan::make(alone);
  const PlanCosts& costs = alone.shape.costs;
  Load load;
  ASSERT_NO_FATAL_FAILURE(check_plan(alone, p, load));
  EXPECT_LT(load.worst, 1.2);
  EXPECT_NEAR(step_cost(alone.shape, p.segments[0], latency(alone.shape, p)), costs.step_memory, 1);
  // Beside them, those of a shared prompt keep their room for longer, and so wait as well: whoever
  // has them gets fewer.
  const Batch beside = decoding(128, 1024, 1024);
  const HostPlan q = HostPlan::make(beside);
  ASSERT_NO_FATAL_FAILURE(check_plan(beside, q, load));
  ASSERT_EQ(q.segments[0].rows, 128);
  EXPECT_NEAR(step_cost(beside.shape, q.segments[0], latency(beside.shape, q)),
              costs.step_memory + (costs.depth - 1) * (costs.step_128 - costs.step_8) / costs.depth,
              3);
  EXPECT_LT(load.worst, 1.2);
  // Where there is little else, products are all that it takes.
  const Batch bound = decoding(256, 16384, 128);
  const HostPlan r = HostPlan::make(bound);
  ASSERT_NO_FATAL_FAILURE(check_plan(bound, r, load));
  EXPECT_LT(load.worst, 1.2);
  EXPECT_EQ(step_cost(bound.shape, r.segments[0], latency(bound.shape, r)), costs.step_128);
}

// Costs are added in 32 bits.
TEST(Planner, HugePromptsAreSharedOutEvenly) {
  for (const int32_t rows : {131'072, 196'608}) {
    Batch b = batch_of(8, 8);
    b.shape.costs = kMmaCosts;
    std::vector<int32_t> blocks;
    b.fill(blocks, rows);
    b.add(rows, rows, std::move(blocks));
    b.finish();
    ASSERT_TRUE(fit_costs(b.shape));
    const HostPlan p = HostPlan::make(b);
    ASSERT_NO_FATAL_FAILURE(check_ranges(b, p));
    Load load;
    ASSERT_NO_FATAL_FAILURE(check_cuts(b, p, load));
    EXPECT_EQ(p.header.workers, b.shape.workers);
    EXPECT_LT(load.worst, 1.3);
  }
}

TEST(Planner, LimitsThatFitLeaveCostsAlone) {
  Batch b = batch_of(8, 4);
  PlanShape s = b.shape;
  s.max_requests = 1024;
  s.max_rows = 16'384;
  s.max_blocks = 131'072 / s.block_size;
  ASSERT_TRUE(fit_costs(s));
  EXPECT_EQ(s.costs.step_memory, kWgmmaCosts.step_memory);
  s.max_blocks = 1 << 26;
  s.kv_heads = 128;
  EXPECT_FALSE(fit_costs(s));
}

// Requests that decode over one prompt of 43 blocks, each seeing its last 160 tokens.
TEST(Planner, WindowsShareWhatTheyHaveInCommon) {
  Batch b = batch_of(2, 2);
  b.shape.window = 160;
  int32_t next = 1000;
  for (int32_t i : {0, 1, 3, 4, 6}) {
    const int32_t length = 705 + 9 * i + 23;
    std::vector<int32_t> blocks;
    for (int32_t c = 0; c < ceil_div(length, 16); ++c) blocks.push_back(c < 43 ? c : next++);
    b.add(1, length, blocks);
  }
  b.shape.cache_blocks = next;
  b.finish();
  const HostPlan p = HostPlan::make(b);
  Load load;
  ASSERT_NO_FATAL_FAILURE(check_plan(b, p, load));
  // From where the last window begins. What the others see before it is shared by few of them.
  ASSERT_EQ(p.header.shared_segments, 1);
  expect_segment(p.segments[0], 4, 608, 80, 5);
}

TEST(Planner, NothingToDo) {
  Batch b = batch_of(2, 4);
  for (const int32_t requests : {0, 3}) {
    while (b.requests() < requests) b.add(0, 0, {});
    b.finish(1);
    const HostPlan p = HostPlan::make(b);
    EXPECT_EQ(p.header.segments, 0);
    EXPECT_EQ(p.header.workers, 0);
    for (int32_t w = 0; w <= b.shape.workers; ++w) EXPECT_EQ(p.cuts[w].step, 0);
  }
}

// --- Batches with faults
// --------------------------------------------------------------------------

TEST(Planner, FaultsAreSetAndIndicesStayInRange) {
  for (uint64_t seed = 1; seed <= 400; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    Random random(seed);
    Batch b = random_batch(random);
    const int64_t room = int64_t{b.shape.max_blocks} * b.shape.block_size;
    const auto any = [&] { return random.between(0, b.requests() - 1); };
    const std::vector<int64_t> wrong = {INT_MIN, -1, 0, room + 1, INT_MAX};
    const bool starts = random.chance(0.5);
    for (int64_t n = random.between(1, 6); n > 0; --n) {
      if (starts) {
        b.starts[any() + 1] = static_cast<int32_t>(random.between(-2, b.shape.max_rows + 2));
      } else {
        b.lengths[any()] = static_cast<int32_t>(random.pick(wrong));
      }
    }
    uint32_t faults = 0;
    int32_t first = INT_MAX;
    for (int32_t i = b.requests() - 1; i >= 0; --i) {
      uint32_t fault = 0;
      if (b.starts[i] < 0 || b.rows(i) < 0 || b.starts[i + 1] > b.shape.max_rows) {
        fault = kFaultStarts;
      } else if (b.rows(i) > 0 && (b.lengths[i] < b.rows(i) || b.lengths[i] > room)) {
        fault = kFaultLength;
      }
      faults |= fault;
      if (fault != 0) first = i;
    }
    const HostPlan p = HostPlan::make(b);
    ASSERT_EQ(p.header.faults, faults);
    ASSERT_EQ(p.header.fault_request, first);
    ASSERT_NO_FATAL_FAILURE(check_ranges(b, p));
    Load load;
    ASSERT_NO_FATAL_FAILURE(check_cuts(b, p, load));
  }
}

/// Requests of 256 tokens with these starts, sound or not; limits as for `rows`.
Batch batch_with_starts(std::vector<int32_t> starts, int32_t rows) {
  Batch b = batch_of(1, 8);
  for (size_t i = 0; i + 1 < starts.size(); ++i) {
    std::vector<int32_t> blocks;
    b.fill(blocks, 256);
    b.add(0, 256, std::move(blocks));
  }
  b.starts.back() = rows;
  b.finish();
  b.starts = std::move(starts);
  return b;
}

void expect_fault_starts(const Batch& b) {
  const HostPlan p = HostPlan::make(b);
  EXPECT_EQ(p.header.faults & kFaultStarts, kFaultStarts);
  check_ranges(b, p);
}

TEST(Planner, RowsClaimedTwice) {
  // Row 5 is the first request's, but the last one begins before it, too.
  expect_fault_starts(batch_with_starts({0, 10, 1, 2, 3}, 10));
}

TEST(Planner, RowsOfNobody) { expect_fault_starts(batch_with_starts({4, 8}, 8)); }

TEST(Planner, MoreRowsThanThereIsRoomFor) {
  std::vector<int32_t> starts;
  for (int32_t i = 0; i < 128; ++i) starts.insert(starts.end(), {0, 250});
  expect_fault_starts(batch_with_starts(std::move(starts), 250));
}

}  // namespace
}  // namespace relay::cuda
