// What `relay serve` can be told, on the command line or in the environment.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "server/options.h"

namespace relay::cli {

struct ServeOptions {
  engine::EngineOptions engine;
  server::ServerOptions server;
  std::vector<std::string> lora_modules;  ///< [NAME=]FILE
  std::vector<std::string> pin_prompts;
  std::string api_key_file;
  std::string admin_key_file;
  std::string relay = "on";
  std::string prefix_caching = "on";
  std::string log_level = "info";
  std::string log_format = "text";
  double drain_seconds = 60;
  double pin_refresh_seconds = 60;
};

/// The model's and the engine's alone. `options` outlives `app`, as below.
void add_engine_options(CLI::App& app, ServeOptions& options);
/// Says what is wrong with them (Error) before the long work begins, and settles the rest.
void prepare_engine_options(ServeOptions& options);
/// Throws Error unless the file can be read.
void check_readable(const std::string& path, const char* what);

/// Registers them all.
void add_serve_options(CLI::App& app, ServeOptions& options);

}  // namespace relay::cli
