#include "engine/backend.h"

#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <vector>

#include "engine/engine.h"
#include "ggml-backend.h"
#include "llama.h"
#include "log.h"

namespace relay::engine {

namespace fs = std::filesystem;

namespace {

constexpr const char* kModuleName = "libggml-relay.so";
constexpr const char* kRegistryName = "RELAY";

std::mutex log_mutex;
std::string log_errors;                          // guarded by log_mutex
ggml_log_level log_level = GGML_LOG_LEVEL_NONE;  // of the line being continued; guarded likewise

bool verbose() {
  const char* value = std::getenv("RELAY_VERBOSE");
  return value != nullptr && *value != '\0' && std::string(value) != "0";
}

void on_llama_log(ggml_log_level level, const char* text, void* /*data*/) {
  static const bool all = verbose();
  const std::lock_guard lock(log_mutex);
  if (level != GGML_LOG_LEVEL_CONT) log_level = level;
  if (log_level == GGML_LOG_LEVEL_WARN || log_level == GGML_LOG_LEVEL_ERROR) {
    log_errors += text;
    if (log_errors.size() > 8192) log_errors.erase(0, log_errors.size() - 4096);
  }
  if (all || log_level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
}

fs::path program_folder() {
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  return error ? fs::current_path() : program.parent_path();
}

std::vector<fs::path> module_folders() {
  const fs::path program = program_folder();
  std::vector<fs::path> folders = {program, program.parent_path() / "lib",
                                   program.parent_path() / "bin", program.parent_path() / "lib64"};
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(&llama_backend_init), &info) != 0 && info.dli_fname) {
    const fs::path library = fs::path(info.dli_fname).parent_path();
    folders.push_back(library);
    folders.push_back(library.parent_path() / "lib");
  }
  return folders;
}

std::string find_module(const std::string& path) {
  if (!path.empty()) {
    if (!fs::exists(path)) {
      throw EngineError(ErrorKind::kBackend, "The Relay module " + path + " does not exist.");
    }
    return fs::absolute(path).string();
  }
  std::string looked;
  for (const fs::path& folder : module_folders()) {
    const fs::path candidate = folder / kModuleName;
    if (fs::exists(candidate)) return candidate.string();
    looked += "\n  " + candidate.lexically_normal().string();
  }
  throw EngineError(ErrorKind::kBackend,
                    std::string(kModuleName) +
                        " was not found; name it with --relay-module, or turn Relay off. Looked "
                        "for:" +
                        looked);
}

ggml_backend_dev_t cpu_device() { return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); }

void load_cpu() {
  if (ggml_backend_reg_count() == 0) ggml_backend_load_all();  // reads GGML_BACKEND_PATH too
  for (const fs::path& folder : module_folders()) {
    if (cpu_device() != nullptr) return;
    ggml_backend_load_all_from_path(folder.c_str());
  }
  if (cpu_device() == nullptr) {
    throw EngineError(ErrorKind::kBackend,
                      "ggml's CPU module (libggml-cpu*.so) was not found beside the program or in "
                      "../bin and ../lib.\n" +
                          take_llama_errors());
  }
}

std::string describe(bool relay_active, const std::string& where) {
  std::string line;
  for (size_t i = 0; i < ggml_backend_dev_count(); ++i) {
    ggml_backend_dev_t device = ggml_backend_dev_get(i);
    if (!line.empty()) line += "; ";
    line +=
        std::string(ggml_backend_dev_name(device)) + ": " + ggml_backend_dev_description(device);
  }
  line += relay_active ? "; attention by Relay (" + where + ")" : "; Relay is off";
  return line;
}

}  // namespace

void capture_llama_log() {
  llama_log_set(on_llama_log, nullptr);
  common_log_set_verbosity_thold(verbose() ? LOG_LEVEL_INFO : LOG_LEVEL_ERROR);
}

std::string take_llama_errors() {
  const std::lock_guard lock(log_mutex);
  return std::exchange(log_errors, {});
}

BackendReport load_backends(bool relay, const std::string& path) {
  static std::mutex mutex;
  static std::string loaded_from;  // guarded by mutex
  const std::lock_guard lock(mutex);
  capture_llama_log();
  take_llama_errors();
  load_cpu();
  ggml_backend_reg_t registered = ggml_backend_reg_by_name(kRegistryName);
  if (!relay) {
    if (registered != nullptr) ggml_backend_unload(registered);
  } else if (registered == nullptr) {
    loaded_from = find_module(path);
    if (ggml_backend_load(loaded_from.c_str()) == nullptr ||
        ggml_backend_reg_by_name(kRegistryName) == nullptr) {
      throw EngineError(ErrorKind::kBackend, "The Relay module " + loaded_from +
                                                 " did not load; turn Relay off to run without "
                                                 "it.\n" +
                                                 take_llama_errors());
    }
  } else if (loaded_from.empty()) {
    const char* from_environment = std::getenv("GGML_BACKEND_PATH");
    loaded_from = from_environment != nullptr ? from_environment : kModuleName;
  }
  // RELAY_DISABLE leaves a registry without a device.
  if (relay && ggml_backend_reg_dev_count(ggml_backend_reg_by_name(kRegistryName)) == 0) {
    throw EngineError(ErrorKind::kBackend, "The Relay module " + loaded_from +
                                               " is disabled by RELAY_DISABLE; unset it, or run "
                                               "without Relay (--relay off).");
  }
  llama_backend_init();
  return {relay, describe(relay, loaded_from)};
}

}  // namespace relay::engine
