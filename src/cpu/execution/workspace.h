// Memory of a running operator.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/aligned_buffer.h"
#include "cpu/plan/plan.h"
#include "relay/attention.h"
#include "relay/state.h"

namespace relay {

/// Counters and nodes reset themselves: whoever takes one to its end sets it back, so that the next
/// layer starts clean without a barrier of its own.
struct Workspace::State {
  WorkspaceLayout layout;
  uint64_t fitted_to = 0;                    ///< serial of the plan that all this is set up for
  AlignedBuffer<float> partial_o;            ///< [partials][q_heads][padded v_dim]
  std::vector<SoftmaxState> partial_states;  ///< [partials][q_heads]
  std::vector<AlignedBuffer<float>> threads;
  /// [partials][head_words]: nodes of the rows' trees (cpu/plan/merge_tree.h). The bit of a KV head
  /// of which one half is there.
  std::unique_ptr<std::atomic<uint64_t>[]> half_there;
  int64_t nodes = 0;  ///< there is room for
  /// Low half: the next item to be taken. High half: how many threads will soon take one.
  alignas(64) std::atomic<uint64_t> next_item{0};
  alignas(64) std::atomic<uint32_t> finished_threads{0};
};

}  // namespace relay
