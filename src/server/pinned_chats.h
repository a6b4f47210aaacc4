// The pinned prompts, remembered as chats. A chat template may print today's date, and then
// what was pinned yesterday begins no chat of today: refresh() notices, and pins the new rendering
// in place of the old one. Clients know a prompt by the id of its first rendering.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/engine.h"

namespace relay::server {

struct ChatToPin {
  std::string name;
  engine::ChatRequest chat;
  int32_t adapter = 0;
  std::string cache_salt;
  int64_t ttl_seconds = 0;
};

struct PinnedChat {
  engine::PinnedPrompt prompt;
  bool ready = true;  ///< false: its new rendering is being computed
};

/// Thread-safe. pin() and refresh() wait for prompts to be computed, and for one another; the
/// others do not wait for them, only for a step of the engine. Errors are the engine's
/// (EngineError).
class PinnedChats {
 public:
  explicit PinnedChats(std::shared_ptr<engine::Engine> engine) : engine_(std::move(engine)) {}

  engine::PinnedPrompt pin(const ChatToPin& request, const engine::ProgressFn& progress = {});
  std::vector<PinnedChat> list() const;
  PinnedChat get(const std::string& id) const;
  PinnedChat set_ttl(const std::string& id, int64_t ttl_seconds);
  void unpin(const std::string& id);
  /// Those that expired since the last pin() or refresh() among them.
  size_t known() const;

  /// Renders every chat again, and pins anew those that now read differently. What cannot be pinned
  /// is logged, and tried again the next time.
  void refresh();

 private:
  struct Entry {
    ChatToPin request;
    std::string id;                     ///< what clients call it
    std::vector<engine::Token> tokens;  ///< the rendering that is pinned
    engine::PinnedPrompt pinned;        ///< the engine's; its id changes with the rendering
    /// Of a new rendering: it is being computed, or could not be pinned. The old one is not held.
    enum class State { kHeld, kComputing, kLost } state = State::kHeld;
  };

  using State = Entry::State;

  // With mutex_ held.
  Entry* find(const std::string& id);
  void forget_expired();

  void refresh(const std::string& id);

  const std::shared_ptr<engine::Engine> engine_;
  std::mutex pinning_;  // held while a prompt is computed; before the other one
  mutable std::mutex mutex_;
  std::vector<Entry> entries_;
};

}  // namespace relay::server
