#include "server/pinned_chats.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "base/unix_time.h"

namespace relay::server {

namespace {

engine::EngineError not_found(const std::string& id) {
  return {engine::ErrorKind::kNotFound, "There is no cached prompt '" + id + "'.", "id"};
}

std::optional<engine::PinnedPrompt> held_by(const engine::Engine& engine, const std::string& id) {
  for (const engine::PinnedPrompt& prompt : engine.pinned_prompts()) {
    if (prompt.id == id) return prompt;
  }
  return std::nullopt;
}

}  // namespace

engine::PinnedPrompt PinnedChats::pin(const ChatToPin& request,
                                      const engine::ProgressFn& progress) {
  const std::lock_guard lock(mutex_);
  Entry entry;
  entry.request = request;
  entry.tokens = engine_->render_chat_prefix(request.chat);
  entry.pinned = engine_->pin_prompt(
      {request.name, entry.tokens, request.cache_salt, request.ttl_seconds, request.adapter},
      progress);
  entry.id = entry.pinned.id;
  // The same rendering is one prompt, whoever asked for it before.
  for (Entry& known : entries_) {
    if (known.pinned.id != entry.pinned.id) continue;
    entry.id = known.id;
    known = entry;
    entry.pinned.id = entry.id;
    return entry.pinned;
  }
  entries_.push_back(entry);
  return entry.pinned;
}

std::vector<engine::PinnedPrompt> PinnedChats::list() const {
  const std::lock_guard lock(mutex_);
  std::vector<engine::PinnedPrompt> prompts;
  for (const Entry& entry : entries_) {
    if (entry.lost) continue;
    if (auto prompt = held_by(*engine_, entry.pinned.id)) {
      prompt->id = entry.id;
      prompts.push_back(std::move(*prompt));
    }
  }
  return prompts;
}

engine::PinnedPrompt PinnedChats::get(const std::string& id) const {
  for (engine::PinnedPrompt& prompt : list()) {
    if (prompt.id == id) return std::move(prompt);
  }
  throw not_found(id);
}

PinnedChats::Entry& PinnedChats::find(const std::string& id) {
  const auto found = std::find_if(entries_.begin(), entries_.end(),
                                  [&](const Entry& entry) { return entry.id == id; });
  if (found == entries_.end()) throw not_found(id);
  return *found;
}

engine::PinnedPrompt PinnedChats::set_ttl(const std::string& id, int64_t ttl_seconds) {
  const std::lock_guard lock(mutex_);
  Entry& entry = find(id);
  if (entry.lost) throw not_found(id);
  entry.pinned = engine_->set_pin_ttl(entry.pinned.id, ttl_seconds);
  engine::PinnedPrompt prompt = entry.pinned;
  prompt.id = id;
  return prompt;
}

void PinnedChats::unpin(const std::string& id) {
  const std::lock_guard lock(mutex_);
  const Entry& entry = find(id);
  if (!entry.lost) engine_->unpin(entry.pinned.id);
  std::erase_if(entries_, [&](const Entry& other) { return other.id == id; });
}

void PinnedChats::refresh() {
  const std::lock_guard lock(mutex_);
  std::erase_if(entries_, [this](Entry& entry) { return !refresh(entry); });
}

bool PinnedChats::refresh(Entry& entry) {
  const std::string& name = entry.request.name.empty() ? entry.id : entry.request.name;
  const int64_t now = unix_now();
  const int64_t end = entry.pinned.expires_at;
  if (end != 0 && end <= now) return false;
  if (!entry.lost && !held_by(*engine_, entry.pinned.id)) return false;
  try {
    std::vector<engine::Token> tokens = engine_->render_chat_prefix(entry.request.chat);
    if (!entry.lost && tokens == entry.tokens) return true;
    if (!entry.lost) {
      spdlog::info(
          "the pinned prompt {} now reads differently (its chat template prints the date "
          "or the time): pinning it anew",
          name);
      // First, for its share of the budget. Its KV stays in the cache while there is room.
      engine_->unpin(entry.pinned.id);
      entry.lost = true;
    }
    entry.tokens = std::move(tokens);
    entry.pinned = engine_->pin_prompt({entry.request.name, entry.tokens, entry.request.cache_salt,
                                        end == 0 ? 0 : end - now, entry.request.adapter});
    entry.lost = false;
    spdlog::info("pinned {}: {} tokens", name, entry.pinned.tokens);
  } catch (const engine::EngineError& error) {
    if (error.kind() == engine::ErrorKind::kShuttingDown) return true;
    spdlog::error("the prompt {} could not be pinned anew: {}", name, error.what());
  } catch (const std::exception& error) {  // nobody above catches it: this is a timer's work
    spdlog::error("the prompt {} could not be pinned anew: {}", name, error.what());
  }
  return true;
}

}  // namespace relay::server
