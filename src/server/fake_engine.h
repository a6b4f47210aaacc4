// An engine without a model, for tests of the server: bytes are tokens, the answer is a script, and
// a thread hands out one piece of it per step to every running request.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <ctime>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "engine/engine.h"

namespace relay::server {

struct FakeScript {
  std::vector<std::string> pieces = {"Hello", ", ", "world", "!"};
  std::chrono::milliseconds step{0};
  int32_t context_length = 1000;
  int32_t max_requests = 1000;  ///< more at once are refused with kQueueFull
  int32_t fail_after = -1;      ///< pieces after which on_error comes
  bool endless = false;         ///< repeat the pieces until cancelled
  std::vector<engine::Adapter> adapters;
  bool has_format = false;  ///< render_chat() gives a format: "CALL name {args}" is a tool call,
                            ///< "THINK a|b" a thought and what is said after it
};

class FakeEngine : public engine::Engine {
 public:
  explicit FakeEngine(FakeScript script) : script_(std::move(script)) {
    info_.name = "fake";
    info_.path = "/models/fake.gguf";
    info_.adapters = script_.adapters;
    info_.identities = {"base"};
    for (const engine::Adapter& adapter : info_.adapters) {
      info_.identities.push_back(adapter.path);
    }
    info_.vocab_size = 256;
    info_.context_length = script_.context_length;
    info_.kv_cells = 4096;
    info_.kv_bytes_per_token = 10;
    info_.parallel = 8;
    info_.max_queue = 8;
    thread_ = std::thread([this] { run(); });
  }
  ~FakeEngine() override { stop(); }

  // What tests look at.
  std::atomic<int> running{0};
  std::atomic<int> cancelled{0};
  std::atomic<int> pins{0};
  mutable std::atomic<int> pin_lookups{0};
  std::atomic<bool> hold_renders{false};                  ///< render_chat() waits while this is set
  mutable std::atomic<int> renders{0};                    ///< begun
  mutable std::atomic<int> parses{0};                     ///< of messages
  static constexpr int64_t kFarAway = 1'000'000'000'000;  ///< as if pins were made then
  std::atomic<int> pins_begun{0};
  std::atomic<bool> pins_wait{false};         ///< pin_prompt() computes and computes
  std::atomic<bool> pin_lookups_fail{false};  ///< with an exception that nobody expects
  engine::GenerateRequest last_request() {
    const std::lock_guard lock(mutex_);
    return last_;
  }
  engine::ChatRequest last_chat() {
    const std::lock_guard lock(mutex_);
    return last_chat_;
  }

  const engine::ModelInfo& info() const override { return info_; }

  std::vector<engine::Token> tokenize(const std::string& text, bool, bool) const override {
    std::vector<engine::Token> tokens;
    for (const char c : text) tokens.push_back(static_cast<unsigned char>(c));
    return tokens;
  }
  std::string detokenize(const std::vector<engine::Token>& tokens, bool) const override {
    std::string text;
    for (const engine::Token token : tokens) text += static_cast<char>(token);
    return text;
  }
  engine::ChatPrompt render_chat(const engine::ChatRequest& chat) const override;
  std::vector<engine::Token> render_chat_prefix(const engine::ChatRequest& chat) const override {
    const std::lock_guard lock(mutex_);
    return tokenize(date_ + chat.messages_json, true, true);
  }
  /// What its chat template prints before the messages.
  void set_date(const std::string& date) {
    const std::lock_guard lock(mutex_);
    date_ = date;
  }
  std::vector<engine::PinRequest> pin_requests() const {
    const std::lock_guard lock(mutex_);
    return pin_requests_;
  }
  engine::ChatMessage parse_message(const engine::OutputFormatPtr&, const std::string& text,
                                    bool) const override {
    ++parses;
    engine::ChatMessage message;
    if (text.rfind("THINK ", 0) == 0) {
      const size_t end = text.find('|');
      message.reasoning = text.substr(6, end - 6);
      if (end != std::string::npos) message.content = text.substr(end + 1);
      return message;
    }
    if (text.rfind("CALL ", 0) != 0) {
      message.content = text;
      return message;
    }
    const size_t space = text.find(' ', 5);
    if (space == std::string::npos) return message;
    message.tool_calls.push_back({"", text.substr(5, space - 5), text.substr(space + 1)});
    return message;
  }
  std::vector<engine::ChatDelta> diff_messages(const engine::ChatMessage& before,
                                               const engine::ChatMessage& after) const override {
    std::vector<engine::ChatDelta> deltas;
    if (after.reasoning.size() > before.reasoning.size()) {
      deltas.emplace_back().reasoning = after.reasoning.substr(before.reasoning.size());
    }
    if (after.content.size() > before.content.size()) {
      deltas.emplace_back().content = after.content.substr(before.content.size());
    }
    for (size_t i = 0; i < after.tool_calls.size(); ++i) {
      const bool is_new = i >= before.tool_calls.size();
      const std::string old = is_new ? "" : before.tool_calls[i].arguments;
      const engine::ToolCall& call = after.tool_calls[i];
      if (!is_new && old == call.arguments) continue;
      engine::ChatDelta& delta = deltas.emplace_back();
      delta.tool_call_index = static_cast<int32_t>(i);
      if (is_new) delta.tool_call = {call.id, call.name, ""};
      delta.tool_call.arguments = call.arguments.substr(old.size());
    }
    return deltas;
  }

  engine::SubmitResult submit(engine::GenerateRequest request,
                              std::shared_ptr<engine::Sink> sink) override {
    const std::lock_guard lock(mutex_);
    engine::Refusal refusal;
    const auto length = static_cast<int32_t>(request.prompt.size());
    if (length + std::max(request.max_tokens, 1) > script_.context_length) {
      refusal.kind = engine::ErrorKind::kContextLengthExceeded;
      refusal.param = "prompt";
      refusal.message = "The context has " + std::to_string(script_.context_length) +
                        " tokens, max_tokens is " + std::to_string(request.max_tokens) + ".";
      return refusal;
    }
    if (!request.json_schema.empty() && request.json_schema.find("bad") != std::string::npos) {
      refusal.kind = engine::ErrorKind::kInvalidGrammar;
      refusal.message = "this schema does not compile";
      refusal.param = "json_schema";
      return refusal;
    }
    if (std::optional<engine::Refusal> full = check_queue(1)) return *full;
    last_ = request;
    const engine::RequestId id = ++next_id_;
    jobs_[id] = Job{std::move(request), std::move(sink), 0, false};
    running = static_cast<int>(jobs_.size());
    changed_.notify_all();
    return id;
  }
  std::optional<engine::Refusal> refuse_if_full(int32_t ahead) override {
    const std::lock_guard lock(mutex_);
    return check_queue(ahead + 1);
  }
  void cancel(engine::RequestId id) override {
    const std::lock_guard lock(mutex_);
    const auto it = jobs_.find(id);
    if (it != jobs_.end()) it->second.cancel = true;
    changed_.notify_all();
  }

  engine::PinnedPrompt pin_prompt(const engine::PinRequest& request,
                                  const engine::ProgressFn&) override {
    if (request.tokens.size() > 500) {
      throw engine::EngineError(engine::ErrorKind::kPinBudgetExceeded, "too long to pin");
    }
    ++pins_begun;
    while (pins_wait) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const std::lock_guard lock(mutex_);
    for (size_t i = 0; i < pinned_.size(); ++i) {
      const engine::PinRequest& known = pin_requests_[i];
      if (known.tokens == request.tokens && known.adapter == request.adapter) return pinned_[i];
    }
    engine::PinnedPrompt prompt;
    prompt.id = "cp_" + std::to_string(pins++);
    prompt.name = request.name;
    prompt.adapter = request.adapter;
    prompt.tokens = static_cast<int32_t>(request.tokens.size());
    if (request.ttl_seconds > 0) prompt.expires_at = std::time(nullptr) + request.ttl_seconds;
    pinned_.push_back(prompt);
    pin_requests_.push_back(request);
    return prompt;
  }
  std::vector<engine::PinnedPrompt> pinned_prompts() const override {
    ++pin_lookups;
    if (pin_lookups_fail) throw std::runtime_error("no memory for the list");
    const std::lock_guard lock(mutex_);
    return pinned_;
  }
  engine::PinnedPrompt set_pin_ttl(const std::string& id, int64_t ttl_seconds) override {
    const std::lock_guard lock(mutex_);
    for (engine::PinnedPrompt& prompt : pinned_) {
      if (prompt.id != id) continue;
      prompt.expires_at = kFarAway + ttl_seconds;
      return prompt;
    }
    throw engine::EngineError(engine::ErrorKind::kNotFound, "no such prompt");
  }
  void unpin(const std::string& id) override {
    const std::lock_guard lock(mutex_);
    for (auto it = pinned_.begin(); it != pinned_.end(); ++it) {
      if (it->id != id) continue;
      pin_requests_.erase(pin_requests_.begin() + (it - pinned_.begin()));
      pinned_.erase(it);
      return;
    }
    throw engine::EngineError(engine::ErrorKind::kNotFound, "no such prompt");
  }

  engine::EngineStats stats() const override {
    engine::EngineStats stats;
    stats.running = running;
    stats.kv_cells_total = 4096;
    stats.kv_cells_used = 1024;
    stats.kv_tokens_read_shared = 5;
    for (int32_t a = 1; a <= static_cast<int32_t>(script_.adapters.size()); ++a) {
      stats.running_adapters.push_back(a);
    }
    return stats;
  }
  std::vector<engine::PrefixNode> prefix_nodes() const override {
    const auto last = static_cast<int32_t>(script_.adapters.size());
    return {{-1, 400, 2, true, 7}, {0, 20, 1, false, 0}, {-1, 30, 1, false, 0, last}};
  }
  void set_observer(std::shared_ptr<engine::Observer> observer) override {
    observer_ = std::move(observer);
  }
  bool drain(std::chrono::milliseconds timeout) override {
    const auto until = std::chrono::steady_clock::now() + timeout;
    while (running > 0 && std::chrono::steady_clock::now() < until) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return running == 0;
  }
  void stop() override {
    {
      const std::lock_guard lock(mutex_);
      stopping_ = true;
      changed_.notify_all();
    }
    if (thread_.joinable()) thread_.join();
  }

 private:
  struct Job {
    engine::GenerateRequest request;
    std::shared_ptr<engine::Sink> sink;
    int32_t at = 0;
    bool cancel = false;
    bool scored = false;  ///< with prompt_logprobs: the prompt's are out
  };

  std::optional<engine::Refusal> check_queue(int32_t more) const {
    if (static_cast<int32_t>(jobs_.size()) + more <= script_.max_requests) return std::nullopt;
    engine::Refusal refusal;
    refusal.kind = engine::ErrorKind::kQueueFull;
    refusal.message = "the queue is full";
    refusal.retry_after_seconds = 7;
    return refusal;
  }

  void run() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return stopping_ || !jobs_.empty(); });
      for (auto& [id, job] : jobs_) job.cancel = job.cancel || stopping_;
      for (auto it = jobs_.begin(); it != jobs_.end();) {
        if (step(it->second)) {
          it = jobs_.erase(it);
        } else {
          ++it;
        }
      }
      running = static_cast<int>(jobs_.size());
      if (stopping_ && jobs_.empty()) return;
      if (script_.step.count() > 0) {
        changed_.wait_for(lock, script_.step, [this] { return stopping_; });
      } else {
        lock.unlock();
        std::this_thread::yield();
        lock.lock();
      }
    }
  }

  /// Its tokens, the first with none, the others with -0.25 and an alternative "?" of -2.
  void send_prompt(Job& job) {
    job.scored = true;
    engine::TokensDelta delta;
    for (const engine::Token token : job.request.prompt) {
      const bool first = delta.prompt.empty();
      engine::GeneratedToken scored;
      scored.self = {token, detokenize({token}, true), first ? std::nanf("") : -0.25f};
      if (!first && job.request.sampling.logprobs > 0) scored.top.push_back({63, "?", -2.0f});
      delta.prompt.push_back(std::move(scored));
    }
    for (int32_t choice = 0; choice < job.request.n; ++choice) job.sink->on_tokens(choice, delta);
  }

  /// One piece for every choice; true when the request is over.
  bool step(Job& job) {
    const auto count = static_cast<int32_t>(script_.pieces.size());
    engine::Usage usage;
    usage.prompt_tokens = static_cast<int32_t>(job.request.prompt.size());
    usage.cached_tokens = 3;
    usage.completion_tokens = job.at * job.request.n;
    if (script_.fail_after >= 0 && job.at >= script_.fail_after) {
      job.sink->on_error(engine::ErrorKind::kInternal, "the fake engine broke");
      return true;
    }
    if (job.request.prompt_logprobs && !job.scored) {
      send_prompt(job);
      return false;
    }
    const bool limited = job.request.max_tokens >= 0 && job.at >= job.request.max_tokens;
    if (job.cancel || limited || (!script_.endless && job.at >= count)) {
      cancelled += job.cancel ? 1 : 0;
      const auto reason = job.cancel ? engine::FinishReason::kCancelled
                          : limited  ? engine::FinishReason::kLength
                                     : engine::FinishReason::kStop;
      for (int32_t choice = 0; choice < job.request.n; ++choice) {
        job.sink->on_choice_finish(choice, reason, "");
      }
      engine::RequestTimings timings;
      timings.total = 0.5;
      if (observer_) observer_->on_request_end(reason, usage, timings);
      job.sink->on_done(usage, timings);
      return true;
    }
    const std::string& piece = script_.pieces[static_cast<size_t>(job.at % count)];
    ++job.at;
    usage.completion_tokens = job.at * job.request.n;
    for (int32_t choice = 0; choice < job.request.n; ++choice) {
      engine::TokensDelta delta;
      delta.text = piece;
      delta.usage = usage;
      engine::GeneratedToken token;
      token.self = {65, piece, -0.5f};
      for (int32_t k = 0; k < job.request.sampling.logprobs; ++k) {
        token.top.push_back({66 + k, std::string(1, static_cast<char>('B' + k)), -1.0f - k});
      }
      delta.tokens.push_back(token);
      job.sink->on_tokens(choice, std::move(delta));
    }
    return false;
  }

  FakeScript script_;
  engine::ModelInfo info_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::map<engine::RequestId, Job> jobs_;
  engine::RequestId next_id_ = 0;
  engine::GenerateRequest last_;
  mutable engine::ChatRequest last_chat_;
  std::vector<engine::PinnedPrompt> pinned_;
  std::vector<engine::PinRequest> pin_requests_;  // of the same
  std::string date_;
  std::shared_ptr<engine::Observer> observer_;
  bool stopping_ = false;
  std::thread thread_;
};

}  // namespace relay::server

/// The fake's format carries nothing; the real one is the engine's own.
struct relay::engine::OutputFormat {};

inline relay::engine::ChatPrompt relay::server::FakeEngine::render_chat(
    const engine::ChatRequest& chat) const {
  if (chat.messages_json.find("untemplatable") != std::string::npos) {
    throw engine::EngineError(engine::ErrorKind::kInvalidTemplate, "the template cannot say this");
  }
  if (chat.json_schema.find("bad") != std::string::npos) {
    throw engine::EngineError(engine::ErrorKind::kInvalidGrammar, "this schema does not compile",
                              "json_schema");
  }
  ++renders;
  while (hold_renders) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  const std::lock_guard lock(mutex_);
  last_chat_ = chat;
  engine::ChatPrompt prompt;
  prompt.text = chat.messages_json;
  prompt.tokens = tokenize(prompt.text, true, true);
  if (script_.has_format) prompt.format = std::make_shared<engine::OutputFormat>();
  return prompt;
}
