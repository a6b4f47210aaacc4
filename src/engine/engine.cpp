#include "engine/engine.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <deque>
#include <functional>
#include <future>
#include <mutex>
#include <thread>

#include "engine/backend.h"
#include "engine/chat_templates.h"
#include "engine/engine_core.h"
#include "engine/large_stack.h"
#include "engine/llama_model.h"
#include "engine/llama_sampler.h"
#include "engine/prompt_cache.h"
#include "engine/return_times.h"

namespace relay::engine {

const char* to_string(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kInvalidRequest:
      return "invalid_request";
    case ErrorKind::kContextLengthExceeded:
      return "context_length_exceeded";
    case ErrorKind::kInvalidGrammar:
      return "invalid_grammar";
    case ErrorKind::kInvalidTemplate:
      return "invalid_template";
    case ErrorKind::kQueueFull:
      return "rate_limit_exceeded";
    case ErrorKind::kShuttingDown:
      return "shutting_down";
    case ErrorKind::kPinBudgetExceeded:
      return "pin_budget_exceeded";
    case ErrorKind::kNotFound:
      return "not_found";
    case ErrorKind::kModel:
      return "model_error";
    case ErrorKind::kBackend:
      return "backend_error";
    case ErrorKind::kInternal:
      return "internal_error";
  }
  return "internal_error";
}

const char* to_string(FinishReason reason) {
  switch (reason) {
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "abort";
    case FinishReason::kError:
      return "error";
  }
  return "error";
}

namespace {

Refusal refusal(ErrorKind kind, std::string message, std::string param = {}) {
  Refusal r;
  r.kind = kind;
  r.message = std::move(message);
  r.param = std::move(param);
  return r;
}

// One prompt being pinned, shared by the thread that waits and the engine thread.
struct PinWait {
  std::mutex mutex;
  std::condition_variable changed;
  int32_t done = 0;
  int32_t total = 0;
  std::optional<PinnedPrompt> result;
  std::optional<EngineError> error;
};

class ThreadedEngine : public Engine {
 public:
  ThreadedEngine(const EngineOptions& options, std::unique_ptr<LlamaModel> model,
                 const BackendReport& backend, const ProgressFn& progress)
      : options_(options),
        model_(std::move(model)),
        templates_(*model_, options.chat_template_file, options.template_kwargs_json),
        prompt_cache_(open_prompt_cache(options, *model_)),
        core_(*model_, *model_, core_options(options, *model_), prompt_cache_.get()) {
    ModelInfo& info = model_->info();
    info.chat_template = templates_.source();
    model_->identify(options);
    info.prefix_caching = options.prefix_caching;
    info.max_queue = options.max_queue;
    info.relay_active = backend.relay_active;
    info.backend = backend.line;
    core_.restore_prompts(progress);
    stats_ = core_.stats();
    // Whoever has seen a request end, or a prompt pinned, finds it so in what we publish.
    core_.set_before_end([this] { publish_state(); });
    thread_ = std::thread([this] { run(); });
  }
  ~ThreadedEngine() override { ThreadedEngine::stop(); }

  const ModelInfo& info() const override { return model_->info(); }

  std::vector<Token> tokenize(const std::string& text, bool add_special,
                              bool parse_special) const override {
    return model_->tokenize(text, add_special, parse_special);
  }
  std::string detokenize(const std::vector<Token>& tokens, bool special) const override {
    return model_->detokenize(tokens, special);
  }

  ChatPrompt render_chat(const ChatRequest& chat) const override {
    return on_large_stack([&] { return templates_.render(chat); });
  }
  std::vector<Token> render_chat_prefix(const ChatRequest& chat) const override {
    return on_large_stack([&] { return templates_.render_prefix(chat); });
  }
  ChatMessage parse_message(const OutputFormatPtr& format, const std::string& text,
                            bool is_partial) const override {
    // The parser recurses as deep as what it reads is nested, with up to 3 KB of stack each. It
    // reads what the client gave of the message, too.
    constexpr size_t kShallow = 512;
    constexpr size_t kDeepest = kLargeStackBytes / (size_t{6} << 10);
    const std::string_view given = format ? std::string_view(format->parser.generation_prompt) : "";
    const auto brackets = [](std::string_view read) {
      return std::count_if(read.begin(), read.end(), [](char c) { return c == '[' || c == '{'; });
    };
    const size_t size = given.size() + text.size();
    if (size > kDeepest && static_cast<size_t>(brackets(given) + brackets(text)) > kDeepest) {
      throw EngineError(ErrorKind::kInternal, "The answer has too many brackets to be parsed.");
    }
    if (size <= kShallow) return templates_.parse(format, text, is_partial);
    return on_large_stack([&] { return templates_.parse(format, text, is_partial); });
  }
  std::vector<ChatDelta> diff_messages(const ChatMessage& before,
                                       const ChatMessage& after) const override {
    return ChatTemplates::diff(before, after);
  }

  SubmitResult submit(GenerateRequest request, std::shared_ptr<Sink> sink) override;
  std::optional<Refusal> refuse_if_full(int32_t ahead) override {
    const std::lock_guard lock(mutex_);
    std::optional<Refusal> full = check_queue(ahead + 1);
    if (full) ++refused_;
    return full;
  }
  void cancel(RequestId id) override {
    post([this, id] { core_.cancel(id); });
  }

  PinnedPrompt pin_prompt(const PinRequest& request, const ProgressFn& progress) override;
  std::vector<PinnedPrompt> pinned_prompts() const override {
    const std::lock_guard lock(mutex_);
    return pinned_;
  }
  PinnedPrompt set_pin_ttl(const std::string& id, int64_t ttl_seconds) override {
    return ask<PinnedPrompt>([&] {
      const PinnedPrompt prompt = core_.set_pin_ttl(id, ttl_seconds);
      publish_state();  // a step may follow, and the caller may look before it is over
      return prompt;
    });
  }
  void unpin(const std::string& id) override {
    ask<bool>([&] {
      core_.unpin(id);
      publish_state();
      return true;
    });
  }

  EngineStats stats() const override {
    const std::lock_guard lock(mutex_);
    EngineStats s = stats_;
    s.waiting += arriving_;
    s.refused += refused_;
    return s;
  }
  std::vector<PrefixNode> prefix_nodes() const override {
    return ask<std::vector<PrefixNode>>([this] { return core_.kv().nodes(); });
  }
  void set_observer(std::shared_ptr<Observer> observer) override {
    post([this, observer = std::move(observer)]() mutable {
      core_.set_observer(std::move(observer));
    });
  }

  bool drain(std::chrono::milliseconds timeout) override {
    std::unique_lock lock(mutex_);
    accepting_ = false;
    return idle_.wait_for(lock, timeout, [this] { return inbox_.empty() && !busy_; });
  }
  void stop() override {
    {
      const std::lock_guard lock(mutex_);
      accepting_ = false;
      stopping_ = true;
    }
    wake_.notify_all();
    const std::lock_guard lock(join_mutex_);
    if (thread_.joinable()) thread_.join();
  }

 private:
  static CoreOptions core_options(const EngineOptions& o, const LlamaModel& model) {
    CoreOptions c;
    c.scheduler.parallel = o.parallel;
    c.scheduler.batch_tokens = std::min(o.batch_tokens, model.max_rows());
    c.scheduler.adapters = static_cast<int32_t>(o.adapters.size());
    for (const Adapter& adapter : o.adapters) c.adapters.push_back(adapter.name);
    c.prefix_caching = o.prefix_caching;
    c.pin_budget = o.pin_budget;
    c.step_seconds = o.step_seconds;
    c.decode_stretch = o.decode_stretch;
    c.kv_bytes_per_token = model.info().kv_bytes_per_token;
    return c;
  }

  static std::unique_ptr<PromptCache> open_prompt_cache(const EngineOptions& o,
                                                        const LlamaModel& model) {
    if (o.prompt_cache_dir.empty()) return nullptr;
    if (!o.prefix_caching) {
      throw EngineError(ErrorKind::kInvalidRequest,
                        "A prompt cache is of no use without prefix caching.");
    }
    PromptCacheOptions c;
    c.folder = o.prompt_cache_dir;
    c.max_bytes = o.prompt_cache_bytes;
    c.expected.token_bytes = model.kv_layout().bytes_per_token();
    c.expected.key = model.kv_key(0);
    for (size_t a = 1; a <= o.adapters.size(); ++a) {
      c.adapter_keys.push_back(model.kv_key(static_cast<int32_t>(a)));
    }
    c.expected.most_tokens = static_cast<uint32_t>(model.cells());
    c.expected.vocabulary = model.vocab_size();
    c.notice = o.notice;
    return std::make_unique<PromptCache>(std::move(c));
  }

  std::optional<Refusal> check(const GenerateRequest& request) const;
  bool is_adapter(int32_t adapter) const {
    return adapter >= 0 && static_cast<size_t>(adapter) <= options_.adapters.size();
  }
  std::optional<Refusal> check_queue(int32_t sequences);  // with mutex_ held
  void post(std::function<void()> message);
  void run();
  template <typename Work>
  void contain(const Work& work);
  void publish_state();

  // Runs `question` on the engine thread and waits for its answer or exception.
  template <typename T>
  T ask(const std::function<T()>& question) const {
    auto task = std::make_shared<std::packaged_task<T()>>(question);
    std::future<T> answer = task->get_future();
    {
      const std::lock_guard lock(mutex_);
      if (stopping_) throw EngineError(ErrorKind::kShuttingDown, "The engine has stopped.");
      inbox_.emplace_back([task] { (*task)(); });
    }
    wake_.notify_all();
    return answer.get();
  }

  const EngineOptions options_;
  const std::unique_ptr<LlamaModel> model_;
  const ChatTemplates templates_;
  const std::unique_ptr<PromptCache> prompt_cache_;
  EngineCore core_;  // the engine thread's

  mutable std::mutex mutex_;  // guards what follows
  mutable std::condition_variable wake_;
  std::condition_variable idle_;
  mutable std::deque<std::function<void()>> inbox_;  // questions come from const functions, too
  EngineStats stats_;
  std::vector<PinnedPrompt> pinned_;
  int32_t arriving_ = 0;  // sequences in the inbox
  int64_t refused_ = 0;
  ReturnTimes return_times_;
  RequestId last_id_ = 0;
  bool busy_ = false;  // the engine thread has requests or messages at hand
  bool accepting_ = true;
  bool stopping_ = false;

  std::mutex join_mutex_;
  std::thread thread_;
};

std::optional<Refusal> ThreadedEngine::check(const GenerateRequest& request) const {
  const ModelInfo& info = model_->info();
  if (request.prompt.empty()) {
    return refusal(ErrorKind::kInvalidRequest, "The prompt is empty.", "prompt");
  }
  for (const Token t : request.prompt) {
    if (t < 0 || t >= info.vocab_size) {
      return refusal(ErrorKind::kInvalidRequest,
                     "Token " + std::to_string(t) + " of the prompt is not in the vocabulary of " +
                         std::to_string(info.vocab_size) + ".",
                     "prompt");
    }
  }
  if (!is_adapter(request.adapter)) {
    return refusal(ErrorKind::kInvalidRequest,
                   "There is no adapter " + std::to_string(request.adapter) + ".", "adapter");
  }
  if (request.n < 1 || request.n > info.parallel) {
    return refusal(ErrorKind::kInvalidRequest,
                   "n must be 1 to " + std::to_string(info.parallel) + ".", "n");
  }
  if (request.max_tokens < -1) {
    return refusal(ErrorKind::kInvalidRequest, "max_tokens must not be negative.", "max_tokens");
  }
  if (request.prompt_logprobs && request.sampling.logprobs < 0) {
    return refusal(ErrorKind::kInvalidRequest, "prompt_logprobs needs logprobs.", "logprobs");
  }
  for (const std::string& stop : request.stop) {
    if (stop.empty()) {
      return refusal(ErrorKind::kInvalidRequest, "A stop string must not be empty.", "stop");
    }
  }
  const auto prompt = static_cast<int64_t>(request.prompt.size());
  const int64_t wanted = request.max_tokens < 0 ? 1 : request.max_tokens;
  if (prompt + wanted > info.context_length) {
    return refusal(
        ErrorKind::kContextLengthExceeded,
        "This model's maximum context length is " + std::to_string(info.context_length) +
            " tokens. However, you requested " + std::to_string(prompt + wanted) + " tokens (" +
            std::to_string(prompt) + " in the prompt, " + std::to_string(wanted) +
            " in the completion). Please reduce the length of the prompt or the completion.",
        "prompt");
  }
  return std::nullopt;
}

std::optional<Refusal> ThreadedEngine::check_queue(int32_t sequences) {
  // Places: the queue, and those that would leave it at once.
  const int32_t waiting = stats_.waiting + arriving_;
  const int32_t idle = std::max(0, options_.parallel - stats_.running);
  if (waiting + sequences <= options_.max_queue + idle) return std::nullopt;
  Refusal full = refusal(ErrorKind::kQueueFull, "The queue is full (" + std::to_string(waiting) +
                                                    " waiting); try again later.");
  const double place = stats_.request_seconds / std::max(1, options_.parallel);
  full.retry_after_seconds = return_times_.next(ReturnTimes::Clock::now(), place);
  return full;
}

SubmitResult ThreadedEngine::submit(GenerateRequest request, std::shared_ptr<Sink> sink) {
  std::optional<Refusal> refused = check(request);
  auto r = std::make_unique<Request>();
  if (!refused) {
    try {
      r->samplers = on_large_stack([&] { return make_samplers(*model_, request); });
    } catch (const EngineError& e) {
      refused = refusal(e.kind(), e.what(), e.param());
    }
  }
  const auto prompt = static_cast<int32_t>(std::min<size_t>(request.prompt.size(), INT32_MAX));
  r->sink = std::move(sink);
  r->adapter = request.adapter;
  r->cache_salt = std::move(request.cache_salt);
  r->pin_salt = std::move(request.pin_salt);
  r->priority = request.priority;
  r->prompt = std::move(request.prompt);
  r->max_tokens_may_shrink = request.max_tokens < 0;
  r->max_tokens =
      request.max_tokens < 0 ? model_->info().context_length - prompt : request.max_tokens;
  r->ignore_end = request.sampling.ignore_eos;
  r->logprobs = request.sampling.logprobs;
  r->prompt_logprobs = request.prompt_logprobs;
  r->stop = std::move(request.stop);
  if (request.format) r->visible = request.format->visible;

  RequestId id = 0;
  {
    const std::lock_guard lock(mutex_);
    if (!accepting_) {
      refused = refusal(ErrorKind::kShuttingDown, "The engine is shutting down.");
    } else if (!refused) {
      refused = check_queue(request.n);
    }
    if (refused) {
      ++refused_;
      return *refused;
    }
    id = ++last_id_;
    r->id = id;
    arriving_ += request.n;
    // std::function wants to copy what it holds.
    auto shared = std::make_shared<std::unique_ptr<Request>>(std::move(r));
    inbox_.emplace_back([this, shared, n = request.n] {
      contain([&] { core_.submit(std::move(*shared)); });
      const std::lock_guard inner(mutex_);
      arriving_ -= n;
      stats_.waiting = core_.scheduler().waiting();
    });
  }
  wake_.notify_all();
  return id;
}

PinnedPrompt ThreadedEngine::pin_prompt(const PinRequest& request, const ProgressFn& progress) {
  const ModelInfo& info = model_->info();
  if (request.tokens.empty()) {
    throw EngineError(ErrorKind::kInvalidRequest, "A prompt to pin must not be empty.");
  }
  if (static_cast<int64_t>(request.tokens.size()) >= info.context_length) {
    throw EngineError(ErrorKind::kInvalidRequest,
                      "The prompt to pin has " + std::to_string(request.tokens.size()) +
                          " tokens and leaves no room in a context of " +
                          std::to_string(info.context_length) + ".");
  }
  for (const Token t : request.tokens) {
    if (t < 0 || t >= info.vocab_size) {
      throw EngineError(ErrorKind::kInvalidRequest,
                        "Token " + std::to_string(t) + " is not in the vocabulary.");
    }
  }
  if (!is_adapter(request.adapter)) {
    throw EngineError(ErrorKind::kInvalidRequest,
                      "There is no adapter " + std::to_string(request.adapter) + ".");
  }
  if (!options_.prefix_caching) {
    throw EngineError(ErrorKind::kInvalidRequest, "Nothing can be pinned without prefix caching.");
  }
  if (request.ttl_seconds < 0) {
    throw EngineError(ErrorKind::kInvalidRequest, "ttl_seconds must not be negative.");
  }
  auto wait = std::make_shared<PinWait>();
  PinCallbacks callbacks;
  callbacks.progress = [wait](int32_t done, int32_t total) {
    const std::lock_guard lock(wait->mutex);
    wait->done = done;
    wait->total = total;
    wait->changed.notify_all();
  };
  callbacks.done = [wait](const PinnedPrompt& prompt) {
    const std::lock_guard lock(wait->mutex);
    wait->result = prompt;
    wait->changed.notify_all();
  };
  callbacks.failed = [wait](ErrorKind kind, const std::string& message) {
    const std::lock_guard lock(wait->mutex);
    wait->error = EngineError(kind, message);
    wait->changed.notify_all();
  };
  {
    const std::lock_guard lock(mutex_);
    if (!accepting_) throw EngineError(ErrorKind::kShuttingDown, "The engine is shutting down.");
    inbox_.emplace_back([this, request, callbacks] {
      try {
        core_.pin(request, callbacks);
      } catch (const std::exception& e) {
        callbacks.failed(ErrorKind::kInternal, std::string("The engine failed: ") + e.what());
        throw;
      }
    });
  }
  wake_.notify_all();
  std::unique_lock lock(wait->mutex);
  int32_t reported = -1;
  for (;;) {
    wait->changed.wait(lock, [&] { return wait->result || wait->error || wait->done > reported; });
    const int32_t done = wait->done;
    const int32_t total = wait->total;
    const bool over = wait->result || wait->error;
    if (progress && total > 0 && done > reported) {
      lock.unlock();  // the engine thread must not wait for the caller's printing
      progress(static_cast<double>(done) / total,
               "prefilling " + (request.name.empty() ? std::string("prompt") : request.name));
      lock.lock();
    }
    reported = std::max(reported, done);
    if (!over) continue;
    if (wait->error) throw *wait->error;
    return *wait->result;
  }
}

void ThreadedEngine::post(std::function<void()> message) {
  {
    const std::lock_guard lock(mutex_);
    if (stopping_) return;
    inbox_.push_back(std::move(message));
  }
  wake_.notify_all();
}

void ThreadedEngine::publish_state() {
  EngineStats stats = core_.stats();
  std::vector<PinnedPrompt> pinned = core_.pinned();
  const std::lock_guard lock(mutex_);
  stats_ = std::move(stats);
  pinned_ = std::move(pinned);
}

/// What reaches the engine thread's own loop is a broken invariant: no request may be answered from
/// cells that cannot be trusted, so all of them fail. The engine takes new ones.
template <typename Work>
void ThreadedEngine::contain(const Work& work) {
  std::string why;
  try {
    work();
    return;
  } catch (const std::exception& e) {
    why = e.what();
  } catch (...) {
    why = "an exception of an unknown type";
  }
  options_.notice("the engine failed: " + why);
  core_.fail_all(ErrorKind::kInternal, "The engine failed: " + why);
}

void ThreadedEngine::run() {
  // For top -H and bench/serving: the threads of ggml that it begins inherit its name.
  pthread_setname_np(pthread_self(), "relay-engine");
  bool more = false;
  for (;;) {
    std::deque<std::function<void()>> messages;
    {
      std::unique_lock lock(mutex_);
      if (inbox_.empty()) {
        busy_ = !core_.idle();
        if (!busy_) idle_.notify_all();
      }
      // Wakes by itself now and then for pinned prompts whose time is over.
      if (!more) {
        wake_.wait_for(lock, std::chrono::seconds(1),
                       [this] { return stopping_ || !inbox_.empty(); });
      }
      if (stopping_) break;
      messages.swap(inbox_);
      busy_ = busy_ || !messages.empty();
    }
    for (const auto& message : messages) contain(message);
    more = false;
    contain([&] {
      more = core_.step();
      publish_state();
    });
  }
  // Those still in the inbox get their answer as well.
  std::deque<std::function<void()>> messages;
  {
    const std::lock_guard lock(mutex_);
    messages.swap(inbox_);
  }
  for (const auto& message : messages) contain(message);
  contain([&] {
    core_.cancel_all();
    publish_state();
  });
  contain([&] { core_.store_prompts(std::chrono::seconds(10)); });
  const std::lock_guard lock(mutex_);
  busy_ = false;
  idle_.notify_all();
}

EngineOptions with_notice(EngineOptions options) {
  if (!options.notice) {
    options.notice = [](const std::string& text) {
      std::fprintf(stderr, "relay: %s\n", text.c_str());
    };
  }
  return options;
}

}  // namespace

std::unique_ptr<Engine> Engine::load(const EngineOptions& given, const ProgressFn& progress) {
  const EngineOptions options = with_notice(given);
  const BackendReport backend = load_backends(options.relay, options.relay_module);
  // Which also computes, and so on a thread that ends: OpenMP keeps a team of threads for each that
  // has computed. Beside the engine thread's there would be more of them than processors, and then
  // none spins for long at a barrier, of which a token has hundreds.
  std::unique_ptr<LlamaModel> model =
      std::async(std::launch::async, [&] {
        return LlamaModel::load(options, backend.relay_active, progress);
      }).get();
  return std::make_unique<ThreadedEngine>(options, std::move(model), backend, progress);
}

}  // namespace relay::engine
