#include "sharing/emit.h"

#include <algorithm>

namespace relay {

void append_segment(Forest& forest, std::span<const Span> spans, std::span<const uint32_t> rows,
                    Visibility visibility) {
  int64_t slots = 0;
  for (const Span& s : spans) slots += s.count;
  if (slots == 0 || rows.empty()) return;
  Segment segment;
  segment.slots = slots;
  segment.visibility = visibility;
  segment.span_begin = static_cast<uint32_t>(forest.spans.size());
  for (const Span& s : spans) {
    if (s.count > 0) forest.spans.push_back(s);
  }
  segment.span_end = static_cast<uint32_t>(forest.spans.size());
  segment.row_begin = static_cast<uint32_t>(forest.row_index.size());
  forest.row_index.insert(forest.row_index.end(), rows.begin(), rows.end());
  segment.row_end = static_cast<uint32_t>(forest.row_index.size());
  forest.segments.push_back(segment);
}

namespace {

/// The part of `spans` whose columns lie in [begin, end).
void append_columns(Forest& forest, std::span<const Span> spans, std::span<const uint32_t> rows,
                    int64_t begin, int64_t end, Visibility visibility) {
  if (begin >= end) return;
  std::vector<Span> part;
  for (const Span& s : spans) {
    const int64_t from = std::max(begin, s.column);
    const int64_t to = std::min(end, s.column + s.count);
    if (from < to) part.push_back({s.slot + (from - s.column), from, to - from});
  }
  append_segment(forest, part, rows, visibility);
}

/// As append_visible, for rows whose columns form one interval.
void append_overlapping(Forest& forest, std::span<const Span> spans, std::span<const uint32_t> rows,
                        const PositionRule& rule) {
  int64_t first = INT64_MAX;  // of the rows' positions
  int64_t last = INT64_MIN;
  for (uint32_t r : rows) {
    first = std::min(first, forest.positions[r]);
    last = std::max(last, forest.positions[r]);
  }
  int64_t begin = INT64_MAX;
  int64_t end = INT64_MIN;
  for (const Span& s : spans) {
    begin = std::min(begin, s.column);
    end = std::max(end, s.column + s.count);
  }
  const auto down = [&](int64_t column) { return column - column % rule.align; };
  const auto up = [&](int64_t column) { return down(column + rule.align - 1); };
  end = std::min(end, last + 1);  // later: seen by no row
  if (rule.window > 0) {
    begin =
        std::max(begin, down(std::max<int64_t>(0, first - rule.window + 1)));  // earlier: by no row
  }
  const int64_t all_begin =
      rule.window > 0 ? std::max(begin, up(std::max<int64_t>(0, last - rule.window + 1))) : begin;
  const int64_t all_end = first + 1 < end ? down(first + 1) : end;
  if (all_begin >= all_end) {
    append_columns(forest, spans, rows, begin, end, Visibility::kPositions);
    return;
  }
  append_columns(forest, spans, rows, begin, all_begin, Visibility::kPositions);
  append_columns(forest, spans, rows, all_begin, all_end, Visibility::kAll);
  append_columns(forest, spans, rows, all_end, end, Visibility::kPositions);
}

}  // namespace

void append_visible(Forest& forest, std::span<const Span> spans, std::span<const uint32_t> rows,
                    const PositionRule& rule) {
  if (spans.empty() || rows.empty()) return;
  if (!rule.causal) {
    append_segment(forest, spans, rows, Visibility::kAll);
    return;
  }
  if (rule.window == 0) {
    append_overlapping(forest, spans, rows, rule);
    return;
  }
  // Rows whose windows lie apart have nothing in common here: each run of overlapping windows is a
  // segment of its own, so that no column is read that nobody sees.
  std::vector<uint32_t> by_position(rows.begin(), rows.end());
  std::stable_sort(by_position.begin(), by_position.end(), [&](uint32_t a, uint32_t b) {
    return forest.positions[a] < forest.positions[b];
  });
  for (size_t first = 0; first < by_position.size();) {
    size_t last = first + 1;
    while (last < by_position.size() && forest.positions[by_position[last]] - rule.window <
                                            forest.positions[by_position[last - 1]]) {
      ++last;
    }
    std::vector<uint32_t> together(by_position.begin() + first, by_position.begin() + last);
    std::sort(together.begin(), together.end());
    append_overlapping(forest, spans, together, rule);
    first = last;
  }
}

}  // namespace relay
