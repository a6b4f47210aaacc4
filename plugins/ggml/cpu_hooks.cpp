#include "cpu_hooks.h"

#include <ggml-backend-impl.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "graph_runner.h"
#include "never_destroyed.h"

namespace relay::ggml {
namespace {

using SetReference = void (*)(ggml_backend_t, bool);

// A living backend and the functions that it had before.
struct Hooked {
  GraphRunner runner;
  GraphRunner::Compute compute;
  void (*free)(ggml_backend_t);
};

// Never destroyed: hosts free backends as late as in destructors of static objects.
struct Hooks {
  std::mutex mutex;  // guards `backends`
  std::unordered_map<ggml_backend_t, std::unique_ptr<Hooked>> backends;
  std::vector<std::unique_ptr<Hooked>> left;  // when the module went
  bool installed = false;
  ggml_backend_dev_t cpu = nullptr;
  ggml_backend_reg_t cpu_registry = nullptr;
  ggml_backend_device_i device{};  // the CPU device's own functions
  ggml_backend_reg_i registry{};   // and its registry's
};

Hooks& hooks() {
  static NeverDestroyed<Hooks> instance;
  return instance.get();
}

// A function of the CPU registry, as it was before.
template <typename Function>
Function own_function(const char* name) {
  return reinterpret_cast<Function>(hooks().registry.get_proc_address(hooks().cpu_registry, name));
}

Hooked* find(ggml_backend_t backend) {
  const std::lock_guard lock(hooks().mutex);
  const auto entry = hooks().backends.find(backend);
  return entry == hooks().backends.end() ? nullptr : entry->second.get();
}

ggml_status compute(ggml_backend_t backend, ggml_cgraph* graph) {
  Hooked& hooked = *find(backend);
  return hooked.runner.run(backend, graph, hooked.compute);
}

void free_backend(ggml_backend_t backend) {
  std::unique_ptr<Hooked> hooked;
  {
    const std::lock_guard lock(hooks().mutex);
    const auto entry = hooks().backends.find(backend);
    hooked = std::move(entry->second);
    hooks().backends.erase(entry);
  }
  hooked->free(backend);
}

void hook(ggml_backend_t backend) {
  auto hooked = std::make_unique<Hooked>();
  hooked->compute = backend->iface.graph_compute;
  hooked->free = backend->iface.free;
  {
    const std::lock_guard lock(hooks().mutex);
    hooks().backends.emplace(backend, std::move(hooked));
  }
  backend->iface.graph_compute = compute;
  backend->iface.free = free_backend;
}

ggml_backend_t create_hooked(const char* params) {
  ggml_backend_t backend = hooks().device.init_backend(hooks().cpu, params);
  if (backend == nullptr) return nullptr;
  try {
    hook(backend);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "relay: a CPU backend works without Relay: %s\n", error.what());
  }
  return backend;
}

ggml_backend_t init_cpu_backend(ggml_backend_dev_t /*device*/, const char* params) {
  return create_hooked(params);
}

void set_threads(ggml_backend_t backend, int threads) {
  if (Hooked* hooked = find(backend)) hooked->runner.set_threads(threads);
  own_function<ggml_backend_set_n_threads_t>("ggml_backend_set_n_threads")(backend, threads);
}

void set_reference(ggml_backend_t backend, bool on) {
  if (Hooked* hooked = find(backend)) hooked->runner.set_reference(on);
  own_function<SetReference>("ggml_backend_cpu_set_use_ref")(backend, on);
}

void* cpu_get_proc_address(ggml_backend_reg_t /*registry*/, const char* name) {
  return get_proc_address(name);
}

}  // namespace

void* get_proc_address(const char* name) {
  void* const own = own_function<void*>(name);
  if (own == nullptr) return nullptr;
  if (std::strcmp(name, "ggml_backend_set_n_threads") == 0) {
    return reinterpret_cast<void*>(&set_threads);
  }
  if (std::strcmp(name, "ggml_backend_cpu_set_use_ref") == 0) {
    return reinterpret_cast<void*>(&set_reference);
  }
  return own;
}

void install_hooks(ggml_backend_dev_t cpu) {
  Hooks& h = hooks();
  h.installed = true;
  h.cpu = cpu;
  h.cpu_registry = cpu->reg;
  h.device = cpu->iface;
  h.registry = h.cpu_registry->iface;
  cpu->iface.init_backend = init_cpu_backend;
  h.cpu_registry->iface.get_proc_address = cpu_get_proc_address;
}

void remove_hooks() {
  Hooks& h = hooks();
  if (!h.installed) return;
  h.installed = false;
  h.cpu->iface.init_backend = h.device.init_backend;
  h.cpu_registry->iface.get_proc_address = h.registry.get_proc_address;
  const std::lock_guard lock(h.mutex);
  for (auto& [backend, hooked] : h.backends) {
    backend->iface.graph_compute = hooked->compute;
    backend->iface.free = hooked->free;
    // Kept: where a signal handler ends the program, graphs are still running in them.
    h.left.push_back(std::move(hooked));
  }
  h.backends = decltype(h.backends)();  // clear() would keep memory
}

ggml_backend_t create_backend(ggml_backend_dev_t device, const char* (*get_name)(ggml_backend_t),
                              const char* params) {
  ggml_backend_t backend = create_hooked(params);
  if (backend == nullptr) return nullptr;
  backend->device = device;
  backend->iface.get_name = get_name;
  return backend;
}

}  // namespace relay::ggml
