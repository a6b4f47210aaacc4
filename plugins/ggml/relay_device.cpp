#include "relay_device.h"

#include <ggml-backend-impl.h>

#include <array>
#include <string>
#include <string_view>

#include "cpu_hooks.h"
#include "relay/attention.h"

namespace relay::ggml {
namespace {

ggml_backend_dev_t cpu_device = nullptr;

// --- Device: every question is put to the CPU device ---------------------------------------------

const char* device_name(ggml_backend_dev_t /*dev*/) { return "RELAY"; }

const char* device_description(ggml_backend_dev_t /*dev*/) {
  static const std::string text =
      std::string(ggml_backend_dev_description(cpu_device)) + ", attention by Relay " RELAY_VERSION;
  return text.c_str();
}

void device_memory(ggml_backend_dev_t /*dev*/, size_t* free, size_t* total) {
  ggml_backend_dev_memory(cpu_device, free, total);
}

enum ggml_backend_dev_type device_type(ggml_backend_dev_t /*dev*/) {
  return GGML_BACKEND_DEVICE_TYPE_CPU;
}

void device_props(ggml_backend_dev_t dev, ggml_backend_dev_props* props) {
  ggml_backend_dev_get_props(cpu_device, props);
  props->name = device_name(dev);
  props->description = device_description(dev);
}

const char* backend_name(ggml_backend_t /*backend*/) { return "RELAY"; }

ggml_backend_t device_init_backend(ggml_backend_dev_t dev, const char* params) {
  return create_backend(dev, backend_name, params);
}

ggml_backend_buffer_type_t device_buffer_type(ggml_backend_dev_t /*dev*/) {
  return ggml_backend_dev_buffer_type(cpu_device);
}

ggml_backend_buffer_t device_buffer_from_host_ptr(ggml_backend_dev_t /*dev*/, void* ptr,
                                                  size_t size, size_t max_tensor_size) {
  return ggml_backend_dev_buffer_from_host_ptr(cpu_device, ptr, size, max_tensor_size);
}

bool device_supports_op(ggml_backend_dev_t /*dev*/, const ggml_tensor* op) {
  return ggml_backend_dev_supports_op(cpu_device, op);
}

bool device_supports_buft(ggml_backend_dev_t /*dev*/, ggml_backend_buffer_type_t buft) {
  return ggml_backend_dev_supports_buft(cpu_device, buft);
}

// --- Registry ------------------------------------------------------------------------------------

const char* registry_name(ggml_backend_reg_t /*reg*/) { return "RELAY"; }

size_t registry_device_count(ggml_backend_reg_t /*reg*/) { return cpu_device != nullptr ? 1 : 0; }

ggml_backend_dev_t registry_device(ggml_backend_reg_t reg, size_t /*index*/) {
  static ggml_backend_device device = {
      .iface = {.get_name = device_name,
                .get_description = device_description,
                .get_memory = device_memory,
                .get_type = device_type,
                .get_props = device_props,
                .init_backend = device_init_backend,
                .get_buffer_type = device_buffer_type,
                .get_host_buffer_type = nullptr,
                .buffer_from_host_ptr = device_buffer_from_host_ptr,
                .supports_op = device_supports_op,
                .supports_buft = device_supports_buft,
                .offload_op = nullptr,
                .event_new = nullptr,
                .event_free = nullptr,
                .event_synchronize = nullptr},
      .reg = reg,
      .context = nullptr};
  return &device;
}

// llama.cpp prints these in its line of system information.
ggml_backend_feature* features(ggml_backend_reg_t /*reg*/) {
  static const std::string isa = current_isa();
  static std::array<ggml_backend_feature, 2> list = {{{"ISA", isa.c_str()}, {nullptr, nullptr}}};
  return list.data();
}

void* registry_get_proc_address(ggml_backend_reg_t /*reg*/, const char* name) {
  if (cpu_device == nullptr) return nullptr;
  if (std::string_view(name) == "ggml_backend_get_features") {
    return reinterpret_cast<void*>(&features);
  }
  return get_proc_address(name);
}

}  // namespace

ggml_backend_reg_t relay_registry(ggml_backend_dev_t cpu) {
  cpu_device = cpu;
  static ggml_backend_reg registry = {.api_version = GGML_BACKEND_API_VERSION,
                                      .iface = {.get_name = registry_name,
                                                .get_device_count = registry_device_count,
                                                .get_device = registry_device,
                                                .get_proc_address = registry_get_proc_address},
                                      .context = nullptr};
  return &registry;
}

}  // namespace relay::ggml
