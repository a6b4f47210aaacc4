#include "measure/cuda/block_layout.h"

#include <algorithm>
#include <numeric>
#include <random>

namespace relay::measure {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

BlockLayout::BlockLayout(const OpProblem& p) {
  check_batch(p);
  shared_blocks = p.prefix / kBlockSlots;
  const int64_t own = p.prefix % kBlockSlots + p.context;
  own_blocks = ceil_div(own, kBlockSlots);
  columns = shared_blocks + own_blocks;
  blocks = shared_blocks + p.batch * own_blocks;
  slots = shared_blocks * kBlockSlots + p.batch * own;
  if (p.prefix + p.context > INT32_MAX || blocks > INT32_MAX / kBlockSlots) {
    throw Error("prefix, context and batch are too large for one KV cache");
  }
}

std::vector<int32_t> BlockLayout::table(int32_t batch) const {
  std::vector<int32_t> ids(blocks);
  std::iota(ids.begin(), ids.end(), 0);
  std::shuffle(ids.begin(), ids.end(), std::mt19937(1));
  std::vector<int32_t> table;
  table.reserve(batch * columns);
  for (int64_t request = 0; request < batch; ++request) {
    const auto own = ids.begin() + shared_blocks + request * own_blocks;
    table.insert(table.end(), ids.begin(), ids.begin() + shared_blocks);
    table.insert(table.end(), own, own + own_blocks);
  }
  return table;
}

}  // namespace relay::measure
