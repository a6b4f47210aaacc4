#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "c_api_v1_fixture.h"
#include "relay/reference.h"
#include "relay/relay.h"

extern "C" size_t relay_inputs_size_in_c(void);

namespace {

// Two requests over one shared block of 16 tokens; request 1 has two query rows.
struct Batch {
  std::vector<int32_t> row_offsets{0, 1, 3};
  std::vector<int64_t> kv_lengths{20, 23};
  std::vector<int32_t> table{2, 0, 2, 1};
  relay_batch c = as<relay_batch>();

  /// In the struct of any version.
  template <typename T>
  T as() const {
    return {sizeof(T), 2, row_offsets.data(), kv_lengths.data(), table.data(), 2, 16, 0, 1};
  }
};

constexpr int kDim = 32;
constexpr int kQHeads = 4;
constexpr int kKvHeads = 2;
constexpr int kSlots = 48;

template <typename T = relay_plan_options>
T options() {
  return {sizeof(T), kQHeads, kKvHeads, kDim, kDim, RELAY_F32, RELAY_F32, 2, 1, RELAY_ROWS};
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
    c = as<relay_inputs>();
  }

  template <typename T>
  T as() {
    const int64_t row = kQHeads * kDim * 4, slot = kKvHeads * kDim * 4;
    T in{};
    in.size = sizeof(T);
    in.q_type = in.out_type = RELAY_F32;
    in.q = q.data();
    in.out = out.data();
    in.q_row_stride = in.out_row_stride = row;
    in.q_head_stride = in.out_head_stride = kDim * 4;
    in.k = {k.data(), 16 * slot, slot, kDim * 4};
    in.v = {v.data(), 16 * slot, slot, kDim * 4};
    in.scale = 0.2f;
    in.lse = lse.data();
    return in;
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
  int32_t threads = 0;
  ASSERT_EQ(relay_plan_threads(plan, &threads), RELAY_OK);
  EXPECT_EQ(threads, opt.threads);
  EXPECT_EQ(relay_plan_threads(nullptr, &threads), RELAY_INVALID);
  EXPECT_EQ(read, 2 * 16 + 4 + 7) << "16 slots are too few to be worth sharing";
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

// --- Versions ------------------------------------------------------------------------------------

/// The struct of another version's program: `size` bytes and not one more, so that a sanitizer sees
/// what is read behind them. Fields that `from` does not have are 0, or `rest`.
template <typename Now>
class Foreign {
 public:
  template <typename T>
  explicit Foreign(const T& from, size_t size = sizeof(T), unsigned char rest = 0)
      : bytes_(std::make_unique<unsigned char[]>(size)) {
    std::memset(bytes_.get(), rest, size);
    std::memcpy(bytes_.get(), &from, std::min(size, sizeof(T)));
    std::memcpy(bytes_.get(), &size, sizeof(size));
  }
  const Now* get() const { return reinterpret_cast<const Now*>(bytes_.get()); }

 private:
  std::unique_ptr<unsigned char[]> bytes_;
};

/// All that a program does for one batch; the first failure, if any.
relay_status run(const relay_batch* batch, const relay_plan_options* options,
                 const relay_inputs* inputs) {
  relay_plan* plan = nullptr;
  relay_workspace* workspace = nullptr;
  relay_status status = relay_plan_batch(&plan, batch, options);
  if (status == RELAY_OK) status = relay_workspace_create(&workspace);
  if (status == RELAY_OK) status = relay_workspace_fit(workspace, plan);
  if (status == RELAY_OK) status = relay_check(plan, inputs);
  for (int thread = 0; thread < 2 && status == RELAY_OK; ++thread) {
    status = relay_attend(plan, inputs, workspace, thread);
  }
  relay_workspace_free(workspace);
  relay_plan_free(plan);
  return status;
}

/// A token in slot 5 of a small cache of f32 in rows; the vectors are left to the caller.
template <typename T>
T write_of(const float* vector, float* k_cache, float* v_cache, const int64_t* slot) {
  T write{};
  write.size = sizeof(T);
  write.kv_heads = 1;
  write.k_dim = write.v_dim = kDim;
  write.k_type = write.v_type = RELAY_F32;
  write.layout = RELAY_ROWS;
  write.block_size = 4;
  write.k_cache = {k_cache, 4 * kDim * 4, kDim * 4, 0};
  write.v_cache = {v_cache, 4 * kDim * 4, kDim * 4, 0};
  write.k = write.v = vector;
  write.tokens = 1;
  write.slots = slot;
  return write;
}

TEST(CApiVersions, ProgramsOfTheFirstVersionAreServed) {
  const Batch batch;
  Tensors now;
  const auto opt = options();
  ASSERT_EQ(run(&batch.c, &opt, &now.c), RELAY_OK) << relay_last_error();

  Tensors then;
  const Foreign<relay_batch> old_batch(batch.as<relay_v1::relay_batch>());
  const Foreign<relay_plan_options> old_options(options<relay_v1::relay_plan_options>());
  const Foreign<relay_inputs> old_inputs(then.as<relay_v1::relay_inputs>());
  ASSERT_EQ(run(old_batch.get(), old_options.get(), old_inputs.get()), RELAY_OK)
      << relay_last_error();
  EXPECT_EQ(then.out, now.out);
  EXPECT_EQ(then.lse, now.lse);

  const std::vector<float> vector(kDim, 3.0f);
  std::vector<float> k(8 * kDim), v(8 * kDim);
  const int64_t slot = 5;
  const Foreign<relay_kv_write> old_write(
      write_of<relay_v1::relay_kv_write>(vector.data(), k.data(), v.data(), &slot));
  ASSERT_EQ(relay_write_kv(old_write.get(), 0, 1), RELAY_OK) << relay_last_error();
  EXPECT_EQ(k[5 * kDim], 3.0f);
  EXPECT_EQ(v[6 * kDim - 1], 3.0f);
}

// Nothing may be appended into the padding of an older version: its programs leave anything there.
static_assert(sizeof(relay_v1::relay_batch) == sizeof(relay_batch));
static_assert(sizeof(relay_v1::relay_plan_options) == sizeof(relay_plan_options));
static_assert(sizeof(relay_v1::relay_inputs) == offsetof(relay_inputs, cache_slots));
static_assert(sizeof(relay_v1::relay_kv_write) == offsetof(relay_kv_write, cache_slots));

TEST(CApiVersions, LongerStructsAreServedUnlessTheyAskForWhatIsUnknown) {
  const Batch batch;
  Tensors now, later;
  const auto opt = options();
  ASSERT_EQ(run(&batch.c, &opt, &now.c), RELAY_OK) << relay_last_error();
  for (const size_t more : {1, 8, 100}) {
    for (const unsigned char rest : {0, 1}) {
      SCOPED_TRACE(std::to_string(more) + " bytes more of " + std::to_string(rest));
      const auto expected = rest == 0 ? RELAY_OK : RELAY_INVALID;
      const auto expect = [&](relay_status status, const std::string& name) {
        ASSERT_EQ(status, expected) << name << ": " << relay_last_error();
        if (status == RELAY_OK) return;
        EXPECT_NE(std::string(relay_last_error()).find(name + " sets a field"), std::string::npos)
            << relay_last_error();
      };
      const Foreign<relay_batch> long_batch(batch.c, sizeof(batch.c) + more, rest);
      expect(run(long_batch.get(), &opt, &later.c), "relay_batch");
      const Foreign<relay_plan_options> long_options(opt, sizeof(opt) + more, rest);
      expect(run(&batch.c, long_options.get(), &later.c), "relay_plan_options");
      const Foreign<relay_inputs> long_inputs(later.c, sizeof(later.c) + more, rest);
      expect(run(&batch.c, &opt, long_inputs.get()), "relay_inputs");
      const std::vector<float> vector(kDim);
      std::vector<float> k(8 * kDim), v(8 * kDim);
      const int64_t slot = 5;
      const auto write = write_of<relay_kv_write>(vector.data(), k.data(), v.data(), &slot);
      const Foreign<relay_kv_write> long_write(write, sizeof(write) + more, rest);
      expect(relay_write_kv(long_write.get(), 0, 1), "relay_kv_write");
    }
  }
  EXPECT_EQ(later.out, now.out);
}

TEST(CApiVersions, SizesOfNoVersionAreRefused) {
  const Batch batch;
  Tensors t;
  const auto opt = options();
  for (const size_t size :
       {size_t{0}, size_t{4}, sizeof(relay_v1::relay_inputs) - 1, size_t{1} << 40, SIZE_MAX}) {
    SCOPED_TRACE(size);
    relay_inputs wrong = t.c;
    wrong.size = size;
    EXPECT_EQ(run(&batch.c, &opt, &wrong), RELAY_INVALID);
    EXPECT_EQ(relay_last_error(), "relay_inputs.size is " + std::to_string(size) +
                                      ", which no version has: set it with sizeof");
  }
  relay_batch no_batch = batch.c;
  no_batch.size = sizeof(relay_v1::relay_batch) - 1;
  EXPECT_EQ(run(&no_batch, &opt, &t.c), RELAY_INVALID);
  relay_plan_options no_options = opt;
  no_options.size = sizeof(relay_v1::relay_plan_options) - 1;
  EXPECT_EQ(run(&batch.c, &no_options, &t.c), RELAY_INVALID);
  const float vector[kDim] = {};
  float cache[8 * kDim];
  const int64_t slot = 5;
  auto no_write = write_of<relay_kv_write>(vector, cache, cache, &slot);
  no_write.size = sizeof(relay_v1::relay_kv_write) - 1;
  EXPECT_EQ(relay_write_kv(&no_write, 0, 1), RELAY_INVALID);
}

// --- Capacity ------------------------------------------------------------------------------------

TEST(CApiCapacity, SlotsThatTheCacheDoesNotHaveAreRefused) {
  const Batch batch;  // its highest slot is the last of block 2: 47
  const auto opt = options();
  Tensors t;
  t.c.cache_slots = kSlots;
  EXPECT_EQ(run(&batch.c, &opt, &t.c), RELAY_OK) << relay_last_error();
  t.c.cache_slots = kSlots - 1;
  EXPECT_EQ(run(&batch.c, &opt, &t.c), RELAY_INVALID);
  EXPECT_NE(std::string(relay_last_error()).find("slot 47"), std::string::npos);
  t.c.cache_slots = -1;
  EXPECT_EQ(run(&batch.c, &opt, &t.c), RELAY_INVALID);

  const std::vector<float> vector(kDim, 3.0f);
  std::vector<float> k(8 * kDim), v(8 * kDim);
  int64_t slot = 8;
  auto write = write_of<relay_kv_write>(vector.data(), k.data(), v.data(), &slot);
  write.cache_slots = 8;
  EXPECT_EQ(relay_write_kv(&write, 0, 1), RELAY_INVALID);
  EXPECT_NE(std::string(relay_last_error()).find("slot 8"), std::string::npos);
  slot = 7;
  EXPECT_EQ(relay_write_kv(&write, 0, 1), RELAY_OK) << relay_last_error();
  EXPECT_EQ(v[8 * kDim - 1], 3.0f);
}

// --- Refusals ------------------------------------------------------------------------------------

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
  EXPECT_EQ(relay_attend(plan, &good.c, workspace, 0), RELAY_OK);
  ASSERT_EQ(relay_plan_batch(&plan, &batch.c, &opt), RELAY_OK);
  EXPECT_EQ(relay_attend(plan, &good.c, workspace, 1), RELAY_INVALID);  // not fitted since
  EXPECT_NE(std::string(relay_last_error()).find("fit"), std::string::npos);
  ASSERT_EQ(relay_workspace_fit(workspace, plan), RELAY_OK);
  EXPECT_EQ(relay_attend(plan, &good.c, workspace, 0), RELAY_OK);
  relay_workspace_free(workspace);
  relay_plan_free(plan);
}

TEST(CApi, SaysWhichPointerIsNull) {
  const auto expect_invalid = [](relay_status status, const char* what) {
    EXPECT_EQ(status, RELAY_INVALID);
    EXPECT_NE(std::string(relay_last_error()).find(what), std::string::npos) << relay_last_error();
  };
  const Batch batch;
  const auto opt = options();
  relay_plan* plan = nullptr;
  expect_invalid(relay_plan_batch(nullptr, &batch.c, &opt), "plan is null");
  expect_invalid(relay_plan_batch(&plan, nullptr, &opt), "relay_batch is null");
  expect_invalid(relay_plan_batch(&plan, &batch.c, nullptr), "relay_plan_options is null");
  const Tensors inputs;
  int32_t threads = 0;
  int64_t slots = 0;
  expect_invalid(relay_check(nullptr, &inputs.c), "plan is null");
  expect_invalid(relay_plan_threads(nullptr, &threads), "plan is null");
  expect_invalid(relay_plan_slots(nullptr, &slots, &slots), "plan is null");
  expect_invalid(relay_workspace_create(nullptr), "workspace is null");
  ASSERT_EQ(relay_plan_batch(&plan, &batch.c, &opt), RELAY_OK);
  expect_invalid(relay_plan_threads(plan, nullptr), "threads is null");
  expect_invalid(relay_plan_slots(plan, nullptr, &slots), "read or attended is null");
  expect_invalid(relay_check(plan, nullptr), "relay_inputs is null");
  expect_invalid(relay_attend(plan, &inputs.c, nullptr, 0), "workspace is null");
  expect_invalid(relay_workspace_fit(nullptr, plan), "workspace is null");
  expect_invalid(relay_write_kv(nullptr, 0, 1), "relay_kv_write is null");
  relay_plan_free(plan);
}

}  // namespace
