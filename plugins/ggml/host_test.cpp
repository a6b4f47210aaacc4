#include "host.h"

#include <gtest/gtest.h>

namespace relay::ggml {
namespace {

TEST(Host, ReadsTheApiVersionOfAnyRegistry) {
  struct OfTheFuture {
    int api_version = 17;
    void* unknown[30] = {};
  } registry;
  EXPECT_EQ(api_version_of(reinterpret_cast<ggml_backend_reg_t>(&registry)), 17);
}

TEST(Host, AnotherApiVersionIsAProblemThatSaysWhatToDo) {
  EXPECT_EQ(api_version_problem(own_api_version()), "");
  const std::string text = api_version_problem(own_api_version() + 1);
  EXPECT_NE(text.find("version " + std::to_string(own_api_version())), std::string::npos);
  EXPECT_NE(text.find("version " + std::to_string(own_api_version() + 1)), std::string::npos);
  EXPECT_NE(text.find("RELAY_LLAMA_CPP_DIR"), std::string::npos);
}

TEST(Host, NoCpuDevice) {  // this test program has loaded none
  testing::internal::CaptureStderr();
  EXPECT_EQ(find_cpu_device(), nullptr);
  EXPECT_NE(testing::internal::GetCapturedStderr().find("no CPU backend"), std::string::npos);
}

}  // namespace
}  // namespace relay::ggml
