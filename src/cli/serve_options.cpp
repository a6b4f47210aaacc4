#include "cli/serve_options.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "relay/types.h"
#include "server/errors.h"
#include "server/json.h"

namespace relay::cli {

namespace {

bool is_file(const std::string& path) {
  std::error_code error;
  return std::filesystem::is_regular_file(path, error);
}

/// [NAME=]FILE,... A file that is there may have commas in its path.
std::vector<std::string> split_files(const std::vector<std::string>& texts) {
  std::vector<std::string> files;
  for (const std::string& text : texts) {
    const bool is_one = is_file(text) || is_file(text.substr(text.find('=') + 1));
    if (is_one || text.find(',') == std::string::npos) {
      files.push_back(text);
      continue;
    }
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) files.push_back(part);
  }
  return files;
}

/// [NAME=]FILE. Where both have a '=', a name has no '/'.
engine::Adapter parse_adapter(const std::string& text) {
  size_t equals = text.find('=');
  if (is_file(text) || text.find('/') < equals) equals = std::string::npos;
  engine::Adapter adapter;
  adapter.path = equals == std::string::npos ? text : text.substr(equals + 1);
  adapter.name = equals == std::string::npos ? std::filesystem::path(text).stem().string()
                                             : text.substr(0, equals);
  if (adapter.name.empty()) throw Error("--lora " + text + ": the name is missing");
  check_readable(adapter.path, "the LoRA adapter");
  return adapter;
}

void prepare_adapters(ServeOptions& o) {
  std::vector<std::string> names = o.server.model_names;
  if (names.empty()) {
    names.push_back(std::filesystem::path(o.engine.model_path).stem().string());
  }
  for (const std::string& text : split_files(o.lora_modules)) {
    engine::Adapter adapter = parse_adapter(text);
    if (std::find(names.begin(), names.end(), adapter.name) != names.end()) {
      throw Error("--lora " + text + ": the name " + adapter.name +
                  " is taken; give another one, as in NAME=" + adapter.path);
    }
    for (const engine::Adapter& other : o.engine.adapters) {
      if (!std::filesystem::equivalent(other.path, adapter.path)) continue;
      throw Error("--lora " + text + ": this file is served as " + other.name +
                  " already, and what is cached is of one name");
    }
    names.push_back(adapter.name);
    o.engine.adapters.push_back(std::move(adapter));
  }
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
  app.add_option("--lora,--lora-modules", o.lora_modules,
                 "LoRA adapter(s), GGUF files that convert_lora_to_gguf.py makes, each served as a "
                 "model of its own: by this name, or the file's. The base model answers without "
                 "them. Nothing of the KV cache is shared between adapters")
      ->envname("RELAY_LORA")
      ->option_text("[NAME=]FILE,...")
      ->group(kGroup);
  app.add_option("--kv-prefix", o.engine.kv_prefix,
                 "Learned keys and values that stand before every prompt (prefix tuning), made by "
                 "scripts/kv_prefix_from_peft.py; held once, shared by all requests")
      ->envname("RELAY_KV_PREFIX")
      ->option_text("FILE")
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
}

void add_prompt_options(CLI::App& app, ServeOptions& o) {
  constexpr const char* kGroup = "Model";
  app.add_option("--pin-prompt", o.pin_prompts,
                 "Prompt to compute at start-up and hold: a text file is a system prompt, a .json "
                 "file an array of messages (or an object with messages and tools). May be given "
                 "several times")
      ->envname("RELAY_PIN_PROMPT")
      ->allow_extra_args(false)
      ->option_text("FILE,...")
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

void add_computing_options(CLI::App& app, ServeOptions& o) {
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
      ->check(CLI::Range(1, 256))
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
  app.add_option("--decode-stretch", e.decode_stretch,
                 "While requests decode, a step takes as much of long prompts as makes it so many "
                 "times as long as without them (short ones may take half of the time beyond "
                 "that); 0: prompts go first, in pieces of a second")
      ->envname("RELAY_DECODE_STRETCH")
      ->check(CLI::Range(0.0, 1000.0))
      ->capture_default_str()
      ->option_text("FACTOR")
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
  app.add_option("--prompt-cache-dir", e.prompt_cache_dir,
                 "Folder in which pinned prompts, and prefixes that many requests share, outlive "
                 "this process; at the next start they need not be computed. It holds the prompts "
                 "in readable form. Not for models with sliding windows, nor with --kv-prefix")
      ->envname("RELAY_PROMPT_CACHE_DIR")
      ->option_text("DIR")
      ->group(kGroup);
  app.add_option("--prompt-cache-size", e.prompt_cache_bytes,
                 "Most bytes of all files there, e.g. 8GiB; those used longest ago go first")
      ->envname("RELAY_PROMPT_CACHE_SIZE")
      ->transform(CLI::AsSizeValue(/*kb_is_1000=*/false))
      ->default_str("8GiB")
      ->option_text("SIZE")
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
  app.add_option("--ssl-certfile,--ssl-cert-file", s.tls_certificate_file,
                 "Certificate in PEM, its chain behind it; with --ssl-keyfile the server speaks "
                 "HTTPS (TLS 1.2 and newer) and nothing else")
      ->envname("RELAY_SSL_CERTFILE")
      ->option_text("FILE")
      ->group(kGroup);
  app.add_option("--ssl-keyfile,--ssl-key-file", s.tls_key_file,
                 "The certificate's key in PEM, not encrypted")
      ->envname("RELAY_SSL_KEYFILE")
      ->option_text("FILE")
      ->group(kGroup);
  app.add_option("--cors-origin", s.cors_origins,
                 "Origin(s) whose pages may use this server from a browser, e.g. "
                 "https://chat.example.com; * for all. Default: none but its own")
      ->envname("RELAY_CORS_ORIGIN")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->option_text("ORIGIN,...")
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
  app.add_option("--log-format", o.log_format,
                 "text, or json: an object a line, that of a request with its id")
      ->envname("RELAY_LOG_FORMAT")
      ->check(CLI::IsMember({"text", "json"}))
      ->capture_default_str()
      ->option_text("FORMAT")
      ->group(kGroup);
}

}  // namespace

void add_engine_options(CLI::App& app, ServeOptions& options) {
  add_model_options(app, options);
  add_computing_options(app, options);
}

void check_readable(const std::string& path, const char* what) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    throw Error(std::string(what) + " '" + path + "' is a folder");
  }
  if (!std::ifstream(path)) throw Error(std::string(what) + " '" + path + "' cannot be read");
}

void prepare_engine_options(ServeOptions& options) {
  check_readable(options.engine.model_path, "the model file");
  if (!options.engine.chat_template_file.empty()) {
    check_readable(options.engine.chat_template_file, "the chat template");
  }
  check_template_kwargs(options.engine.template_kwargs_json);
  prepare_adapters(options);
  options.pin_prompts = split_files(options.pin_prompts);
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
}

void add_serve_options(CLI::App& app, ServeOptions& options) {
  add_engine_options(app, options);
  add_prompt_options(app, options);
  add_http_options(app, options);
}

}  // namespace relay::cli
