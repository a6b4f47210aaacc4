// The module libggml-relay.so: what ggml calls when it loads it, and what happens when it goes.
#include <ggml-backend.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>

#include "cpu_hooks.h"
#include "host.h"
#include "relay/attention.h"
#include "relay/forest.h"
#include "relay_device.h"
#include "statistics.h"

namespace relay::ggml {
namespace {

bool disabled() {
  const char* value = std::getenv("RELAY_DISABLE");
  return value != nullptr && *value != '\0' && std::strcmp(value, "0") != 0;
}

bool active = false;

ggml_backend_reg_t initialize() {
  // Hosts load all their backends more than once.
  if (active) return relay_registry(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU));
  if (disabled()) {
    std::fprintf(stderr, "relay: not active: RELAY_DISABLE is set\n");
    return relay_registry(nullptr);
  }
  const ggml_backend_dev_t cpu = find_cpu_device();
  if (cpu == nullptr) return nullptr;
  const std::string isa = current_isa();       // throws Error for a wrong RELAY_ISA,
  const Sharing sharing = sharing_from_env();  // or RELAY_SHARING
  install_hooks(cpu);
  active = true;
  if (Statistics::instance().verbose()) {
    std::fprintf(stderr, "relay: " RELAY_VERSION " serves the attention of %s with %s kernels%s\n",
                 ggml_backend_dev_name(cpu), isa.c_str(),
                 sharing == Sharing::kOff ? ", sharing off" : "");
  }
  return relay_registry(cpu);
}

// When the module is unloaded, and when the program ends.
__attribute__((destructor)) void leave() {
  if (!active) return;
  active = false;
  remove_hooks();
  Statistics::instance().report();
}

}  // namespace
}  // namespace relay::ggml

extern "C" __attribute__((visibility("default"))) ggml_backend_reg_t ggml_backend_init() {
  try {
    return relay::ggml::initialize();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "relay: not active: %s\n", error.what());
    return nullptr;
  }
}
