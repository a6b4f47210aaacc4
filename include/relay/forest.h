// Who shares what: a forest whose nodes are runs of KV slots and the rows that attend them.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "relay/types.h"

namespace relay {

/// A run of consecutive KV slots. `column` is the sequence position of the first one (causal masks,
/// windows, ALiBi) and, where a bias matrix is given, its column there.
struct Span {
  int64_t slot = 0;
  int64_t column = 0;
  int64_t count = 0;
  bool operator==(const Span&) const = default;
};

enum class Visibility : uint8_t {
  kAll,        ///< every row of the segment sees every slot of it
  kPositions,  ///< row r sees column c iff c <= position(r) and c > position(r) - window
  kBias,       ///< bias(row, column) is added to the logit; -inf hides the slot
};

/// One node: its slots are read once for all of its rows.
/// Spans are forest.spans[span_begin, span_end); rows are forest.row_index[row_begin, row_end),
/// ascending and unique.
struct Segment {
  uint32_t span_begin = 0;
  uint32_t span_end = 0;
  uint32_t row_begin = 0;
  uint32_t row_end = 0;
  int64_t slots = 0;  ///< sum of the spans' counts
  Visibility visibility = Visibility::kAll;

  uint32_t rows() const { return row_end - row_begin; }
};

/// The attention of row r is over the slots of all segments that list r; those are disjoint.
/// A row in no segment attends nothing: its output is 0 and its log-sum-exp -inf (sinks apart).
struct Forest {
  int32_t rows = 0;
  std::vector<int64_t> positions;  ///< per row; needed by kPositions and ALiBi, else may be empty
  std::vector<Span> spans;
  std::vector<uint32_t> row_index;
  std::vector<Segment> segments;

  void clear();
  std::span<const Span> spans_of(const Segment& s) const;
  std::span<const uint32_t> rows_of(const Segment& s) const;
  /// Bytes-free measure of sharing: KV slots read with sharing, and by each row for itself.
  int64_t slots_read() const;
  int64_t slots_attended() const;
};

/// Throws Error if the forest breaks a promise made above (indices, counts, order, disjointness).
void validate(const Forest& forest);

/// kOff reads each request's KV for itself, by the same code: the ablation (RELAY_SHARING=off).
enum class Sharing : uint8_t { kOn, kOff };

/// From RELAY_SHARING (on | off, default on); throws Error on any other value.
Sharing sharing_from_env();

// --- Builders -----------------------------------------------------------------------------------

/// Batch described by block tables (vLLM): request i owns the query rows
/// [row_offsets[i], row_offsets[i+1]), the last rows of its kv_lengths[i] tokens; token t lies in
/// slot table[i * table_stride + t / block_size] * block_size + t % block_size.
struct BlockTables {
  int32_t requests = 0;
  std::span<const int32_t> row_offsets;  ///< requests + 1
  std::span<const int64_t> kv_lengths;   ///< requests; >= the request's row count
  const int32_t* table = nullptr;
  int64_t table_stride = 0;
  int64_t block_size = 16;
  bool causal = true;
  int64_t window = 0;  ///< sliding window in tokens, 0 for none
  int64_t align = 1;   ///< segments begin at multiples of this: kTileSlots for KvLayout::kTiles
};
void build_from_block_tables(const BlockTables& batch, Sharing sharing, Forest& forest);

/// Batch described by an additive f16 or f32 mask (ggml): -inf hides, 0 shows, other values bias.
/// mask(row, column) at data + row * row_stride + column * element size. Block b of a KvCache with
/// block_size = slots_per_block is stream b; its rows are [b, b+1) * rows_per_stream and its
/// columns 0 to columns-1 are the slots b * slots_per_block + column.
struct MaskBatch {
  DType type = DType::kF16;
  const void* data = nullptr;  ///< null: everything is visible
  int64_t row_stride = 0;
  int64_t stream_stride = 0;  ///< bytes from one stream's mask to the next; 0 when shared
  int32_t rows_per_stream = 0;
  int32_t streams = 1;
  int64_t columns = 0;
  int64_t slots_per_block = 0;
};
void build_from_mask(const MaskBatch& batch, Sharing sharing, Forest& forest);

/// Batch described by an explicit tree: node n holds `spans`, below `parent` (-1: a root; parents
/// come before children). Row r attends its leaf and all of that node's ancestors.
struct TreeNode {
  int32_t parent = -1;
  std::vector<Span> spans;
};
struct PrefixTreeBatch {
  std::span<const TreeNode> nodes;
  std::span<const int32_t> leaf_of_row;      ///< -1: attends nothing
  std::span<const int64_t> position_of_row;  ///< empty: every slot is visible
  int64_t window = 0;
};
void build_from_tree(const PrefixTreeBatch& batch, Sharing sharing, Forest& forest);

}  // namespace relay
