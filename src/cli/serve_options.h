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
  std::vector<std::string> pin_prompts;
  std::string api_key_file;
  std::string admin_key_file;
  std::string relay = "on";
  std::string prefix_caching = "on";
  std::string log_level = "info";
  double drain_seconds = 60;
  double pin_refresh_seconds = 60;
};

/// Registers them all; `options` outlives `app`.
void add_serve_options(CLI::App& app, ServeOptions& options);

}  // namespace relay::cli
