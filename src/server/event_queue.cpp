#include "server/event_queue.h"

namespace relay::server {

namespace {

size_t size_of(const std::vector<engine::GeneratedToken>& tokens) {
  size_t bytes = 0;
  for (const engine::GeneratedToken& token : tokens) {
    bytes += sizeof(token) + token.self.bytes.size();
    for (const engine::TokenLogprob& other : token.top) bytes += sizeof(other) + other.bytes.size();
  }
  return bytes;
}

size_t size_of(const engine::TokensDelta& delta) {
  return sizeof(Event) + delta.text.size() + size_of(delta.tokens) + size_of(delta.prompt);
}

}  // namespace

EventQueue::EventQueue(size_t max_bytes, std::function<void()> wake)
    : max_bytes_(max_bytes), wake_(std::move(wake)) {}

void EventQueue::push(Event event, size_t bytes) {
  const std::lock_guard lock(mutex_);
  if (closed_ || overflowed_) return;
  const bool was_empty = events_.empty();
  bytes_ += bytes;
  overflowed_ = bytes_ > max_bytes_;
  if (!overflowed_) events_.push_back(std::move(event));
  if (was_empty || overflowed_) wake_();
}

void EventQueue::take(std::vector<Event>& out) {
  const std::lock_guard lock(mutex_);
  if (out.empty()) {
    out.swap(events_);
  } else {
    for (Event& event : events_) out.push_back(std::move(event));
    events_.clear();
  }
  bytes_ = 0;
}

bool EventQueue::overflowed() const {
  const std::lock_guard lock(mutex_);
  return overflowed_;
}

void EventQueue::close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  wake_ = nullptr;
  events_.clear();
}

QueueSink::QueueSink(std::shared_ptr<EventQueue> queue, int32_t prompt)
    : queue_(std::move(queue)), prompt_(prompt) {}

void QueueSink::on_tokens(int32_t choice, engine::TokensDelta delta) {
  const size_t bytes = size_of(delta);
  Event event;
  event.kind = Event::Kind::kTokens;
  event.prompt = prompt_;
  event.choice = choice;
  event.delta = std::move(delta);
  queue_->push(std::move(event), bytes);
}

void QueueSink::on_choice_finish(int32_t choice, engine::FinishReason reason,
                                 const std::string& stop_string) {
  Event event;
  event.kind = Event::Kind::kFinish;
  event.prompt = prompt_;
  event.choice = choice;
  event.reason = reason;
  event.message = stop_string;
  queue_->push(std::move(event), sizeof(Event) + stop_string.size());
}

void QueueSink::on_done(const engine::Usage& usage, const engine::RequestTimings& /*timings*/) {
  Event event;
  event.kind = Event::Kind::kDone;
  event.prompt = prompt_;
  event.usage = usage;
  queue_->push(std::move(event), sizeof(Event));
}

void QueueSink::on_error(engine::ErrorKind kind, const std::string& message) {
  Event event;
  event.kind = Event::Kind::kError;
  event.prompt = prompt_;
  event.error_kind = kind;
  event.message = message;
  queue_->push(std::move(event), sizeof(Event) + message.size());
}

}  // namespace relay::server
