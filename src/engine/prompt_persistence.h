// Between the engine's KV and the prompt cache on disk: what lasts is stored piece by piece between
// steps, and comes back at start-up.
#pragma once

#include <chrono>
#include <cstdint>
#include <deque>

#include "engine/engine.h"
#include "engine/kv_memory.h"
#include "engine/prompt_cache.h"

namespace relay::engine {

class PromptPersistence {
 public:
  /// Without a cache nothing is stored.
  PromptPersistence(KvMemory& kv, PromptCache* cache) : kv_(kv), cache_(cache) {}

  /// The prefixes used last, as many as fit, at most `most`. Returns their tokens.
  int64_t restore(int32_t most, const ProgressFn& progress);

  /// Something was pinned: no need to wait before looking.
  void look_soon() { next_look_ = {}; }
  /// After a step: copies a piece of what is being stored. idle: nothing else is to be done, so the
  /// disk may be waited for, shortly. True: there is more.
  bool step(bool idle);
  /// Stores what should be and is not, if that takes no longer; before the end.
  void finish(std::chrono::seconds time);

 private:
  bool advance(bool idle);
  void look();

  KvMemory& kv_;
  PromptCache* cache_;
  bool storing_ = false;
  std::deque<PrefixTree::Prefix> queue_;  // the first is being stored, if storing_
  std::chrono::steady_clock::time_point next_look_{};
};

}  // namespace relay::engine
