#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "relay/reference.h"
#include "relay/relay.h"

extern "C" size_t relay_inputs_size_in_c(void);

namespace {

// Two requests over one shared block of 16 tokens; request 1 has two query rows.
struct Batch {
  std::vector<int32_t> row_offsets{0, 1, 3};
  std::vector<int64_t> kv_lengths{20, 23};
  std::vector<int32_t> table{2, 0, 2, 1};
  relay_batch c{
      sizeof(relay_batch), 2, row_offsets.data(), kv_lengths.data(), table.data(), 2, 16, 0, 1};
};

constexpr int kDim = 32;
constexpr int kQHeads = 4;
constexpr int kKvHeads = 2;
constexpr int kSlots = 48;

relay_plan_options options() {
  return {sizeof(relay_plan_options),
          kQHeads,
          kKvHeads,
          kDim,
          kDim,
          RELAY_F32,
          RELAY_F32,
          2,
          1,
          RELAY_ROWS};
}

struct Tensors {
  std::vector<float> q, k, v, out, lse;
  relay_inputs c{};

  Tensors()
      : q(3 * kQHeads * kDim),
        k(kSlots * kKvHeads * kDim),
        v(k.size()),
        out(q.size()),
        lse(3 * kQHeads) {
    uint32_t x = 12345;
    for (auto* t : {&q, &k, &v}) {
      for (float& f : *t)
        f = static_cast<float>((x = x * 1664525u + 1013904223u) >> 8) * 0x1p-23f - 1;
    }
    const int64_t row = kQHeads * kDim * 4, slot = kKvHeads * kDim * 4;
    c.size = sizeof(relay_inputs);
    c.q_type = c.out_type = RELAY_F32;
    c.q = q.data();
    c.out = out.data();
    c.q_row_stride = c.out_row_stride = row;
    c.q_head_stride = c.out_head_stride = kDim * 4;
    c.k = {k.data(), 16 * slot, slot, kDim * 4};
    c.v = {v.data(), 16 * slot, slot, kDim * 4};
    c.scale = 0.2f;
    c.lse = lse.data();
  }
};

TEST(CApi, LayoutIsTheSameInC) { EXPECT_EQ(relay_inputs_size_in_c(), sizeof(relay_inputs)); }

TEST(CApi, AttendsLikeTheReference) {
  Batch batch;
  const auto opt = options();
  relay_plan* plan = nullptr;
  ASSERT_EQ(relay_plan_batch(&plan, &batch.c, &opt), RELAY_OK) << relay_last_error();
  int64_t read = 0, attended = 0;
  ASSERT_EQ(relay_plan_slots(plan, &read, &attended), RELAY_OK);
  EXPECT_EQ(read, 16 + 4 + 7);
  EXPECT_GT(attended, read);

  relay_workspace* workspace = nullptr;
  ASSERT_EQ(relay_workspace_create(&workspace), RELAY_OK);
  ASSERT_EQ(relay_workspace_fit(workspace, plan), RELAY_OK);
  Tensors t;
  ASSERT_EQ(relay_check(plan, &t.c), RELAY_OK) << relay_last_error();
  for (int thread = 0; thread < 2; ++thread) {
    ASSERT_EQ(relay_attend(plan, &t.c, workspace, thread), RELAY_OK) << relay_last_error();
  }

  relay::AttentionInputs in;
  in.q = {relay::DType::kF32, t.q.data(), t.c.q_row_stride, t.c.q_head_stride};
  in.kv.k = {relay::DType::kF32, t.k.data(), t.c.k.block_stride, t.c.k.slot_stride, kDim * 4};
  in.kv.v = {relay::DType::kF32, t.v.data(), t.c.v.block_stride, t.c.v.slot_stride, kDim * 4};
  in.kv.block_size = 16;
  in.scale = t.c.scale;
  const relay::HeadShape shape{kQHeads, kKvHeads, kDim, kDim};
  const int64_t seen[3] = {20, 22, 23};
  for (int row = 0; row < 3; ++row) {
    std::vector<relay::AttendedSlot> slots;
    for (int64_t i = 0; i < seen[row]; ++i) {
      slots.push_back({batch.table[(row > 0) * 2 + i / 16] * 16 + i % 16, i});
    }
    std::vector<double> out(kQHeads * kDim), lse(kQHeads);
    relay::reference_row(shape, in, row, seen[row] - 1, slots, out.data(), lse.data());
    // Values lie in [-1, 1] and logits in [-7, 7]: 64 roundings of 2^-24 at that size.
    for (int i = 0; i < kQHeads * kDim; ++i) {
      EXPECT_NEAR(t.out[row * kQHeads * kDim + i], out[i], 64 * 7 * 0x1p-24);
    }
    for (int h = 0; h < kQHeads; ++h)
      EXPECT_NEAR(t.lse[row * kQHeads + h], lse[h], 64 * 7 * 0x1p-24);
  }
  relay_workspace_free(workspace);
  relay_plan_free(plan);
}

TEST(CApi, TilesGiveTheSameAsRows) {
  // One request of 70 tokens in blocks of 64: two tiles.
  constexpr int kTokens = 70;
  const int32_t row_offsets[] = {0, 1};
  const int64_t kv_lengths[] = {kTokens};
  const int32_t table[] = {1, 0};
  const relay_batch batch = {sizeof(relay_batch), 1, row_offsets, kv_lengths, table, 2, 64, 0, 1};
  Tensors t;
  std::vector<float> k(kTokens * kKvHeads * kDim), v(k.size());
  for (size_t i = 0; i < k.size(); ++i) {
    k[i] = std::sin(static_cast<float>(i));
    v[i] = std::cos(static_cast<float>(i));
  }
  std::vector<int64_t> slots;
  for (int i = 0; i < kTokens; ++i) slots.push_back(table[i / 64] * 64 + i % 64);
  std::vector<float> out[2];
  for (const relay_layout layout : {RELAY_ROWS, RELAY_TILES}) {
    // Unused slots are NaN.
    std::vector<float> k_cache(128 * kKvHeads * kDim, NAN), v_cache(k_cache.size(), NAN);
    const int64_t vector = kDim * 4, head = 64 * vector;
    relay_kv_write write = {};
    write.size = sizeof(write);
    write.kv_heads = kKvHeads;
    write.k_dim = write.v_dim = kDim;
    write.k_type = write.v_type = RELAY_F32;
    write.layout = layout;
    write.block_size = 64;
    write.k_cache = {k_cache.data(), kKvHeads * head, vector, head};
    write.v_cache = {v_cache.data(), kKvHeads * head, vector, head};
    write.k = k.data();
    write.v = v.data();
    write.k_row_stride = write.v_row_stride = kKvHeads * vector;
    write.k_head_stride = write.v_head_stride = vector;
    write.tokens = kTokens;
    write.slots = slots.data();
    EXPECT_EQ(relay_write_kv(&write, 0, kKvHeads + 1), RELAY_INVALID);
    ASSERT_EQ(relay_write_kv(&write, 0, 1), RELAY_OK) << relay_last_error();
    ASSERT_EQ(relay_write_kv(&write, 1, kKvHeads), RELAY_OK) << relay_last_error();

    relay_plan_options opt = options();
    opt.layout = layout;
    relay_plan* plan = nullptr;
    ASSERT_EQ(relay_plan_batch(&plan, &batch, &opt), RELAY_OK) << relay_last_error();
    relay_workspace* workspace = nullptr;
    ASSERT_EQ(relay_workspace_create(&workspace), RELAY_OK);
    ASSERT_EQ(relay_workspace_fit(workspace, plan), RELAY_OK);
    t.c.k = write.k_cache;
    t.c.v = write.v_cache;
    ASSERT_EQ(relay_check(plan, &t.c), RELAY_OK) << relay_last_error();
    for (int thread = 0; thread < 2; ++thread) {
      ASSERT_EQ(relay_attend(plan, &t.c, workspace, thread), RELAY_OK) << relay_last_error();
    }
    out[layout] = t.out;
    relay_workspace_free(workspace);
    relay_plan_free(plan);
  }
  for (int i = 0; i < kQHeads * kDim; ++i) {
    EXPECT_NEAR(out[RELAY_ROWS][i], out[RELAY_TILES][i], 64 * 7 * 0x1p-24);
  }
}

TEST(CApi, RefusesWhatIsWrongAndSaysWhy) {
  Batch batch;
  auto opt = options();
  relay_plan* plan = nullptr;
  EXPECT_EQ(relay_plan_batch(nullptr, &batch.c, &opt), RELAY_INVALID);
  opt.q_heads = 3;
  EXPECT_EQ(relay_plan_batch(&plan, &batch.c, &opt), RELAY_INVALID);
  EXPECT_NE(std::string(relay_last_error()).find("q_heads"), std::string::npos);
  EXPECT_EQ(plan, nullptr);
  opt = options();
  opt.size = 4;
  EXPECT_EQ(relay_plan_batch(&plan, &batch.c, &opt), RELAY_INVALID);
  opt = options();
  batch.kv_lengths[0] = 0;
  EXPECT_EQ(relay_plan_batch(&plan, &batch.c, &opt), RELAY_INVALID);
  batch.kv_lengths[0] = 20;
  ASSERT_EQ(relay_plan_batch(&plan, &batch.c, &opt), RELAY_OK);
  Tensors t;
  t.c.q = nullptr;
  EXPECT_EQ(relay_check(plan, &t.c), RELAY_INVALID);
  relay_workspace* workspace = nullptr;
  ASSERT_EQ(relay_workspace_create(&workspace), RELAY_OK);
  Tensors good;
  EXPECT_EQ(relay_attend(plan, &good.c, workspace, 0), RELAY_INVALID);  // not fitted
  ASSERT_EQ(relay_workspace_fit(workspace, plan), RELAY_OK);
  EXPECT_EQ(relay_attend(plan, &good.c, workspace, 2), RELAY_INVALID);  // no such thread
  relay_workspace_free(workspace);
  relay_plan_free(plan);
}

}  // namespace
