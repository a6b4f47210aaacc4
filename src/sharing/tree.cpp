// Explicit prefix tree -> forest: a node's readers are the rows whose leaf lies in its subtree.
#include <map>
#include <string>

#include "sharing/emit.h"

namespace relay {

void build_from_tree(const PrefixTreeBatch& batch, Sharing sharing, Forest& forest) {
  const auto fail = [](const std::string& what) { throw Error("prefix tree: " + what); };
  const auto nodes = static_cast<int32_t>(batch.nodes.size());
  const size_t rows = batch.leaf_of_row.size();
  for (int32_t n = 0; n < nodes; ++n) {
    if (batch.nodes[n].parent >= n || batch.nodes[n].parent < -1) {
      fail("node " + std::to_string(n) + ": parents come before children, -1 is a root");
    }
  }
  if (batch.window < 0) fail("window must not be negative");
  if (!batch.position_of_row.empty() && batch.position_of_row.size() != rows) {
    fail("position_of_row must be empty or one per row");
  }
  forest.clear();
  forest.rows = static_cast<int32_t>(rows);
  forest.positions.assign(batch.position_of_row.begin(), batch.position_of_row.end());

  std::vector<std::vector<uint32_t>> readers(batch.nodes.size());
  std::map<int32_t, std::vector<uint32_t>> rows_of_leaf;
  for (size_t row = 0; row < rows; ++row) {
    const int32_t leaf = batch.leaf_of_row[row];
    if (leaf < -1 || leaf >= nodes) fail("row " + std::to_string(row) + ": no such leaf");
    if (leaf >= 0) rows_of_leaf[leaf].push_back(static_cast<uint32_t>(row));
    for (int32_t n = leaf; n >= 0; n = batch.nodes[n].parent) {
      readers[n].push_back(static_cast<uint32_t>(row));
    }
  }
  const PositionRule rule{!batch.position_of_row.empty(), batch.window};
  if (sharing == Sharing::kOn) {
    // A child with all of its node's readers goes on where the node ends: one run of slots, so that
    // a request on its own is planned as if nothing could be shared.
    std::vector<int32_t> next(batch.nodes.size(), -1);
    std::vector<char> goes_on(batch.nodes.size(), 0);
    for (int32_t n = 0; n < nodes; ++n) {
      const int32_t parent = batch.nodes[n].parent;
      if (parent < 0 || readers[n].empty() || readers[n].size() != readers[parent].size()) continue;
      next[parent] = n;
      goes_on[n] = 1;
    }
    std::vector<Span> spans;
    for (int32_t n = 0; n < nodes; ++n) {
      if (goes_on[n] != 0) continue;
      spans.clear();
      for (int32_t m = n; m >= 0; m = next[m]) {
        spans.insert(spans.end(), batch.nodes[m].spans.begin(), batch.nodes[m].spans.end());
      }
      append_visible(forest, spans, readers[n], rule);
    }
    return;
  }
  // Rows of one leaf are one request; each request reads its whole path for itself.
  for (const auto& [leaf, request] : rows_of_leaf) {
    std::vector<int32_t> path;
    for (int32_t n = leaf; n >= 0; n = batch.nodes[n].parent) path.push_back(n);
    std::vector<Span> spans;
    for (auto n = path.rbegin(); n != path.rend(); ++n) {
      spans.insert(spans.end(), batch.nodes[*n].spans.begin(), batch.nodes[*n].spans.end());
    }
    append_visible(forest, spans, request, rule);
  }
}

}  // namespace relay
