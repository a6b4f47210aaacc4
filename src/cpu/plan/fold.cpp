#include "cpu/plan/fold.h"

#include <algorithm>
#include <span>

#include "cpu/plan/block_costs.h"

namespace relay {
namespace {

class Folder {
 public:
  Folder(const Forest& forest, const PlanOptions& options, const CostModel& costs, FoldScratch& s)
      : forest_(forest),
        heads_(options.shape.kv_heads),
        whole_tiles_(options.layout == KvLayout::kTiles),
        costs_(costs),
        block_costs_(costs, options.shape),
        s_(s) {}

  /// Decides for all segments; whether any is folded.
  bool decide() {
    s_.folds.clear();
    if (std::none_of(forest_.segments.begin(), forest_.segments.end(),
                     [](const Segment& segment) { return segment.rows() > 1; })) {
      return false;
    }
    const auto segments = static_cast<uint32_t>(forest_.segments.size());
    list_segments_of_rows();
    s_.order.resize(segments);
    s_.slots.resize(segments);
    s_.left.resize(segments);
    s_.common.assign(segments, 0);
    s_.taken.assign(static_cast<size_t>(forest_.rows), 0);
    for (uint32_t i = 0; i < segments; ++i) {
      s_.order[i] = i;
      s_.slots[i] = forest_.segments[i].slots;
      s_.left[i] = forest_.segments[i].rows();
    }
    // From the root down: what is folded into a segment makes it longer, so that it may be worth
    // sharing itself.
    std::sort(s_.order.begin(), s_.order.end(), [&](uint32_t a, uint32_t b) {
      const uint32_t rows_a = forest_.segments[a].rows();
      const uint32_t rows_b = forest_.segments[b].rows();
      return rows_a != rows_b ? rows_a > rows_b : a < b;
    });
    for (uint32_t from : s_.order) {
      if (forest_.segments[from].rows() < 2) break;
      find_below(from);
      fold(from);
    }
    return !s_.folds.empty();
  }

  void build(Forest& out) {
    out.clear();
    out.rows = forest_.rows;
    out.positions.assign(forest_.positions.begin(), forest_.positions.end());
    const size_t segments = forest_.segments.size();
    std::sort(s_.folds.begin(), s_.folds.end(), [](const Fold& a, const Fold& b) {
      return a.into != b.into ? a.into < b.into : a.number < b.number;
    });
    s_.contents.resize(segments);
    for (uint32_t i : s_.order) lay_out_spans(i, out);
    std::sort(s_.folds.begin(), s_.folds.end(), [](const Fold& a, const Fold& b) {
      return a.from != b.from ? a.from < b.from : a.number < b.number;
    });
    auto fold = s_.folds.begin();
    for (uint32_t i = 0; i < segments; ++i) {
      const auto first = fold;
      while (fold != s_.folds.end() && fold->from == i) ++fold;
      if (s_.left[i] > 0) append(i, {first, fold}, out);
    }
  }

 private:
  using Fold = FoldScratch::Fold;

  void list_segments_of_rows() {
    const auto rows = static_cast<size_t>(forest_.rows);
    s_.results.assign(rows, 0);
    for (uint32_t row : forest_.row_index) ++s_.results[row];
    s_.first_of.assign(rows + 1, 0);
    for (size_t r = 0; r < rows; ++r) s_.first_of[r + 1] = s_.first_of[r] + s_.results[r];
    s_.segments_of.resize(forest_.row_index.size());
    for (uint32_t i = 0; i < forest_.segments.size(); ++i) {
      for (uint32_t row : forest_.rows_of(forest_.segments[i])) {
        s_.segments_of[s_.first_of[row]++] = i;
      }
    }
    for (size_t r = rows; r-- > 0;) s_.first_of[r + 1] = s_.first_of[r];
    s_.first_of[0] = 0;
  }

  /// s_.below: the largest segments whose rows are all among those of `from`, and that can take its
  /// slots. No row is in two of them.
  void find_below(uint32_t from) {
    const auto rows = forest_.rows_of(forest_.segments[from]);
    s_.below.clear();
    for (uint32_t row : rows) {
      for (uint32_t at = s_.first_of[row]; at < s_.first_of[row + 1]; ++at) {
        const uint32_t into = s_.segments_of[at];
        if (s_.common[into]++ == 0) s_.below.push_back(into);
      }
    }
    const auto comes_later = [&](uint32_t into) {
      const uint32_t size = forest_.segments[into].rows();
      return size < rows.size() || (size == rows.size() && into > from);
    };
    size_t kept = 0;
    for (uint32_t into : s_.below) {
      const bool all = s_.common[into] == forest_.segments[into].rows();
      s_.common[into] = 0;
      if (all && s_.left[into] == forest_.segments[into].rows() && comes_later(into) &&
          can_take(into, from)) {
        s_.below[kept++] = into;
      }
    }
    s_.below.resize(kept);
    std::sort(s_.below.begin(), s_.below.end(), [&](uint32_t a, uint32_t b) {
      const uint32_t rows_a = forest_.segments[a].rows();
      const uint32_t rows_b = forest_.segments[b].rows();
      return rows_a != rows_b ? rows_a > rows_b : a < b;
    });
    kept = 0;
    for (uint32_t into : s_.below) {
      const auto its_rows = forest_.rows_of(forest_.segments[into]);
      if (std::any_of(its_rows.begin(), its_rows.end(),
                      [&](uint32_t row) { return s_.taken[row] != 0; })) {
        continue;
      }
      for (uint32_t row : its_rows) s_.taken[row] = 1;
      s_.below[kept++] = into;
    }
    s_.below.resize(kept);
    for (uint32_t row : rows) s_.taken[row] = 0;
  }

  /// Whether `into` may begin with the slots of `from`.
  bool can_take(uint32_t into, uint32_t from) const {
    const Segment& a = forest_.segments[from];
    const Segment& b = forest_.segments[into];
    if (a.visibility != b.visibility) return false;
    if (whole_tiles_ && s_.slots[from] % kTileSlots != 0) return false;
    if (a.visibility != Visibility::kPositions) return true;
    // Columns of such a segment ascend.
    const Span& last = forest_.spans[a.span_end - 1];
    return s_.slots[into] == b.slots &&
           last.column + last.count <= forest_.spans[b.span_begin].column;
  }

  // --- Costs -------------------------------------------------------------------------------------

  /// Seconds of reading `slots` slots for `rows` rows, as a part of some segment.
  double reading(int64_t rows, int64_t slots) const {
    return block_costs_.kv_seconds(rows, block_costs_.least_parts(rows), slots,
                                   slots * block_costs_.query_rows(rows));
  }
  /// Likewise, of slots that another reader has read before.
  double reading_again(int64_t rows, int64_t slots) const {
    if (!from_cache_) return reading(rows, slots);
    const CostModel::Path& path = block_costs_.few(rows) ? costs_.few : costs_.many;
    const double products = static_cast<double>(block_costs_.query_rows(rows)) * path.row;
    const double cached = static_cast<double>(costs_.slot_bytes) * costs_.byte / kCacheSpeed;
    const auto parts = static_cast<double>(block_costs_.least_parts(rows));
    return static_cast<double>(slots) *
           (parts * costs_.locate + heads_ * std::max(path.slot + products, cached));
  }
  /// Seconds of sharing `slots` slots by `rows` rows, with their partial results and merging.
  double sharing(int64_t rows, int64_t slots) const {
    if (rows == 0) return 0;
    const int64_t tiles = (rows + block_costs_.rows_at_once() - 1) / block_costs_.rows_at_once();
    const int64_t rows_each = (rows + tiles - 1) / tiles;
    const double results =
        static_cast<double>(tiles) *
            block_costs_.overhead(rows_each, block_costs_.least_parts(rows_each)) +
        block_costs_.states(rows) * costs_.merge;
    return kSegment + kResults * results +
           kReading * static_cast<double>(tiles) * reading(rows_each, slots);
  }
  /// Seconds that `into` costs more with so many slots at its beginning, read a moment ago.
  double folding(uint32_t into, int64_t slots) const {
    const Segment& segment = forest_.segments[into];
    double seconds = reading_again(segment.rows(), slots);
    for (uint32_t row : forest_.rows_of(segment)) {
      // Its result goes straight out if it is the only one that is left.
      if (s_.results[row] == 2) seconds -= kResults * block_costs_.states(1) * costs_.store;
    }
    return seconds;
  }

  /// Whether `from`, were it folded, would be in the cache from one reader to the next: in between
  /// comes what is a reader's own.
  bool stays_in_cache(uint32_t from) const {
    int64_t own = 0;
    for (uint32_t into : s_.below) own = std::max(own, s_.slots[into]);
    return static_cast<double>(s_.slots[from] + own) * heads_ *
               static_cast<double>(costs_.slot_bytes) <=
           static_cast<double>(costs_.last_cache_bytes) * kStaysInCache;
  }

  /// Decides for one segment.
  void fold(uint32_t from) {
    const int64_t slots = s_.slots[from];
    if (slots > kMostSlots) return;
    int64_t rows = s_.left[from];
    from_cache_ = stays_in_cache(from);
    // Those whose rows fill a kernel by themselves, as a prefilling request's do, one by one.
    size_t kept = 0;
    for (uint32_t into : s_.below) {
      const int64_t own = forest_.segments[into].rows();
      if (own < rows && block_costs_.query_rows(own) >= kernels::kScoreRows &&
          folding(into, slots) < sharing(rows, slots) - sharing(rows - own, slots)) {
        go(from, into);
        rows -= own;
      } else {
        s_.below[kept++] = into;
      }
    }
    s_.below.resize(kept);
    // All others together.
    double seconds = 0;
    int64_t going = 0;
    for (uint32_t into : s_.below) {
      seconds += folding(into, slots);
      going += forest_.segments[into].rows();
    }
    if (going == 0) return;
    if (going == rows) {  // then one of them reads it first
      const int64_t first = forest_.segments[s_.below[0]].rows();
      seconds += reading(first, slots) - reading_again(first, slots);
    }
    if (seconds >= sharing(rows, slots) - sharing(rows - going, slots)) return;
    for (uint32_t into : s_.below) go(from, into);
  }

  void go(uint32_t from, uint32_t into) {
    const auto rows = forest_.rows_of(forest_.segments[into]);
    s_.folds.push_back({from, into, static_cast<uint32_t>(s_.folds.size())});
    s_.slots[into] += s_.slots[from];
    s_.left[from] -= static_cast<uint32_t>(rows.size());
    for (uint32_t row : rows) --s_.results[row];
  }

  // --- The result --------------------------------------------------------------------------------

  /// Appends a segment's spans, after those of the segments that were folded into it: these come
  /// earlier in s_.order. s_.folds are in order of `into`.
  void lay_out_spans(uint32_t i, Forest& out) {
    const auto begin = static_cast<uint32_t>(out.spans.size());
    auto fold = std::lower_bound(s_.folds.begin(), s_.folds.end(), i,
                                 [](const Fold& f, uint32_t into) { return f.into < into; });
    for (; fold != s_.folds.end() && fold->into == i; ++fold) {
      const FoldScratch::Content above = s_.contents[fold->from];
      for (uint32_t at = above.span_begin; at < above.span_end; ++at) {
        const Span span = out.spans[at];
        out.spans.push_back(span);
      }
    }
    const auto own = forest_.spans_of(forest_.segments[i]);
    out.spans.insert(out.spans.end(), own.begin(), own.end());
    s_.contents[i] = {begin, static_cast<uint32_t>(out.spans.size())};
  }

  /// Appends a segment with the rows that have not gone by one of these folds.
  void append(uint32_t i, std::span<const Fold> gone, Forest& out) {
    Segment segment = forest_.segments[i];
    for (const Fold& fold : gone) {
      for (uint32_t row : forest_.rows_of(forest_.segments[fold.into])) s_.taken[row] = 1;
    }
    const auto begin = static_cast<uint32_t>(out.row_index.size());
    for (uint32_t row : forest_.rows_of(segment)) {
      if (s_.taken[row] == 0) out.row_index.push_back(row);
      s_.taken[row] = 0;
    }
    segment.span_begin = s_.contents[i].span_begin;
    segment.span_end = s_.contents[i].span_end;
    segment.row_begin = begin;
    segment.row_end = static_cast<uint32_t>(out.row_index.size());
    segment.slots = s_.slots[i];
    out.segments.push_back(segment);
  }

  // What the model cannot tell: with these the shortest prefixes that are shared are about those
  // from which on sharing was measured to be faster (docs/performance.md).
  /// Partial results cost so many times what they do in the first-level cache, where the model's
  /// costs are measured.
  static constexpr double kResults = 2;
  /// And reading for all rows together so many times: what saves less than that is not worth it.
  static constexpr double kReading = 1.05;
  /// Seconds of all threads together: what follows a segment that all of them take part in. Its
  /// items begin with cold states, and some threads wait where each had a request of its own.
  static constexpr double kSegment = 10e-6;
  /// The last-level cache is read so many times as fast as memory (measured: 1.8 to 2.2).
  static constexpr double kCacheSpeed = 2;
  /// Longer ones are read once for all whatever is predicted: where arithmetic is the limit there
  /// is little between the two, and a batch beside it may need the memory.
  static constexpr int64_t kMostSlots = 1024;
  /// So much of the last-level cache keeps what was read.
  static constexpr double kStaysInCache = 0.5;

  const Forest& forest_;
  const double heads_;
  const bool whole_tiles_;
  const CostModel& costs_;
  const BlockCosts block_costs_;
  FoldScratch& s_;
  bool from_cache_ = false;  ///< whether the segment at hand is still there when it is read again
};

}  // namespace

void fold_short_segments(const Forest& forest, const PlanOptions& options, const CostModel& costs,
                         FoldScratch& scratch, Forest& folded) {
  Folder folder(forest, options, costs, scratch);
  if (folder.decide()) {
    folder.build(folded);
  } else {
    folded = forest;
  }
}

}  // namespace relay
