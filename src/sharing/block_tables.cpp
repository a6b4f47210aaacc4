// Block tables -> forest. Requests whose tables begin with the same full blocks share them; the
// blocks are compared by id, since an engine gives equal prefixes the same blocks.
#include <algorithm>
#include <numeric>
#include <string>

#include "sharing/emit.h"

namespace relay {
namespace {

class BlockTableBuilder {
 public:
  BlockTableBuilder(const BlockTables& batch, Forest& forest) : batch_(batch), forest_(forest) {}

  /// Emits blocks [depth, ...) of `group` (request numbers), which agree on all blocks before.
  void build(std::vector<int32_t> group, int64_t depth) {
    while (!group.empty()) {
      if (group.size() == 1) {  // all that is left, a partial last block included
        emit(group, depth * batch_.block_size, batch_.kv_lengths[group[0]]);
        return;
      }
      const int64_t end = common_end(group, depth);
      emit(group, depth * batch_.block_size, end * batch_.block_size);
      depth = end;
      // Requests with no full block left go on alone; the others by the block that comes next.
      std::vector<int32_t> on;
      for (int32_t r : group) {
        if (full_blocks(r) > depth) {
          on.push_back(r);
        } else {
          emit({r}, depth * batch_.block_size, batch_.kv_lengths[r]);
        }
      }
      std::stable_sort(on.begin(), on.end(),
                       [&](int32_t a, int32_t b) { return block(a, depth) < block(b, depth); });
      size_t first = 0;
      while (first < on.size()) {
        size_t last = first + 1;
        while (last < on.size() && block(on[last], depth) == block(on[first], depth)) ++last;
        std::vector<int32_t> part(on.begin() + first, on.begin() + last);
        if (last == on.size() && first == 0) {
          group = std::move(part);  // nobody split off: no need to recurse
          break;
        }
        build(std::move(part), depth);
        first = last;
      }
      if (first > 0 || on.empty()) return;
    }
  }

 private:
  int32_t block(int32_t request, int64_t depth) const {
    return batch_.table[request * batch_.table_stride + depth];
  }
  int64_t full_blocks(int32_t request) const {
    return batch_.kv_lengths[request] / batch_.block_size;
  }

  /// First depth at which the group disagrees or a member has no full block.
  int64_t common_end(const std::vector<int32_t>& group, int64_t depth) const {
    int64_t end = INT64_MAX;
    for (int32_t r : group) end = std::min(end, full_blocks(r));
    for (size_t i = 1; i < group.size(); ++i) {
      int64_t d = depth;
      while (d < end && block(group[i], d) == block(group[0], d)) ++d;
      end = d;
    }
    return std::max(end, depth);
  }

  /// Columns [begin, end) of the (common) block table for all rows of the group.
  void emit(const std::vector<int32_t>& group, int64_t begin, int64_t end) {
    if (begin >= end) return;
    spans_.clear();
    for (int64_t column = begin; column < end;) {
      const int64_t d = column / batch_.block_size;
      const int64_t in_block = column % batch_.block_size;
      const int64_t next = column + std::min(end - column, batch_.block_size - in_block);
      const int64_t slot = block(group[0], d) * batch_.block_size + in_block;
      if (!spans_.empty() && spans_.back().slot + spans_.back().count == slot) {
        spans_.back().count += next - column;
      } else {
        spans_.push_back({slot, column, next - column});
      }
      column = next;
    }
    rows_.clear();
    for (int32_t r : group) {
      for (int32_t row = batch_.row_offsets[r]; row < batch_.row_offsets[r + 1]; ++row) {
        rows_.push_back(static_cast<uint32_t>(row));
      }
    }
    std::sort(rows_.begin(), rows_.end());
    append_visible(forest_, spans_, rows_, {batch_.causal, batch_.window, batch_.align});
  }

  const BlockTables& batch_;
  Forest& forest_;
  std::vector<Span> spans_;
  std::vector<uint32_t> rows_;
};

void check(const BlockTables& batch) {
  const auto fail = [](const std::string& what) { throw Error("block tables: " + what); };
  if (batch.requests < 0) fail("negative number of requests");
  if (batch.row_offsets.size() != static_cast<size_t>(batch.requests) + 1) {
    fail("row_offsets must have requests + 1 entries");
  }
  if (batch.kv_lengths.size() != static_cast<size_t>(batch.requests)) {
    fail("kv_lengths must have one entry per request");
  }
  if (batch.block_size < 1) fail("block_size must be positive");
  if (batch.window < 0) fail("window must not be negative");
  if (batch.align < 1 || batch.block_size % batch.align != 0) {
    fail("block_size must be a multiple of align");
  }
  if (batch.requests > 0 && batch.table == nullptr) fail("table is null");
  if (batch.row_offsets[0] != 0) fail("row_offsets must begin with 0");
  const int64_t last_block = INT64_MAX / batch.block_size - 1;
  for (int32_t r = 0; r < batch.requests; ++r) {
    const int64_t rows = int64_t{batch.row_offsets[r + 1]} - batch.row_offsets[r];
    const int64_t length = batch.kv_lengths[r];
    const std::string name = "request " + std::to_string(r) + ": ";
    if (rows < 0) fail(name + "row_offsets must not descend");
    if (length < rows) fail(name + "fewer KV tokens than rows");
    const int64_t blocks = length / batch.block_size + (length % batch.block_size != 0);
    if (blocks > batch.table_stride && batch.requests > 1) fail(name + "table row too short");
    for (int64_t d = 0; d < blocks; ++d) {
      const int32_t block = batch.table[r * batch.table_stride + d];
      if (block < 0) fail(name + "negative block number");
      if (block > last_block) fail(name + "the block's slots have no 64-bit number");
    }
  }
}

}  // namespace

void build_from_block_tables(const BlockTables& batch, Sharing sharing, Forest& forest) {
  check(batch);
  forest.clear();
  forest.rows = batch.row_offsets[batch.requests];
  forest.positions.resize(static_cast<size_t>(forest.rows));
  for (int32_t r = 0; r < batch.requests; ++r) {
    const int64_t rows = batch.row_offsets[r + 1] - batch.row_offsets[r];
    for (int64_t i = 0; i < rows; ++i) {
      forest.positions[batch.row_offsets[r] + i] = batch.kv_lengths[r] - rows + i;
    }
  }
  BlockTableBuilder builder(batch, forest);
  std::vector<int32_t> with_rows;
  for (int32_t r = 0; r < batch.requests; ++r) {
    if (batch.row_offsets[r + 1] > batch.row_offsets[r]) with_rows.push_back(r);
  }
  if (sharing == Sharing::kOn) {
    // By first block: build() takes a group whose members agree so far.
    builder.build(std::move(with_rows), 0);
  } else {
    for (int32_t r : with_rows) builder.build({r}, 0);
  }
}

}  // namespace relay
