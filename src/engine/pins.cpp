#include "engine/pins.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "base/unix_time.h"
#include "engine/sha256.h"

namespace relay::engine {

namespace {

std::string token_bytes(const std::vector<Token>& tokens) {
  std::string bytes;
  bytes.reserve(4 * tokens.size());
  for (const Token t : tokens) {
    for (int shift = 0; shift < 32; shift += 8) {
      bytes += static_cast<char>((static_cast<uint32_t>(t) >> shift) & 0xFF);
    }
  }
  return bytes;
}

}  // namespace

void Pins::pin(const PinRequest& request, uint64_t arrival, PinCallbacks callbacks) {
  const std::string bytes = token_bytes(request.tokens);
  std::string digest = sha256_hex(request.cache_salt + '\0' + bytes);
  if (request.adapter > 0) {
    // By name: its place may be another's after the next start.
    digest =
        sha256_hex(limits_.adapters.at(static_cast<size_t>(request.adapter) - 1) + '/' + digest);
  }
  const std::string id = "cp_" + digest.substr(0, 24);
  if (const auto it = pins_.find(id); it != pins_.end()) {
    PinnedPrompt& prompt = it->second.prompt;
    prompt.name = request.name;
    prompt.expires_at = request.ttl_seconds > 0 ? unix_now() + request.ttl_seconds : 0;
    if (before_done_) before_done_();
    callbacks.done(prompt);
    return;
  }
  const auto count = static_cast<int32_t>(request.tokens.size());
  Scope scope{request.adapter, nullptr};
  if (!request.cache_salt.empty()) scope.salt = kv_.salt(request.cache_salt);
  const auto budget = static_cast<int32_t>(limits_.budget * kv_.cells_total());
  int32_t pinned = kv_.cells_pinned();
  for (const auto& job : jobs_) pinned += job->sequence.length();
  const int32_t added = count - kv_.pinned_prefix(scope, request.tokens);
  if (pinned + added > budget) {
    callbacks.failed(ErrorKind::kPinBudgetExceeded,
                     "Pinning " + std::to_string(added) + " tokens beside " +
                         std::to_string(pinned) + " pinned ones passes the budget of " +
                         std::to_string(budget) + " of " + std::to_string(kv_.cells_total()) +
                         " KV cells.");
    return;
  }
  if (kv_.pinned_sequences() + static_cast<int32_t>(jobs_.size()) >= limits_.prompts) {
    callbacks.failed(ErrorKind::kPinBudgetExceeded,
                     "At most " + std::to_string(limits_.prompts) + " prompts can be pinned.");
    return;
  }
  auto job = std::make_unique<Job>();
  job->request = request;
  job->id = id;
  job->sha256 = sha256_hex(bytes);
  job->callbacks = std::move(callbacks);
  Sequence& s = job->sequence;
  s.arrival = arrival;
  s.priority = std::numeric_limits<int32_t>::min();  // an operator asked; everyone gains
  s.scope = std::move(scope);
  s.prompt_length = count;
  s.generates = false;
  s.tokens = request.tokens;
  scheduler_.enqueue(&s);
  jobs_.push_back(std::move(job));
}

bool Pins::finish() {
  const size_t before = jobs_.size();
  for (size_t i = 0; i < jobs_.size();) {
    Job& job = *jobs_[i];
    Sequence& s = job.sequence;
    if (job.callbacks.progress) job.callbacks.progress(s.computed, s.length());
    if (!s.running() || s.pending() > 0) {
      ++i;
      continue;
    }
    Pin pin;
    pin.seq = scheduler_.remove_pinned(&s);
    pin.prompt.id = job.id;
    pin.prompt.name = job.request.name;
    pin.prompt.sha256 = job.sha256;
    pin.prompt.tokens = s.length();
    pin.prompt.bytes = s.length() * limits_.kv_bytes_per_token;
    pin.prompt.created = unix_now();
    if (job.request.ttl_seconds > 0) {
      pin.prompt.expires_at = pin.prompt.created + job.request.ttl_seconds;
    }
    pin.prompt.cache_salt = job.request.cache_salt;
    pin.prompt.adapter = job.request.adapter;
    const auto seq = pin.seq;
    const auto [it, inserted] = pins_.emplace(job.id, std::move(pin));
    if (!inserted) kv_.unpin(seq);  // the same prompt was asked for twice at once
    if (before_done_) before_done_();
    job.callbacks.done(it->second.prompt);
    jobs_.erase(jobs_.begin() + static_cast<std::ptrdiff_t>(i));
  }
  return jobs_.size() < before;
}

std::vector<PinnedPrompt> Pins::list() const {
  std::vector<PinnedPrompt> list;
  for (const auto& [id, pin] : pins_) list.push_back(pin.prompt);
  return list;
}

PinnedPrompt Pins::set_ttl(const std::string& id, int64_t ttl_seconds) {
  const auto it = pins_.find(id);
  if (it == pins_.end()) throw EngineError(ErrorKind::kNotFound, "No pinned prompt " + id + ".");
  it->second.prompt.expires_at = ttl_seconds > 0 ? unix_now() + ttl_seconds : 0;
  return it->second.prompt;
}

void Pins::unpin(const std::string& id) {
  const auto it = pins_.find(id);
  if (it == pins_.end()) throw EngineError(ErrorKind::kNotFound, "No pinned prompt " + id + ".");
  kv_.unpin(it->second.seq);
  pins_.erase(it);
}

void Pins::expire() {
  const int64_t now = unix_now();
  for (auto it = pins_.begin(); it != pins_.end();) {
    const int64_t expires = it->second.prompt.expires_at;
    if (expires != 0 && expires <= now) {
      kv_.unpin(it->second.seq);
      it = pins_.erase(it);
    } else {
      ++it;
    }
  }
}

void Pins::fail(const Sequence& sequence, ErrorKind kind, const std::string& message,
                Scheduler::Keep keep) {
  const auto job = std::find_if(jobs_.begin(), jobs_.end(),
                                [&](const auto& j) { return &j->sequence == &sequence; });
  scheduler_.remove(&(*job)->sequence, keep);
  (*job)->callbacks.failed(kind, message);
  jobs_.erase(job);
}

void Pins::fail_all(ErrorKind kind, const std::string& message) {
  for (auto& job : jobs_) {
    scheduler_.remove(&job->sequence, Scheduler::Keep::kNothing);
    job->callbacks.failed(kind, message);
  }
  jobs_.clear();
}

}  // namespace relay::engine
