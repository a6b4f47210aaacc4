// Small models with random weights for tests, written once per program.
#pragma once

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <map>
#include <string>

#include "synth/shapes.h"
#include "synth/write_model.h"

namespace relay::engine {

/// Path of a model of this shape ("tiny", "tiny-gemma2", …), its weights of this type.
/// RELAY_TEST_MODEL replaces "tiny".
inline std::string test_model(const std::string& shape, const std::string& type = "f16") {
  struct Folder {
    std::filesystem::path path = std::filesystem::temp_directory_path() /
                                 ("relay-engine-test-" + std::to_string(::getpid()));
    Folder() { std::filesystem::create_directories(path); }
    ~Folder() {
      std::error_code ignored;
      std::filesystem::remove_all(path, ignored);
    }
  };
  static Folder folder;
  static std::map<std::string, std::string> written;
  if (const char* given = std::getenv("RELAY_TEST_MODEL"); given != nullptr && shape == "tiny") {
    return given;
  }
  const std::string name = shape + "-" + type;
  std::string& path = written[name];
  if (path.empty()) {
    synth::Request request;
    request.shape = synth::find_shape(shape);
    request.output = folder.path / (name + ".gguf");
    request.type = type;
    synth::write_model(request);
    path = request.output.string();
  }
  return path;
}

}  // namespace relay::engine
