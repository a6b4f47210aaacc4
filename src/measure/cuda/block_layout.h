// Which blocks of a paged KV cache the requests of a problem list.
#pragma once

#include <cstdint>
#include <vector>

#include "measure/problem.h"

namespace relay::measure {

/// Only whole blocks can be shared: where the prefix ends within one, each request has its own copy
/// of that one's tokens.
struct BlockLayout {
  static constexpr int32_t kBlockSlots = 16;  // vLLM's default

  /// Throws Error for a batch without a request or without a slot, or of more slots than 32 bits
  /// count.
  explicit BlockLayout(const OpProblem& problem);

  int64_t shared_blocks;
  int64_t own_blocks;  ///< of each request
  int64_t columns;     ///< of the block table
  int64_t blocks;      ///< of the cache
  int64_t slots;       ///< in use, each counted once

  /// [batch][columns]; ids in no order, as in a cache that has been in use for a while.
  std::vector<int32_t> table(int32_t batch) const;
};

}  // namespace relay::measure
