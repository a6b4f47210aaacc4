// The C interface of the GPU as far as no GPU is needed: what is wrong is refused with a message.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <type_traits>

#include "relay/relay_cuda.h"

extern "C" size_t relay_cuda_size_in_c(int which);

namespace {

relay_cuda_plan_options good_options() {
  relay_cuda_plan_options options = {};
  options.size = sizeof(options);
  options.q_heads = 8;
  options.kv_heads = 2;
  options.head_dim = 128;
  options.q_type = options.kv_type = RELAY_BF16;
  options.max_requests = 4;
  options.max_rows = 16;
  options.max_blocks = 10;
  options.block_size = 16;
  options.cache_blocks = 100;
  options.causal = 1;
  options.sharing = 1;
  return options;
}

/// Expects RELAY_INVALID and a message with `word` in it.
void expect_invalid(relay_status status, const std::string& word) {
  EXPECT_EQ(status, RELAY_INVALID) << word;
  EXPECT_NE(std::string(relay_cuda_last_error()).find(word), std::string::npos)
      << "'" << relay_cuda_last_error() << "' does not say '" << word << "'";
}

void expect_options_invalid(const std::function<void(relay_cuda_plan_options&)>& change,
                            const std::string& word) {
  relay_cuda_plan_options options = good_options();
  change(options);
  size_t bytes = 77;
  expect_invalid(relay_cuda_workspace_bytes(&options, &bytes), word);
  EXPECT_EQ(bytes, 77u);
  relay_cuda_plan* plan = nullptr;
  alignas(256) static char workspace[256];
  expect_invalid(relay_cuda_plan_create(&plan, &options, workspace, sizeof(workspace), nullptr),
                 word);
  EXPECT_EQ(plan, nullptr);
}

TEST(CudaCApi, LayoutIsTheSameInC) {
  EXPECT_EQ(relay_cuda_size_in_c(0), sizeof(relay_cuda_plan_options));
  EXPECT_EQ(relay_cuda_size_in_c(1), sizeof(relay_cuda_batch));
  EXPECT_EQ(relay_cuda_size_in_c(2), sizeof(relay_cuda_inputs));
  EXPECT_EQ(relay_cuda_size_in_c(3), sizeof(relay_cuda_kv_write));
  EXPECT_EQ(relay_cuda_size_in_c(4), sizeof(relay_cuda_summary));
}

TEST(CudaCApi, LayoutOfTheFirstVersion) {
  // Programs that were compiled with it are served for ever: fields are only appended.
  EXPECT_EQ(offsetof(relay_cuda_plan_options, min_shared_slots) + sizeof(int32_t),
            sizeof(relay_cuda_plan_options));
  EXPECT_EQ(sizeof(relay_cuda_plan_options), 72u);
  EXPECT_EQ(sizeof(relay_cuda_batch), 48u);
  EXPECT_EQ(offsetof(relay_cuda_inputs, q_scale), 168u);  // appended since
  EXPECT_EQ(sizeof(relay_cuda_kv_write), 72u);
  EXPECT_EQ(sizeof(relay_cuda_summary), 64u);
  EXPECT_TRUE(std::is_standard_layout_v<relay_cuda_inputs>);
}

TEST(CudaCApi, NullPointers) {
  const relay_cuda_plan_options options = good_options();
  size_t bytes = 0;
  expect_invalid(relay_cuda_workspace_bytes(nullptr, &bytes), "relay_cuda_plan_options is null");
  expect_invalid(relay_cuda_workspace_bytes(&options, nullptr), "bytes is null");
  relay_cuda_plan* plan = nullptr;
  expect_invalid(relay_cuda_plan_create(nullptr, &options, &bytes, 1, nullptr), "plan is null");
  expect_invalid(relay_cuda_plan_create(&plan, nullptr, &bytes, 1, nullptr),
                 "relay_cuda_plan_options is null");
  expect_invalid(relay_cuda_plan_create(&plan, &options, nullptr, 1, nullptr), "workspace is null");
  EXPECT_EQ(plan, nullptr);

  relay_cuda_batch batch = {};
  batch.size = sizeof(batch);
  relay_cuda_inputs inputs = {};
  inputs.size = sizeof(inputs);
  relay_cuda_kv_write write = {};
  write.size = sizeof(write);
  relay_cuda_summary summary = {};
  summary.size = sizeof(summary);
  expect_invalid(relay_cuda_plan_batch(nullptr, &batch, nullptr), "plan is null");
  expect_invalid(relay_cuda_attend(nullptr, &inputs, nullptr), "plan is null");
  expect_invalid(relay_cuda_write_kv(nullptr, &write, &inputs, nullptr), "plan is null");
  expect_invalid(relay_cuda_summarize(nullptr, &summary, nullptr), "plan is null");
  expect_invalid(relay_cuda_check_batch(nullptr, nullptr), "plan is null");
  EXPECT_STREQ(relay_cuda_path(nullptr), "");
  relay_cuda_plan_free(nullptr);
}

TEST(CudaCApi, SizesThatNoVersionHas) {
  for (const size_t size :
       {size_t{0}, sizeof(size_t), sizeof(relay_cuda_plan_options) - 1, size_t{4096}, SIZE_MAX}) {
    expect_options_invalid([&](relay_cuda_plan_options& o) { o.size = size; },
                           "relay_cuda_plan_options.size");
  }
}

TEST(CudaCApi, StructsOfTheFirstVersion) {
  relay_cuda_inputs inputs = {};
  inputs.size = offsetof(relay_cuda_inputs, q_scale);
  expect_invalid(relay_cuda_attend(nullptr, &inputs, nullptr), "plan is null");
  inputs.size -= 1;
  expect_invalid(relay_cuda_attend(nullptr, &inputs, nullptr), "relay_cuda_inputs.size");
}

TEST(CudaCApi, StructsOfALaterVersion) {
  struct {
    relay_cuda_plan_options options;
    int64_t appended[2];
  } later = {good_options(), {0, 1}};
  later.options.size = sizeof(later);
  size_t bytes = 0;
  expect_invalid(relay_cuda_workspace_bytes(&later.options, &bytes), "does not know");
  // Where it is 0, what is known of it counts: the next thing that is wrong is found.
  later.appended[1] = 0;
  later.options.path = 9;
  expect_invalid(relay_cuda_workspace_bytes(&later.options, &bytes), "path");
}

TEST(CudaCApi, ValuesThatNothingMeans) {
  using Options = relay_cuda_plan_options;
  for (const int32_t type : {int32_t{RELAY_F32}, int32_t{RELAY_Q8_0}, -1, 4, 99}) {
    expect_options_invalid([&](Options& o) { o.q_type = type; }, "q_type");
    expect_options_invalid([&](Options& o) { o.kv_type = type; }, "kv_type");
  }
  expect_options_invalid([](Options& o) { o.q_type = RELAY_CUDA_F8_E4M3; }, "q_type");
  for (const int32_t value : {-1, 2}) {
    expect_options_invalid([&](Options& o) { o.causal = value; }, "causal");
    expect_options_invalid([&](Options& o) { o.check = value; }, "check");
  }
  for (const int32_t value : {-2, 2}) {
    expect_options_invalid([&](Options& o) { o.sharing = value; }, "sharing");
  }
  for (const int32_t value : {-1, 3}) {
    expect_options_invalid([&](Options& o) { o.path = value; }, "path");
  }
  expect_options_invalid([](Options& o) { o.min_shared_slots = -1; }, "min_shared_slots");
}

TEST(CudaCApi, OptionsThatNoKernelServes) {
  using Options = relay_cuda_plan_options;
  expect_options_invalid([](Options& o) { o.head_dim = 72; }, "head size");
  expect_options_invalid([](Options& o) { o.q_heads = 9; }, "heads");
  expect_options_invalid([](Options& o) { o.kv_type = RELAY_F16; }, "KV");
  expect_options_invalid([](Options& o) { o.max_requests = 0; }, "max_requests");
  expect_options_invalid([](Options& o) { o.max_requests = 1025; }, "max_requests");
  expect_options_invalid([](Options& o) { o.block_size = 24; }, "block_size");
  expect_options_invalid(
      [](Options& o) {
        o.causal = 0;
        o.window = 8;
      },
      "window");
}

TEST(CudaCApi, NamesAreAlwaysStrings) {
  // Empty without a GPU, and then the reason is there.
  const std::string name = relay_cuda_device_name();
  if (name.empty()) {
    EXPECT_STRNE(relay_cuda_last_error(), "");
  }
  EXPECT_NE(relay_cuda_last_error(), nullptr);
}

}  // namespace
