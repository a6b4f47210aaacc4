// Appends segments to a forest; shared by the builders.
#pragma once

#include <cstdint>
#include <span>

#include "relay/forest.h"

namespace relay {

/// What decides which of its columns a row sees, besides being listed.
struct PositionRule {
  bool causal = false;  ///< row r sees column c iff c <= positions[r]
  int64_t window = 0;   ///< and, if > 0, c > positions[r] - window
  int64_t align = 1;    ///< cuts are at multiples of this, with kPositions on the safe side
};

/// Appends one segment; takes rows ascending. Nothing is appended without rows or slots.
void append_segment(Forest& forest, std::span<const Span> spans, std::span<const uint32_t> rows,
                    Visibility visibility);

/// Appends `spans` (ascending columns) for `rows`, cut where the rule's outcome changes: columns
/// that no row sees are left out, those that every row sees become kAll, the rest kPositions.
/// forest.positions must hold the rows' positions if the rule needs them.
void append_visible(Forest& forest, std::span<const Span> spans, std::span<const uint32_t> rows,
                    const PositionRule& rule);

}  // namespace relay
