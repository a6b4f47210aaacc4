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

/// Thread-safe. All but list() and get() may wait for the engine, and all wait for one another.
/// Errors are the engine's (EngineError).
class PinnedChats {
 public:
  explicit PinnedChats(std::shared_ptr<engine::Engine> engine) : engine_(std::move(engine)) {}

  engine::PinnedPrompt pin(const ChatToPin& request, const engine::ProgressFn& progress = {});
  std::vector<engine::PinnedPrompt> list() const;
  engine::PinnedPrompt get(const std::string& id) const;
  engine::PinnedPrompt set_ttl(const std::string& id, int64_t ttl_seconds);
  void unpin(const std::string& id);

  /// Renders every chat again, and pins anew those that now read differently. What cannot be pinned
  /// is logged, and tried again the next time.
  void refresh();

 private:
  struct Entry {
    ChatToPin request;
    std::string id;                     ///< what clients call it
    std::vector<engine::Token> tokens;  ///< the rendering that is pinned
    engine::PinnedPrompt pinned;        ///< the engine's; its id changes with the rendering
    bool lost = false;                  ///< the new rendering could not be pinned: nothing is
  };

  Entry& find(const std::string& id);
  /// False: its time is over.
  bool refresh(Entry& entry);

  const std::shared_ptr<engine::Engine> engine_;
  mutable std::mutex mutex_;
  std::vector<Entry> entries_;
};

}  // namespace relay::server
