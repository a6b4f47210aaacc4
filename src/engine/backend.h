// ggml's backend modules: the CPU's, and Relay's own.
#pragma once

#include <string>

namespace relay::engine {

struct BackendReport {
  bool relay_active = false;
  std::string line;  ///< for people: the devices, and whether Relay serves the attention
};

/// Loads what a model needs, once per process; later calls only switch Relay on or off. With
/// `relay`, the module at `path` (empty: looked for beside the program, in ../lib, and beside
/// libllama) must load. Throws EngineError(kBackend) if it does not, with ggml's own words. No
/// context may exist when the answer to `relay` changes.
BackendReport load_backends(bool relay, const std::string& path);

/// Sends llama.cpp's log to ours: errors to stderr, everything if RELAY_VERBOSE is set (not 0).
void capture_llama_log();
/// The warnings and errors since the last call, one per line; for messages about a failed load.
std::string take_llama_errors();

}  // namespace relay::engine
