// Work on a host's threads, and what is said when it fails: the reason that the failing thread saw.
#include "openmp.h"

#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

namespace {

// A runtime that grants `granted` threads, or as many as are asked for.
int granted = 0;
thread_local int number = 0;
thread_local int count = 1;

void run_region(void (*body)(void*), void* data, unsigned threads, unsigned) {
  const int n = granted > 0 ? granted : static_cast<int>(threads);
  std::vector<std::thread> team;
  for (int i = 0; i < n; ++i) {
    team.emplace_back([=] {
      number = i;
      count = n;
      body(data);
    });
  }
  for (std::thread& thread : team) thread.join();
}

relay_openmp runtime() {
  return {sizeof(relay_openmp), run_region, [] { return 4; }, [] { return number; },
          [] { return count; }};
}

// One request of one head over one block; the values are its slots' numbers.
constexpr int kDim = 32;
constexpr int kSlots = 16;

struct Batch {
  std::vector<int32_t> row_offsets{0, 1};
  std::vector<int64_t> kv_lengths{kSlots};
  std::vector<int32_t> table{0};
  std::vector<float> q = std::vector<float>(kDim, 0.0f);
  std::vector<float> k = std::vector<float>(kSlots * kDim, 1.0f);
  std::vector<float> v = std::vector<float>(kSlots * kDim);
  std::vector<float> out = std::vector<float>(kDim, -1.0f);
  relay_plan* plan = nullptr;
  relay_workspace* workspace = nullptr;
  relay_inputs inputs{};

  Batch() {
    for (size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(i / kDim);
    make_plan();
    EXPECT_EQ(relay_workspace_create(&workspace), RELAY_OK);
    EXPECT_EQ(relay_workspace_fit(workspace, plan), RELAY_OK);
    constexpr int64_t kVector = kDim * 4;
    inputs.size = sizeof(inputs);
    inputs.q_type = inputs.out_type = RELAY_F32;
    inputs.q = q.data();
    inputs.out = out.data();
    inputs.q_row_stride = inputs.q_head_stride = kVector;
    inputs.out_row_stride = inputs.out_head_stride = kVector;
    inputs.k = {k.data(), kSlots * kVector, kVector, kVector};
    inputs.v = {v.data(), kSlots * kVector, kVector, kVector};
    inputs.scale = 1.0f;
  }
  ~Batch() {
    relay_workspace_free(workspace);
    relay_plan_free(plan);
  }
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  void make_plan() {
    const relay_batch batch = {sizeof(relay_batch),
                               1,
                               row_offsets.data(),
                               kv_lengths.data(),
                               table.data(),
                               1,
                               kSlots,
                               0,
                               1};
    const relay_plan_options options = {
        sizeof(relay_plan_options), 1, 1, kDim, kDim, RELAY_F32, RELAY_F32, 4, 1, RELAY_ROWS};
    ASSERT_EQ(relay_plan_batch(&plan, &batch, &options), RELAY_OK) << relay_last_error();
  }
};

class OpenMp : public ::testing::Test {
 protected:
  OpenMp() {
    granted = 0;
    const relay_openmp given = runtime();
    EXPECT_EQ(relay_openmp_use(&given), RELAY_OK);
  }
};

TEST_F(OpenMp, AttendsOnAllThreadsAndOnFewer) {
  for (int n : {0, 1, 3}) {
    granted = n;
    Batch batch;
    ASSERT_EQ(relay_openmp_attend(batch.plan, &batch.inputs, batch.workspace, 4), RELAY_OK)
        << relay_openmp_error();
    for (float value : batch.out) EXPECT_FLOAT_EQ(value, (kSlots - 1) / 2.0f) << n;
  }
}

TEST_F(OpenMp, SaysWhatTheFailingThreadSaw) {
  Batch batch;
  batch.make_plan();  // again, and the workspace is not fitted to that
  EXPECT_EQ(relay_openmp_attend(batch.plan, &batch.inputs, batch.workspace, 4), RELAY_INVALID);
  EXPECT_NE(std::string(relay_openmp_error()).find("call fit() after each planning"),
            std::string::npos)
      << relay_openmp_error();
}

TEST_F(OpenMp, RunsAPlanOnAsManyThreadsAsItWasMadeFor) {
  Batch batch;
  for (int32_t threads : {3, 5}) {
    // Fewer would leave shares of the output unwritten.
    EXPECT_EQ(relay_openmp_attend(batch.plan, &batch.inputs, batch.workspace, threads),
              RELAY_INVALID);
    EXPECT_NE(std::string(relay_openmp_error()).find("made for 4 threads"), std::string::npos)
        << relay_openmp_error();
    for (float value : batch.out) EXPECT_EQ(value, -1.0f);
  }
}

TEST_F(OpenMp, WritesAndSaysWhyNot) {
  constexpr int kTokens = 16;
  constexpr int kHeads = 32;
  constexpr int64_t kVector = kDim * 4;
  std::vector<float> values(kTokens * kHeads * kDim);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<float>(i);
  std::vector<float> k(values.size()), v(values.size());
  std::vector<int64_t> slots;
  for (int i = 0; i < kTokens; ++i) slots.push_back(kTokens - 1 - i);
  relay_kv_write write{};
  write.size = sizeof(write);
  write.kv_heads = kHeads;
  write.k_dim = write.v_dim = kDim;
  write.k_type = write.v_type = RELAY_F32;
  write.block_size = kTokens;
  write.k_cache = {k.data(), kTokens * kHeads * kVector, kHeads * kVector, kVector};
  write.v_cache = {v.data(), kTokens * kHeads * kVector, kHeads * kVector, kVector};
  write.k = write.v = values.data();
  write.k_row_stride = write.v_row_stride = kHeads * kVector;
  write.k_head_stride = write.v_head_stride = kVector;
  write.tokens = kTokens;
  write.slots = slots.data();
  write.cache_slots = kTokens;
  ASSERT_EQ(relay_openmp_write(&write), RELAY_OK) << relay_openmp_error();
  for (int token = 0; token < kTokens; ++token) {
    for (int i = 0; i < kHeads * kDim; ++i) {
      const float expected = values[token * kHeads * kDim + i];
      ASSERT_EQ(k[slots[token] * kHeads * kDim + i], expected);
      ASSERT_EQ(v[slots[token] * kHeads * kDim + i], expected);
    }
  }
  slots[3] = kTokens;
  EXPECT_EQ(relay_openmp_write(&write), RELAY_INVALID);
  EXPECT_NE(std::string(relay_openmp_error()).find("slot 16, the KV cache has 16"),
            std::string::npos)
      << relay_openmp_error();
}

TEST_F(OpenMp, NamesTheEntryPointThatIsMissing) {
  relay_openmp given = runtime();
  given.thread_num = nullptr;
  EXPECT_EQ(relay_openmp_use(&given), RELAY_INVALID);
  EXPECT_NE(std::string(relay_openmp_error()).find("without omp_get_thread_num"), std::string::npos)
      << relay_openmp_error();
  given = runtime();
  given.size = 8;
  EXPECT_EQ(relay_openmp_use(&given), RELAY_INVALID);
  EXPECT_NE(std::string(relay_openmp_error()).find("relay_openmp.size is 8"), std::string::npos)
      << relay_openmp_error();
}

}  // namespace
