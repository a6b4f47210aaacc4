#include "engine/prompt_persistence.h"

#include <algorithm>
#include <exception>
#include <string>

namespace relay::engine {

namespace {

using Clock = std::chrono::steady_clock;

constexpr auto kLookEvery = std::chrono::seconds(10);
constexpr auto kWaitForDisk = std::chrono::milliseconds(20);
constexpr uint32_t kHotHits = 3;  // sequences that shared a prefix after the one that computed it
constexpr size_t kLeastTokens = 32;  // below that it is computed as fast

std::string digest_of(const Salt& salt) { return salt ? salt->digest : std::string(); }
std::string digest_within(const Salt& salt) { return salt ? digest_of(salt->within) : ""; }

/// How many salts' KV a stored prefix may begin with, besides its own.
int depth_of(const KvFileHeader& header) {
  return header.salt.empty() ? 0 : header.within.empty() ? 1 : 2;
}

}  // namespace

int64_t PromptPersistence::restore(int32_t most, const ProgressFn& progress) {
  if (cache_ == nullptr) return 0;
  std::vector<PromptCache::Stored> chosen;
  size_t room = static_cast<size_t>(kv_.cells_free());
  for (PromptCache::Stored& stored : cache_->list()) {
    if (stored.header.tokens.size() > room || static_cast<int32_t>(chosen.size()) >= most) continue;
    room -= stored.header.tokens.size();
    chosen.push_back(std::move(stored));
  }
  // Those for all first, then those of salts that others are within, so that these share them; then
  // the oldest, which are evicted first.
  std::reverse(chosen.begin(), chosen.end());
  std::stable_sort(chosen.begin(), chosen.end(),
                   [](const PromptCache::Stored& a, const PromptCache::Stored& b) {
                     return depth_of(a.header) < depth_of(b.header);
                   });
  int64_t tokens = 0;
  size_t done = 0;
  for (const PromptCache::Stored& stored : chosen) {
    const KvFileHeader& header = stored.header;
    Scope scope{stored.adapter, nullptr};
    if (!header.salt.empty()) scope.salt = kv_.salt_of_digest(header.salt, header.within);
    if (kv_.restore(scope, header.tokens, header.token_bytes, cache_->read(stored))) {
      tokens += static_cast<int64_t>(header.tokens.size());
    }
    if (progress) {
      progress(static_cast<double>(++done) / static_cast<double>(chosen.size()),
               "restoring prompts");
    }
  }
  return tokens;
}

bool PromptPersistence::step(bool idle) {
  if (cache_ == nullptr) return false;
  try {
    return advance(idle);
  } catch (const std::exception& e) {
    cache_->give_up(e.what());
    cache_ = nullptr;
    return false;
  }
}

bool PromptPersistence::advance(bool idle) {
  if (storing_) {
    if (idle ? !cache_->wait_ready(kWaitForDisk) : !cache_->ready()) return idle;
    const PrefixTree::Prefix& prefix = queue_.front();
    const auto [begin, count] = cache_->next_piece();
    if (count > 0) {
      if (auto kv = kv_.save(prefix.scope, prefix.tokens, begin, count)) {
        cache_->add(std::move(*kv));
        return true;
      }
      cache_->abandon();
    }
    storing_ = false;
    queue_.pop_front();
    return true;
  }
  if (!queue_.empty()) {
    const PrefixTree::Prefix& prefix = queue_.front();
    const auto& [adapter, salt] = prefix.scope;
    storing_ = cache_->wants(adapter, digest_of(salt), prefix.tokens);
    if (storing_) {
      cache_->begin(adapter, digest_of(salt), digest_within(salt), prefix.tokens);
    } else {
      queue_.pop_front();
    }
    return true;
  }
  if (Clock::now() < next_look_) return false;
  look();
  return !queue_.empty();
}

void PromptPersistence::look() {
  next_look_ = Clock::now() + kLookEvery;
  for (PrefixTree::Prefix& prefix : kv_.lasting(kHotHits)) {
    if (prefix.tokens.size() < kLeastTokens) continue;
    if (prefix.scope.salt) {
      queue_.push_back(std::move(prefix));
    } else {
      queue_.push_front(std::move(prefix));  // of use to most
    }
  }
}

void PromptPersistence::finish(std::chrono::seconds time) {
  const auto end = Clock::now() + time;
  look_soon();
  while (Clock::now() < end && step(true)) {
  }
  if (cache_ != nullptr && storing_) cache_->abandon();
}

}  // namespace relay::engine
