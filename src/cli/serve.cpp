// relay serve: one model behind the OpenAI HTTP API, long prompts pinned at start-up.
#include <pthread.h>
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "base/utf8.h"
#include "cli/commands.h"
#include "engine/engine.h"
#include "relay/types.h"
#include "server/auth.h"
#include "server/errors.h"
#include "server/json.h"
#include "server/openai_request.h"
#include "server/server.h"

namespace relay::cli {

namespace {

using Clock = std::chrono::steady_clock;

struct ServeOptions {
  engine::EngineOptions engine;
  server::ServerOptions server;
  std::vector<std::string> pin_prompts;
  std::string api_key_file;
  std::string admin_key_file;
  std::string relay = "on";
  std::string prefix_caching = "on";
  std::string log_level = "info";
  double drain_seconds = 60;
  double pin_refresh_seconds = 60;
};

// --- Signals
// --------------------------------------------------------------------------------------

/// SIGINT and SIGTERM, taken by a thread of their own. The first asks for a good end; while nothing
/// can be drained yet (loading) it ends the program. The second always does.
class Signals {
 public:
  /// Call before any other thread exists: threads inherit the blocked signals.
  Signals() {
    sigemptyset(&set_);
    sigaddset(&set_, SIGINT);
    sigaddset(&set_, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &set_, nullptr);
    std::signal(SIGPIPE, SIG_IGN);
    std::thread([this] { run(); }).detach();
  }
  /// From now on a first signal is for wait().
  void serving() {
    const std::lock_guard lock(mutex_);
    serving_ = true;
  }
  void wait() {
    std::unique_lock lock(mutex_);
    arrived_.wait(lock, [this] { return count_ > 0; });
  }

 private:
  void run() {
    for (;;) {
      int signal = 0;
      if (sigwait(&set_, &signal) != 0) continue;
      const std::lock_guard lock(mutex_);
      ++count_;
      if (count_ > 1) {
        std::fputs("relay: second signal, ending at once\n", stderr);
        _exit(128 + signal);
      }
      if (!serving_) {
        std::fputs("\nrelay: ended before it was ready\n", stderr);
        _exit(0);
      }
      arrived_.notify_all();
    }
  }

  sigset_t set_;
  std::mutex mutex_;
  std::condition_variable arrived_;
  int count_ = 0;
  bool serving_ = false;
};

// --- Start-up
// -------------------------------------------------------------------------------------

/// Shows how far loading and pinning are: in place on a terminal, else a line now and then.
class ProgressPrinter {
 public:
  explicit ProgressPrinter(server::Service& service)
      : service_(service), terminal_(isatty(STDERR_FILENO) == 1) {}

  void operator()(double fraction, const std::string& what) {
    service_.set_progress(fraction, what);
    const int percent = static_cast<int>(fraction * 100);
    const Clock::time_point now = Clock::now();
    if (terminal_) {
      if (what != what_ || percent != percent_) {
        std::fprintf(stderr, "\r\033[K%s: %d %%%s", what.c_str(), percent,
                     fraction >= 1 ? "\n" : "");
      }
    } else if (what != what_ || (percent != percent_ && now - shown_ > kInterval) ||
               (fraction >= 1 && percent_ < 100)) {
      spdlog::info("{}: {} %", what, percent);
      shown_ = now;
    }
    what_ = what;
    percent_ = percent;
  }

 private:
  static constexpr std::chrono::seconds kInterval{2};

  server::Service& service_;
  const bool terminal_;
  std::string what_;
  int percent_ = -1;
  Clock::time_point shown_;
};

void check_readable(const std::string& path, const char* what) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    throw Error(std::string(what) + " '" + path + "' is a folder");
  }
  if (!std::ifstream(path)) throw Error(std::string(what) + " '" + path + "' cannot be read");
}

/// The chat that every request with this system prompt begins with.
engine::ChatRequest read_prompt_file(const std::string& path) {
  check_readable(path, "the prompt file");
  std::ifstream file(path, std::ios::binary);
  std::stringstream content;
  content << file.rdbuf();
  const std::string text = content.str();
  if (text.find_first_not_of(" \t\r\n") == std::string::npos) {
    throw Error("the prompt file '" + path + "' is empty");
  }
  if (std::filesystem::path(path).extension() == ".json") {
    try {
      return server::parse_prompt_file_json(text, server::RequestLimits());
    } catch (const server::ApiError& error) {
      throw Error("the prompt file '" + path + "': " + error.what());
    }
  }
  if (!is_valid_utf8(text)) throw Error("the prompt file '" + path + "' is not UTF-8 text");
  engine::ChatRequest chat;
  chat.messages_json = server::dump(server::Json::array({{{"role", "system"}, {"content", text}}}));
  return chat;
}

void check_template_kwargs(const std::string& json) {
  if (json.empty()) return;
  std::string why = "it is another kind of JSON";
  try {
    if (server::parse_json(json).is_object()) return;
  } catch (const server::ApiError& error) {
    why = error.what();
  }
  throw Error("--chat-template-kwargs must be a JSON object; " + json + " is none: " + why);
}

struct PromptFile {
  std::string path;
  engine::ChatRequest chat;
};

int64_t pin_prompts(server::PinnedChats& chats, const std::vector<PromptFile>& files,
                    ProgressPrinter& progress) {
  int64_t tokens = 0;
  for (const PromptFile& file : files) {
    const std::string name = std::filesystem::path(file.path).filename().string();
    server::ChatToPin request;
    request.name = name;
    request.chat = file.chat;
    try {
      const Clock::time_point begin = Clock::now();
      const engine::PinnedPrompt pinned = chats.pin(
          request,
          [&](double fraction, const std::string&) { progress(fraction, "pinning " + name); });
      const std::chrono::duration<double> took = Clock::now() - begin;
      spdlog::info("pinned {}: {} tokens, {:.1f} MiB of KV, {:.1f} s", name, pinned.tokens,
                   static_cast<double>(pinned.bytes) / (1 << 20), took.count());
      tokens += pinned.tokens;
    } catch (const engine::EngineError& error) {
      std::string hint;
      if (error.kind() == engine::ErrorKind::kPinBudgetExceeded) {
        hint = " Raise --pin-budget (a share of the cache) or --ctx-size.";
      }
      throw Error("cannot pin '" + file.path + "': " + error.what() + hint);
    }
  }
  return tokens;
}

bool is_loopback(const std::string& host) {
  return host == "localhost" || host == "::1" || host.rfind("127.", 0) == 0;
}

void set_up_logging(const std::string& level) {
  // Standard output is for the line that says the server is ready.
  spdlog::set_default_logger(spdlog::stderr_color_mt("relay"));
  spdlog::set_pattern("%Y-%m-%d %H:%M:%S.%e %^%l%$ %v");
  spdlog::set_level(spdlog::level::from_str(level));
}

void serve(ServeOptions options) {
  set_up_logging(options.log_level);
  Signals* signals = new Signals;  // its thread lives as long as the program

  // What can be wrong with the command line is said before the long work begins.
  check_readable(options.engine.model_path, "the model file");
  if (!options.engine.chat_template_file.empty()) {
    check_readable(options.engine.chat_template_file, "the chat template");
  }
  check_template_kwargs(options.engine.template_kwargs_json);
  std::vector<PromptFile> prompts;
  for (const std::string& path : options.pin_prompts) {
    prompts.push_back({path, read_prompt_file(path)});
  }
  const auto add_keys = [](std::vector<std::string>& keys, const std::string& file) {
    if (file.empty()) return;
    for (std::string& key : server::read_key_file(file)) keys.push_back(std::move(key));
  };
  add_keys(options.server.api_keys, options.api_key_file);
  add_keys(options.server.admin_keys, options.admin_key_file);
  if (options.engine.batch_tokens < options.engine.parallel) {
    throw Error(
        "--batch-size must be at least --parallel: each step computes a token of every "
        "running request");
  }
  options.engine.relay = options.relay == "on";
  options.engine.prefix_caching = options.prefix_caching == "on";
  if (!options.server.model_names.empty()) {
    options.engine.model_alias = options.server.model_names.front();
  }

  options.server.pin_refresh =
      std::chrono::milliseconds(static_cast<int64_t>(options.pin_refresh_seconds * 1000));

  server::Server http(options.server);
  http.listen();
  spdlog::info("listening on {}", http.url());
  if (!is_loopback(options.server.host) && options.server.api_keys.empty()) {
    spdlog::warn("==================================================================");
    spdlog::warn("ANYONE who can reach {} can use this server: it was bound to a", http.url());
    spdlog::warn("public address without a key. Use --api-key-file, or --host 127.0.0.1");
    spdlog::warn("==================================================================");
  }

  ProgressPrinter progress(http.service());
  const std::shared_ptr<engine::Engine> engine = engine::Engine::load(
      options.engine, [&](double fraction, const std::string& what) { progress(fraction, what); });
  const engine::ModelInfo& info = engine->info();
  spdlog::info("{} ({}), context {} tokens, KV cache {} tokens", info.name, info.description,
               info.context_length, info.kv_cells);
  spdlog::info("{}", info.backend);
  const auto chats = std::make_shared<server::PinnedChats>(engine);
  const int64_t pinned = pin_prompts(*chats, prompts, progress);

  signals->serving();
  http.service().set_engine(engine, chats);
  std::printf("relay is ready: %s/v1  model %s  pinned %lld tokens  Relay %s\n", http.url().c_str(),
              info.name.c_str(), static_cast<long long>(pinned),
              info.relay_active ? "active" : "NOT active");
  std::fflush(stdout);

  signals->wait();
  spdlog::info("draining; a second signal ends at once");
  http.service().begin_drain();
  const auto limit = std::chrono::milliseconds(static_cast<int64_t>(options.drain_seconds * 1000));
  if (!engine->drain(limit)) {
    spdlog::warn("requests still running after {} s are ended", options.drain_seconds);
  }
  engine->stop();
  http.shutdown(std::chrono::seconds(5));
  spdlog::info("ended");
}

// --- Options
// --------------------------------------------------------------------------------------

void add_model_options(CLI::App& app, ServeOptions& o) {
  constexpr const char* kGroup = "Model";
  app.add_option("-m,--model", o.engine.model_path, "The model, a GGUF file")
      ->envname("RELAY_MODEL")
      ->required()
      ->option_text("FILE")
      ->group(kGroup);
  app.add_option("-a,--alias,--served-model-name", o.server.model_names,
                 "Name(s) the model is served under; default: the file's name")
      ->envname("RELAY_MODEL_NAME")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->option_text("NAME,...")
      ->group(kGroup);
  app.add_option("--chat-template-file", o.engine.chat_template_file,
                 "Jinja chat template instead of the model's own")
      ->envname("RELAY_CHAT_TEMPLATE_FILE")
      ->option_text("FILE")
      ->group(kGroup);
  app.add_option("--chat-template-kwargs", o.engine.template_kwargs_json,
                 "JSON object that every chat template is given, e.g. "
                 "'{\"date_string\":\"26 Jul 2024\"}' for Llama 3 to print that date and not "
                 "today's; a request's chat_template_kwargs come on top")
      ->envname("RELAY_CHAT_TEMPLATE_KWARGS")
      ->option_text("JSON")
      ->group(kGroup);
  app.add_option("--pin-prompt", o.pin_prompts,
                 "Prompt to compute at start-up and hold: a text file is a system prompt, a .json "
                 "file an array of messages (or an object with messages and tools). May be given "
                 "several times")
      ->envname("RELAY_PIN_PROMPT")
      ->allow_extra_args(false)
      ->option_text("FILE")
      ->group(kGroup);
  app.add_option("--pin-refresh", o.pin_refresh_seconds,
                 "Seconds between looks whether a pinned prompt still reads the same: a template "
                 "that prints the date makes another prompt of it at midnight, which is then "
                 "pinned in its place. 0: never")
      ->envname("RELAY_PIN_REFRESH")
      ->check(CLI::Range(0.0, 86400.0))
      ->capture_default_str()
      ->option_text("SECONDS")
      ->group(kGroup);
}

void add_engine_options(CLI::App& app, ServeOptions& o) {
  constexpr const char* kGroup = "Engine";
  const auto cache_types =
      CLI::IsMember({"f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"});
  engine::EngineOptions& e = o.engine;
  app.add_option("-c,--ctx-size", e.kv_cells,
                 "Tokens the KV cache holds, all requests and pinned prompts together; 0: the "
                 "model's context")
      ->envname("RELAY_CTX_SIZE")
      ->check(CLI::Range(0, 1 << 30))
      ->capture_default_str()
      ->group(kGroup);
  app.add_option("--max-model-len", e.max_context,
                 "Most tokens of one request; 0: the smaller of the model's context and --ctx-size")
      ->envname("RELAY_MAX_MODEL_LEN")
      ->check(CLI::Range(0, 1 << 30))
      ->capture_default_str()
      ->group(kGroup);
  app.add_option("--parallel,--max-num-seqs", e.parallel, "Most requests computed at once (-np)")
      ->envname("RELAY_PARALLEL")
      ->check(CLI::Range(1, 240))
      ->capture_default_str()
      ->group(kGroup);
  app.add_option("-b,--batch-size,--max-num-batched-tokens", e.batch_tokens,
                 "Most tokens of one step")
      ->envname("RELAY_BATCH_SIZE")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str()
      ->group(kGroup);
  app.add_option("--ubatch-size", e.ubatch_tokens, "Most tokens computed together (-ub)")
      ->envname("RELAY_UBATCH_SIZE")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str()
      ->group(kGroup);
  app.add_option("-t,--threads", e.threads, "Threads that compute; 0: one per physical core")
      ->envname("RELAY_THREADS")
      ->check(CLI::Range(0, 1024))
      ->capture_default_str()
      ->group(kGroup);
  app.add_option(
         "--cache-type-k", e.cache_type_k,
         "Type of the keys in the KV cache: f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 (-ctk)")
      ->envname("RELAY_CACHE_TYPE_K")
      ->check(cache_types)
      ->capture_default_str()
      ->option_text("TYPE")
      ->group(kGroup);
  app.add_option("--cache-type-v", e.cache_type_v,
                 "Type of the values in the KV cache, one of the same (-ctv)")
      ->envname("RELAY_CACHE_TYPE_V")
      ->check(cache_types)
      ->capture_default_str()
      ->option_text("TYPE")
      ->group(kGroup);
  app.add_option("--relay", o.relay, "Attention by Relay; off: llama.cpp's own")
      ->envname("RELAY_ATTENTION")
      ->check(CLI::IsMember({"on", "off"}))
      ->capture_default_str()
      ->option_text("on|off")
      ->group(kGroup);
  app.add_option("--relay-module", e.relay_module,
                 "Path of libggml-relay.so; default: beside this program or in ../lib")
      ->envname("RELAY_MODULE")
      ->option_text("FILE")
      ->group(kGroup);
  app.add_option("--prefix-caching", o.prefix_caching,
                 "Share and keep the KV of equal prefixes; off: for comparison")
      ->envname("RELAY_PREFIX_CACHING")
      ->check(CLI::IsMember({"on", "off"}))
      ->capture_default_str()
      ->option_text("on|off")
      ->group(kGroup);
  app.add_option("--pin-budget", e.pin_budget, "Share of the KV cache that pinned prompts may hold")
      ->envname("RELAY_PIN_BUDGET")
      ->check(CLI::Range(0.0, 1.0))
      ->capture_default_str()
      ->option_text("SHARE")
      ->group(kGroup);
  app.add_option("--max-queue", e.max_queue, "Requests that may wait; more are answered with 429")
      ->envname("RELAY_MAX_QUEUE")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str()
      ->group(kGroup);
  app.add_flag("!--no-mmap", e.mmap, "Read the model into memory instead of mapping it")
      ->group(kGroup);
}

void add_http_options(CLI::App& app, ServeOptions& o) {
  constexpr const char* kGroup = "HTTP";
  server::ServerOptions& s = o.server;
  app.add_option("--host", s.host, "Address to listen on")
      ->envname("RELAY_HOST")
      ->capture_default_str()
      ->option_text("ADDRESS")
      ->group(kGroup);
  app.add_option("--port", s.port, "Port to listen on; 0: any free one")
      ->envname("RELAY_PORT")
      ->capture_default_str()
      ->option_text("PORT")
      ->group(kGroup);
  app.add_option("--api-key", s.api_keys,
                 "Key(s) clients must send. Other users of this machine can see a command line: "
                 "better use the environment or --api-key-file")
      ->envname("RELAY_API_KEY")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->option_text("KEY,...")
      ->group(kGroup);
  app.add_option("--api-key-file", o.api_key_file, "File with keys, one per line")
      ->envname("RELAY_API_KEY_FILE")
      ->option_text("FILE")
      ->group(kGroup);
  app.add_option("--admin-key", s.admin_keys,
                 "Key(s) that may also manage /v1/cached_prompts; without one nobody may. As with "
                 "--api-key, better not on the command line")
      ->envname("RELAY_ADMIN_KEY")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->option_text("KEY,...")
      ->group(kGroup);
  app.add_option("--admin-key-file", o.admin_key_file, "File with admin keys, one per line")
      ->envname("RELAY_ADMIN_KEY_FILE")
      ->option_text("FILE")
      ->group(kGroup);
  app.add_option("--max-body", s.max_body_bytes, "Largest request body, e.g. 16MiB")
      ->envname("RELAY_MAX_BODY")
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/false))
      ->default_str("16MiB")
      ->option_text("SIZE")
      ->group(kGroup);
  app.add_option("--max-connections", s.max_connections, "Most connections open at once")
      ->envname("RELAY_MAX_CONNECTIONS")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str()
      ->group(kGroup);
  app.add_option("--threads-http", s.io_threads, "Threads that move bytes and write answers")
      ->envname("RELAY_THREADS_HTTP")
      ->check(CLI::Range(1, 64))
      ->capture_default_str()
      ->group(kGroup);
  app.add_option("--drain-timeout", o.drain_seconds,
                 "Seconds that running requests have left after SIGINT or SIGTERM")
      ->envname("RELAY_DRAIN_TIMEOUT")
      ->check(CLI::Range(0.0, 86400.0))
      ->capture_default_str()
      ->option_text("SECONDS")
      ->group(kGroup);
  app.add_option("--log-level", o.log_level,
                 "trace, debug, info, warn, error or off; debug shows every request")
      ->envname("RELAY_LOG_LEVEL")
      ->check(CLI::IsMember({"trace", "debug", "info", "warn", "error", "off"}))
      ->capture_default_str()
      ->option_text("LEVEL")
      ->group(kGroup);
}

}  // namespace

void add_serve(CLI::App& app) {
  const auto options = std::make_shared<ServeOptions>();
  CLI::App* serve_app = app.add_subcommand(
      "serve", "Serves a model over the OpenAI HTTP API; shared prompts are stored and read once");
  serve_app->footer(
      "Examples:\n"
      "  relay serve -m model.gguf --pin-prompt prompt.txt --port 8080\n"
      "  curl http://127.0.0.1:8080/v1/chat/completions -d '{\"messages\":[{\"role\":\"user\","
      "\"content\":\"Hello\"}]}'\n"
      "SIGINT and SIGTERM let running requests finish; a second one ends at once.\n"
      "GET /health answers 503 until the model is loaded and the prompts are pinned.\n"
      "RELAY_VERBOSE, RELAY_ISA and the other variables of docs/llama-cpp.md hold here, too.");
  add_model_options(*serve_app, *options);
  add_engine_options(*serve_app, *options);
  add_http_options(*serve_app, *options);
  serve_app->callback([options] { serve(*options); });
}

}  // namespace relay::cli
