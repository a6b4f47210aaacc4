// What the endpoints do, without HTTP: state of the server, models, cached prompts, and the start
// of generations. Thread-safe.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "server/auth.h"
#include "server/generation.h"
#include "server/metrics.h"
#include "server/options.h"
#include "server/pinned_chats.h"
#include "server/router.h"

namespace relay::server {

/// A whole answer.
struct Answer {
  int status = 200;
  std::string content_type = "application/json";
  std::string body;
  std::vector<std::pair<std::string, std::string>> headers;
};
Answer answer_error(const ApiError& error, ErrorForm form = ErrorForm::kOpenAi);

class Service {
 public:
  explicit Service(const ServerOptions& options);

  const ServerOptions& options() const { return options_; }

  // --- State: loading -> ready -> draining
  /// Shown by /health while loading.
  void set_progress(double fraction, const std::string& what);
  /// Ready: requests are taken from now on. `pinned` holds what was pinned before; null: nothing.
  void set_engine(std::shared_ptr<engine::Engine> engine,
                  std::shared_ptr<PinnedChats> pinned = nullptr);
  /// Pins anew the prompts that now read differently. May wait for the engine.
  void refresh_pinned();
  /// New requests are answered with 503 from now on.
  void begin_drain();
  bool draining() const { return phase_ == Phase::kDraining; }

  // --- Requests
  /// Throws ApiError 401, 403.
  Caller authorize(const Route& route, std::string_view authorization,
                   std::string_view x_api_key) const;
  /// Throws ApiError 503 unless ready.
  void require_ready() const;
  /// Throws ApiError 429 where the queue is full already, and 503 unless ready.
  void require_room();

  /// A request's claim to a place in the engine's queue, to be held from before generate() until it
  /// has returned: so a full queue is told without the work of making a prompt.
  class Place {
   public:
    /// Throws ApiError 429 where the queue is full or will be, and 503 unless ready.
    explicit Place(Service& service);
    ~Place() { --preparing_; }
    Place(const Place&) = delete;
    Place& operator=(const Place&) = delete;

   private:
    std::atomic<int32_t>& preparing_;
  };

  /// Endpoints that generate nothing. May wait for the engine (Work::kWaiter, kPinner). Throws
  /// ApiError.
  Answer answer(const Route& route, std::string_view body, const Caller& caller);
  /// Endpoints of Work::kGeneration. Throws ApiError.
  std::unique_ptr<Generation> generate(Endpoint endpoint, std::string_view body,
                                       const Caller& caller, std::function<void()> wake);

 private:
  enum class Phase { kLoading, kReady, kDraining };

  /// Whether the caller runs this server, as far as keys can tell.
  bool is_operator(const Caller& caller) const;
  std::shared_ptr<engine::Engine> engine() const;
  std::shared_ptr<PinnedChats> pinned() const;
  RequestLimits limits(const engine::Engine& engine) const;
  std::vector<std::string> model_names(const engine::Engine& engine) const;
  /// What the base model, 0, and adapters are called.
  std::string name_of(const engine::Engine& engine, int32_t adapter) const;
  struct NamedModel {
    std::string name;     ///< to answer with
    int32_t adapter = 0;  ///< the engine's
  };
  /// Throws ApiError 404.
  NamedModel resolve_model(const engine::Engine& engine, const std::string& model) const;
  /// Sets what a request's model stands for.
  void resolve_model(GenerationContext& context, const std::string& model) const;
  Json cached_prompt_json(const engine::Engine& engine, const PinnedChat& chat) const;

  Answer page() const;
  Answer state() const;
  Answer health() const;
  Answer models(const std::string& only) const;
  Answer metrics(const Caller& caller) const;
  Answer count_tokens(std::string_view body) const;
  Answer tokenize(std::string_view body) const;
  Answer detokenize(std::string_view body) const;
  Answer apply_template(std::string_view body) const;
  Answer create_cached_prompt(std::string_view body);
  Answer list_cached_prompts() const;
  Answer get_cached_prompt(const std::string& id) const;
  Answer update_cached_prompt(const std::string& id, std::string_view body);
  Answer delete_cached_prompt(const std::string& id);

  const ServerOptions options_;
  const KeyRing keys_;
  std::atomic<Phase> phase_{Phase::kLoading};
  std::atomic<int32_t> preparing_{0};  // places that are held
  mutable std::mutex mutex_;           // guards what follows
  std::shared_ptr<engine::Engine> engine_;
  std::shared_ptr<PinnedChats> pinned_;
  std::shared_ptr<Metrics> metrics_;
  std::vector<std::string> fingerprints_;  // by adapter
  double progress_ = 0;
  std::string progress_what_ = "starting";
};

}  // namespace relay::server
