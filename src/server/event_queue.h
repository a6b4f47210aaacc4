// From the engine thread to a connection: a bounded queue of one HTTP request's events. A reader
// that falls too far behind overflows it; the engine is never held up.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engine/engine.h"

namespace relay::server {

struct Event {
  enum class Kind { kTokens, kFinish, kDone, kError };
  Kind kind = Kind::kTokens;
  int32_t prompt = 0;                                         ///< which prompt of the HTTP request
  int32_t choice = 0;                                         ///< kTokens, kFinish
  engine::TokensDelta delta;                                  ///< kTokens
  engine::FinishReason reason = engine::FinishReason::kStop;  ///< kFinish
  engine::Usage usage;                                        ///< kDone
  engine::ErrorKind error_kind = engine::ErrorKind::kInternal;  ///< kError
  std::string message;  ///< kError; kFinish: the stop string that ended it
};

class EventQueue {
 public:
  /// `wake` is called from the engine thread, under the queue's lock, when the queue stops being
  /// empty or overflows; it must only hand a notice on. It is never called after close().
  EventQueue(size_t max_bytes, std::function<void()> wake);

  /// Takes about `bytes` of the room. On overflow this event and all later ones are dropped.
  void push(Event event, size_t bytes);
  /// Moves all events to the end of `out`.
  void take(std::vector<Event>& out);
  bool overflowed() const;
  /// From now on events are dropped and nobody is woken.
  void close();

 private:
  const size_t max_bytes_;
  mutable std::mutex mutex_;
  std::function<void()> wake_;
  std::vector<Event> events_;
  size_t bytes_ = 0;
  bool overflowed_ = false;
  bool closed_ = false;
};

/// The sink of one prompt's request; tags the events with `prompt`.
class QueueSink : public engine::Sink {
 public:
  QueueSink(std::shared_ptr<EventQueue> queue, int32_t prompt);

  void on_tokens(int32_t choice, engine::TokensDelta delta) override;
  void on_choice_finish(int32_t choice, engine::FinishReason reason,
                        const std::string& stop_string) override;
  void on_done(const engine::Usage& usage, const engine::RequestTimings& timings) override;
  void on_error(engine::ErrorKind kind, const std::string& message) override;

 private:
  std::shared_ptr<EventQueue> queue_;
  const int32_t prompt_;
};

}  // namespace relay::server
