// KV in tiles (KvLayout::kTiles): written by write_kv(), attended by every kernel set, compared
// with the oracle over the same values.
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "core/bent_costs.h"
#include "core/checker.h"
#include "core/forest_generator.h"
#include "core/numeric.h"
#include "core/operator_case.h"
#include "core/test_env.h"
#include "relay/kv_cache.h"

namespace relay::test {
namespace {

/// A tiled cache of NaN, [block][head][K tiles | V tiles], with guard bytes behind it.
class TiledKv {
 public:
  TiledKv(const HeadShape& shape, DType type, int64_t block_size, int64_t blocks) : shape_(shape) {
    const int64_t k_vector = row_bytes(type, shape.qk_dim);
    const int64_t v_vector = row_bytes(type, shape.v_dim);
    const int64_t head = block_size * (k_vector + v_vector);
    bytes_.assign(static_cast<size_t>(head * shape.kv_heads * blocks) + kGuard, 0xff);
    cache_.layout = KvLayout::kTiles;
    cache_.block_size = block_size;
    cache_.k = {.type = type,
                .data = bytes_.data(),
                .block_stride = head * shape.kv_heads,
                .slot_stride = k_vector,
                .head_stride = head,
                .unpack = nullptr};
    cache_.v = cache_.k;
    cache_.v.data = bytes_.data() + block_size * k_vector;
    cache_.v.slot_stride = v_vector;
  }

  const KvCache& cache() const { return cache_; }

  /// Copies the flagged slots of a cache in rows, heads in two shares as two threads would.
  void write(const KvCache& rows, const std::vector<bool>& used) {
    std::vector<int64_t> slots(used.size());
    for (size_t i = 0; i < used.size(); ++i) slots[i] = used[i] ? static_cast<int64_t>(i) : -1;
    const auto view = [](const KvPlane& plane) {
      return ConstRows{.type = plane.type,
                       .data = plane.data,
                       .row_stride = plane.slot_stride,
                       .head_stride = plane.head_stride};
    };
    const int32_t half = shape_.kv_heads / 2;
    write_kv(cache_, shape_, view(rows.k), view(rows.v), slots, 0, half);
    write_kv(cache_, shape_, view(rows.k), view(rows.v), slots, half, shape_.kv_heads);
  }

  bool guards_hold() const {
    for (size_t i = bytes_.size() - kGuard; i < bytes_.size(); ++i) {
      if (bytes_[i] != 0xff) return false;
    }
    return true;
  }

 private:
  static constexpr size_t kGuard = 64;
  HeadShape shape_;
  std::vector<unsigned char> bytes_;
  KvCache cache_;
};

OperatorConfig tiled_config(Random& random) {
  OperatorConfig c = random_config(random);
  const std::vector<int32_t> dims = {16, 32, 48, 64, 64, 80, 96, 112, 128, 128, 192, 256};
  const int32_t group = random.pick(std::vector<int32_t>{1, 2, 3, 4, 7, 8, 16});
  c.shape.qk_dim = random.pick(dims);
  c.shape.v_dim = random.chance(0.7) ? c.shape.qk_dim : random.pick(dims);
  c.shape.kv_heads = static_cast<int32_t>(random.between(1, 4));
  c.shape.q_heads = group * c.shape.kv_heads;
  c.k_type = c.v_type = random.pick(
      std::vector<DType>{DType::kF32, DType::kF16, DType::kBF16, DType::kBF16, DType::kBF16});
  c.placement = Placement::kSlotMajor;
  return c;
}

class Tiled : public ::testing::TestWithParam<uint64_t> {};

TEST_P(Tiled, RandomForestsOfBlockTables) {
  const uint64_t seed = GetParam();
  Random random(derive_seed(seed, 0x711));
  OperatorConfig config = tiled_config(random);
  ForestLimits limits;
  limits.tables_possible = true;
  limits.whole_tiles = true;
  limits.max_slots = 8192;
  limits.max_attended = static_cast<int64_t>(60'000 * std::min(1.0, scale())) + 2'000;
  const ForestCase c = generate_forest(seed, limits);
  if (!c.causal) config.slopes = false;
  OperatorCase op(config, c.rows(), c.block_size, c.blocks, c.used_slots(), seed);
  TiledKv tiled(config.shape, config.k_type, c.block_size, c.blocks);
  // A window cuts through tiles. What it hides there must be finite, as in an engine it is: tokens
  // that were visible before.
  std::vector<bool> written = c.used_slots();
  if (c.window > 0) {
    OperatorCase all(config, c.rows(), c.block_size, c.blocks,
                     std::vector<bool>(written.size(), true), seed + 1);
    tiled.write(all.kv.cache(), std::vector<bool>(written.size(), true));
  }
  tiled.write(op.kv.cache(), written);
  SCOPED_TRACE(c.describe() + "\n" + config.describe() + "\n" + repeat_command());
  const Oracle oracle(op, truth_of(c), arithmetics_for(config), seed);
  for (Sharing sharing : {Sharing::kOn, Sharing::kOff}) {
    Forest forest;
    build_from_tables(c, sharing, forest, kTileSlots);
    ASSERT_NO_THROW(validate(forest));
    const auto threads = static_cast<int32_t>(random.between(1, 8));
    const double bend = random_bend(random);
    for_each_isa([&](const std::string& isa) {
      op.out.reset();
      AttentionInputs inputs = op.inputs();
      inputs.kv = tiled.cache();
      inputs.window = c.window;
      PlanOptions options = op.options(threads);
      options.layout = KvLayout::kTiles;
      const PlanPtr plan = make_plan_by_bent_costs(forest, options, bend);
      ASSERT_NO_THROW(validate(*plan, inputs));
      Workspace workspace(*plan);
      run_plan(*plan, inputs, workspace, threads, Threading::kReal, seed);
      ASSERT_EQ(oracle.compare(op, op.out,
                               arithmetic_of(isa, config.shape, config.k_type, config.v_type)),
                "");
      ASSERT_EQ(op.out.broken_guards(), "");
    });
    if (HasFatalFailure()) return;
  }
  EXPECT_TRUE(tiled.guards_hold());
}

INSTANTIATE_TEST_SUITE_P(Seeds, Tiled, ::testing::ValuesIn(seeds(60)));

// --- The layout itself ---------------------------------------------------------------------------

TEST(TiledLayout, ElementsLieWhereTheHeaderSays) {
  const HeadShape shape{.q_heads = 2, .kv_heads = 2, .qk_dim = 32, .v_dim = 16};
  for (DType type : {DType::kF32, DType::kF16, DType::kBF16}) {
    SCOPED_TRACE(to_string(type));
    TiledKv tiled(shape, type, 128, 2);
    OperatorConfig config;
    config.shape = shape;
    config.k_type = config.v_type = type;
    OperatorCase op(config, 1, 128, 2, std::vector<bool>(256, true), 3);
    tiled.write(op.kv.cache(), std::vector<bool>(256, true));
    const KvCache& cache = tiled.cache();
    const bool pairs = type == DType::kBF16;
    for (int64_t slot : {0, 1, 63, 64, 127, 128, 193, 255}) {
      for (int32_t head = 0; head < 2; ++head) {
        const auto tile = [&](const KvPlane& plane, int64_t dim) {
          return static_cast<const char*>(plane.data) + slot / 128 * plane.block_stride +
                 head * plane.head_stride + slot % 128 / 64 * 64 * row_bytes(type, dim);
        };
        const int64_t s = slot % 64;
        for (int64_t i = 0; i < shape.qk_dim; ++i) {
          const int64_t at = pairs ? (i / 2 * 64 + s) * 2 + i % 2 : i * 64 + s;
          ASSERT_EQ(decode_element(type, tile(cache.k, shape.qk_dim), at),
                    op.kv.k.decoded(slot, head)[i]);
        }
        for (int64_t i = 0; i < shape.v_dim; ++i) {
          const int64_t at = pairs ? (s / 2 * shape.v_dim + i) * 2 + s % 2 : s * shape.v_dim + i;
          ASSERT_EQ(decode_element(type, tile(cache.v, shape.v_dim), at),
                    op.kv.v.decoded(slot, head)[i]);
        }
      }
    }
  }
}

// --- What is refused -----------------------------------------------------------------------------

std::string message_of(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "";
}

TEST(TiledErrors, PlansSayWhatDoesNotFit) {
  PlanOptions options{.shape = {.q_heads = 2, .kv_heads = 1, .qk_dim = 64, .v_dim = 64},
                      .k_type = DType::kBF16,
                      .v_type = DType::kBF16,
                      .layout = KvLayout::kTiles};
  Forest forest;
  forest.rows = 1;
  forest.spans = {{.slot = 64, .column = 0, .count = 64}, {.slot = 192, .column = 64, .count = 3}};
  forest.row_index = {0};
  forest.segments = {{.span_begin = 0, .span_end = 2, .row_begin = 0, .row_end = 1, .slots = 67}};
  EXPECT_EQ(message_of([&] { make_plan(forest, options); }), "");
  PlanOptions bad = options;
  bad.v_type = DType::kF16;
  EXPECT_NE(message_of([&] { make_plan(forest, bad); }).find("same for K and V"),
            std::string::npos);
  bad = options;
  bad.shape.qk_dim = 72;
  EXPECT_NE(message_of([&] { make_plan(forest, bad); }).find("multiples of 16"), std::string::npos);
  bad = options;
  bad.k_type = bad.v_type = DType::kQ8_0;
  EXPECT_NE(message_of([&] { make_plan(forest, bad); }).find("f32, f16 or bf16"),
            std::string::npos);
  Forest shifted = forest;
  shifted.spans[0].slot = 65;
  EXPECT_NE(message_of([&] { make_plan(shifted, options); }).find("whole tiles"),
            std::string::npos);
  Forest early = forest;
  early.spans[0].count = 63;
  early.segments[0].slots = 66;
  EXPECT_NE(message_of([&] { make_plan(early, options); }).find("whole tiles"), std::string::npos);
}

TEST(TiledErrors, WritingSaysWhatDoesNotFit) {
  const HeadShape shape{.q_heads = 1, .kv_heads = 1, .qk_dim = 32, .v_dim = 32};
  TiledKv tiled(shape, DType::kBF16, 64, 1);
  OperatorConfig config;
  config.shape = shape;
  config.k_type = config.v_type = DType::kF16;
  OperatorCase op(config, 1, 64, 1, std::vector<bool>(64, true), 3);
  EXPECT_NE(message_of([&] {
              tiled.write(op.kv.cache(), std::vector<bool>(64, true));
            }).find("cache's types"),
            std::string::npos);

  KvCache cache = tiled.cache();
  cache.k.slot_stride += 2;
  std::vector<uint16_t> vector(32);
  const ConstRows tokens{
      .type = DType::kBF16, .data = vector.data(), .row_stride = 64, .head_stride = 64};
  const std::vector<int64_t> slots = {0};
  EXPECT_NE(
      message_of([&] { write_kv(cache, shape, tokens, tokens, slots, 0, 1); }).find("slot strides"),
      std::string::npos);
}

}  // namespace
}  // namespace relay::test
