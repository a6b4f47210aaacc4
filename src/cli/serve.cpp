// relay serve: one model behind the OpenAI HTTP API, long prompts pinned at start-up.
#include <spdlog/sinks/stdout_color_sinks.h>
#include <spdlog/spdlog.h>

#include <chrono>
#include <cstdio>
#include <exception>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "base/utf8.h"
#include "cli/commands.h"
#include "cli/serve_options.h"
#include "cli/serve_progress.h"
#include "cli/signals.h"
#include "engine/engine.h"
#include "relay/types.h"
#include "server/auth.h"
#include "server/errors.h"
#include "server/json.h"
#include "server/json_log.h"
#include "server/openai_request.h"
#include "server/server.h"

namespace relay::cli {

namespace {

using Clock = std::chrono::steady_clock;

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

struct PromptFile {
  std::string path;
  engine::ChatRequest chat;
};

int64_t pin_prompts(server::PinnedChats& chats, const std::vector<PromptFile>& files,
                    ServeProgress& progress) {
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

void set_up_logging(const std::string& level, bool json) {
  // Standard output is for the line that says the server is ready.
  spdlog::set_default_logger(spdlog::stderr_color_mt("relay"));
  if (json) {
    spdlog::set_formatter(server::make_json_formatter());
  } else {
    spdlog::set_pattern("%Y-%m-%d %H:%M:%S.%e %^%l%$ %v");
  }
  spdlog::set_level(spdlog::level::from_str(level));
}

void serve(ServeOptions options) {
  options.server.json_logs = options.log_format == "json";
  set_up_logging(options.log_level, options.server.json_logs);
  Signals* signals = new Signals;  // its thread lives as long as the program

  // What can be wrong with the command line is said before the long work begins.
  prepare_engine_options(options);
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
  if (options.server.tls_certificate_file.empty() != options.server.tls_key_file.empty()) {
    throw Error("TLS needs both, --ssl-certfile and --ssl-keyfile");
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

  options.engine.notice = [](const std::string& text) { spdlog::warn("{}", text); };
  ServeProgress progress(http.service());
  const std::shared_ptr<engine::Engine> engine = engine::Engine::load(
      options.engine, [&](double fraction, const std::string& what) { progress(fraction, what); });
  const engine::ModelInfo& info = engine->info();
  spdlog::info("{} ({}), context {} tokens, KV cache {} tokens", info.name, info.description,
               info.context_length, info.kv_cells);
  for (const engine::Adapter& adapter : info.adapters) {
    spdlog::info("LoRA adapter {} from {}", adapter.name, adapter.path);
  }
  if (info.kv_prefix > 0) {
    spdlog::info("KV prefix of {} positions before every request", info.kv_prefix);
  }
  spdlog::info("{}", info.backend);
  if (!options.engine.prompt_cache_dir.empty()) {
    const engine::EngineStats stats = engine->stats();
    spdlog::info("restored {} tokens of prompts from {} in {:.2f} s", stats.restored_tokens,
                 options.engine.prompt_cache_dir, stats.seconds_restoring);
  }
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
  add_serve_options(*serve_app, *options);
  serve_app->callback([options] {
    try {
      serve(*options);
    } catch (const std::exception& error) {
      if (options->log_format != "json") throw;
      spdlog::critical("{}", error.what());  // what reads JSON can read nothing else
      throw CLI::RuntimeError(1);
    }
  });
}

}  // namespace relay::cli
