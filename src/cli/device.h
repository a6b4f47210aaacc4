// --device of several subcommands.
#pragma once

#include <CLI/CLI.hpp>
#include <initializer_list>
#include <string>

#include "measure/problem.h"

namespace relay::cli {

inline CLI::Option* add_device(CLI::App& app, std::string& name, const std::string& about) {
  return app.add_option("--device", name, about)
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->option_text("NAME");
}

inline measure::Device device_of(const std::string& name) {
  return name == "cuda" ? measure::Device::kCuda : measure::Device::kCpu;
}

/// Refuses options that mean nothing on a GPU.
inline void refuse_on_gpu(const CLI::App& app, std::initializer_list<const char*> options) {
  for (const char* option : options) {
    if (app.count(option) > 0) throw CLI::ValidationError(option, "means nothing on a GPU");
  }
}

}  // namespace relay::cli
