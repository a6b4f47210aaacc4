// Random batches over random prefix trees, and the ground truth of who attends what.
//
// A ForestCase is written down in terms of requests and tokens, never of a relay::Forest. From it
// come both the ground truth (per row, a list of slots) and the inputs of each builder, so that the
// oracle sees nothing that Relay's sharing made.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "core/random.h"
#include "relay/attention.h"
#include "relay/forest.h"
#include "relay/reference.h"

namespace relay::test {

/// What a random forest may grow to. Several limits hold at once; the tightest decides.
struct ForestLimits {
  int32_t max_depth = 6;
  int32_t max_rows = 256;
  int64_t max_prefix = 8192;       ///< tokens of one shared node
  int64_t max_context = 256;       ///< tokens of a request's own
  int64_t max_slots = 16384;       ///< stored tokens, the KV cache's size
  int64_t max_attended = 400'000;  ///< (row, slot) pairs
  bool tables_possible = false;    ///< only cases that block tables can describe
  bool whole_tiles = false;        ///< only blocks that KvLayout::kTiles allows
};

struct ForestCase {
  struct Node {
    int32_t parent = -1;
    std::vector<int64_t> slots;  ///< where its tokens lie
  };
  struct Request {
    int32_t node = -1;      ///< where its path ends; -1: it attends nothing
    int64_t kv_length = 0;  ///< tokens of the path that it has, its query tokens included
    int32_t rows = 1;       ///< query tokens: the last of kv_length
  };

  uint64_t seed = 0;
  int64_t block_size = 1;  ///< of the KV cache
  int64_t blocks = 0;
  bool causal = true;
  int64_t window = 0;
  bool tables_possible =
      false;                ///< shared nodes are whole blocks and every request attends something
  std::vector<Node> nodes;  ///< parents before children
  std::vector<Request> requests;

  int32_t rows() const { return static_cast<int32_t>(request_of_row.size()); }
  int64_t slots() const { return blocks * block_size; }
  int64_t position(int64_t row) const;
  /// The slots of a request's tokens 0 to kv_length-1.
  std::vector<int64_t> path(const Request& request) const;
  /// The ground truth: what `row` attends; columns are token positions.
  std::vector<AttendedSlot> attended(int64_t row) const;
  /// Slots that any row attends, as flags.
  std::vector<bool> used_slots() const;
  std::string describe() const;

  std::vector<int32_t> request_of_row;
  std::vector<int32_t> row_in_request;

  /// To be called when `requests` has been filled in by hand.
  void index_rows();
};

ForestCase generate_forest(uint64_t seed, const ForestLimits& limits);

/// The smallest building kit for hand-written cases: one shared prefix, then contexts of their own,
/// all decode rows, one block for all slots. Slots lie in order: prefix first.
ForestCase shared_prefix_case(int64_t prefix, const std::vector<int64_t>& contexts);

// --- Inputs of the builders ----------------------------------------------------------------------

void build_from_tables(const ForestCase& forest_case, Sharing sharing, Forest& forest,
                       int64_t align = 1);
/// `seed` chooses where runs of slots are cut into spans; the meaning is the same.
void build_from_tree(const ForestCase& forest_case, Sharing sharing, uint64_t seed, Forest& forest);

enum class MaskValues : uint8_t {
  kZero,      ///< visible slots carry 0
  kRandom,    ///< visible slots carry a random bias
  kDistance,  ///< visible slots carry -(position - column): ALiBi as ggml spells it
};

/// An additive mask over the slots of the KV cache, in memory as a host would hold it.
struct Mask {
  DType type = DType::kF16;
  int32_t rows_per_stream = 0;
  int32_t streams = 1;
  int64_t columns = 0;
  int64_t row_stride = 0;
  int64_t stream_stride = 0;
  std::vector<unsigned char> bytes;

  float at(int64_t row, int64_t column) const;
  void set(int64_t row, int64_t column, float value);
  MaskBatch batch() const;
  ConstRows bias() const;  ///< the same matrix as AttentionInputs::bias
  /// The ground truth of the mask itself. The column of stream s is that within the stream.
  std::vector<AttendedSlot> attended(int64_t row) const;
};

/// An all-hidden mask; rows are padded with NaN, which must never be read.
Mask make_mask(DType type, int32_t rows_per_stream, int32_t streams, int64_t columns);
Mask mask_of(const ForestCase& forest_case, DType type, MaskValues values, uint64_t seed);

/// Masks of no tree: random patterns (bands, blocks, sparse holes, noise) per stream.
Mask generate_mask(uint64_t seed, int32_t max_rows, int64_t max_columns);

}  // namespace relay::test
