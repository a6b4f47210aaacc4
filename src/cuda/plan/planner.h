// From the runs that requests share to segments and work: the logic of planning, for a team of
// threads of one thread block, or (tests) one thread of the host.
//
// A Team has
//   each(n, f)   f(0) to f(n - 1) in any order, and a barrier
//   scan(p, n)   exclusive prefix sums in place, of numbers that are not negative; returns the sum
//   scan(p, q, n)  the same for two arrays at once; returns both sums
//   any(b)       whether b holds for any thread of the team
//   min(p, v), max(p, v), add(p, v)  atomic; add returns the old value
//
// Members of a group are the requests that share a run with its *leader*, the request that owns the
// blocks. Where the members' runs end in different places, the group is cut there into segments.
// Everything that a request does not share is a segment of its own.
#pragma once

#include <algorithm>
#include <climits>
#include <initializer_list>
#include <type_traits>

#include "cuda/plan/plan_data.h"

namespace relay::cuda {

/// The planner adds costs in 32 bits: makes their unit coarser until the dearest batch within the
/// limits fits. False if even its steps are too many to be counted.
inline bool fit_costs(PlanShape& shape) {
  const int64_t tiles =
      int64_t{shape.max_requests} + ceil_div(shape.max_rows, rows_per_tile(shape));
  const int64_t steps =
      (int64_t{shape.max_blocks} * shape.block_size + shape.tile_slots - 1) / shape.tile_slots;
  PlanCosts& c = shape.costs;
  for (;;) {
    const int64_t step = std::max({c.step_memory, c.step_8, c.step_64, c.step_128});
    const int64_t job = c.job + int64_t{c.rows} * shape.tile_rows / 16;
    const int64_t of_tile = (steps + kMaxParts) * step + kMaxParts * job;
    if (of_tile <= INT_MAX / (tiles * shape.kv_heads)) return true;
    if (step == 1) return false;
    for (int32_t* cost : {&c.step_memory, &c.step_8, &c.step_64, &c.step_128, &c.job, &c.rows,
                          &c.worker, &c.portion, &c.tail}) {
      *cost = std::max(1, *cost / 2);
    }
  }
}

/// The planner's memory: arrays by request (R), by run (N), by group segment (G) and by segment
/// (S).
struct PlannerScratch {
  static constexpr int32_t kTotals = 6;

  int32_t* rows;          // R
  int32_t* row_begin;     // R
  int32_t* length;        // R, tokens
  int32_t* first;         // R, column
  int32_t* seen_from;     // R, column
  int32_t* run_base;      // R
  int32_t* run_count;     // R
  int32_t* members;       // R, members of the group that it leads
  int32_t* shift;         // R, the group's runs begin and end at multiples of 2^shift blocks
  int32_t* cursor;        // R
  int32_t* next;          // R
  int32_t* bounds_count;  // R
  int32_t* own_count;     // R, segments of its own, of one that may share
  int32_t* tile_count;    // R, and of one that fills tiles
  int32_t* bounds;        // R x (kMaxGroupSegments + 1)
  Run* runs;              // N
  Run* raster;            // N, the same in their groups' rasters
  int32_t* covered;       // G, rows of members
  int32_t* group_id;      // G, number of the segment
  int32_t* visible_from;  // G
  int32_t* visible_to;    // G
  int32_t* group_seen;    // G, first column that any member sees
  int32_t* rows_end;      // G, after the last row of any member
  int32_t* before;        // N x kMaxGroupSegments, rows in the group segments before the run's
  int32_t* sums;          // S
  int32_t* costs;         // S
  int32_t* totals;        // kTotals

  RELAY_HD static int64_t max_segments(const PlanShape& shape) {
    const int64_t tiles = ceil_div(shape.max_rows, rows_per_tile(shape)) + shape.max_requests;
    return int64_t{shape.max_requests} * (2 * kMaxGroupSegments + kMaxRuns + 1) + tiles;
  }

  /// Lays the arrays out from `base` on (null: only counts); returns the bytes.
  RELAY_HD static int64_t lay_out(const PlanShape& shape, char* base, PlannerScratch* s) {
    const int64_t r = shape.max_requests;
    int64_t used = 0;
    const auto take = [&](auto*& p, int64_t count) {
      using T = std::remove_reference_t<decltype(*p)>;
      if (base != nullptr) p = reinterpret_cast<T*>(base + used);
      used += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    };
    PlannerScratch ignored{};
    PlannerScratch& to = s != nullptr ? *s : ignored;
    for (int32_t** p : {&to.rows, &to.row_begin, &to.length, &to.first, &to.seen_from, &to.run_base,
                        &to.run_count, &to.members, &to.shift, &to.cursor, &to.next,
                        &to.bounds_count, &to.own_count, &to.tile_count}) {
      take(*p, r);
    }
    take(to.bounds, r * (kMaxGroupSegments + 1));
    take(to.runs, r * kMaxRuns);
    take(to.raster, r * kMaxRuns);
    for (int32_t** p : {&to.covered, &to.group_id, &to.visible_from, &to.visible_to, &to.group_seen,
                        &to.rows_end}) {
      take(*p, r * kMaxGroupSegments);
    }
    take(to.before, r * kMaxRuns * kMaxGroupSegments);
    take(to.sums, max_segments(shape));
    take(to.costs, max_segments(shape));
    take(to.totals, kTotals);
    return used;
  }
};

template <typename Team>
class Planner {
 public:
  RELAY_HD Planner(Team& team, const PlanShape& shape, const PlanBatch& batch,
                   const PlannerScratch& scratch, const PlanView& out)
      : team_(team), shape_(shape), batch_(batch), s_(scratch), out_(out) {}

  /// `run_counts` [requests] and `runs` [requests][kMaxRuns], or null: nothing is shared.
  RELAY_HD void plan(const int32_t* run_counts, const Run* runs) {
    take_requests(run_counts, runs);
    int32_t least_shift = 0;
    for (;;) {
      find_bounds(least_shift);
      number_segments();
      write_segments();
      if (partial_rows_ <= shape_.partial_capacity || run_total_ == 0) break;
      // More partial results than there is room for: share in coarser pieces, at last not at all.
      least_shift += 1;
      if (least_shift > 24) run_total_ = 0;
    }
    cut();
    write_rows();
    team_.each(batch_.requests, [&](int i) {
      const RequestInfo info = out_.requests[i];
      if (info.rows_per_segment > 0) return;
      for (int p = 0; p < info.parts; ++p) {
        RequestPart& part = out_.parts[i * kMaxParts + p];
        part = part_of(part.segment, part.row, out_.segments[part.segment]);
      }
    });
  }

 private:
  struct Interval {
    int32_t begin;
    int32_t end;
  };

  RELAY_HD void take_requests(const int32_t* run_counts, const Run* runs) {
    const int32_t n = batch_.requests;
    team_.each(1, [&](int) { *out_.header = PlanHeader{}; });
    team_.each(n, [&](int i) {
      const RequestShape r = request_shape(shape_, batch_, i);
      s_.rows[i] = r.rows;
      s_.row_begin[i] = r.row_begin;
      s_.length[i] = r.length;
      s_.first[i] = r.first;
      s_.seen_from[i] = r.seen_from;
      const int32_t count = run_counts != nullptr && sharable(shape_, r.rows) ? run_counts[i] : 0;
      s_.run_count[i] = count;
      s_.run_base[i] = count;
      s_.members[i] = 0;
      if (r.faults != 0) fault(i, r.faults);
      team_.max(&out_.header->rows, r.row_begin + r.rows);
    });
    // Where the starts are wrong, requests may claim each other's rows: then there is nothing to
    // do.
    if (n > 0 && (out_.header->faults & kFaultStarts) != 0) {
      team_.each(n, [&](int i) {
        s_.rows[i] = s_.row_begin[i] = s_.length[i] = 0;
        s_.first[i] = s_.seen_from[i] = 0;
        s_.run_count[i] = s_.run_base[i] = 0;
      });
      team_.each(1, [&](int) { out_.header->rows = 0; });
    }
    run_total_ = team_.scan(s_.run_base, n);
    team_.each(n, [&](int i) {
      for (int k = 0; k < s_.run_count[i]; ++k) {
        const Run run = runs[i * kMaxRuns + k];
        s_.runs[s_.run_base[i] + k] = run;
        team_.add(&s_.members[run.owner], 1);
      }
    });
  }

  RELAY_HD void fault(int32_t request, uint32_t kind) {
    team_.min(&out_.header->fault_request, request);
    team_.set_bits(&out_.header->faults, kind);
  }

  /// A run within its group's raster.
  RELAY_HD Interval rastered(const Run& run) const {
    const int32_t shift = s_.shift[run.owner];
    return {((run.begin + (1 << shift) - 1) >> shift) << shift, (run.end >> shift) << shift};
  }

  /// Where the groups' segments begin and end: the distinct ends of their members' runs, in order.
  /// A group with too many of them, or with segments too short to pay, gets a coarser raster.
  RELAY_HD void find_bounds(int32_t least_shift) {
    const int32_t n = batch_.requests;
    team_.each(n, [&](int i) {
      s_.shift[i] = least_shift;
      s_.bounds_count[i] = 0;
      s_.cursor[i] = run_total_ > 0 && s_.members[i] > 0 ? -1 : INT_MAX;
      s_.next[i] = INT_MAX;
    });
    if (run_total_ == 0) return;
    for (bool more = true; more;) {
      team_.each(run_total_, [&](int k) {
        const Run run = s_.runs[k];
        const int32_t cursor = s_.cursor[run.owner];
        const Interval in = rastered(run);
        if (in.begin >= in.end || in.end <= cursor) return;
        team_.min(&s_.next[run.owner], in.begin > cursor ? in.begin : in.end);
      });
      bool here = false;
      team_.each(n, [&](int i) {
        const int32_t next = s_.next[i];
        s_.next[i] = INT_MAX;
        if (next == INT_MAX) {
          s_.cursor[i] = INT_MAX;
          return;
        }
        here = true;
        int32_t& count = s_.bounds_count[i];
        const bool narrow = count > 0 && next - s_.cursor[i] < shape_.min_shared_blocks &&
                            (1 << s_.shift[i]) < shape_.min_shared_blocks;
        if (narrow || count > kMaxGroupSegments) {
          s_.shift[i] += 2;
          s_.cursor[i] = -1;
          count = 0;
          return;
        }
        s_.bounds[i * (kMaxGroupSegments + 1) + count] = next;
        s_.cursor[i] = next;
        ++count;
      });
      more = team_.any(here);
    }
    team_.each(run_total_, [&](int k) {
      const Interval in = rastered(s_.runs[k]);
      s_.raster[k] = {in.begin, in.end, s_.runs[k].owner, s_.runs[k].request};
    });
  }

  RELAY_HD bool is_wide(int32_t g) const {
    return (s_.rows[g / kMaxGroupSegments] + s_.covered[g]) * shape_.group > shape_.tile_rows;
  }
  RELAY_HD const int32_t* bounds_of(int32_t leader) const {
    return s_.bounds + leader * (kMaxGroupSegments + 1);
  }
  /// Segments between the bounds of a group; some may have no member.
  RELAY_HD int32_t group_segments(int32_t leader) const {
    return s_.bounds_count[leader] > 0 ? s_.bounds_count[leader] - 1 : 0;
  }

  /// Calls f(k) for the segments of its group that a run covers.
  template <typename F>
  RELAY_HD void covered_segments(const Run& run, F f) const {
    if (run.begin >= run.end) return;
    const int32_t* bounds = bounds_of(run.owner);
    for (int k = 0; k < group_segments(run.owner); ++k) {
      if (run.begin <= bounds[k] && run.end >= bounds[k + 1]) f(k);
    }
  }

  RELAY_HD Interval visible(int32_t i) const {
    const int32_t first_row = s_.length[i] - s_.rows[i];  // its position
    Interval in{0, s_.length[i]};
    if (shape_.causal) in.end = first_row + 1;
    if (shape_.window > 0) in.begin = s_.length[i] - shape_.window;
    return in;
  }

  RELAY_HD void number_segments() {
    const int32_t n = batch_.requests;
    const int32_t groups = run_total_ > 0 ? n * kMaxGroupSegments : 0;
    team_.each(groups, [&](int g) {
      const int32_t leader = g / kMaxGroupSegments;
      const Interval in = visible(leader);
      s_.covered[g] = 0;
      s_.visible_from[g] = in.begin;
      s_.visible_to[g] = in.end;
      s_.group_seen[g] = s_.seen_from[leader];
      s_.rows_end[g] = 0;
    });
    if (groups > 0) {
      team_.each(run_total_, [&](int r) {
        const Run run = s_.raster[r];
        const Interval in = visible(run.request);
        covered_segments(run, [&](int k) {
          const int32_t g = run.owner * kMaxGroupSegments + k;
          team_.add(&s_.covered[g], s_.rows[run.request]);
          team_.max(&s_.visible_from[g], in.begin);
          team_.min(&s_.visible_to[g], in.end);
          team_.min(&s_.group_seen[g], s_.seen_from[run.request]);
          team_.max(&s_.rows_end[g], s_.row_begin[run.request] + s_.rows[run.request]);
        });
      });
    }
    // Those of several row tiles come first: cut() gives them workers of their own.
    wide_ = shared_ = 0;
    if (groups > 0) {
      team_.each(groups, [&](int g) {
        s_.sums[g] = s_.covered[g] > 0 && is_wide(g) ? 1 : 0;
        s_.group_id[g] = s_.covered[g] > 0 && !is_wide(g) ? 1 : 0;
      });
      const auto counts = team_.scan(s_.sums, s_.group_id, groups);
      wide_ = counts.first;
      shared_ = wide_ + counts.second;
      team_.each(groups,
                 [&](int g) { s_.group_id[g] = is_wide(g) ? s_.sums[g] : wide_ + s_.group_id[g]; });
    }
    team_.each(n, [&](int i) {
      int32_t own = 0;
      int32_t tiles = 0;
      if (s_.rows[i] > 0) {
        if (sharable(shape_, s_.rows[i])) {
          walk(i, [&](int32_t, int32_t) { ++own; }, [](int32_t, int32_t) {});
        } else {
          tiles = ceil_div(s_.rows[i], rows_per_tile(shape_));
        }
      }
      s_.own_count[i] = own;
      s_.tile_count[i] = tiles;
    });
    const auto own = team_.scan(s_.tile_count, s_.own_count, n);
    light_ = shared_ + own.first;
    segments_ = light_ + own.second;
  }

  /// In the order of columns: own(begin, end) for what request i reads alone, shared(group segment,
  /// run or -1 for the leader) for the rest.
  template <typename Own, typename Shared>
  RELAY_HD void walk(int32_t i, Own own, Shared shared) const {
    int32_t at = s_.first[i];
    int32_t run = 0;
    int32_t led = 0;
    const int32_t runs = run_total_ > 0 ? s_.run_count[i] : 0;
    const int32_t leads = run_total_ > 0 ? group_segments(i) : 0;
    for (;;) {
      Interval in{0, 0};
      while (run < runs) {
        in = {s_.raster[s_.run_base[i] + run].begin, s_.raster[s_.run_base[i] + run].end};
        if (in.begin < in.end) break;
        ++run;
      }
      while (led < leads && s_.covered[i * kMaxGroupSegments + led] == 0) ++led;
      const bool take_run = run < runs && (led == leads || in.begin < bounds_of(i)[led]);
      if (run == runs && led == leads) break;
      if (!take_run) in = {bounds_of(i)[led], bounds_of(i)[led + 1]};
      const int32_t begin = in.begin * shape_.block_size;
      if (begin > at) own(at, begin);
      at = in.end * shape_.block_size;
      if (take_run) {
        const int32_t number = s_.run_base[i] + run;
        const int32_t owner = s_.raster[number].owner;
        covered_segments(s_.raster[number],
                         [&](int k) { shared(owner * kMaxGroupSegments + k, number); });
        ++run;
      } else {
        shared(i * kMaxGroupSegments + led, -1);
        ++led;
      }
    }
    if (at < s_.length[i]) own(at, s_.length[i]);
  }

  /// Rows of a group segment that come before those of a run: the leader's, then the members' in
  /// the order of requests. Several threads count for each run.
  RELAY_HD void count_rows_before() {
    constexpr int kShares = 4;
    team_.each(run_total_ * kMaxGroupSegments,
               [&](int i) { s_.before[i] = s_.rows[s_.raster[i / kMaxGroupSegments].owner]; });
    team_.each(run_total_ * kShares, [&](int i) {
      const int32_t number = i / kShares;
      const Run run = s_.raster[number];
      const int32_t* bounds = bounds_of(run.owner);
      covered_segments(run, [&](int k) {
        int32_t rows = 0;
        for (int32_t r = i % kShares; r < number; r += kShares) {
          const Run other = s_.raster[r];
          const bool counts =
              other.owner == run.owner && other.begin <= bounds[k] && other.end >= bounds[k + 1];
          rows += counts ? s_.rows[other.request] : 0;
        }
        if (rows > 0) team_.add(&s_.before[number * kMaxGroupSegments + k], rows);
      });
    });
  }
  RELAY_HD int32_t rows_before(int32_t g, int32_t run) const {
    return run < 0 ? 0 : s_.before[run * kMaxGroupSegments + g % kMaxGroupSegments];
  }

  RELAY_HD void put_segment(int32_t id, const Segment& segment) {
    out_.segments[id] = segment;
    s_.sums[id] = segment.first_row < 0 ? segment.rows : 0;
    s_.costs[id] = segment.partial_base < 0 ? 0 : segment.rows;
  }

  RELAY_HD void write_segments() {
    if (run_total_ > 0) count_rows_before();
    const int32_t n = batch_.requests;
    const int32_t groups = run_total_ > 0 ? n * kMaxGroupSegments : 0;
    team_.each(groups, [&](int g) {
      if (s_.covered[g] == 0) return;
      const int32_t leader = g / kMaxGroupSegments;
      const int32_t* bounds = bounds_of(leader) + g % kMaxGroupSegments;
      Segment segment{};
      segment.request = leader;
      segment.first = bounds[0] * shape_.block_size;
      segment.slots = (bounds[1] - bounds[0]) * shape_.block_size;
      segment.rows = s_.rows[leader] + s_.covered[g];
      segment.visible_from = s_.visible_from[g];
      segment.visible_to = s_.visible_to[g];
      segment.seen_from = s_.group_seen[g];
      segment.shared = 1;
      // Members stand in the order of requests, as rows do.
      segment.first_row =
          s_.rows_end[g] - s_.row_begin[leader] == segment.rows ? s_.row_begin[leader] : -1;
      put_segment(s_.group_id[g], segment);
    });
    team_.each(n, [&](int i) {
      const int32_t rows = s_.rows[i];
      const bool light = sharable(shape_, rows);
      const int32_t base = light ? light_ + s_.own_count[i] : shared_ + s_.tile_count[i];
      if (rows == 0) {
        out_.requests[i] = {0, 0, 0, s_.row_begin[i]};
        return;
      }
      Segment segment{};
      segment.request = i;
      if (!light) {
        const int32_t step = rows_per_tile(shape_);
        out_.requests[i] = {1, base, step, s_.row_begin[i]};
        for (int32_t t = 0; t * step < rows; ++t) {
          const int32_t row = t * step;
          segment.rows = rows - row < step ? rows - row : step;
          segment.first_row = s_.row_begin[i] + row;
          segment.partial_base = -1;
          const int32_t position = s_.length[i] - rows + row;
          const int32_t last = position + segment.rows - 1;
          const int32_t end = shape_.causal ? last + 1 : s_.length[i];
          const int32_t lo = shape_.window > 0 ? position - shape_.window + 1 : 0;
          segment.first = lo > 0 ? lo / shape_.block_size * shape_.block_size : 0;
          segment.seen_from = lo > 0 ? lo : 0;
          segment.slots = end > segment.first ? end - segment.first : 0;
          segment.visible_from = shape_.window > 0 ? last - shape_.window + 1 : 0;
          segment.visible_to = shape_.causal ? position + 1 : end;
          put_segment(base + t, segment);
        }
        return;
      }
      segment.first_row = s_.row_begin[i];
      int32_t parts = 0;
      int32_t own = 0;
      const Interval in = visible(i);
      walk(
          i,
          [&](int32_t begin, int32_t end) {
            segment.first = begin;
            segment.slots = end - begin;
            segment.rows = rows;
            segment.visible_from = in.begin;
            segment.visible_to = in.end;
            segment.seen_from = s_.seen_from[i];
            out_.parts[i * kMaxParts + parts++] = {base + own, 0, 0, 0, 0, 0};
            put_segment(base + own++, segment);
          },
          [&](int32_t g, int32_t run) {
            out_.parts[i * kMaxParts + parts++] = {s_.group_id[g], rows_before(g, run), 0, 0, 0, 0};
          });
      if (parts == 1 && own == 1) {
        out_.segments[base].partial_base = -1;
        s_.costs[base] = 0;
      }
      out_.requests[i] = {parts, 0, 0, s_.row_begin[i]};
    });
    // Where the rows of shared segments stand in row_index, and the partial results of rows that
    // have more than one part; the latter in head groups, as rows x heads may be many.
    const int32_t partial = team_.scan(s_.sums, s_.costs, segments_).second;
    const int64_t partial_rows = int64_t{partial} * shape_.q_heads;
    partial_rows_ = partial_rows > INT_MAX ? INT_MAX : static_cast<int32_t>(partial_rows);
    team_.each(segments_, [&](int k) {
      Segment& segment = out_.segments[k];
      segment.row_begin = s_.sums[k];
      if (segment.partial_base >= 0) segment.partial_base = s_.costs[k] * shape_.q_heads;
      segment.steps = ceil_div(segment.slots, shape_.tile_slots);
      segment.row_tiles = ceil_div(segment.rows * shape_.group, shape_.tile_rows);
    });
    team_.each(n, [&](int i) {
      const RequestInfo info = out_.requests[i];
      if (info.rows_per_segment > 0) return;
      for (int p = 0; p < info.parts; ++p) {
        const RequestPart part = out_.parts[i * kMaxParts + p];
        if (out_.segments[part.segment].first_row >= 0) continue;
        int32_t* to = out_.row_index + out_.segments[part.segment].row_begin + part.row;
        for (int32_t r = 0; r < s_.rows[i]; ++r) to[r] = info.row_begin + r;
      }
    });
  }

  /// The tiles of a segment read the same KV at about the same time: from memory only once.
  RELAY_HD int32_t step_memory(const Segment& segment) const {
    return shape_.costs.step_memory / (segment.row_tiles > 0 ? segment.row_tiles : 1);
  }
  RELAY_HD int32_t step_products(const Segment& segment) const {
    const int32_t rows = segment.rows * shape_.group;
    return rows > 64 ? shape_.costs.step_128
                     : (rows > 8 ? shape_.costs.step_64 : shape_.costs.step_8);
  }
  RELAY_HD bool is_read_bound(const Segment& segment) const {
    return step_memory(segment) > step_products(segment);
  }
  RELAY_HD int32_t step_cost(const Segment& segment) const {
    const int32_t products = step_products(segment);
    if (!is_read_bound(segment)) return products;
    const int32_t memory = step_memory(segment) * reading_share_ / kWhole;
    return memory > products ? memory : products;
  }
  RELAY_HD int32_t job_cost(const Segment& segment) const {
    const int32_t tiles = segment.row_tiles > 0 ? segment.row_tiles : 1;
    const int32_t rows = ceil_div(segment.rows * shape_.group, tiles);
    return shape_.costs.job + shape_.costs.rows * rows / 16;
  }
  /// What a job takes beside its steps: half of it goes on while KV is read, as far as the steps
  /// wait for that.
  RELAY_HD int32_t job_lead(const Segment& segment) const {
    const int32_t waiting = segment.steps * (step_cost(segment) - step_products(segment));
    const int32_t half = job_cost(segment) / 2;
    return job_cost(segment) - (waiting < half ? waiting : half);
  }
  RELAY_HD int32_t whole_cost(const Segment& segment) const {
    return job_lead(segment) + segment.steps * step_cost(segment);
  }
  RELAY_HD int32_t jobs(const Segment& segment) const {
    return segment.row_tiles * shape_.kv_heads;
  }

  /// Cuts the line of steps into equal shares and the tail. The row tiles of a wide segment are to
  /// read the same KV at the same time, so that it comes from memory once: each of its tiles gets
  /// the same number of workers of its own, which cut it in the same places.
  RELAY_HD void cut() {
    find_reading_share();
    team_.each(segments_, [&](int k) {
      const Segment& segment = out_.segments[k];
      s_.sums[k] = jobs(segment) * segment.steps;
      s_.costs[k] = segment.steps == 0 ? 0 : jobs(segment) * whole_cost(segment);
    });
    const auto sums = team_.scan(s_.sums, s_.costs, segments_);
    const int32_t steps = sums.first;
    const int32_t cost = sums.second;
    int32_t workers = cost / shape_.costs.worker;
    workers = workers < 1 ? 1 : (workers > shape_.workers ? shape_.workers : workers);
    team_.each(segments_, [&](int k) { out_.segments[k].step_base = s_.sums[k]; });
    const int32_t light = light_cost(cost, workers);
    // From here on sums[k] is the first worker of wide segment k.
    const int32_t wide_cost = cost_before(wide_, cost);
    const int32_t rest = cost - wide_cost;
    const int32_t heavy = rest - light;  // of the rest: no part of the tail
    // Where there is a tail to fill what others leave, workers of wide segments may get less.
    const int32_t relief = light / 2 < cost / kRelief ? light / 2 : cost / kRelief;
    int32_t wide_workers = 0;
    bool teamed = false;
    // As near to its share as can be, or, where that leaves the rest too few, below it.
    for (int32_t below = 0; below < 2 && wide_ > 0 && !teamed; ++below) {
      team_.each(wide_, [&](int k) {
        const int64_t tiles = out_.segments[k].row_tiles;
        const int64_t share = int64_t{wide_share(k, cost)} * workers;
        const int64_t whole = (cost - relief) * tiles;
        const auto teams = static_cast<int32_t>((share + (below > 0 ? 0 : whole / 2)) / whole);
        s_.sums[k] = (teams < 1 ? 1 : teams) * static_cast<int32_t>(tiles);
      });
      // Not where shares would be uneven: nobody may have more than 5/4 of the mean.
      bool uneven = false;
      team_.each(wide_, [&](int k) {
        uneven = uneven || too_much(wide_share(k, cost), s_.sums[k], cost, workers);
      });
      uneven = team_.any(uneven);
      wide_workers = team_.scan(s_.sums, wide_);
      teamed = !uneven && wide_workers + (heavy > 0 ? 1 : 0) <= workers &&
               !(heavy > 0 && too_much(heavy, workers - wide_workers, cost, workers));
    }
    if (!teamed) wide_workers = 0;
    const int32_t done = teamed ? wide_cost : 0;
    const int32_t others = workers - wide_workers;
    const int32_t tail = tail_cost(cost - done, light, others, cost, workers);
    const int32_t fixed = cost - done - tail;
    if (fixed == 0) workers = wide_workers > 0 ? wide_workers : workers;
    const int32_t portions = tail_portions(tail);
    const int32_t all = workers + portions;
    team_.each((all > shape_.workers ? all : shape_.workers) + 1, [&](int i) {
      if (i >= all) {
        out_.cuts[i] = Cut{steps, segments_};
        return;
      }
      Cut cut{};
      if (i < wide_workers) {
        cut = team_step(i, wide_workers);
      } else if (i < workers) {
        cut = step_at(done + int64_t{fixed} * (i - wide_workers) / others, 0);
      } else {
        // Where the tail begins, only jobs of many rows stay whole.
        cut = step_at(done + fixed + int64_t{tail} * (i - workers) / portions,
                      i > workers ? tail / portions : 1);
      }
      out_.cuts[i] = cut;
      if (segments_ > 0) out_.begins[i] = out_.segments[cut.segment];
    });
    team_.each(1, [&](int) {
      PlanHeader& header = *out_.header;
      header.segments = segments_;
      header.shared_segments = shared_;
      header.workers = steps > 0 ? workers : 0;
      header.portions = steps > 0 ? all : 0;
      header.steps = steps;
      header.partial_rows = partial_rows_;
    });
  }

  /// What the tail may be made of: the own contexts of requests that fill no tile, if none of their
  /// jobs is longer than a worker's share (it would be cut into many pieces), nor any that stays
  /// whole longer than an eighth of that. Only where reading is the bound, as nothing else takes
  /// longer for some workers than for others.
  RELAY_HD int32_t light_cost(int32_t cost, int32_t workers) {
    if (shape_.max_portions == shape_.workers || workers < shape_.workers || !reading_bounds_ ||
        cost / workers < shape_.costs.tail) {
      return 0;
    }
    team_.each(segments_ - light_, [&](int i) {
      const Segment& segment = out_.segments[light_ + i];
      const bool stays_whole = segment.rows * shape_.group > kTailRows;
      team_.max(&s_.totals[stays_whole ? kLongestWhole : kLongest], whole_cost(segment));
    });
    longest_ = s_.totals[kLongest];
    longest_whole_ = s_.totals[kLongestWhole];
    const bool too_long =
        longest_ > cost / shape_.workers || longest_whole_ > cost / (8 * shape_.workers);
    return too_long ? 0 : cost - cost_before(light_, cost);
  }

  /// How many portions the tail has. None is shorter than a job that stays whole; those that are
  /// not much longer than a portion do.
  RELAY_HD int32_t tail_portions(int32_t tail) const {
    if (tail == 0) return 0;
    const int32_t room = shape_.max_portions - shape_.workers;
    const auto of_at_least = [&](int32_t portion) {
      const int32_t portions = tail / (portion > longest_whole_ ? portion : longest_whole_);
      return portions < 1 ? 1 : (portions > room ? room : portions);
    };
    const int32_t portions = of_at_least(shape_.costs.portion);
    return longest_ < 2 * (tail / portions) ? of_at_least(longest_)
                                            : of_at_least(3 * shape_.costs.portion);
  }

  /// Of `rest`, what is left to whoever has time: workers of their own get three quarters of the
  /// mean, and what is not light in any case.
  RELAY_HD static int32_t tail_cost(int32_t rest, int32_t light, int32_t others, int32_t cost,
                                    int32_t workers) {
    const int64_t fixed = int64_t{cost} * others * 3 / (int64_t{workers} * 4);
    const int64_t tail = rest - fixed;
    return static_cast<int32_t>(tail < 0 ? 0 : (tail < light ? tail : light));
  }

  /// Who is bound by reading reads faster where others are bound by products. What all of it takes
  /// at least is the longer of all reading and all products; reading gets what the products of the
  /// others leave of that.
  RELAY_HD void find_reading_share() {
    team_.each(kSums, [&](int k) { s_.totals[k] = 0; });
    team_.each(segments_, [&](int k) {
      const Segment& segment = out_.segments[k];
      const int32_t steps = jobs(segment) * segment.steps;
      const int32_t products = jobs(segment) * job_cost(segment) + steps * step_products(segment);
      const int32_t memory = steps * step_memory(segment);
      team_.add(&s_.totals[kMemory], memory);
      // Of a short step only what it reads.
      const auto bytes = static_cast<int32_t>(int64_t{memory} * segment.slots /
                                              (shape_.tile_slots * int64_t{segment.steps} + 1));
      team_.add(&s_.totals[kExcess], bytes - products);
      if (is_read_bound(segment)) {
        team_.add(&s_.totals[kReading], memory);
      } else {
        team_.add(&s_.totals[kProducts], products);
      }
    });
    reading_bounds_ = s_.totals[kExcess] > 0;
    const int64_t left = int64_t{s_.totals[kMemory]} - s_.totals[kProducts];
    const int64_t reading = s_.totals[kReading];
    const int64_t share = reading > 0 && left > 0 ? left * kWhole / reading : 0;
    reading_share_ = share < kWhole ? static_cast<int32_t>(share) : kWhole;
  }

  /// The cost of all segments before k.
  RELAY_HD int32_t cost_before(int32_t k, int32_t cost) const {
    return k == segments_ ? cost : s_.costs[k];
  }
  RELAY_HD int32_t wide_share(int32_t k, int32_t cost) const {
    return cost_before(k + 1, cost) - s_.costs[k];
  }

  /// Whether `part` of the cost is too much for so many of the workers.
  RELAY_HD static bool too_much(int32_t part, int32_t of, int32_t cost, int32_t workers) {
    return int64_t{part} * workers * 4 > int64_t{cost} * of * 5;
  }

  /// Where worker w of the wide segments begins.
  RELAY_HD Cut team_step(int32_t w, int32_t wide_workers) const {
    int32_t low = 0;
    for (int32_t high = wide_; high - low > 1;) {
      const int32_t middle = (low + high) / 2;
      (s_.sums[middle] <= w ? low : high) = middle;
    }
    const Segment& segment = out_.segments[low];
    const int32_t to = low + 1 == wide_ ? wide_workers : s_.sums[low + 1];
    const int32_t per_tile = (to - s_.sums[low]) / segment.row_tiles;
    const int32_t tile = (w - s_.sums[low]) / per_tile;
    const int32_t of_tile = (w - s_.sums[low]) % per_tile;
    const int32_t line = shape_.kv_heads * segment.steps;
    const auto at = static_cast<int32_t>(int64_t{line} * of_tile / per_tile);
    return {segment.step_base + tile * line + at / segment.steps * segment.steps +
                snapped(at % segment.steps, segment.steps),
            low};
  }

  /// No piece of a job is tiny.
  RELAY_HD int32_t snapped(int32_t step, int32_t steps) const {
    if (step < shape_.costs.snap) return 0;
    return step > steps - shape_.costs.snap ? steps : step;
  }

  /// The step in front of which `cost` is reached; not near a job's end or begin. `portion`: cost
  /// of a portion of the tail, where jobs of many rows stay whole, and those that are not much
  /// longer.
  RELAY_HD Cut step_at(int64_t cost, int32_t portion) const {
    if (segments_ == 0) return {0, 0};
    int32_t low = 0;  // the last segment that begins at or before it
    for (int32_t high = segments_; high - low > 1;) {
      const int32_t middle = (low + high) / 2;
      (s_.costs[middle] <= cost ? low : high) = middle;
    }
    const Segment& segment = out_.segments[low];
    if (segment.steps == 0) return {segment.step_base, low};
    const int32_t one = step_cost(segment);
    const int32_t lead = job_lead(segment);
    const int32_t whole = whole_cost(segment);
    const auto within = static_cast<int32_t>(cost - s_.costs[low]);
    int32_t job = within / whole;
    int32_t step = snapped((within % whole - lead + one / 2) / one, segment.steps);
    if (portion > 0 && step > 0 &&
        (segment.rows * shape_.group > kTailRows || whole < 2 * portion)) {
      job += 1;
      step = 0;
    }
    if (job >= jobs(segment)) {
      job = jobs(segment);
      step = 0;
    }
    return {segment.step_base + job * segment.steps + step, low};
  }

  RELAY_HD void write_rows() {
    const int32_t n = batch_.requests;
    team_.each(out_.header->rows, [&](int row) {
      int32_t low = 0;  // the last request that begins at or before the row
      for (int32_t high = n; high - low > 1;) {
        const int32_t middle = (low + high) / 2;
        (batch_.query_starts[middle] <= row ? low : high) = middle;
      }
      const int32_t position = s_.length[low] - s_.rows[low] + row - s_.row_begin[low];
      RowInfo info{low, position, 0, s_.length[low]};
      if (shape_.causal) info.hi = position + 1 < 0 ? 0 : position + 1;
      if (shape_.window > 0 && position - shape_.window + 1 > 0) {
        info.lo = position - shape_.window + 1;
      }
      out_.rows[row] = info;
    });
  }

  Team& team_;
  const PlanShape& shape_;
  const PlanBatch& batch_;
  const PlannerScratch& s_;
  const PlanView& out_;
  int32_t run_total_ = 0;
  int32_t shared_ = 0;
  int32_t wide_ = 0;   ///< shared segments of several row tiles
  int32_t light_ = 0;  ///< the first of requests that fill no tile
  int32_t segments_ = 0;
  int32_t partial_rows_ = 0;
  static constexpr int32_t kWhole = 1024;
  static constexpr int32_t kRelief = 8;  ///< workers of wide segments get so much less, at most
  int32_t reading_share_ = kWhole;       ///< of what reading takes where all read, in kWhole-ths
  bool reading_bounds_ = false;          ///< it takes longer than all products
  int32_t longest_ = 0;                  ///< cost of the longest job of the tail that may be cut
  int32_t longest_whole_ = 0;            ///< and of those that may not
  enum { kReading, kProducts, kMemory, kExcess, kLongest, kLongestWhole, kSums };  // totals
  static_assert(kSums == PlannerScratch::kTotals);
};

}  // namespace relay::cuda
