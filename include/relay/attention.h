// Attention over a forest of KV segments on the threads of a CPU: plan once per batch, run once per
// layer. relay/inputs.h says what is computed.
//
//   Forest forest;  build_from_block_tables(batch, Sharing::kOn, forest);
//   PlanPtr plan = make_plan(forest, {.shape = shape, .threads = 8});  // KV in f16
//   Workspace workspace(*plan);
//   // on each of 8 threads, for every layer:
//   attend(*plan, inputs, workspace, thread);
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "relay/forest.h"
#include "relay/inputs.h"
#include "relay/types.h"

namespace relay {

/// Everything a plan depends on besides the forest.
struct PlanOptions {
  HeadShape shape;
  DType k_type = DType::kF16;
  DType v_type = DType::kF16;
  KvLayout layout = KvLayout::kRows;
  int32_t threads = 1;  ///< number of threads that will call attend()
};

/// How a forest's work is cut into items and where their partial results go. Immutable once made;
/// one plan serves every layer of a batch, and concurrent workspaces.
class Plan;

struct PlanDeleter {
  void operator()(Plan* plan) const;
};
using PlanPtr = std::unique_ptr<Plan, PlanDeleter>;

/// Plans `forest`. Throws Error if the shape is unsupported or the forest invalid.
PlanPtr make_plan(const Forest& forest, const PlanOptions& options);
/// Plans again in the memory of an older plan: no allocation once it has grown to its working size.
void remake_plan(Plan& plan, const Forest& forest, const PlanOptions& options);

/// What a plan will do, for reports and tests.
struct PlanSummary {
  int64_t items = 0;
  int64_t partials = 0;  ///< (row, query head) partial states that need merging
  int64_t workspace_bytes = 0;
  int64_t kv_slots_read = 0;      ///< slot reads, each of all KV heads
  int64_t kv_slots_attended = 0;  ///< what they would be without sharing
  double flops = 0;               ///< multiply-adds counted twice, padding left out
};
PlanSummary summarize(const Plan& plan);
/// What the plan was made with.
const PlanOptions& options_of(const Plan& plan);

/// Scratch memory of one running operator: partial states, packed tiles, counters. It fits the plan
/// that it was last fitted to, until that is planned again; reuse it for every layer.
class Workspace {
 public:
  Workspace();
  explicit Workspace(const Plan& plan);
  ~Workspace();
  Workspace(Workspace&&) noexcept;
  Workspace& operator=(Workspace&&) noexcept;

  /// Grows to `plan` if needed. Not while an attend() is running on it.
  void fit(const Plan& plan);

  struct State;
  State& state() { return *state_; }

 private:
  std::unique_ptr<State> state_;
};

/// Does one thread's share of the operator; every thread 0..threads-1 of the plan must call it once
/// (in any order, at any time, or all from one thread in turn). The output is complete when all
/// have returned; then the workspace may be used for the next layer. Throws Error, before anything
/// is done, if the workspace was not fitted to this planning or there is no such thread.
void attend(const Plan& plan, const AttentionInputs& inputs, Workspace& workspace, int32_t thread);

/// Validates, plans and runs on `threads` threads of its own: for tests and one-off use.
void attend_forest(const Forest& forest, const PlanOptions& options, const AttentionInputs& inputs);

/// Throws Error if `inputs` cannot be served with this plan (types, null pointers, strides, slots
/// that the cache does not have).
void validate(const Plan& plan, const AttentionInputs& inputs);

// --- Instruction sets

/// Names of the kernel sets this CPU can run, best first: amx, avx512bf16, avx512, avx2; sve256,
/// neonbf16, neon; plain.
std::vector<std::string> available_isas();
/// The set in use: the best, or RELAY_ISA. Throws Error if RELAY_ISA names one that cannot run
/// here.
std::string current_isa();
/// Switches the set (tests). Throws Error if it cannot run here.
void select_isa(const std::string& name);

}  // namespace relay
