#include "relay/forest.h"

#include <algorithm>
#include <cstdlib>
#include <string>

namespace relay {

void Forest::clear() {
  rows = 0;
  positions.clear();
  spans.clear();
  row_index.clear();
  segments.clear();
}

std::span<const Span> Forest::spans_of(const Segment& s) const {
  return std::span(spans).subspan(s.span_begin, s.span_end - s.span_begin);
}

std::span<const uint32_t> Forest::rows_of(const Segment& s) const {
  return std::span(row_index).subspan(s.row_begin, s.row_end - s.row_begin);
}

int64_t Forest::slots_read() const {
  int64_t n = 0;
  for (const Segment& s : segments) n += s.slots;
  return n;
}

int64_t Forest::slots_attended() const {
  int64_t n = 0;
  for (const Segment& s : segments) n += s.slots * s.rows();
  return n;
}

void validate(const Forest& forest) {
  const auto fail = [](const std::string& what) { throw Error("forest: " + what); };
  if (forest.rows < 0) fail("negative number of rows");
  if (!forest.positions.empty() && forest.positions.size() != static_cast<size_t>(forest.rows)) {
    fail("positions must be empty or one per row");
  }
  for (size_t i = 0; i < forest.segments.size(); ++i) {
    const Segment& s = forest.segments[i];
    const std::string name = "segment " + std::to_string(i) + ": ";
    if (s.span_begin >= s.span_end || s.span_end > forest.spans.size()) {
      fail(name + "bad span range");
    }
    if (s.row_begin >= s.row_end || s.row_end > forest.row_index.size()) {
      fail(name + "bad row range");
    }
    int64_t slots = 0;
    for (const Span& span : forest.spans_of(s)) {
      if (span.count <= 0 || span.slot < 0 || span.column < 0) fail(name + "bad span");
      slots += span.count;
    }
    if (slots != s.slots) fail(name + "slots is not the sum of its spans");
    int64_t previous = -1;
    for (uint32_t row : forest.rows_of(s)) {
      if (row <= previous || row >= static_cast<uint32_t>(forest.rows)) {
        fail(name + "rows must be ascending, unique and below rows");
      }
      previous = row;
    }
    if (s.visibility == Visibility::kPositions && forest.positions.empty()) {
      fail(name + "kPositions needs positions");
    }
  }
  // Disjointness: no row may attend a slot twice.
  std::vector<std::vector<Span>> attended(static_cast<size_t>(forest.rows));
  for (const Segment& s : forest.segments) {
    for (uint32_t row : forest.rows_of(s)) {
      const auto spans = forest.spans_of(s);
      attended[row].insert(attended[row].end(), spans.begin(), spans.end());
    }
  }
  for (size_t row = 0; row < attended.size(); ++row) {
    auto& spans = attended[row];
    std::sort(spans.begin(), spans.end(),
              [](const Span& a, const Span& b) { return a.slot < b.slot; });
    for (size_t i = 1; i < spans.size(); ++i) {
      if (spans[i - 1].slot + spans[i - 1].count > spans[i].slot) {
        fail("row " + std::to_string(row) + " attends slot " + std::to_string(spans[i].slot) +
             " twice");
      }
    }
  }
}

Sharing sharing_from_env() {
  const char* value = std::getenv("RELAY_SHARING");
  if (value == nullptr || *value == '\0' || std::string(value) == "on") return Sharing::kOn;
  if (std::string(value) == "off") return Sharing::kOff;
  throw Error("RELAY_SHARING must be 'on' or 'off', not '" + std::string(value) + "'");
}

}  // namespace relay
