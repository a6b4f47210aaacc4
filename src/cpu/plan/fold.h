// Which shared segments pay, and what becomes of the others.
//
// A shared segment costs each of its rows one more partial result: a state to be set up, stored and
// merged. What it saves, reading its slots again for each reader, grows with its length, and KV
// that was just read for one reader comes from the cache for the next one. So a short segment is
// dearer shared than not. Such a segment is folded into the segments below it, as if it were each
// reader's own: its slots come first in each of them.
#pragma once

#include <cstdint>
#include <vector>

#include "relay/attention.h"

namespace relay {

struct CostModel;

/// Memory of fold_short_segments(), for those who call it again and again.
struct FoldScratch {
  /// One fold: `from`'s slots are read by `into`'s rows there.
  struct Fold {
    uint32_t from = 0;
    uint32_t into = 0;
    uint32_t number = 0;  ///< in the order in which they were decided
  };
  struct Content {
    uint32_t span_begin = 0;
    uint32_t span_end = 0;
  };
  std::vector<uint32_t> order;     ///< segments, those with most rows first
  std::vector<uint32_t> first_of;  ///< [rows + 1]: where row r's begin in segments_of
  std::vector<uint32_t> segments_of;
  std::vector<uint32_t> results;  ///< [rows]: segments that list it still
  std::vector<uint32_t> common;   ///< [segments]: rows in common with the one at hand
  std::vector<uint32_t> below;    ///< segments below the one at hand
  std::vector<uint32_t> left;     ///< [segments]: rows that have not gone
  std::vector<int64_t> slots;     ///< [segments]: with those folded into it
  std::vector<uint8_t> taken;     ///< [rows]
  std::vector<Fold> folds;
  std::vector<Content> contents;  ///< [segments]: its spans, with those folded into it
};

/// Makes `folded` a copy of `forest` in which each shared segment pays, by `costs`: rows attend the
/// same slots by the same rules, but some by other segments. A function of its arguments alone;
/// allocates nothing once scratch and result have grown to their working size.
void fold_short_segments(const Forest& forest, const PlanOptions& options, const CostModel& costs,
                         FoldScratch& scratch, Forest& folded);

}  // namespace relay
