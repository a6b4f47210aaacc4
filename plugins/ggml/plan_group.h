// Plans of one graph: which nodes share one, when it is made, and the memory that it is made in.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "flash_attention.h"
#include "relay/attention.h"
#include "relay/forest.h"

namespace relay::ggml {

/// A plan with its working memory, kept from graph to graph so that a steady state allocates
/// nothing.
class PlanSlot {
 public:
  /// Finds the sharing in `key`'s mask and plans for `threads` threads. Throws Error.
  void plan(const PlanKey& key, Sharing sharing, int32_t threads);

  /// Does thread `ith` of `nth`'s share of one node. Called by ggml's threads.
  void attend(const AttentionInputs& inputs, int ith, int nth);

  /// Throws Error if the plan cannot serve these inputs.
  void check(const AttentionInputs& inputs) const { validate(*plan_, inputs); }

 private:
  int32_t threads_ = 1;
  Forest forest_;
  PlanPtr plan_;
  Workspace workspace_;
};

/// The nodes of one graph that share a plan: they agree in their key.
///
/// Where the graph itself computes the mask, the plan cannot be made before the graph runs: the
/// group is deferred. Its plan is then made by the first thread that comes to its first node, while
/// the others wait; they could not do anything else before the barrier behind that node.
class PlanGroup {
 public:
  /// Starts anew for another graph.
  void reset(const PlanKey& key, size_t node);

  const PlanKey& key() const { return key_; }
  bool mask_is_computed() const { return key_.mask_version > 0; }

  /// First and last node (their place among the attention nodes of the graph).
  size_t first() const { return first_; }
  size_t last() const { return last_; }
  void extend_to(size_t node) { last_ = node; }

  /// Plans in `slot`, or for a computed mask arranges that it is done in time. Throws Error, for a
  /// computed mask too: everything but the mask's content is tried out here.
  void plan(PlanSlot& slot, Sharing sharing, int32_t threads);
  PlanSlot& slot() const { return *slot_; }

  void attend(const AttentionInputs& inputs, int ith, int nth);

 private:
  enum class Phase : int { kReady, kDeferred, kPlanning };

  PlanKey key_;
  size_t first_ = 0;
  size_t last_ = 0;
  PlanSlot* slot_ = nullptr;
  Sharing sharing_ = Sharing::kOn;
  std::atomic<Phase> phase_{Phase::kReady};
};

}  // namespace relay::ggml
