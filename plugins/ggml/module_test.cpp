// The built module, as a host sees it: one program, one module, in the order of a host's life.
#include <dlfcn.h>
#include <ggml-backend-impl.h>
#include <ggml-backend.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <string>

namespace {

using Init = ggml_backend_reg_t (*)();

class ModuleTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { ggml_backend_load(GGML_CPU_MODULE); }

  ggml_backend_dev_t cpu() { return ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU); }

  void TearDown() override {
    if (handle_ != nullptr) dlclose(handle_);
  }

  // What ggml does, but with the module's message.
  ggml_backend_reg_t init(std::string& message) {
    handle_ = dlopen(GGML_RELAY_MODULE, RTLD_NOW | RTLD_LOCAL);
    EXPECT_NE(handle_, nullptr) << dlerror();
    const Init function = reinterpret_cast<Init>(dlsym(handle_, "ggml_backend_init"));
    testing::internal::CaptureStderr();
    ggml_backend_reg_t registry = function();
    message = testing::internal::GetCapturedStderr();
    return registry;
  }

 private:
  void* handle_ = nullptr;
};

TEST_F(ModuleTest, RefusesAnotherApiVersion) {
  ggml_backend_reg_t registry = ggml_backend_dev_backend_reg(cpu());
  const auto before = cpu()->iface.init_backend;
  registry->api_version = GGML_BACKEND_API_VERSION + 1;
  std::string message;
  EXPECT_EQ(init(message), nullptr);
  registry->api_version = GGML_BACKEND_API_VERSION;
  EXPECT_NE(message.find("API version " + std::to_string(GGML_BACKEND_API_VERSION + 1)),
            std::string::npos)
      << message;
  EXPECT_EQ(cpu()->iface.init_backend, before);
}

TEST_F(ModuleTest, RefusesAnIsaThatCannotRun) {
  const char* isa = std::getenv("RELAY_ISA");
  const std::string kept = isa != nullptr ? isa : "";
  setenv("RELAY_ISA", "abacus", 1);
  std::string message;
  EXPECT_EQ(init(message), nullptr);
  EXPECT_NE(message.find("abacus"), std::string::npos) << message;
  kept.empty() ? unsetenv("RELAY_ISA") : setenv("RELAY_ISA", kept.c_str(), 1);
}

TEST_F(ModuleTest, CanBeDisabled) {
  setenv("RELAY_DISABLE", "1", 1);
  const auto before = cpu()->iface.init_backend;
  std::string message;
  ggml_backend_reg_t registry = init(message);
  ASSERT_NE(registry, nullptr);
  EXPECT_EQ(ggml_backend_reg_dev_count(registry), 0u);
  EXPECT_NE(message.find("RELAY_DISABLE"), std::string::npos);
  EXPECT_EQ(cpu()->iface.init_backend, before);
  unsetenv("RELAY_DISABLE");
}

TEST_F(ModuleTest, LoadsAndGoes) {
  const auto before = cpu()->iface;
  const auto functions_before = ggml_backend_dev_backend_reg(cpu())->iface;
  ggml_backend_reg_t registry = ggml_backend_load(GGML_RELAY_MODULE);
  ASSERT_NE(registry, nullptr);
  EXPECT_NE(cpu()->iface.init_backend, before.init_backend);
  EXPECT_STREQ(ggml_backend_dev_name(cpu()), "CPU");  // the host's CPU device is still the first

  ggml_backend_dev_t device = ggml_backend_dev_by_name("RELAY");
  ASSERT_NE(device, nullptr);
  ggml_backend_dev_props props;
  ggml_backend_dev_get_props(device, &props);
  EXPECT_EQ(props.type, GGML_BACKEND_DEVICE_TYPE_CPU);
  EXPECT_EQ(ggml_backend_dev_buffer_type(device), ggml_backend_dev_buffer_type(cpu()));
  ggml_backend_t backend = ggml_backend_dev_init(device, nullptr);
  ASSERT_NE(backend, nullptr);
  EXPECT_STREQ(ggml_backend_name(backend), "RELAY");
  EXPECT_EQ(ggml_backend_get_device(backend), device);
  ggml_backend_free(backend);

  const auto features = reinterpret_cast<ggml_backend_get_features_t>(
      ggml_backend_reg_get_proc_address(registry, "ggml_backend_get_features"));
  ASSERT_NE(features, nullptr);
  EXPECT_STREQ(features(registry)[0].name, "ISA");

  // Hosts load all their backends more than once.
  const auto hooked = cpu()->iface.init_backend;
  EXPECT_EQ(ggml_backend_load(GGML_RELAY_MODULE), registry);
  EXPECT_EQ(cpu()->iface.init_backend, hooked);

  // A backend that outlives the module.
  backend = ggml_backend_dev_init(cpu(), nullptr);
  ASSERT_NE(backend, nullptr);
  ggml_backend_unload(registry);
  EXPECT_EQ(ggml_backend_dev_by_name("RELAY"), nullptr);
  EXPECT_EQ(cpu()->iface.init_backend, before.init_backend);
  EXPECT_EQ(ggml_backend_dev_backend_reg(cpu())->iface.get_proc_address,
            functions_before.get_proc_address);
  ggml_backend_free(backend);
}

}  // namespace
