// A cache that says how many slots it has (KvCache::slots) is never touched beyond them, whatever
// block tables and slot lists say. Its memory ends with its last slot, so that a sanitizer sees
// what the comparisons with counts do not.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "core/random.h"
#include "core/test_env.h"
#include "relay/attention.h"
#include "relay/kv_cache.h"

namespace relay::test {
namespace {

constexpr HeadShape kShape{.q_heads = 2, .kv_heads = 1, .qk_dim = 16, .v_dim = 16};
constexpr int64_t kVector = 16 * sizeof(float);

/// Empty, or what was refused.
std::string refusal(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

/// K and V of one head in f32, all 1.
struct Cache {
  std::vector<float> k, v;
  KvCache view;

  Cache(KvLayout layout, int64_t block_size, int64_t blocks)
      : k(static_cast<size_t>(blocks * block_size) * 16, 1.0f), v(k) {
    view.k = {.type = DType::kF32,
              .data = k.data(),
              .block_stride = block_size * kVector,
              .slot_stride = kVector,
              .head_stride = 0,
              .unpack = nullptr};
    view.v = view.k;
    view.v.data = v.data();
    view.block_size = block_size;
    view.layout = layout;
    view.slots = blocks * block_size;
  }
};

/// Block tables of which some lead out of the cache.
struct RandomTables {
  int64_t block_size;
  int64_t blocks;  ///< of the cache
  int64_t stride;
  std::vector<int32_t> row_offsets{0};
  std::vector<int64_t> kv_lengths;
  std::vector<int32_t> table;
  BlockTables batch;

  RandomTables(Random& random, bool tiles) {
    block_size = tiles ? 64 * random.between(1, 2) : random.between(1, 40);
    blocks = random.between(1, 30);
    stride = random.between(1, 12);
    const double strays = random.pick(std::vector<double>{0, 0.02, 0.2});
    const int64_t requests = random.between(1, 6);
    for (int64_t r = 0; r < requests; ++r) {
      const int64_t length = random.between(0, stride * block_size);
      kv_lengths.push_back(length);
      row_offsets.push_back(row_offsets.back() +
                            static_cast<int32_t>(random.between(0, std::min<int64_t>(length, 5))));
      const int64_t shared = r > 0 ? random.between(0, stride) : 0;
      for (int64_t d = 0; d < stride; ++d) {
        if (d < shared) {
          table.push_back(table[d]);
        } else if (random.chance(strays)) {  // the first beyond the end, or any
          table.push_back(
              static_cast<int32_t>(random.chance(0.5) ? blocks : random.between(0, INT32_MAX)));
        } else {
          table.push_back(static_cast<int32_t>(random.between(0, blocks - 1)));
        }
      }
    }
    batch.requests = static_cast<int32_t>(requests);
    batch.row_offsets = row_offsets;
    batch.kv_lengths = kv_lengths;
    batch.table = table.data();
    batch.table_stride = stride;
    batch.block_size = block_size;
    batch.causal = random.chance(0.8);
    batch.window = batch.causal && random.chance(0.3) ? random.between(1, 100) : 0;
    batch.align = tiles ? kTileSlots : 1;
  }

  /// One more than the highest slot of a request's tokens from `first` on.
  int64_t end_of(int32_t request, int64_t first) const {
    int64_t end = 0;
    for (int64_t t = first; t < kv_lengths[request]; ++t) {
      const int64_t block = table[request * stride + t / block_size];
      end = std::max(end, block * block_size + t % block_size + 1);
    }
    return end;
  }
  /// Of all tokens that a row attends.
  int64_t attended_end() const {
    int64_t end = 0;
    for (int32_t r = 0; r < batch.requests; ++r) {
      const int32_t rows = row_offsets[r + 1] - row_offsets[r];
      if (rows == 0) continue;
      const int64_t first = batch.window == 0 ? 0 : kv_lengths[r] - rows + 1 - batch.window;
      end = std::max(end, end_of(r, std::max<int64_t>(0, first)));
    }
    return end;
  }
  /// Of all tokens that the tables list.
  int64_t listed_end() const {
    int64_t end = 0;
    for (int32_t r = 0; r < batch.requests; ++r) end = std::max(end, end_of(r, 0));
    return end;
  }
};

class Capacity : public ::testing::TestWithParam<uint64_t> {};

TEST_P(Capacity, BlockTablesThatLeadOutOfTheCacheAreRefused) {
  SCOPED_TRACE(repeat_command());
  Random random(derive_seed(GetParam(), 0xca1));
  int refused = 0, served = 0;
  for (int round = 0; round < 100; ++round) {
    SCOPED_TRACE(round);
    const bool tiles = random.chance(0.3);
    const RandomTables tables(random, tiles);
    Forest forest;
    build_from_block_tables(tables.batch, random.chance(0.7) ? Sharing::kOn : Sharing::kOff,
                            forest);
    const PlanOptions options{.shape = kShape,
                              .k_type = DType::kF32,
                              .v_type = DType::kF32,
                              .layout = tiles ? KvLayout::kTiles : KvLayout::kRows,
                              .threads = 1};
    const PlanPtr plan = make_plan(forest, options);
    const Cache cache(options.layout, tables.block_size, tables.blocks);
    const auto rows = static_cast<size_t>(std::max(1, forest.rows));
    const std::vector<float> q(rows * 2 * 16, 0.5f);
    std::vector<float> out(q.size());
    AttentionInputs inputs;
    inputs.q = {
        .type = DType::kF32, .data = q.data(), .row_stride = 2 * kVector, .head_stride = kVector};
    inputs.out = {
        .type = DType::kF32, .data = out.data(), .row_stride = 2 * kVector, .head_stride = kVector};
    inputs.kv = cache.view;
    inputs.window = tables.batch.window;

    const std::string why = refusal([&] { validate(*plan, inputs); });
    if (tables.attended_end() > cache.view.slots) {
      ASSERT_NE(why.find("the KV cache has " + std::to_string(cache.view.slots) + " slots"),
                std::string::npos)
          << why;
    }
    if (tables.listed_end() <= cache.view.slots) {
      ASSERT_EQ(why, "");
    }
    AttentionInputs unknown = inputs;
    unknown.kv.slots = 0;
    ASSERT_EQ(refusal([&] { validate(*plan, unknown); }), "") << "nothing is known of its end";
    (why.empty() ? served : refused) += 1;
    if (!why.empty()) continue;
    Workspace workspace(*plan);
    attend(*plan, inputs, workspace, 0);
    for (int32_t row = 0; row < forest.rows; ++row) {  // a mean of ones
      ASSERT_NEAR(out[static_cast<size_t>(row) * 2 * 16], 1.0f, 1e-5f) << "row " << row;
    }
  }
  EXPECT_GT(refused, 0);
  EXPECT_GT(served, 0);
}

TEST_P(Capacity, TokensOfOtherSlotsAreNotWritten) {
  SCOPED_TRACE(repeat_command());
  Random random(derive_seed(GetParam(), 0xca2));
  for (int round = 0; round < 100; ++round) {
    SCOPED_TRACE(round);
    const KvLayout layout = random.chance(0.3) ? KvLayout::kTiles : KvLayout::kRows;
    const int64_t block_size = layout == KvLayout::kTiles ? 64 : random.between(1, 40);
    Cache cache(layout, block_size, random.between(1, 10));
    const int64_t capacity = cache.view.slots;
    std::vector<int64_t> slots(static_cast<size_t>(random.between(0, 20)));
    bool fits = true;
    for (int64_t& slot : slots) {
      slot = random.between(-2, capacity - 1);
      if (random.chance(0.02)) {
        slot = random.chance(0.5) ? capacity : random.between(capacity, INT64_MAX / 1024);
      }
      fits &= slot < capacity;
    }
    const std::vector<float> tokens(std::max<size_t>(1, slots.size()) * 16, 2.0f);
    const ConstRows vectors = {
        .type = DType::kF32, .data = tokens.data(), .row_stride = kVector, .head_stride = kVector};
    const std::string why =
        refusal([&] { write_kv(cache.view, kShape, vectors, vectors, slots, 0, 1); });
    ASSERT_EQ(why.empty(), fits) << why;
    std::sort(slots.begin(), slots.end());
    slots.erase(std::unique(slots.begin(), slots.end()), slots.end());
    const auto kept = std::count_if(slots.begin(), slots.end(), [](int64_t s) { return s >= 0; });
    const auto written = fits ? kept * 16 : 0;
    EXPECT_EQ(std::count(cache.k.begin(), cache.k.end(), 2.0f), written);
    EXPECT_EQ(std::count(cache.v.begin(), cache.v.end(), 2.0f), written);
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, Capacity, ::testing::ValuesIn(seeds(20)));

TEST(CapacityOfTrees, CountsTheLastSlotOfTheHighestSpan) {
  const std::vector<TreeNode> nodes = {{-1, {{100, 0, 10}, {5, 10, 3}}}, {0, {{40, 13, 1}}}};
  const std::vector<int32_t> leaves = {0, 1};
  Forest forest;
  build_from_tree({.nodes = nodes, .leaf_of_row = leaves, .position_of_row = {}}, Sharing::kOn,
                  forest);
  PlanOptions options{.shape = kShape, .k_type = DType::kF32, .v_type = DType::kF32};
  const PlanPtr plan = make_plan(forest, options);
  std::vector<float> q(2 * 2 * 16), out(q.size());
  Cache cache(KvLayout::kRows, 110, 1);
  AttentionInputs inputs;
  inputs.q = {
      .type = DType::kF32, .data = q.data(), .row_stride = 2 * kVector, .head_stride = kVector};
  inputs.out = {
      .type = DType::kF32, .data = out.data(), .row_stride = 2 * kVector, .head_stride = kVector};
  inputs.kv = cache.view;
  EXPECT_EQ(refusal([&] { validate(*plan, inputs); }), "");
  inputs.kv.slots = 109;
  EXPECT_EQ(refusal([&] { validate(*plan, inputs); }),
            "attention: the batch attends slot 109, the KV cache has 109 slots");
  inputs.kv.slots = -1;
  EXPECT_THROW(validate(*plan, inputs), Error);
}

TEST(CapacityOfForests, SpansBeyondAllNumbersAreRefused) {
  Forest forest;
  forest.rows = 1;
  forest.row_index = {0};
  forest.spans = {{.slot = INT64_MAX - 1, .column = 0, .count = 2}};
  forest.segments = {{.span_begin = 0, .span_end = 1, .row_begin = 0, .row_end = 1, .slots = 2}};
  const PlanOptions options{.shape = kShape};
  EXPECT_NE(refusal([&] { make_plan(forest, options); }), "");
  forest.spans = {{.slot = 0, .column = 0, .count = INT64_MAX},
                  {.slot = 0, .column = 0, .count = INT64_MAX}};
  forest.segments[0].span_end = 2;
  forest.segments[0].slots = -2;  // what their sum would wrap to
  EXPECT_NE(refusal([&] { make_plan(forest, options); }), "");

  const int32_t row_offsets[] = {0, 1};
  const int64_t kv_lengths[] = {1};
  const int32_t table[] = {2};
  BlockTables batch;
  batch.requests = 1;
  batch.row_offsets = row_offsets;
  batch.kv_lengths = kv_lengths;
  batch.table = table;
  batch.table_stride = 1;
  batch.block_size = INT64_MAX / 2;
  EXPECT_NE(refusal([&] { build_from_block_tables(batch, Sharing::kOn, forest); }), "");
}

}  // namespace
}  // namespace relay::test
