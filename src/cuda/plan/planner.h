// From the runs that requests share to segments and work: the logic of planning, for a team of
// threads of one thread block, or (tests) one thread of the host.
//
// A Team has
//   each(n, f)   f(0) to f(n - 1) in any order, and a barrier
//   scan(arrays, n, sums)  exclusive prefix sums of several arrays in place, and their sums
//   any(b)       whether b holds for any thread of the team
//   sum(values), greatest(values)  of what each thread has, in place, for all of them
//   min(p, v), max(p, v), add(p, v), set_bits(p, v)  atomic
//
// Planning is bound by latency: what counts is how many barriers there are, and how many reads that
// wait for each other between them.
//
// Members of a group are its *leader*, the request that owns the blocks, and the requests that
// share a run with it. Where the members' runs end in different places, the group is cut there into
// segments. Everything that a request does not share is a segment of its own.
#pragma once

#include <algorithm>
#include <climits>
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
    // All steps together: at most what reading or products take, or copies without waiting, and
    // what find_latency() rounds up.
    const int64_t most = std::max({c.step_memory, c.step_8, c.step_64, c.step_128, c.latency});
    const int64_t step = most > 1 ? most + 1 : 1;
    const int64_t job = c.job + int64_t{c.rows} * shape.tile_rows / 16;
    const int64_t of_tile = (steps + kMaxParts) * step + kMaxParts * job;
    if (of_tile <= INT_MAX / (tiles * shape.kv_heads)) return true;
    if (step == 1) return false;
    for (int32_t* cost : {&c.step_memory, &c.step_8, &c.step_64, &c.step_128, &c.latency, &c.job,
                          &c.rows, &c.worker, &c.portion, &c.tail}) {
      *cost = std::max(1, *cost / 2);
    }
  }
}

/// The planner's memory: arrays by request (R), by group segment (G) and by segment (S).
struct PlannerScratch {
  int32_t* rows;          // R
  int32_t* row_begin;     // R
  int32_t* length;        // R, tokens
  int32_t* first;         // R, column
  int32_t* seen_from;     // R, column
  int32_t* run_count;     // R
  int32_t* shift;         // R, the group's runs begin and end at multiples of 2^shift blocks
  int32_t* cursor;        // R
  int32_t* next;          // R
  int32_t* bounds_count;  // R
  int32_t* wide_base;     // R, segments of several row tiles that it leads; from the scan on, of
  int32_t* narrow_base;   // R    the requests before it, as are the next; other segments it leads
  int32_t* tile_base;     // R, segments of its own, of one that fills tiles
  int32_t* own_base;      // R, and of one that may share
  int32_t* partial_base;  // R, rows with partial results, of whole jobs
  int32_t* index_base;    // R, rows that stand in row_index
  int32_t* bounds;        // R x (kMaxGroupSegments + 1)
  Run* runs;              // R x kMaxRuns
  int32_t* covered;       // G, rows of all members; 0: it is nobody's. In the end: first workers
  int32_t* ordinal;       // G, number among the leader's segments that are as wide
  int32_t* visible_from;  // G
  int32_t* visible_to;    // G
  int32_t* group_seen;    // G, first column that any member sees
  int32_t* rows_begin;    // G, first row of any member
  int32_t* rows_end;      // G, after the last
  int32_t* before;        // R x (kMaxRuns + 1) x kMaxGroupSegments, rows of the members before it,
                          //   in the segments of its runs and in those that it leads
  int32_t* sums;          // S
  int32_t* costs;         // S
  int32_t* faults;        // 2: PlanFault, and the first request that has one

  RELAY_HD static int64_t max_segments(const PlanShape& shape) {
    const int64_t tiles = ceil_div(shape.max_rows, rows_per_tile(shape)) + shape.max_requests;
    return int64_t{shape.max_requests} * (2 * kMaxGroupSegments + kMaxRuns + 1) + tiles;
  }

  /// Lays the arrays out from `base` on (null: only counts); returns the bytes.
  RELAY_HD static int64_t lay_out(const PlanShape& shape, char* base, PlannerScratch* s) {
    const int64_t r = shape.max_requests;
    int64_t used = 0;
    // Each by name: where their addresses stood in a list, kernels would keep them in memory.
    const auto take = [&](auto*& p, int64_t count) {
      using T = std::remove_reference_t<decltype(*p)>;
      if (base != nullptr) p = reinterpret_cast<T*>(base + used);
      used += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    };
    PlannerScratch ignored{};
    PlannerScratch& to = s != nullptr ? *s : ignored;
    take(to.rows, r);
    take(to.row_begin, r);
    take(to.length, r);
    take(to.first, r);
    take(to.seen_from, r);
    take(to.run_count, r);
    take(to.shift, r);
    take(to.cursor, r);
    take(to.next, r);
    take(to.bounds_count, r);
    take(to.wide_base, r);
    take(to.narrow_base, r);
    take(to.tile_base, r);
    take(to.own_base, r);
    take(to.partial_base, r);
    take(to.index_base, r);
    take(to.bounds, r * (kMaxGroupSegments + 1));
    take(to.runs, r * kMaxRuns);
    take(to.covered, r * kMaxGroupSegments);
    take(to.ordinal, r * kMaxGroupSegments);
    take(to.visible_from, r * kMaxGroupSegments);
    take(to.visible_to, r * kMaxGroupSegments);
    take(to.group_seen, r * kMaxGroupSegments);
    take(to.rows_begin, r * kMaxGroupSegments);
    take(to.rows_end, r * kMaxGroupSegments);
    take(to.before, r * (kMaxRuns + 1) * kMaxGroupSegments);
    take(to.sums, max_segments(shape));
    take(to.costs, max_segments(shape));
    take(to.faults, 2);
    return used;
  }
};

template <typename Team>
class Planner {
 public:
  RELAY_HD Planner(Team& team, const PlanShape& shape, const PlanBatch& batch,
                   const PlannerScratch& scratch, const PlanView& out)
      : team_(team),
        shape_(shape),
        batch_(batch),
        s_(scratch),
        out_(out),
        slots_log2_(log2_of(shape.tile_slots)),
        rows_log2_(log2_of(shape.tile_rows)),
        rows_per_tile_(rows_per_tile(shape)) {}

  /// `run_counts` [requests] and `runs` [requests][kMaxRuns], or null: nothing is shared.
  RELAY_HD void plan(const int32_t* run_counts, const Run* runs) {
    take_requests(run_counts, runs);
    for (int32_t least_shift = 0;; ++least_shift) {
      if (sharing_) find_bounds(least_shift);
      number_segments();
      if (partial_rows_ <= shape_.partial_capacity || !sharing_) break;
      // More partial results than there is room for: share in coarser pieces, at last not at all.
      sharing_ = least_shift < 24;
    }
    write_segments();
    cut();
  }

 private:
  struct Interval {
    int32_t begin;
    int32_t end;
  };

  RELAY_HD void take_requests(const int32_t* run_counts, const Run* runs) {
    const int32_t n = batch_.requests;
    uint32_t faults = 0;
    bool shares = false;
    team_.each(n, [&](int i) {
      // Read before it is known whether they count, as each read would wait for the one before.
      int32_t count = run_counts != nullptr ? run_counts[i] : 0;
      const Run first = run_counts != nullptr ? runs[i * kMaxRuns] : Run{};
      const RequestShape r = request_shape(shape_, batch_, i);
      s_.rows[i] = r.rows;
      s_.row_begin[i] = r.row_begin;
      s_.length[i] = r.length;
      s_.first[i] = r.first;
      s_.seen_from[i] = r.seen_from;
      if (!sharable(shape_, r.rows)) count = 0;
      if (count > 0) s_.runs[i * kMaxRuns] = first;
      RELAY_NO_UNROLL
      for (int k = 1; k < count; ++k) s_.runs[i * kMaxRuns + k] = runs[i * kMaxRuns + k];
      s_.run_count[i] = count;
      shares = shares || count > 0;
      faults |= r.faults;
    });
    sharing_ = run_counts != nullptr && team_.any(shares);
    if (team_.any(faults != 0)) note_faults();
    rows_ = n > 0 ? s_.row_begin[n - 1] + s_.rows[n - 1] : 0;
  }

  RELAY_HD void note_faults() {
    const int32_t n = batch_.requests;
    team_.each(1, [&](int) {
      s_.faults[kWhich] = 0;
      s_.faults[kFirstRequest] = INT_MAX;
    });
    team_.each(n, [&](int i) {
      const uint32_t faults = request_shape(shape_, batch_, i).faults;
      if (faults == 0) return;
      team_.min(&s_.faults[kFirstRequest], i);
      team_.set_bits(reinterpret_cast<uint32_t*>(&s_.faults[kWhich]), faults);
    });
    faults_ = static_cast<uint32_t>(s_.faults[kWhich]);
    fault_request_ = s_.faults[kFirstRequest];
    // Where the starts are wrong, requests may claim each other's rows: then there is nothing to
    // do.
    if ((faults_ & kFaultStarts) == 0) return;
    sharing_ = false;
    team_.each(n, [&](int i) {
      s_.rows[i] = s_.row_begin[i] = s_.length[i] = s_.first[i] = s_.seen_from[i] = 0;
      s_.run_count[i] = 0;
    });
  }

  /// Run k of request i within its group's raster.
  RELAY_HD Run run_of(int32_t i, int32_t k) const {
    Run run = s_.runs[i * kMaxRuns + k];
    const int32_t shift = s_.shift[run.owner];
    run.begin = ((run.begin + (1 << shift) - 1) >> shift) << shift;
    run.end = (run.end >> shift) << shift;
    return run;
  }
  /// Calls f(run) for the runs of all requests.
  template <typename F>
  RELAY_HD void each_run(F f) {
    team_.each(batch_.requests, [&](int i) {
      RELAY_NO_UNROLL
      for (int k = 0; k < s_.run_count[i]; ++k) f(run_of(i, k));
    });
  }

  /// Where the groups' segments begin and end: the distinct ends of their members' runs, in order.
  /// A group with too many of them, or with segments too short to pay, gets a coarser raster.
  RELAY_HD void find_bounds(int32_t least_shift) {
    const int32_t n = batch_.requests;
    team_.each(n, [&](int i) {
      s_.shift[i] = least_shift;
      s_.bounds_count[i] = 0;
      s_.cursor[i] = -1;
      s_.next[i] = INT_MAX;
    });
    for (bool more = true; more;) {
      each_run([&](const Run& run) {
        const int32_t cursor = s_.cursor[run.owner];
        if (run.begin >= run.end || run.end <= cursor) return;
        team_.min(&s_.next[run.owner], run.begin > cursor ? run.begin : run.end);
      });
      bool here = false;
      team_.each(n, [&](int i) {
        const int32_t next = s_.next[i];
        if (next == INT_MAX) {
          s_.cursor[i] = INT_MAX;
          return;
        }
        s_.next[i] = INT_MAX;
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
  }

  RELAY_HD bool is_wide(int32_t g) const { return s_.covered[g] * shape_.group > shape_.tile_rows; }
  /// The members' rows are neighbours.
  RELAY_HD bool in_one_piece(int32_t g) const {
    return s_.rows_end[g] - s_.rows_begin[g] == s_.covered[g];
  }
  RELAY_HD const int32_t* bounds_of(int32_t leader) const {
    return s_.bounds + leader * (kMaxGroupSegments + 1);
  }
  /// Segments between the bounds of a group; some may have no member.
  RELAY_HD int32_t group_segments(int32_t leader) const {
    const int32_t bounds = sharing_ ? s_.bounds_count[leader] : 0;
    return bounds > 0 ? bounds - 1 : 0;
  }
  RELAY_HD int32_t segment_of(int32_t g) const {
    const int32_t leader = g / kMaxGroupSegments;
    return s_.ordinal[g] + (is_wide(g) ? s_.wide_base[leader] : wide_ + s_.narrow_base[leader]);
  }

  /// Calls f(g) for the group segments that request i leads and that have other members.
  template <typename F>
  RELAY_HD void led_segments(int32_t i, F f) const {
    RELAY_NO_UNROLL
    for (int k = 0; k < group_segments(i); ++k) {
      const int32_t g = i * kMaxGroupSegments + k;
      if (s_.covered[g] > 0) f(g);
    }
  }

  /// Calls f(k) for the segments of its group that a run covers.
  template <typename F>
  RELAY_HD void covered_segments(const Run& run, F f) const {
    if (run.begin >= run.end) return;
    const int32_t* bounds = bounds_of(run.owner);
    RELAY_NO_UNROLL
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

  /// What the members of group segments have in common.
  RELAY_HD void gather_members() {
    team_.each(batch_.requests, [&](int i) {
      const Interval in = visible(i);
      RELAY_NO_UNROLL
      for (int k = 0; k < group_segments(i); ++k) {
        const int32_t g = i * kMaxGroupSegments + k;
        s_.covered[g] = 0;
        s_.visible_from[g] = in.begin;
        s_.visible_to[g] = in.end;
        s_.group_seen[g] = s_.seen_from[i];
        s_.rows_begin[g] = s_.row_begin[i];
        s_.rows_end[g] = s_.row_begin[i] + s_.rows[i];
      }
    });
    each_run([&](const Run& run) {
      const Interval in = visible(run.request);
      covered_segments(run, [&](int k) {
        const int32_t g = run.owner * kMaxGroupSegments + k;
        team_.add(&s_.covered[g], s_.rows[run.request]);
        team_.min(&s_.visible_to[g], in.end);
        if (shape_.window > 0) {
          team_.max(&s_.visible_from[g], in.begin);
          team_.min(&s_.group_seen[g], s_.seen_from[run.request]);
        }
        team_.min(&s_.rows_begin[g], s_.row_begin[run.request]);
        team_.max(&s_.rows_end[g], s_.row_begin[run.request] + s_.rows[run.request]);
      });
    });
  }

  RELAY_HD void number_segments() {
    if (sharing_) gather_members();
    team_.each(batch_.requests, [&](int i) {
      const int32_t rows = s_.rows[i];
      int32_t wide = 0;
      int32_t narrow = 0;
      int32_t partial = 0;
      int32_t index = 0;
      led_segments(i, [&](int32_t g) {
        s_.covered[g] += rows;
        s_.ordinal[g] = is_wide(g) ? wide++ : narrow++;
        partial += s_.covered[g];
        if (!in_one_piece(g)) index += s_.covered[g];
      });
      int32_t own = 0;
      int32_t tiles = 0;
      if (rows > 0 && sharable(shape_, rows)) {
        int32_t parts = 0;
        walk(i, [&](int32_t, int32_t) { ++own, ++parts; }, [&](int32_t, int32_t) { ++parts; });
        // The results of one that has a single part go straight out.
        if (parts > 1) partial += own * rows;
      } else {
        tiles = quotient(rows + rows_per_tile_ - 1, rows_per_tile_);
      }
      s_.wide_base[i] = wide;
      s_.narrow_base[i] = narrow;
      s_.tile_base[i] = tiles;
      s_.own_base[i] = own;
      s_.partial_base[i] = partial;
      s_.index_base[i] = index;
    });
    int32_t sums[6];
    team_.scan(
        {s_.wide_base, s_.narrow_base, s_.tile_base, s_.own_base, s_.partial_base, s_.index_base},
        batch_.requests, sums);
    // Those of several row tiles come first: cut() gives them workers of their own.
    wide_ = sums[0];
    shared_ = wide_ + sums[1];
    light_ = shared_ + sums[2];
    segments_ = light_ + sums[3];
    // In head groups, as rows x heads may be many.
    const int64_t partial_rows = int64_t{sums[4]} * shape_.q_heads;
    partial_rows_ = partial_rows > INT_MAX ? INT_MAX : static_cast<int32_t>(partial_rows);
    indexed_ = sums[5] > 0;
  }

  /// In the order of columns: own(begin, end) for what request i reads alone, shared(group segment,
  /// number of the run, kMaxRuns where it leads) for the rest.
  template <typename Own, typename Shared>
  RELAY_HD void walk(int32_t i, Own own, Shared shared) const {
    int32_t at = s_.first[i];
    int32_t run = 0;
    int32_t led = 0;
    const int32_t runs = sharing_ ? s_.run_count[i] : 0;
    const int32_t leads = group_segments(i);
    while (run < runs || led < leads) {
      const Run in = run < runs ? run_of(i, run) : Run{};
      if (run < runs && in.begin >= in.end) {
        ++run;
        continue;
      }
      if (led < leads && s_.covered[i * kMaxGroupSegments + led] == 0) {
        ++led;
        continue;
      }
      const bool takes_run = run < runs && (led == leads || in.begin < bounds_of(i)[led]);
      const int32_t begin = (takes_run ? in.begin : bounds_of(i)[led]) * shape_.block_size;
      if (begin > at) own(at, begin);
      at = (takes_run ? in.end : bounds_of(i)[led + 1]) * shape_.block_size;
      if (takes_run) {
        covered_segments(in, [&](int k) { shared(in.owner * kMaxGroupSegments + k, run); });
        ++run;
      } else {
        shared(i * kMaxGroupSegments + led, kMaxRuns);
        ++led;
      }
    }
    if (at < s_.length[i]) own(at, s_.length[i]);
  }

  RELAY_HD int32_t& before(int32_t i, int32_t run, int32_t g) const {
    return s_.before[(i * (kMaxRuns + 1) + run) * kMaxGroupSegments + g % kMaxGroupSegments];
  }
  /// Rows of a group segment that come before those of its member i, by whichever run (walk()):
  /// members stand in the order of requests.
  RELAY_HD int32_t rows_before(int32_t i, int32_t run, int32_t g) const {
    return in_one_piece(g) ? s_.row_begin[i] - s_.rows_begin[g] : before(i, run, g);
  }

  /// Counts them where they are no neighbours. Several threads for each member.
  RELAY_HD void count_rows_before() {
    constexpr int kShares = 4;
    const int32_t n = batch_.requests;
    const auto each_membership = [&](int32_t i, auto f) {
      RELAY_NO_UNROLL
      for (int k = 0; k < s_.run_count[i]; ++k) {
        const Run run = run_of(i, k);
        covered_segments(run, [&](int s) { f(k, run.owner * kMaxGroupSegments + s); });
      }
      led_segments(i, [&](int32_t g) { f(kMaxRuns, g); });
    };
    team_.each(n, [&](int i) {
      each_membership(i, [&](int run, int32_t g) {
        const int32_t leader = g / kMaxGroupSegments;
        before(i, run, g) = leader < i ? s_.rows[leader] : 0;
      });
    });
    team_.each(n * kShares, [&](int share) {
      const int32_t i = share / kShares;
      each_membership(i, [&](int run, int32_t g) {
        if (in_one_piece(g)) return;
        const int32_t leader = g / kMaxGroupSegments;
        const int32_t* bounds = bounds_of(leader) + g % kMaxGroupSegments;
        int32_t rows = 0;
        RELAY_NO_UNROLL
        for (int32_t j = share % kShares; j < i; j += kShares) {
          RELAY_NO_UNROLL
          for (int k = 0; k < s_.run_count[j]; ++k) {
            const Run other = run_of(j, k);
            const bool counts =
                other.owner == leader && other.begin <= bounds[0] && other.end >= bounds[1];
            rows += counts ? s_.rows[j] : 0;
          }
        }
        if (rows > 0) team_.add(&before(i, run, g), rows);
      });
    });
  }

  /// Completes a segment and writes it.
  RELAY_HD void put_segment(int32_t id, Segment& segment) {
    segment.steps = (segment.slots + shape_.tile_slots - 1) >> slots_log2_;
    segment.row_tiles = (segment.rows * shape_.group + shape_.tile_rows - 1) >> rows_log2_;
    store(&out_.segments[id], segment);
    add_load(segment);
  }

  RELAY_HD void write_segments() {
    if (indexed_) count_rows_before();
    const int32_t n = batch_.requests;
    team_.each(n, [&](int i) {
      const int32_t rows = s_.rows[i];
      if (rows == 0 || !sharable(shape_, rows)) {
        store(&out_.requests[i],
              {rows > 0 ? 1 : 0, shared_ + s_.tile_base[i], rows_per_tile_, s_.row_begin[i]});
        return;
      }
      const Interval in = visible(i);
      int32_t partial = s_.partial_base[i];
      int32_t index = s_.index_base[i];
      Segment segment{};
      segment.request = i;
      segment.shared = 1;
      led_segments(i, [&](int32_t g) {
        const int32_t* bounds = bounds_of(i) + g % kMaxGroupSegments;
        segment.first = bounds[0] * shape_.block_size;
        segment.slots = (bounds[1] - bounds[0]) * shape_.block_size;
        segment.rows = s_.covered[g];
        segment.visible_from = s_.visible_from[g];
        segment.visible_to = s_.visible_to[g];
        segment.seen_from = s_.group_seen[g];
        segment.first_row = in_one_piece(g) ? s_.rows_begin[g] : -1;
        segment.row_begin = index;
        segment.partial_base = partial * shape_.q_heads;
        put_segment(segment_of(g), segment);
        partial += segment.rows;
        if (segment.first_row < 0) index += segment.rows;
      });
      segment.shared = 0;
      segment.rows = rows;
      segment.visible_from = in.begin;
      segment.visible_to = in.end;
      segment.seen_from = s_.seen_from[i];
      segment.first_row = s_.row_begin[i];
      segment.row_begin = 0;
      int32_t own = light_ + s_.own_base[i];
      int32_t parts = 0;
      const auto add_part = [&](int32_t id, int32_t row) {
        out_.parts[i * kMaxParts + parts++] = {id, row};
      };
      walk(
          i,
          [&](int32_t begin, int32_t end) {
            segment.first = begin;
            segment.slots = end - begin;
            const bool only = parts == 0 && end == s_.length[i];
            segment.partial_base = only ? -1 : partial * shape_.q_heads;
            if (!only) partial += rows;
            put_segment(own, segment);
            add_part(own++, 0);
          },
          [&](int32_t g, int32_t run) { add_part(segment_of(g), rows_before(i, run, g)); });
      store(&out_.requests[i], {parts, 0, 0, s_.row_begin[i]});
      if (light_ == shared_) {
        RELAY_NO_UNROLL
        for (int32_t r = 0; r < rows; ++r) write_row(i, r);
      }
    });
    if (light_ > shared_) write_tiles();
    team_.sum(load_);
    if (indexed_) write_row_index();
  }

  /// The last request whose number in `bases` is at most `number`.
  RELAY_HD int32_t request_of(const int32_t* bases, int32_t number) const {
    int32_t low = 0;
    RELAY_NO_UNROLL
    for (int32_t high = batch_.requests; high - low > 1;) {
      const int32_t middle = (low + high) / 2;
      (bases[middle] <= number ? low : high) = middle;
    }
    return low;
  }

  /// The segments of requests that fill tiles. These have many rows: all threads write all rows.
  RELAY_HD void write_tiles() {
    team_.each(light_ - shared_, [&](int t) {
      const int32_t i = request_of(s_.tile_base, t);
      const int32_t rows = s_.rows[i];
      const int32_t row = (t - s_.tile_base[i]) * rows_per_tile_;
      const int32_t position = s_.length[i] - rows + row;
      Segment segment{};
      segment.request = i;
      segment.rows = rows - row < rows_per_tile_ ? rows - row : rows_per_tile_;
      segment.first_row = s_.row_begin[i] + row;
      segment.partial_base = -1;
      const int32_t last = position + segment.rows - 1;
      const int32_t end = shape_.causal ? last + 1 : s_.length[i];
      const int32_t lo = shape_.window > 0 ? position - shape_.window + 1 : 0;
      segment.first = lo > 0 ? quotient(lo, shape_.block_size) * shape_.block_size : 0;
      segment.seen_from = lo > 0 ? lo : 0;
      segment.slots = end > segment.first ? end - segment.first : 0;
      segment.visible_from = shape_.window > 0 ? last - shape_.window + 1 : 0;
      segment.visible_to = shape_.causal ? position + 1 : end;
      put_segment(shared_ + t, segment);
    });
    team_.each(rows_, [&](int row) {
      const int32_t i = request_of(s_.row_begin, row);
      write_row(i, row - s_.row_begin[i]);
    });
  }

  /// Row r of request i.
  RELAY_HD void write_row(int32_t i, int32_t r) {
    const int32_t position = s_.length[i] - s_.rows[i] + r;
    RowInfo info{i, position, 0, s_.length[i]};
    if (shape_.causal) info.hi = position + 1 < 0 ? 0 : position + 1;
    if (shape_.window > 0 && position - shape_.window + 1 > 0) {
      info.lo = position - shape_.window + 1;
    }
    store(&out_.rows[s_.row_begin[i] + r], info);
  }

  RELAY_HD void write_row_index() {
    team_.each(batch_.requests, [&](int i) {
      const RequestInfo info = out_.requests[i];
      if (info.rows_per_segment > 0) return;
      RELAY_NO_UNROLL
      for (int p = 0; p < info.parts; ++p) {
        const RequestPart part = out_.parts[i * kMaxParts + p];
        const Segment& segment = out_.segments[part.segment];
        if (segment.first_row >= 0) continue;
        int32_t* to = out_.row_index + segment.row_begin + part.row;
        RELAY_NO_UNROLL
        for (int32_t r = 0; r < s_.rows[i]; ++r) to[r] = info.row_begin + r;
      }
    });
  }

  /// The tiles of a segment read the same KV at about the same time: from memory only once.
  RELAY_HD int32_t step_memory(const Segment& segment) const {
    const int32_t cost = shape_.costs.step_memory;
    return segment.row_tiles > 1 ? quotient(cost, segment.row_tiles) : cost;
  }
  enum StepClass { kSteps8, kSteps64, kSteps128 };
  RELAY_HD StepClass step_class(const Segment& segment) const {
    const int32_t rows = segment.rows * shape_.group;
    return rows > 64 ? kSteps128 : (rows > 8 ? kSteps64 : kSteps8);
  }
  RELAY_HD int32_t step_products(const Segment& segment) const {
    const StepClass of = step_class(segment);
    return of == kSteps8 ? shape_.costs.step_8
                         : (of == kSteps64 ? shape_.costs.step_64 : shape_.costs.step_128);
  }
  /// A worker has room for `depth` steps, on their way or at work. A step that comes later than the
  /// products of another take is waited for, but `depth` of them at a time. (A model, which fits
  /// what batches take on an H200.)
  RELAY_HD int32_t step_cost(const Segment& segment) const {
    const int32_t products = step_products(segment);
    return latency_ > products ? products + quotient(latency_ - products, shape_.costs.depth)
                               : products;
  }
  RELAY_HD int32_t job_cost(const Segment& segment) const {
    int32_t rows = segment.rows * shape_.group;
    if (segment.row_tiles > 1) rows = quotient(rows + segment.row_tiles - 1, segment.row_tiles);
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
    find_latency();
    team_.each(segments_, [&](int k) {
      const Segment segment = load(&out_.segments[k]);
      const int32_t whole = whole_cost(segment);
      s_.sums[k] = jobs(segment) * segment.steps;
      s_.costs[k] = segment.steps == 0 ? 0 : jobs(segment) * whole;
      if (k < light_) return;
      const bool stays_whole = segment.rows * shape_.group > kTailRows;
      // Not by index, or all that is known here would lie in memory.
      const int32_t cut = stays_whole ? 0 : whole;
      const int32_t kept = stays_whole ? whole : 0;
      if (cut > longest_[kCutJobs]) longest_[kCutJobs] = cut;
      if (kept > longest_[kWholeJobs]) longest_[kWholeJobs] = kept;
    });
    team_.greatest(longest_);
    int32_t sums[2];
    team_.scan({s_.sums, s_.costs}, segments_, sums);
    const int32_t steps = sums[0];
    const int32_t cost = sums[1];
    // At least one for each job, as jobs that stay whole need no merging.
    int32_t workers = quotient(cost, shape_.costs.worker);
    workers = workers < load_[kJobs] ? load_[kJobs] : workers;
    workers = workers < 1 ? 1 : (workers > shape_.workers ? shape_.workers : workers);
    const int32_t light = light_cost(cost, workers);
    const int32_t wide_cost = cost_before(wide_, cost);
    const int32_t rest = cost - wide_cost;
    const int32_t heavy = rest - light;  // of the rest: no part of the tail
    // Where there is a tail to fill what others leave, workers of wide segments may get less.
    const int32_t relief = light / 2 < cost / kRelief ? light / 2 : cost / kRelief;
    int32_t* first_worker = s_.covered;  // of wide segments
    int32_t wide_workers = 0;
    bool teamed = false;
    // As near to its share as can be, or, where that leaves the rest too few, below it.
    RELAY_NO_UNROLL
    for (int32_t below = 0; below < 2 && wide_ > 0 && !teamed; ++below) {
      // Not where shares would be uneven: nobody may have more than 5/4 of the mean.
      bool uneven = false;
      team_.each(wide_, [&](int k) {
        const int64_t tiles = out_.segments[k].row_tiles;
        const int64_t share = int64_t{wide_share(k, cost)} * workers;
        const int64_t whole = (cost - relief) * tiles;
        const auto teams = static_cast<int32_t>((share + (below > 0 ? 0 : whole / 2)) / whole);
        first_worker[k] = (teams < 1 ? 1 : teams) * static_cast<int32_t>(tiles);
        uneven = uneven || too_much(wide_share(k, cost), first_worker[k], cost, workers);
      });
      uneven = team_.any(uneven);
      team_.scan({first_worker}, wide_, &wide_workers);
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
    const int32_t cuts = (all > shape_.workers ? all : shape_.workers) + 1;
    team_.each(cuts > segments_ ? cuts : segments_, [&](int i) {
      // Nobody reads this here, only s_.sums.
      if (i < segments_) out_.segments[i].step_base = s_.sums[i];
      if (i >= cuts) return;
      if (i == 0) {
        *out_.header = {segments_, shared_,       steps > 0 ? workers : 0, steps > 0 ? all : 0,
                        steps,     rows_,         partial_rows_,           0,
                        faults_,   fault_request_};
      }
      if (i >= all) {
        out_.cuts[i] = Cut{steps, segments_};
        return;
      }
      Cut cut{};
      if (i < wide_workers) {
        cut = team_step(first_worker, i, wide_workers);
      } else if (i < workers) {
        cut = step_at(done + share_of(fixed, i - wide_workers, others), 0);
      } else {
        // Where the tail begins, only jobs of many rows stay whole.
        cut = step_at(done + fixed + share_of(tail, i - workers, portions),
                      i > workers ? quotient(tail, portions) : 1);
      }
      out_.cuts[i] = cut;
      if (segments_ == 0) return;
      Segment begins = load(&out_.segments[cut.segment]);
      begins.step_base = s_.sums[cut.segment];
      store(&out_.begins[i], begins);
    });
  }

  /// cost x i / n, which 32 bits hold: n and i are numbers of workers or portions.
  RELAY_HD static int32_t share_of(int32_t cost, int32_t i, int32_t n) {
    const int32_t each = quotient(cost, n);
    return each * i + quotient((cost - each * n) * i, n);
  }

  /// What the tail may be made of: the own contexts of requests that fill no tile, if none of their
  /// jobs is longer than a worker's share (it would be cut into many pieces), nor any that stays
  /// whole longer than an eighth of that. Only where reading is the bound, as nothing else takes
  /// longer for some workers than for others.
  RELAY_HD int32_t light_cost(int32_t cost, int32_t workers) {
    if (shape_.max_portions == shape_.workers || workers < shape_.workers || !reading_bounds_ ||
        quotient(cost, workers) < shape_.costs.tail) {
      return 0;
    }
    const int32_t mean = quotient(cost, shape_.workers);
    const bool too_long = longest_[kCutJobs] > mean || longest_[kWholeJobs] > mean / 8;
    return too_long ? 0 : cost - cost_before(light_, cost);
  }

  /// How many portions the tail has. None is shorter than a job that stays whole; those that are
  /// not much longer than a portion do.
  RELAY_HD int32_t tail_portions(int32_t tail) const {
    if (tail == 0) return 0;
    const int32_t room = shape_.max_portions - shape_.workers;
    const auto of_at_least = [&](int32_t portion) {
      const int32_t portions =
          quotient(tail, portion > longest_[kWholeJobs] ? portion : longest_[kWholeJobs]);
      return portions < 1 ? 1 : (portions > room ? room : portions);
    };
    const int32_t portions = of_at_least(shape_.costs.portion);
    return longest_[kCutJobs] < 2 * quotient(tail, portions)
               ? of_at_least(longest_[kCutJobs])
               : of_at_least(3 * shape_.costs.portion);
  }

  /// Of `rest`, what is left to whoever has time: workers of their own get three quarters of the
  /// mean, and what is not light in any case.
  RELAY_HD static int32_t tail_cost(int32_t rest, int32_t light, int32_t others, int32_t cost,
                                    int32_t workers) {
    const int32_t tail = rest - share_of(cost, 3 * others, 4 * workers);
    return tail < 0 ? 0 : (tail < light ? tail : light);
  }

  RELAY_HD void add_load(const Segment& segment) {
    const int32_t steps = jobs(segment) * segment.steps;
    const int32_t products = step_products(segment);
    const int32_t memory = step_memory(segment);
    // Not by index, or all that is known here would lie in memory.
    const StepClass of = step_class(segment);
    load_[kSteps8] += of == kSteps8 ? steps : 0;
    load_[kSteps64] += of == kSteps64 ? steps : 0;
    load_[kSteps128] += of == kSteps128 ? steps : 0;
    const int32_t beside = jobs(segment) * job_cost(segment);
    load_[kJobs] += segment.steps > 0 ? jobs(segment) : 0;
    load_[kWaiting] += steps * (memory - products) - beside / 2;
    // Of a short step only what it reads.
    const int64_t bytes = int64_t{memory} * segment.slots >> slots_log2_;
    load_[kExcess] += jobs(segment) * static_cast<int32_t>(bytes) - steps * products - beside;
  }

  /// What all steps wait, times the depth, if copies take so long: see step_cost().
  RELAY_HD int64_t waiting(int32_t latency) const {
    const auto of = [&](int32_t steps, int32_t products) {
      return latency > products ? int64_t{steps} * (latency - products) : 0;
    };
    const PlanCosts& costs = shape_.costs;
    return of(load_[kSteps8], costs.step_8) + of(load_[kSteps64], costs.step_64) +
           of(load_[kSteps128], costs.step_128);
  }

  /// How long copies of KV take. Each worker asks for as many as it has room for; where the memory
  /// cannot give that, they take longer, until all work takes as long as all reading. Of what a job
  /// takes beside its steps half goes on while KV is read.
  RELAY_HD void find_latency() {
    const PlanCosts& costs = shape_.costs;
    reading_bounds_ = load_[kExcess] > 0;
    const int64_t wanted = int64_t{load_[kWaiting]} * costs.depth;
    latency_ = costs.latency;
    RELAY_NO_UNROLL
    for (int32_t most = costs.depth * costs.step_memory; latency_ < most;) {
      const int32_t middle = (latency_ + most) / 2;
      if (waiting(middle) < wanted) {
        latency_ = middle + 1;
      } else {
        most = middle;
      }
    }
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
  RELAY_HD Cut team_step(const int32_t* first_worker, int32_t w, int32_t wide_workers) const {
    int32_t low = 0;
    RELAY_NO_UNROLL
    for (int32_t high = wide_; high - low > 1;) {
      const int32_t middle = (low + high) / 2;
      (first_worker[middle] <= w ? low : high) = middle;
    }
    const Segment segment = load(&out_.segments[low]);
    const int32_t to = low + 1 == wide_ ? wide_workers : first_worker[low + 1];
    const int32_t per_tile = quotient(to - first_worker[low], segment.row_tiles);
    const int32_t tile = quotient(w - first_worker[low], per_tile);
    const int32_t of_tile = w - first_worker[low] - tile * per_tile;
    const int32_t line = shape_.kv_heads * segment.steps;
    const int32_t at = share_of(line, of_tile, per_tile);
    const int32_t jobs_before = quotient(at, segment.steps) * segment.steps;
    return {s_.sums[low] + tile * line + jobs_before + snapped(at - jobs_before, segment.steps),
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
  RELAY_HD Cut step_at(int32_t cost, int32_t portion) const {
    if (segments_ == 0) return {0, 0};
    int32_t low = 0;  // the last segment that begins at or before it
    RELAY_NO_UNROLL
    for (int32_t high = segments_; high - low > 1;) {
      const int32_t middle = (low + high) / 2;
      (s_.costs[middle] <= cost ? low : high) = middle;
    }
    const Segment segment = load(&out_.segments[low]);
    if (segment.steps == 0) return {s_.sums[low], low};
    const int32_t one = step_cost(segment);
    const int32_t lead = job_lead(segment);
    const int32_t whole = whole_cost(segment);
    const auto within = static_cast<int32_t>(cost - s_.costs[low]);
    int32_t job = quotient(within, whole);
    int32_t step = snapped(quotient(within - job * whole - lead + one / 2, one), segment.steps);
    if (portion > 0 && step > 0 &&
        (segment.rows * shape_.group > kTailRows || whole < 2 * portion)) {
      job += 1;
      step = 0;
    }
    if (job >= jobs(segment)) {
      job = jobs(segment);
      step = 0;
    }
    return {s_.sums[low] + job * segment.steps + step, low};
  }

  Team& team_;
  const PlanShape& shape_;
  const PlanBatch& batch_;
  const PlannerScratch& s_;
  const PlanView& out_;
  const int32_t slots_log2_;
  const int32_t rows_log2_;
  const int32_t rows_per_tile_;
  bool sharing_ = false;  ///< there are runs
  bool indexed_ = false;  ///< the rows of some shared segment are no neighbours
  int32_t rows_ = 0;
  uint32_t faults_ = 0;
  int32_t fault_request_ = INT_MAX;
  int32_t shared_ = 0;
  int32_t wide_ = 0;   ///< shared segments of several row tiles
  int32_t light_ = 0;  ///< the first of requests that fill no tile
  int32_t segments_ = 0;
  int32_t partial_rows_ = 0;
  static constexpr int32_t kRelief = 8;  ///< workers of wide segments get so much less, at most
  int32_t latency_ = 0;                  ///< of a copy of KV
  bool reading_bounds_ = false;          ///< it takes longer than all products
  enum { kJobs = 3, kWaiting, kExcess };
  /// Of all segments, each thread's until they are summed: steps by their rows (StepClass); jobs
  /// that have steps; what reading takes less products and half of what jobs take; what it takes
  /// less products and all of that, where a short step reads no more than it has.
  int32_t load_[6] = {};
  enum { kCutJobs, kWholeJobs };
  int32_t longest_[2] = {};  ///< cost of the longest job of the tail that may be cut, that may not
  enum { kWhich, kFirstRequest };
};

}  // namespace relay::cuda
