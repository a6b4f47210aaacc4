// Writes a GGUF model with random weights in a named shape.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "synth/shapes.h"

namespace relay::synth {

/// Names of the weight types: f32, f16, bf16, q8_0, q4_0, ... (all of ggml's that need no
/// importance matrix).
std::vector<std::string> weight_types();

struct Request {
  Shape shape;
  std::filesystem::path output;
  std::string type = "f16";  ///< one of weight_types()
  uint64_t seed = 1;
  std::string vocabulary;     ///< name or file; empty: the shape's own
  std::string chat_template;  ///< Jinja file; empty: the vocabulary's own
  bool force = false;         ///< replace an existing file
  int threads = 0;            ///< 0: as many as the CPU has; the file does not depend on it

  /// Called from one thread at a time with the bytes written so far and in all.
  std::function<void(uint64_t done, uint64_t total)> progress;
  /// Set to true from anywhere (a signal handler too) to stop; write_model then throws Cancelled.
  const std::atomic<bool>* cancel = nullptr;
  /// Bytes that may still be written in a folder; tests replace it.
  std::function<uint64_t(const std::filesystem::path& folder)> free_space;
};

struct Result {
  uint64_t bytes = 0;
  uint64_t parameters = 0;
  int64_t tensors = 0;
  int64_t vocabulary_size = 0;
  std::string vocabulary_source;
  std::string template_source;
};

class Cancelled : public std::runtime_error {
 public:
  Cancelled() : std::runtime_error("interrupted; nothing was left behind") {}
};

/// Size of the file that write_model would write, with all checks but those of the output.
Result measure_model(const Request& request);

/// Writes the model under a temporary name in the output's folder and renames it when complete, so
/// that the output either is whole or is not there. Throws std::invalid_argument for a request that
/// cannot be met and std::runtime_error for files that cannot be read or written; the temporary
/// file is gone then.
Result write_model(const Request& request);

}  // namespace relay::synth
