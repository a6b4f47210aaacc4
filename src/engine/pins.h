// Pinned prompts of the engine: those being computed, and those held until unpinned or expired.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/kv_memory.h"
#include "engine/scheduler.h"
#include "engine/sequence.h"

namespace relay::engine {

/// Called while a prompt is pinned, each from within a step or pin().
struct PinCallbacks {
  std::function<void(int32_t done, int32_t total)> progress;
  std::function<void(const PinnedPrompt&)> done;
  std::function<void(ErrorKind, const std::string&)> failed;
};

struct PinLimits {
  double budget = 0.2;                ///< share of the cells
  int32_t prompts = 0;                ///< at most so many
  int64_t kv_bytes_per_token = 0;     ///< for what is told of them
  std::vector<std::string> adapters;  ///< their names, of which ids are made
};

class Pins {
 public:
  Pins(KvMemory& kv, Scheduler& scheduler, const PinLimits& limits)
      : kv_(kv), scheduler_(scheduler), limits_(limits) {}

  /// Enqueues the prompt to be computed, or refuses it through its callbacks. One that is pinned
  /// already gets the new name and time to live.
  void pin(const PinRequest& request, uint64_t arrival, PinCallbacks callbacks);
  std::vector<PinnedPrompt> list() const;
  PinnedPrompt set_ttl(const std::string& id, int64_t ttl_seconds);  ///< throws EngineError
  void unpin(const std::string& id);                                 ///< throws EngineError

  bool computing() const { return !jobs_.empty(); }
  /// After a step: tells how far prompts are and pins those that are computed. Returns whether any.
  bool finish();
  void expire();
  /// The prompt that this sequence computes is given up.
  void fail(const Sequence& sequence, ErrorKind kind, const std::string& message,
            Scheduler::Keep keep);
  void fail_all(ErrorKind kind, const std::string& message);

  /// Called before PinCallbacks::done.
  void set_before_done(std::function<void()> hook) { before_done_ = std::move(hook); }

 private:
  struct Job {
    PinRequest request;
    std::string id;
    std::string sha256;
    PinCallbacks callbacks;
    Sequence sequence;
  };
  struct Pin {
    PinnedPrompt prompt;
    SeqId seq = -1;
  };

  KvMemory& kv_;
  Scheduler& scheduler_;
  const PinLimits limits_;
  std::vector<std::unique_ptr<Job>> jobs_;
  std::map<std::string, Pin> pins_;
  std::function<void()> before_done_;
};

}  // namespace relay::engine
