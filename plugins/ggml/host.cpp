#include "host.h"

#include <ggml-backend-impl.h>

#include <cstdio>

namespace relay::ggml {

int own_api_version() { return GGML_BACKEND_API_VERSION; }

int api_version_of(ggml_backend_reg_t registry) {
  // Read as an int, not as our ggml_backend_reg: the rest of the struct is what versions change.
  return *reinterpret_cast<const int*>(registry);
}

std::string api_version_problem(int host_version) {
  if (host_version == own_api_version()) return "";
  return "this llama.cpp has ggml backend API version " + std::to_string(host_version) +
         ", but the module was built for version " + std::to_string(own_api_version()) +
         ".\nrelay: Build Relay against its source: cmake --preset release "
         "-DRELAY_LLAMA_CPP_DIR=<that llama.cpp>";
}

ggml_backend_dev_t find_cpu_device() {
  ggml_backend_dev_t device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  if (device == nullptr) {
    std::fprintf(stderr,
                 "relay: not active: this program has registered no CPU backend with the ggml "
                 "library that the module sees.\n"
                 "relay: Load the CPU backend first (ggml_backend_load_all does); a program with "
                 "ggml linked in statically cannot use modules.\n");
    return nullptr;
  }
  const std::string problem =
      api_version_problem(api_version_of(ggml_backend_dev_backend_reg(device)));
  if (!problem.empty()) {
    std::fprintf(stderr, "relay: not active: %s\n", problem.c_str());
    return nullptr;
  }
  return device;
}

}  // namespace relay::ggml
