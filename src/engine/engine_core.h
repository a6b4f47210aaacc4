// The engine without its thread and without llama.cpp: requests in, steps, output to their sinks.
// Single-threaded; engine.cpp gives it a thread, tests call step() themselves.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "engine/engine.h"
#include "engine/kv_memory.h"
#include "engine/model.h"
#include "engine/pins.h"
#include "engine/prompt_persistence.h"
#include "engine/scheduler.h"
#include "engine/sequence.h"
#include "engine/step_pacer.h"

namespace relay::engine {

struct CoreOptions {
  SchedulerOptions scheduler;
  bool prefix_caching = true;
  double pin_budget = 0.2;         ///< share of the cells
  double step_seconds = 1.0;       ///< as in EngineOptions
  double decode_stretch = 1.75;    ///< as in EngineOptions
  int64_t kv_bytes_per_token = 0;  ///< for the statistics
  std::vector<std::string>
      adapters;  ///< names of scheduler.adapters, for the ids of pinned prompts
};

using Clock = std::chrono::steady_clock;

/// A request that passed the checks that need no cache state.
struct Request {
  RequestId id = 0;
  int32_t adapter = 0;  ///< as in GenerateRequest
  std::shared_ptr<Sink> sink;
  Clock::time_point submitted = Clock::now();
  std::string cache_salt;
  std::string pin_salt;
  int32_t priority = 0;
  std::vector<Token> prompt;
  int32_t max_tokens = 1;              ///< of each choice; 0: compute the prompt alone
  bool max_tokens_may_shrink = false;  ///< it was not asked for: fit it to the cache
  bool ignore_end = false;             ///< end-of-text tokens are tokens like others
  int32_t logprobs = -1;               ///< as in SamplingParams
  bool prompt_logprobs = false;        ///< as in GenerateRequest
  std::vector<std::string> stop;
  std::unordered_set<Token> visible;  ///< control tokens whose text is part of the output
  std::vector<std::unique_ptr<Sampler>> samplers;  ///< one for each choice

  // Filled by the core.
  std::vector<std::unique_ptr<Sequence>> choices;  ///< null once finished
  int32_t open = 0;
  Usage usage;
  bool began = false;
  bool has_token = false;
  Clock::time_point began_at{};
  Clock::time_point first_token_at{};
  Clock::time_point last_token_at{};
};

class EngineCore {
 public:
  /// cache: where prompts are stored; may be null.
  EngineCore(Model& model, const Vocabulary& vocabulary, const CoreOptions& options,
             PromptCache* cache = nullptr);
  ~EngineCore();

  /// Takes the request in, or refuses it through its sink if it can never fit beside what is
  /// pinned.
  void submit(std::unique_ptr<Request> request);
  void cancel(RequestId id);
  void cancel_all();
  /// Every open request and pin job ends with this error.
  void fail_all(ErrorKind kind, const std::string& message);

  void pin(const PinRequest& request, PinCallbacks callbacks);
  std::vector<PinnedPrompt> pinned() const;
  PinnedPrompt set_pin_ttl(const std::string& id, int64_t ttl_seconds);  ///< throws EngineError
  void unpin(const std::string& id);                                     ///< throws EngineError

  /// Prompts come back from the cache; before the first step.
  void restore_prompts(const ProgressFn& progress);
  /// Those that should be in it and are not are stored; after the last step.
  void store_prompts(std::chrono::seconds time) { persistence_.finish(time); }

  /// Computes one step. False: there was nothing to do.
  bool step();
  bool idle() const { return requests_.empty() && !pins_.computing(); }

  void set_observer(std::shared_ptr<Observer> observer) { observer_ = std::move(observer); }
  EngineStats stats() const;
  /// Called before a request's last sink call, when the counts already show it gone, and before a
  /// pin's.
  void set_before_end(const std::function<void()>& hook) {
    before_end_ = hook;
    pins_.set_before_done(hook);
  }
  KvMemory& kv() { return kv_; }
  const KvMemory& kv() const { return kv_; }
  const Scheduler& scheduler() const { return scheduler_; }

 private:
  PrefillBudget prefill_budget(int32_t adapter) const;
  void note_admissions(const StepPlan& plan, Clock::time_point now);
  void note_sharing(const StepPlan& plan);
  void compute(const StepPlan& plan);
  void score_prompt(const Slice& slice, int32_t first_row);
  void sample(const StepPlan& plan);
  void take_token(Request& request, Sequence& sequence, int32_t row);
  void finish_choice(Request& request, Sequence& sequence, FinishReason reason);
  void finish_request(Request& request, FinishReason reason);
  void fail_request(Request& request, ErrorKind kind, const std::string& message,
                    Scheduler::Keep keep);
  void fail_sequence(Sequence& sequence, ErrorKind kind, const std::string& message,
                     Scheduler::Keep keep);
  void end_exhausted(Sequence& sequence);
  int32_t cells_for(const Scope& scope, std::span<const Token> tokens) const;
  GeneratedToken describe(const Request& request, Token token, int32_t row);

  Model& model_;
  const Vocabulary& vocabulary_;
  CoreOptions options_;
  KvMemory kv_;
  Scheduler scheduler_;
  std::unordered_map<RequestId, std::unique_ptr<Request>> requests_;
  Pins pins_;
  PromptPersistence persistence_;
  std::shared_ptr<Observer> observer_;
  std::function<void()> before_end_;
  EngineStats counters_;  // its gauges are made in stats()
  uint64_t arrivals_ = 0;
  Batch batch_;
  std::vector<StepPacer> pacers_;  // of each adapter: its steps take their own time
};

}  // namespace relay::engine
