#include "server/service.h"

#include <algorithm>
#include <cstdio>

#include "server/anthropic.h"
#include "server/documents.h"
#include "server/errors.h"
#include "server/json.h"
#include "server/openai_request.h"
#include "server/responses.h"
#include "server/tokenizer_api.h"

namespace relay::server {

namespace {

constexpr int kLoadingRetrySeconds = 5;
constexpr int kDrainingRetrySeconds = 10;

/// Changes with whatever may change the output for the same request and seed.
std::string make_fingerprint(const std::string& identity, const std::string& backend) {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a
  const auto mix = [&](const std::string& text) {
    for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  };
  mix(identity);
  mix(backend);
  char text[32];
  std::snprintf(text, sizeof(text), "fp_relay_%010llx",
                static_cast<unsigned long long>(hash & 0xffffffffffu));
  return text;
}

Answer ok(const Json& json, int status = 200) {
  return Answer{status, "application/json", dump(json), {}};
}

}  // namespace

Answer answer_error(const ApiError& error, ErrorForm form) {
  const bool anthropic = form == ErrorForm::kAnthropic;
  return Answer{error.status(), "application/json",
                anthropic ? error.anthropic_body() : error.body(), error.headers()};
}

Service::Service(const ServerOptions& options)
    : options_(options), keys_(options.api_keys, options.admin_keys) {}

void Service::set_progress(double fraction, const std::string& what) {
  const std::lock_guard lock(mutex_);
  progress_ = fraction;
  progress_what_ = what;
}

void Service::set_engine(std::shared_ptr<engine::Engine> engine,
                         std::shared_ptr<PinnedChats> pinned) {
  auto metrics = std::make_shared<Metrics>(model_names(*engine).front());
  std::vector<std::string> fingerprints;
  for (const std::string& identity : engine->info().identities) {
    fingerprints.push_back(make_fingerprint(identity, engine->info().backend));
  }
  engine->set_observer(metrics);
  const std::lock_guard lock(mutex_);
  fingerprints_ = std::move(fingerprints);
  metrics_ = std::move(metrics);
  pinned_ = pinned != nullptr ? std::move(pinned) : std::make_shared<PinnedChats>(engine);
  engine_ = std::move(engine);
  Phase loading = Phase::kLoading;
  phase_.compare_exchange_strong(loading, Phase::kReady);
}

void Service::refresh_pinned() {
  std::shared_ptr<PinnedChats> pinned;
  {
    const std::lock_guard lock(mutex_);
    pinned = pinned_;
  }
  if (pinned != nullptr && phase_ == Phase::kReady) pinned->refresh();
}

void Service::begin_drain() { phase_ = Phase::kDraining; }

std::shared_ptr<engine::Engine> Service::engine() const {
  require_ready();
  const std::lock_guard lock(mutex_);
  return engine_;
}

std::shared_ptr<PinnedChats> Service::pinned() const {
  require_ready();
  const std::lock_guard lock(mutex_);
  return pinned_;
}

void Service::require_ready() const {
  switch (phase_.load()) {
    case Phase::kReady:
      return;
    case Phase::kLoading:
      throw unavailable("loading", "The model is being loaded.", kLoadingRetrySeconds);
    case Phase::kDraining:
      throw unavailable("shutting_down", "The server is shutting down.", kDrainingRetrySeconds);
  }
}

void Service::require_room() {
  if (const auto full = engine()->refuse_if_full(preparing_)) throw from_refusal(*full);
}

Service::Place::Place(Service& service) : preparing_(service.preparing_) {
  const std::shared_ptr<engine::Engine> engine = service.engine();
  const auto full = engine->refuse_if_full(preparing_++);
  if (!full) return;
  --preparing_;
  throw from_refusal(*full);
}

bool Service::is_operator(const Caller& caller) const {
  return caller.admin || (keys_.open() && !keys_.has_admin_keys());
}

Caller Service::authorize(const Route& route, std::string_view authorization,
                          std::string_view x_api_key) const {
  const Caller caller = keys_.identify(authorization, x_api_key);
  if (route.access == Access::kAnyone) return caller;
  if (route.access == Access::kOperator && is_operator(caller)) return caller;
  if (!caller.allowed) {
    const bool missing = authorization.empty() && x_api_key.empty();
    throw ApiError(401, "invalid_request_error", "invalid_api_key",
                   missing ? "An API key is needed: Authorization: Bearer <key>."
                           : "The API key is not valid.")
        .header("WWW-Authenticate", "Bearer");
  }
  const bool for_admins = route.access == Access::kAdmin || route.access == Access::kOperator;
  if (for_admins && !caller.admin) {
    throw ApiError(403, "invalid_request_error", "admin_key_required",
                   keys_.has_admin_keys()
                       ? "This endpoint needs an admin key."
                       : "This endpoint needs an admin key, and the server was started without "
                         "one (--admin-key-file, RELAY_ADMIN_KEY).");
  }
  return caller;
}

RequestLimits Service::limits(const engine::Engine& engine) const {
  RequestLimits limits;
  const engine::ModelInfo& info = engine.info();
  limits.vocab_size = info.vocab_size;
  limits.max_tokens = static_cast<size_t>(info.context_length);
  limits.max_prompts =
      std::min(limits.max_prompts, static_cast<size_t>(info.parallel) + info.max_queue);
  return limits;
}

std::vector<std::string> Service::model_names(const engine::Engine& engine) const {
  return options_.model_names.empty() ? std::vector<std::string>{engine.info().name}
                                      : options_.model_names;
}

std::string Service::name_of(const engine::Engine& engine, int32_t adapter) const {
  return adapter == 0 ? model_names(engine).front()
                      : engine.info().adapters.at(static_cast<size_t>(adapter) - 1).name;
}

Service::NamedModel Service::resolve_model(const engine::Engine& engine,
                                           const std::string& model) const {
  const std::vector<std::string> names = model_names(engine);
  if (model.empty()) return {names.front(), 0};
  if (std::find(names.begin(), names.end(), model) != names.end()) return {model, 0};
  const std::vector<engine::Adapter>& adapters = engine.info().adapters;
  for (size_t i = 0; i < adapters.size(); ++i) {
    if (adapters[i].name == model) return {model, static_cast<int32_t>(i) + 1};
  }
  throw model_not_found(model);
}

void Service::resolve_model(GenerationContext& context, const std::string& model) const {
  NamedModel named = resolve_model(*context.engine, model);
  context.model = std::move(named.name);
  context.adapter = named.adapter;
  const std::lock_guard lock(mutex_);
  context.fingerprint = fingerprints_.at(static_cast<size_t>(named.adapter));
}

Answer Service::answer(const Route& route, std::string_view body, const Caller& caller) {
  try {
    switch (route.endpoint) {
      case Endpoint::kPage:
        return page();
      case Endpoint::kOpenApi:
        return Answer{200, "application/json", kOpenApi, {}};
      case Endpoint::kState:
        return state();
      case Endpoint::kHealth:
        return health();
      case Endpoint::kModels:
      case Endpoint::kModel:
        return models(route.argument);
      case Endpoint::kMetrics:
        return metrics(caller);
      case Endpoint::kListCachedPrompts:
        return list_cached_prompts();
      case Endpoint::kCreateCachedPrompt:
        return create_cached_prompt(body);
      case Endpoint::kGetCachedPrompt:
        return get_cached_prompt(route.argument);
      case Endpoint::kUpdateCachedPrompt:
        return update_cached_prompt(route.argument, body);
      case Endpoint::kDeleteCachedPrompt:
        return delete_cached_prompt(route.argument);
      case Endpoint::kVersion:
        return ok(Json{{"version", RELAY_VERSION}});
      case Endpoint::kCountTokens:
        return count_tokens(body);
      case Endpoint::kTokenize:
        return tokenize(body);
      case Endpoint::kDetokenize:
        return detokenize(body);
      case Endpoint::kApplyTemplate:
        return apply_template(body);
      case Endpoint::kEmbeddings:
        throw ApiError(400, "invalid_request_error", "unsupported_endpoint",
                       "This server generates text; it computes no embeddings (/v1/embeddings).");
      case Endpoint::kStoredResponse:
        throw ApiError(404, "invalid_request_error", "response_not_stored",
                       "Responses are not stored here: send the whole conversation in 'input'.");
      case Endpoint::kChatCompletions:
      case Endpoint::kCompletions:
      case Endpoint::kResponses:
      case Endpoint::kMessages:
        break;
    }
  } catch (const engine::EngineError& error) {
    throw from_engine(error.kind(), error.what(), error.param());
  }
  throw ApiError(500, "server_error", "internal_error", "This endpoint has no plain answer.");
}

std::unique_ptr<Generation> Service::generate(Endpoint endpoint, std::string_view body,
                                              const Caller& caller, std::function<void()> wake) {
  GenerationContext context;
  context.engine = engine();
  context.caller_salt = caller.salt;
  context.max_queued_bytes = options_.max_queued_bytes;
  context.wake = std::move(wake);
  const RequestLimits bounds = limits(*context.engine);
  context.max_prompt_logprobs = bounds.max_prompt_logprobs;
  if (endpoint == Endpoint::kMessages) {
    MessagesRequest request = parse_messages(body, bounds);
    resolve_model(context, request.chat.common.model);
    return Generation::start(
        std::move(request.chat), std::move(context),
        [&](const ResponseHead& head) { return make_messages_writer(head, request.caches); });
  }
  if (endpoint == Endpoint::kResponses) {
    ResponsesRequest request = parse_responses(body, bounds);
    resolve_model(context, request.chat.common.model);
    return Generation::start(std::move(request.chat), std::move(context),
                             [&](const ResponseHead& head) {
                               return make_responses_writer(head, std::move(request.echo));
                             });
  }
  if (endpoint == Endpoint::kChatCompletions) {
    ChatCompletionRequest request = parse_chat_completion(body, bounds);
    resolve_model(context, request.common.model);
    return Generation::start(std::move(request), std::move(context));
  }
  CompletionRequest request = parse_completion(body, bounds);
  resolve_model(context, request.common.model);
  return Generation::start(std::move(request), std::move(context));
}

Answer Service::health() const {
  const Phase phase = phase_;
  if (phase == Phase::kReady) return ok(Json{{"status", "ok"}});
  try {
    require_ready();
  } catch (const ApiError& error) {
    Answer answer = answer_error(error);
    Json json = Json::parse(answer.body);
    json["status"] = phase == Phase::kLoading ? "loading" : "draining";
    if (phase == Phase::kLoading) {
      const std::lock_guard lock(mutex_);
      json["progress"] = progress_;
      json["step"] = progress_what_;
    }
    answer.body = dump(json);
    return answer;
  }
  return ok(Json{{"status", "ok"}});
}

Answer Service::models(const std::string& only) const {
  const std::shared_ptr<engine::Engine> engine = this->engine();
  const engine::ModelInfo& info = engine->info();
  const std::vector<std::string> names = model_names(*engine);
  Json data = Json::array();
  for (const std::string& name : names) {
    Json model{{"id", name},          {"object", "model"}, {"created", info.created},
               {"owned_by", "relay"}, {"root", info.path}, {"max_model_len", info.context_length}};
    if (name == only) return ok(model);
    data.push_back(std::move(model));
  }
  for (const engine::Adapter& adapter : info.adapters) {
    Json model = data.front();
    model["id"] = adapter.name;
    model["root"] = adapter.path;
    model["parent"] = names.front();
    if (adapter.name == only) return ok(model);
    data.push_back(std::move(model));
  }
  if (!only.empty()) throw model_not_found(only);
  return ok(Json{{"object", "list"}, {"data", std::move(data)}});
}

Answer Service::metrics(const Caller& caller) const {
  std::shared_ptr<engine::Engine> engine;
  std::shared_ptr<Metrics> metrics;
  {
    const std::lock_guard lock(mutex_);
    engine = engine_;
    metrics = metrics_;
  }
  Answer answer;
  answer.content_type = "text/plain; version=0.0.4; charset=utf-8";
  if (metrics != nullptr) answer.body = metrics->render(engine.get(), is_operator(caller));
  return answer;
}

Answer Service::page() const {
  Answer answer;
  answer.content_type = "text/html; charset=utf-8";
  answer.body = kPage;
  answer.headers = {{"Cache-Control", "no-cache"},
                    {"Content-Security-Policy",
                     "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
                     "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
                     "frame-ancestors 'none'"}};
  return answer;
}

Answer Service::state() const {
  const std::shared_ptr<engine::Engine> engine = this->engine();
  const engine::ModelInfo& info = engine->info();
  Json models = Json::array();
  for (size_t a = 0; a <= info.adapters.size(); ++a) {
    models.push_back(name_of(*engine, static_cast<int32_t>(a)));
  }
  Json nodes = Json::array();
  for (const engine::PrefixNode& node : engine->prefix_nodes()) {
    nodes.push_back({{"parent", node.parent},
                     {"model", name_of(*engine, node.adapter)},
                     {"tokens", node.tokens},
                     {"running", node.running},
                     {"pinned", node.pinned},
                     {"hits", node.hits}});
  }
  Json pins = Json::array();
  for (const auto& [prompt, ready] : pinned()->list()) {
    if (!ready) continue;
    pins.push_back({{"name", prompt.name},
                    {"model", name_of(*engine, prompt.adapter)},
                    {"tokens", prompt.tokens},
                    {"bytes", prompt.bytes}});
  }
  const engine::EngineStats s = engine->stats();
  const int64_t each = info.kv_bytes_per_token;
  return ok(Json{{"model", name_of(*engine, 0)},
                 {"models", std::move(models)},
                 {"description", info.description},
                 {"relay_active", info.relay_active},
                 {"context_length", info.context_length},
                 {"parallel", info.parallel},
                 {"running", s.running},
                 {"waiting", s.waiting},
                 {"steps", s.steps},
                 {"generation_tokens", s.generation_tokens},
                 {"prompt_tokens", s.prompt_tokens},
                 {"prefix_queries", s.prefix_queries},
                 {"prefix_hits", s.prefix_hits},
                 {"shared_group_size", s.shared_group_size},
                 {"shared_prefix_tokens", s.shared_prefix_tokens},
                 {"kv_tokens", s.kv_cells_used},
                 {"kv_tokens_total", s.kv_cells_total},
                 {"kv_tokens_pinned", s.pinned_tokens},
                 {"kv_tokens_cached", s.kv_cells_cached},
                 // Without what is merely kept for later requests.
                 {"kv_bytes_stored", (s.kv_cells_used - s.kv_cells_cached) * each},
                 {"kv_bytes_unshared", s.kv_bytes_unshared},
                 {"kv_bytes_read", (s.kv_tokens_read_shared + s.kv_tokens_read_private) * each},
                 {"kv_bytes_read_unshared",
                  (s.kv_tokens_read_shared + s.kv_tokens_read_private + s.kv_tokens_saved) * each},
                 {"pinned", std::move(pins)},
                 {"prefix_tree", std::move(nodes)}});
}

Answer Service::count_tokens(std::string_view body) const {
  const std::shared_ptr<engine::Engine> engine = this->engine();
  const ChatCompletionRequest request = parse_count_tokens(body, limits(*engine));
  resolve_model(*engine, request.common.model);
  return ok(Json{{"input_tokens", engine->render_chat(request.chat).tokens.size()}});
}

Answer Service::tokenize(std::string_view body) const {
  const std::shared_ptr<engine::Engine> engine = this->engine();
  const TokenizeRequest request = parse_tokenize(body, limits(*engine));
  resolve_model(*engine, request.model);
  return ok(tokenize_json(*engine, request));
}

Answer Service::detokenize(std::string_view body) const {
  const std::shared_ptr<engine::Engine> engine = this->engine();
  const DetokenizeRequest request = parse_detokenize(body, limits(*engine));
  resolve_model(*engine, request.model);
  const std::string text = engine->detokenize(request.tokens, /*special=*/true);
  return ok(Json{{"prompt", text}, {"content", text}});  // vLLM's name, llama-server's name
}

Answer Service::apply_template(std::string_view body) const {
  const std::shared_ptr<engine::Engine> engine = this->engine();
  const ChatCompletionRequest request = parse_chat_completion(body, limits(*engine));
  resolve_model(*engine, request.common.model);
  return ok(Json{{"prompt", engine->render_chat(request.chat).text}});
}

Answer Service::create_cached_prompt(std::string_view body) {
  const std::shared_ptr<engine::Engine> engine = this->engine();
  CachedPromptRequest request = parse_cached_prompt(body, limits(*engine));
  ChatToPin chat;
  chat.adapter = resolve_model(*engine, request.model).adapter;
  chat.name = std::move(request.name);
  chat.chat = std::move(request.chat);
  chat.cache_salt = pin_salt(request.cache_salt);
  chat.ttl_seconds = request.ttl_seconds;
  return ok(cached_prompt_json(*engine, {pinned()->pin(chat)}), 201);
}

Json Service::cached_prompt_json(const engine::Engine& engine, const PinnedChat& chat) const {
  const engine::PinnedPrompt& prompt = chat.prompt;
  Json json;
  json["id"] = prompt.id;
  json["object"] = "cached_prompt";
  json["status"] = chat.ready ? "ready" : "computing";
  json["model"] = name_of(engine, prompt.adapter);
  json["name"] = prompt.name;
  json["tokens"] = prompt.tokens;
  json["bytes"] = prompt.bytes;
  json["prefix_sha256"] = prompt.sha256;
  json["created"] = prompt.created;
  json["expires_at"] = prompt.expires_at > 0 ? Json(prompt.expires_at) : Json(nullptr);
  return json;
}

Answer Service::list_cached_prompts() const {
  const std::shared_ptr<engine::Engine> engine = this->engine();
  Json data = Json::array();
  for (const PinnedChat& chat : pinned()->list()) {
    data.push_back(cached_prompt_json(*engine, chat));
  }
  return ok(Json{{"object", "list"}, {"data", std::move(data)}});
}

Answer Service::get_cached_prompt(const std::string& id) const {
  return ok(cached_prompt_json(*engine(), pinned()->get(id)));
}

Answer Service::update_cached_prompt(const std::string& id, std::string_view body) {
  const int64_t ttl = parse_cached_prompt_ttl(body);
  return ok(cached_prompt_json(*engine(), pinned()->set_ttl(id, ttl)));
}

Answer Service::delete_cached_prompt(const std::string& id) {
  pinned()->unpin(id);
  return ok(Json{{"id", id}, {"object", "cached_prompt.deleted"}, {"deleted", true}});
}

}  // namespace relay::server
