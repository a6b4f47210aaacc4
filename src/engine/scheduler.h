// Decides, step by step, which rows are computed: who is admitted, who waits for whose prefix, how
// large a piece of a prompt goes beside the decode rows, and who gives way when cells run out.
//
// A sequence that decodes is one whose pending part is a single token; nothing else tells prefill
// from decode. Order of service is (priority, arrival), with two exceptions, both bounded: of a
// step's prefill rows one half goes to the first prompt in that order, the other to those with the
// fewest tokens left, so that neither long nor short ones starve; and a request whose prompt is for
// the most part cached may be admitted before others, each of which is overtaken kMostOvertaken
// times at most.
//
// A step computes with one adapter. Adapters with running sequences share the time equally, however
// many sequences each has: the next step is for the one that has had the least. A step counts for
// kMostCharged seconds at most: what a process that was stopped or swapped out lost is not held
// against the adapter whose step it was, so that none lies further behind another than that.
// Admission knows no turns, so that nobody overtakes others by being of another adapter.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "engine/kv_memory.h"
#include "engine/model.h"
#include "engine/sequence.h"

namespace relay::engine {

/// Most prefill rows of a step.
struct PrefillBudget {
  int32_t beside = 0;  ///< where requests decode
  int32_t alone = 0;   ///< where none does
  /// Where requests decode: those of short prompts, the ones above among them. A prompt is short if
  /// what it had to compute when it was admitted fits into a step of its own (`alone`).
  int32_t short_prompts = 0;
};

/// Seconds; far above what a step is meant to take (EngineOptions::step_seconds).
constexpr double kMostCharged = 5.0;

struct SchedulerOptions {
  int32_t parallel = 64;        ///< most sequences running
  int32_t batch_tokens = 2048;  ///< most rows of a step
  int32_t adapters = 0;         ///< beside the base model
  int32_t scored_rows = 1;  ///< most of a step of prompts that are scored: all want their logits
  /// A sequence waits for another that is computing a prefix of its prompt if that saves it at
  /// least so many tokens. Waiting costs a step; below this, computing them again costs less.
  int32_t min_follow_tokens = 32;
};

/// Rows of one sequence in a step: `count` tokens from its computed length on.
struct Slice {
  Sequence* sequence = nullptr;
  int32_t count = 0;
  bool samples = false;  ///< the last of them yields its next token
};

struct StepPlan {
  int32_t adapter = 0;               ///< of all slices
  std::vector<Slice> slices;         ///< depth-first in the prefix tree
  std::vector<Sequence*> admitted;   ///< began (or began again) in this step
  std::vector<Sequence*> exhausted;  ///< cannot go on: the cells are too few even for it alone
  int32_t rows = 0;
  int32_t prefill_rows = 0;
};

class Scheduler {
 public:
  Scheduler(KvMemory& kv, const SchedulerOptions& options)
      : kv_(kv), options_(options), had_(static_cast<size_t>(options.adapters) + 1, 0.0) {}

  /// The sequence stays its owner's, who removes it before destroying it.
  void enqueue(Sequence* sequence);

  /// What to compute next; `budget` is asked for that of the adapter that it computes with. Cells
  /// for all rows are free when it returns. May admit and preempt. No slices: nothing to do (or see
  /// exhausted).
  StepPlan plan(const std::function<PrefillBudget(int32_t adapter)>& budget);

  /// The plan's rows are in the cache, computed in so many seconds: records them and publishes
  /// prompts.
  void commit(const StepPlan& plan, double seconds);

  enum class Keep { kAll, kPrompt, kNothing };
  /// The sequence leaves, from the queue or from running. keep: what stays in the cache of what it
  /// has computed.
  void remove(Sequence* sequence, Keep keep);
  /// Turns the running sequence into a pinned path; returns its id.
  SeqId remove_pinned(Sequence* sequence);

  /// The youngest running sequence gives up its cells and waits again with its tokens. False if
  /// fewer than two are running.
  bool preempt_youngest();

  /// Whose turn it is.
  int32_t next_adapter() const;
  /// Adapters, the base model among them, of these sequences: each once, in ascending order.
  static std::vector<int32_t> adapters_of(const std::vector<Sequence*>& sequences);
  /// Sequences of an adapter that decode.
  int32_t decoding(int32_t adapter) const;
  int32_t running() const { return static_cast<int32_t>(running_.size()); }
  int32_t waiting() const { return static_cast<int32_t>(waiting_.size()); }
  int64_t preemptions() const { return preemptions_; }
  const std::vector<Sequence*>& running_sequences() const { return running_; }
  const std::vector<Sequence*>& waiting_sequences() const { return waiting_; }

 private:
  bool has_running(int32_t adapter) const;
  bool follows_another(Sequence& sequence) const;
  int32_t headroom(const Sequence& sequence) const;
  int32_t promised_cells() const;
  void plan_decode(StepPlan& plan);
  void plan_admissions(StepPlan& plan);
  void plan_prefill(StepPlan& plan, PrefillBudget budget);
  std::vector<Sequence*> admission_order() const;
  void add_slice(StepPlan& plan, Sequence* sequence, int32_t count);
  void order_by_prefix(StepPlan& plan) const;
  void preempt(Sequence* sequence);

  KvMemory& kv_;
  SchedulerOptions options_;
  std::vector<Sequence*> waiting_;  // in order of service
  std::vector<Sequence*> running_;  // in order of service
  int64_t preemptions_ = 0;
  // Seconds that each adapter has had; one that comes back after a while starts level with the
  // others, those of the last turn.
  std::vector<double> had_;
  double last_turn_ = 0;
};

}  // namespace relay::engine
