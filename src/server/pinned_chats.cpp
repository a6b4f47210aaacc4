#include "server/pinned_chats.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <map>
#include <utility>

#include "base/unix_time.h"

namespace relay::server {

namespace {

engine::EngineError not_found(const std::string& id) {
  return {engine::ErrorKind::kNotFound, "There is no cached prompt '" + id + "'.", "id"};
}

/// What the engine holds, by its id.
std::map<std::string, engine::PinnedPrompt> prompts_of(const engine::Engine& engine) {
  std::map<std::string, engine::PinnedPrompt> prompts;
  for (engine::PinnedPrompt& prompt : engine.pinned_prompts()) {
    prompts.emplace(prompt.id, std::move(prompt));
  }
  return prompts;
}

}  // namespace

engine::PinnedPrompt PinnedChats::pin(const ChatToPin& request,
                                      const engine::ProgressFn& progress) {
  const std::lock_guard pinning(pinning_);
  {
    const std::lock_guard lock(mutex_);
    forget_expired();
  }
  Entry entry;
  entry.request = request;
  entry.tokens = engine_->render_chat_prefix(request.chat);
  entry.pinned = engine_->pin_prompt(
      {request.name, entry.tokens, request.cache_salt, request.ttl_seconds, request.adapter},
      progress);
  entry.id = entry.pinned.id;
  const std::lock_guard lock(mutex_);
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

std::vector<PinnedChat> PinnedChats::list() const {
  const std::lock_guard lock(mutex_);
  const auto held = prompts_of(*engine_);
  std::vector<PinnedChat> chats;
  for (const Entry& entry : entries_) {
    const auto found = held.find(entry.pinned.id);
    if (entry.state == State::kComputing) {
      chats.push_back({entry.pinned, /*ready=*/false});
    } else if (entry.state == State::kHeld && found != held.end()) {
      chats.push_back({found->second});
    } else {
      continue;
    }
    chats.back().prompt.id = entry.id;
  }
  return chats;
}

size_t PinnedChats::known() const {
  const std::lock_guard lock(mutex_);
  return entries_.size();
}

PinnedChat PinnedChats::get(const std::string& id) const {
  for (PinnedChat& chat : list()) {
    if (chat.prompt.id == id) return std::move(chat);
  }
  throw not_found(id);
}

PinnedChats::Entry* PinnedChats::find(const std::string& id) {
  const auto found = std::find_if(entries_.begin(), entries_.end(),
                                  [&](const Entry& entry) { return entry.id == id; });
  return found == entries_.end() ? nullptr : &*found;
}

void PinnedChats::forget_expired() {
  const int64_t now = unix_now();
  const auto held = prompts_of(*engine_);
  std::erase_if(entries_, [&](const Entry& entry) {
    const int64_t end = entry.pinned.expires_at;
    return (end != 0 && end <= now) ||
           (entry.state == State::kHeld && !held.contains(entry.pinned.id));
  });
}

PinnedChat PinnedChats::set_ttl(const std::string& id, int64_t ttl_seconds) {
  const std::lock_guard lock(mutex_);
  Entry* entry = find(id);
  if (entry == nullptr || entry->state == State::kLost) throw not_found(id);
  const bool ready = entry->state == State::kHeld;
  if (ready) {
    entry->pinned = engine_->set_pin_ttl(entry->pinned.id, ttl_seconds);
  } else {
    entry->pinned.expires_at = ttl_seconds > 0 ? unix_now() + ttl_seconds : 0;
  }
  PinnedChat chat{entry->pinned, ready};
  chat.prompt.id = id;
  return chat;
}

void PinnedChats::unpin(const std::string& id) {
  const std::lock_guard lock(mutex_);
  const Entry* entry = find(id);
  if (entry == nullptr) throw not_found(id);
  if (entry->state == State::kHeld) engine_->unpin(entry->pinned.id);
  std::erase_if(entries_, [&](const Entry& other) { return other.id == id; });
}

void PinnedChats::refresh() {
  const std::lock_guard pinning(pinning_);
  std::vector<std::string> ids;
  {
    const std::lock_guard lock(mutex_);
    forget_expired();
    for (const Entry& entry : entries_) ids.push_back(entry.id);
  }
  for (const std::string& id : ids) refresh(id);
}

void PinnedChats::refresh(const std::string& id) {
  std::unique_lock lock(mutex_);
  const Entry* known = find(id);
  if (known == nullptr) return;
  const Entry entry = *known;
  lock.unlock();
  const std::string& name = entry.request.name.empty() ? id : entry.request.name;
  try {
    std::vector<engine::Token> tokens = engine_->render_chat_prefix(entry.request.chat);
    if (entry.state == State::kHeld && tokens == entry.tokens) return;
    lock.lock();
    Entry* old = find(id);
    if (old == nullptr) return;
    if (old->state == State::kHeld) {
      spdlog::info(
          "the pinned prompt {} now reads differently (its chat template prints the date "
          "or the time): pinning it anew",
          name);
      // First, for its share of the budget. Its KV stays in the cache while there is room.
      engine_->unpin(old->pinned.id);
    }
    old->state = State::kComputing;
    lock.unlock();
    engine::PinnedPrompt pinned = engine_->pin_prompt(
        {entry.request.name, tokens, entry.request.cache_salt, 0, entry.request.adapter});
    lock.lock();
    Entry* now = find(id);
    if (now == nullptr) {
      engine_->unpin(pinned.id);  // as somebody wanted meanwhile
      return;
    }
    if (const int64_t end = now->pinned.expires_at; end != 0) {
      pinned = engine_->set_pin_ttl(pinned.id, std::max<int64_t>(1, end - unix_now()));
    }
    now->tokens = std::move(tokens);
    now->pinned = pinned;
    now->state = State::kHeld;
    spdlog::info("pinned {}: {} tokens", name, pinned.tokens);
    return;
  } catch (const engine::EngineError& error) {
    if (error.kind() != engine::ErrorKind::kShuttingDown) {
      spdlog::error("the prompt {} could not be pinned anew: {}", name, error.what());
    }
  } catch (const std::exception& error) {  // nobody above catches it: this is a timer's work
    spdlog::error("the prompt {} could not be pinned anew: {}", name, error.what());
  }
  if (!lock.owns_lock()) lock.lock();
  Entry* failed = find(id);
  if (failed != nullptr && failed->state == State::kComputing) failed->state = State::kLost;
}

}  // namespace relay::server
