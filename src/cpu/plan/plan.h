// How a forest's work is cut: items for the threads, and the places of their partial results.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/plan/fold.h"
#include "cpu/plan/schedule.h"
#include "relay/attention.h"

namespace relay {

struct CostModel;

inline constexpr int32_t kMaxGroup = 1024;  ///< query heads of one KV head

/// One piece of work: a chunk of one segment's slots, some KV heads, some rows. Its KV is read
/// once.
struct WorkItem {
  static constexpr uint32_t kNoSegment = UINT32_MAX;

  uint32_t segment = kNoSegment;  ///< kNoSegment: rows that attend nothing
  uint32_t row_begin = 0;         ///< range of Plan::row_index
  uint32_t row_end = 0;
  uint32_t span = 0;  ///< the chunk begins in this span, at this offset
  int64_t span_offset = 0;
  int64_t slots = 0;
  int32_t head_begin = 0;  ///< KV heads
  int32_t head_end = 0;
  bool few = false;    ///< which kernel: see KernelSet::few_rows
  uint32_t block = 0;  ///< it is a part of Plan::blocks[block]
  uint32_t chunk = 0;  ///< which of its chunks

  // For the cost model: what the item does for each of its heads.
  double row_slots = 0;       ///< slots times the query rows that may see them, tile by tile
  uint32_t partial_rows = 0;  ///< rows whose result is not their only one
  double cost = 0;            ///< seconds, without merging

  uint32_t rows() const { return row_end - row_begin; }
};

class Plan {
 public:
  static constexpr uint32_t kDirect = UINT32_MAX;  ///< a row's only result goes straight out

  uint64_t serial = 0;  ///< of its last planning, in this process: which plan this is
  PlanOptions options;
  Forest forest;                        ///< what was planned, short segments folded (fold.h)
  std::vector<uint32_t> row_index;      ///< the forest's, and the rows that attend nothing
  std::vector<WorkItem> items;          ///< in the order in which threads take them
  std::vector<uint32_t> partial_begin;  ///< [rows + 1]: row r's partials (merge_tree.h)
  std::vector<uint32_t> first_partial;  ///< [block][row]: that of its first chunk, or kDirect

  int64_t partials = 0;   ///< partials of all rows, each of all query heads
  int64_t slots_end = 0;  ///< all slots of the forest lie below
  // Largest needs of any item, for the threads' scratch.
  int64_t max_states = 0;  ///< (query row, KV head) pairs
  int64_t max_bias_rows = 0;

  /// A segment, or some of its rows; cut by slots into chunks, which are cut by heads into items.
  struct Block {
    uint32_t segment = 0;
    uint32_t row_begin = 0;  ///< range of row_index
    uint32_t row_end = 0;
    uint32_t shared_rows = 0;  ///< rows that other blocks list too
    int64_t slots = 0;         ///< of the segment, less the last ones if no row sees them
    int64_t unit_rows = -1;    ///< Plan::unit_rows[unit_rows + i]: unit i's; -1: all rows see all
    int64_t parts = 1;         ///< least number of items that its heads go into
    double overhead = 0;       ///< seconds of a chunk, whatever its slots
    double cost = 0;           ///< seconds of all slots and heads, in one chunk
    uint32_t chunks = 0;
    uint32_t rows_at = 0;     ///< Plan::first_partial[rows_at + i] is row i's
    int64_t leaf = -1;        ///< of its first chunk in its rows' trees; -1: not the same in all
    int64_t merges = 0;       ///< the most that an item may have to do for one KV head
    int64_t tail_units = 0;   ///< of the last chunk, if it is a tail (planner.cpp)
    uint32_t first_item = 0;  ///< while items lie in the order in which they were cut

    uint32_t rows() const { return row_end - row_begin; }
  };
  std::vector<Block> blocks;

  /// Partial of an item's row i, or kDirect.
  uint32_t partial_of(const WorkItem& item, uint32_t i) const {
    const uint32_t first = first_partial[blocks[item.block].rows_at + i];
    return first == kDirect ? kDirect : first + item.chunk;
  }

  /// How many a row has; 0 where its only result goes straight out.
  uint32_t partials_of(uint32_t row) const { return partial_begin[row + 1] - partial_begin[row]; }

  std::vector<uint32_t> alike;    ///< [rows]: how many, from this one on, lie in the same blocks
  std::vector<uint32_t> results;  ///< [rows]: chunks of its blocks; all partials, or a lone one
  double merge_seconds = 0;       ///< of two partials of one KV head

  // Scratch of planning, kept to avoid allocation.
  std::vector<int64_t> unit_rows;   ///< query rows that see something of a unit of slots
  std::vector<uint32_t> blocks_of;  ///< [rows]: how many blocks list the row
  std::vector<WorkItem> as_cut;     ///< items, before they have their order
  std::vector<ItemInOrder> order;
  ScheduleScratch schedule;
  FoldScratch folding;
};

/// Throws Error for options that no plan can be made for, whatever the forest.
void check_options(const PlanOptions& options);

/// As remake_plan of attention.h, by the given costs: a plan is a function of these three.
void remake_plan(Plan& plan, const Forest& forest, const PlanOptions& options,
                 const CostModel& costs);

/// Bytes of a workspace that fits `plan`; one place for sizing and for Workspace::fit.
struct WorkspaceLayout {
  int64_t partial_floats = 0;  ///< partial o vectors
  int64_t partial_states = 0;  ///< SoftmaxState each
  int64_t nodes = 0;           ///< [partials][head_words]
  int64_t thread_floats = 0;   ///< scratch of one thread, a multiple of 16
  // Offsets within a thread's scratch, in floats.
  int64_t q = 0, o = 0, max = 0, sum = 0, bias = 0, unpacked = 0, kernel = 0;

  int64_t bytes(int32_t threads) const;
};
WorkspaceLayout layout_of(const Plan& plan);

}  // namespace relay
