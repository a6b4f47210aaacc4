// The builders: does the forest say exactly who attends what, and is what can be shared read once?
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "core/forest_generator.h"
#include "core/test_env.h"

namespace relay::test {
namespace {

constexpr float kHidden = -std::numeric_limits<float>::infinity();

/// What a forest makes of a row: the inverse of the builders, by the letter of forest.h.
std::vector<AttendedSlot> attended_in(const Forest& forest, uint32_t row, int64_t window,
                                      const Mask* mask) {
  std::vector<AttendedSlot> result;
  for (const Segment& segment : forest.segments) {
    const auto rows = forest.rows_of(segment);
    if (!std::binary_search(rows.begin(), rows.end(), row)) continue;
    for (const Span& span : forest.spans_of(segment)) {
      for (int64_t i = 0; i < span.count; ++i) {
        const AttendedSlot slot = {.slot = span.slot + i, .column = span.column + i};
        if (segment.visibility == Visibility::kPositions) {
          const int64_t at = forest.positions[row];
          if (slot.column > at || (window > 0 && slot.column <= at - window)) continue;
        }
        // A bias without a mask hides everything: the truth will differ.
        if (segment.visibility == Visibility::kBias &&
            (mask == nullptr || mask->at(row, slot.column) == kHidden)) {
          continue;
        }
        result.push_back(slot);
      }
    }
  }
  std::sort(result.begin(), result.end(),
            [](const auto& a, const auto& b) { return a.slot < b.slot; });
  return result;
}

/// Compares a forest with the truth, row by row.
::testing::AssertionResult says(const Forest& forest, int64_t rows, int64_t window,
                                const Mask* mask,
                                const std::function<std::vector<AttendedSlot>(int64_t)>& truth) {
  if (forest.rows != rows) {
    return ::testing::AssertionFailure() << forest.rows << " rows instead of " << rows;
  }
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<AttendedSlot> expected = truth(row);
    std::sort(expected.begin(), expected.end(),
              [](const auto& a, const auto& b) { return a.slot < b.slot; });
    const std::vector<AttendedSlot> actual =
        attended_in(forest, static_cast<uint32_t>(row), window, mask);
    if (actual.size() != expected.size()) {
      return ::testing::AssertionFailure() << "row " << row << " attends " << actual.size()
                                           << " slots instead of " << expected.size();
    }
    for (size_t i = 0; i < actual.size(); ++i) {
      if (actual[i].slot != expected[i].slot || actual[i].column != expected[i].column) {
        return ::testing::AssertionFailure()
               << "row " << row << " attends slot " << actual[i].slot << " as column "
               << actual[i].column << " where slot " << expected[i].slot << " as column "
               << expected[i].column << " is due";
      }
    }
  }
  return ::testing::AssertionSuccess();
}

/// A kAll or kPositions segment over whole rows has no need of a bias it does not consult; a mask
/// with a bias must keep kBias where a visible value is not 0.
::testing::AssertionResult keeps_bias(const Forest& forest, const Mask& mask) {
  for (const Segment& segment : forest.segments) {
    if (segment.visibility == Visibility::kBias) continue;
    for (uint32_t row : forest.rows_of(segment)) {
      for (const Span& span : forest.spans_of(segment)) {
        for (int64_t column = span.column; column < span.column + span.count; ++column) {
          if (mask.at(row, column) != 0) {
            return ::testing::AssertionFailure()
                   << "row " << row << ", column " << column << " has bias " << mask.at(row, column)
                   << " in a segment without";
          }
        }
      }
    }
  }
  return ::testing::AssertionSuccess();
}

// --- Random batches ------------------------------------------------------------------------------

class RandomSharing : public ::testing::TestWithParam<uint64_t> {};

TEST_P(RandomSharing, BuildersTellTheTruth) {
  ForestLimits limits;
  limits.max_slots = 6000;
  limits.max_rows = 128;
  limits.max_attended = 120'000;
  limits.tables_possible = GetParam() % 2 == 0;
  const ForestCase c = generate_forest(GetParam(), limits);
  SCOPED_TRACE(c.describe() + "\n" + repeat_command());
  const auto truth = [&](int64_t row) { return c.attended(row); };

  int64_t stored = 0;
  for (bool used : c.used_slots()) stored += used;
  Forest forest;
  for (Sharing sharing : {Sharing::kOn, Sharing::kOff}) {
    build_from_tree(c, sharing, GetParam(), forest);
    ASSERT_NO_THROW(validate(forest));
    EXPECT_TRUE(says(forest, c.rows(), c.window, nullptr, truth)) << "tree";
    // With sharing, what is stored once is read once: nothing twice, nothing in vain.
    if (sharing == Sharing::kOn) {
      EXPECT_EQ(forest.slots_read(), stored) << "tree";
    }

    if (c.tables_possible) {
      build_from_tables(c, sharing, forest);
      ASSERT_NO_THROW(validate(forest));
      EXPECT_TRUE(says(forest, c.rows(), c.window, nullptr, truth)) << "block tables";
      // Only whole blocks are shared: each request may read one partial block again.
      if (sharing == Sharing::kOn) {
        const int64_t partial = static_cast<int64_t>(c.requests.size()) * (c.block_size - 1);
        EXPECT_LE(forest.slots_read(), stored + partial) << "block tables";
      }
    }

    const Mask mask = mask_of(c, DType::kF16, MaskValues::kZero, GetParam());
    build_from_mask(mask.batch(), sharing, forest);
    ASSERT_NO_THROW(validate(forest));
    EXPECT_TRUE(says(forest, c.rows(), 0, &mask, [&](int64_t row) { return mask.attended(row); }))
        << "mask";
    EXPECT_TRUE(keeps_bias(forest, mask));
    if (sharing == Sharing::kOn) {
      EXPECT_EQ(forest.slots_read(), stored) << "mask";
    }
  }
}

TEST_P(RandomSharing, MasksOfNoTree) {
  const Mask mask = generate_mask(GetParam(), 96, 1500);
  SCOPED_TRACE(repeat_command());
  Forest forest;
  for (Sharing sharing : {Sharing::kOn, Sharing::kOff}) {
    build_from_mask(mask.batch(), sharing, forest);
    ASSERT_NO_THROW(validate(forest));
    EXPECT_TRUE(says(forest, static_cast<int64_t>(mask.streams) * mask.rows_per_stream, 0, &mask,
                     [&](int64_t row) { return mask.attended(row); }));
    EXPECT_TRUE(keeps_bias(forest, mask));
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, RandomSharing, ::testing::ValuesIn(seeds(80)));

// --- Small batches, worked out by hand -----------------------------------------------------------

/// The one segment that these rows, and no others, read; fails if there is none or several.
std::optional<Segment> segment_of(const Forest& forest, const std::vector<uint32_t>& rows) {
  std::optional<Segment> found;
  for (const Segment& segment : forest.segments) {
    const auto its = forest.rows_of(segment);
    if (!std::equal(its.begin(), its.end(), rows.begin(), rows.end())) continue;
    if (found) return std::nullopt;
    found = segment;
  }
  return found;
}

/// Tokens of a batch described by hand: blocks of 4, a prefix of 2 blocks in all tables.
class ThreeRequests : public ::testing::Test {
 protected:
  // Blocks 5 and 2 are shared; the requests have 3, 4 and 6 tokens of their own.
  std::vector<int32_t> table_ = {5, 2, 0, -1, 5, 2, 7, -1, 5, 2, 9, 1};
  std::vector<int32_t> row_offsets_ = {0, 1, 2, 3};
  std::vector<int64_t> kv_lengths_ = {11, 12, 14};
  BlockTables batch_ = {.requests = 3,
                        .row_offsets = row_offsets_,
                        .kv_lengths = kv_lengths_,
                        .table = table_.data(),
                        .table_stride = 4,
                        .block_size = 4};
  Forest forest_;
};

TEST_F(ThreeRequests, PrefixIsOneSegment) {
  build_from_block_tables(batch_, Sharing::kOn, forest_);
  validate(forest_);
  ASSERT_EQ(forest_.segments.size(), 4u);
  const auto prefix = segment_of(forest_, {0, 1, 2});
  ASSERT_TRUE(prefix);
  EXPECT_EQ(prefix->slots, 8);
  EXPECT_EQ(prefix->visibility, Visibility::kAll);
  const auto spans = forest_.spans_of(*prefix);
  ASSERT_EQ(spans.size(), 2u);
  EXPECT_EQ(spans[0], (Span{.slot = 20, .column = 0, .count = 4}));
  EXPECT_EQ(spans[1], (Span{.slot = 8, .column = 4, .count = 4}));
  EXPECT_EQ(segment_of(forest_, {0}).value().slots, 3);
  EXPECT_EQ(segment_of(forest_, {1}).value().slots, 4);
  EXPECT_EQ(segment_of(forest_, {2}).value().slots, 6);
  EXPECT_EQ(forest_.slots_read(), 8 + 13);
  EXPECT_EQ(forest_.slots_attended(), 3 * 8 + 13);
  EXPECT_EQ(forest_.positions, (std::vector<int64_t>{10, 11, 13}));
}

TEST_F(ThreeRequests, BlocksSideBySideAreOneSpan) {
  for (const size_t i : {1, 5, 9}) table_[i] = 6;  // behind block 5
  build_from_block_tables(batch_, Sharing::kOn, forest_);
  const auto prefix = segment_of(forest_, {0, 1, 2});
  ASSERT_TRUE(prefix);
  const auto spans = forest_.spans_of(*prefix);
  ASSERT_EQ(spans.size(), 1u);
  EXPECT_EQ(spans[0].slot, 20);
  EXPECT_EQ(spans[0].count, 8);
}

TEST_F(ThreeRequests, SharingOffReadsEachRequestAlone) {
  build_from_block_tables(batch_, Sharing::kOff, forest_);
  validate(forest_);
  EXPECT_EQ(forest_.slots_read(), 3 * 8 + 13);
  EXPECT_EQ(forest_.slots_attended(), 3 * 8 + 13);
  for (const Segment& segment : forest_.segments) EXPECT_EQ(segment.rows(), 1u);
}

TEST_F(ThreeRequests, PartialBlocksAreNotShared) {
  // Requests 0 and 1 hold equal ids in the third block, but 1 has written one token more.
  table_[6] = 0;
  for (bool causal : {true, false}) {  // without positions nothing else hides the block's rest
    batch_.causal = causal;
    build_from_block_tables(batch_, Sharing::kOn, forest_);
    validate(forest_);
    EXPECT_EQ(attended_in(forest_, 0, 0, nullptr).size(), 11u);
    EXPECT_EQ(attended_in(forest_, 1, 0, nullptr).size(), 12u);
  }
}

TEST_F(ThreeRequests, WindowLeavesThePrefixBehind) {
  batch_.window = 4;  // columns 7..10, 8..11, 10..13
  build_from_block_tables(batch_, Sharing::kOn, forest_);
  validate(forest_);
  EXPECT_EQ(forest_.slots_read(), 1 + 3 + 4 + 4) << "reads what no row can see";
}

TEST_F(ThreeRequests, PrefillChunkIsCausal) {
  // Request 1 is being read in: its last 3 tokens are query rows.
  row_offsets_ = {0, 1, 4, 5};
  build_from_block_tables(batch_, Sharing::kOn, forest_);
  validate(forest_);
  EXPECT_EQ(forest_.rows, 5);
  EXPECT_EQ(forest_.positions, (std::vector<int64_t>{10, 9, 10, 11, 13}));
  const auto prefix = segment_of(forest_, {0, 1, 2, 3, 4});
  ASSERT_TRUE(prefix);
  EXPECT_EQ(prefix->slots, 8);
  EXPECT_EQ(prefix->visibility, Visibility::kAll);
  for (uint32_t row = 1; row <= 3; ++row) {
    EXPECT_EQ(attended_in(forest_, row, 0, nullptr).size(), 9u + row);
  }
}

TEST_F(ThreeRequests, RequestsWithoutRowsAreNotRead) {
  row_offsets_ = {0, 1, 1, 2};
  build_from_block_tables(batch_, Sharing::kOn, forest_);
  validate(forest_);
  EXPECT_EQ(forest_.rows, 2);
  EXPECT_EQ(forest_.slots_read(), 8 + 3 + 6);
}

TEST_F(ThreeRequests, NotCausal) {
  batch_.causal = false;
  row_offsets_ = {0, 1, 4, 5};
  build_from_block_tables(batch_, Sharing::kOn, forest_);
  validate(forest_);
  for (uint32_t row = 1; row <= 3; ++row) {
    EXPECT_EQ(attended_in(forest_, row, 0, nullptr).size(), 12u);
  }
}

TEST_F(ThreeRequests, RefusesBrokenTables) {
  const auto refused = [&](const std::function<void()>& change) {
    const auto table = table_;
    const auto row_offsets = row_offsets_;
    const auto kv_lengths = kv_lengths_;
    const BlockTables batch = batch_;
    change();
    EXPECT_THROW(build_from_block_tables(batch_, Sharing::kOn, forest_), Error);
    std::copy(table.begin(), table.end(), table_.begin());
    std::copy(row_offsets.begin(), row_offsets.end(), row_offsets_.begin());
    std::copy(kv_lengths.begin(), kv_lengths.end(), kv_lengths_.begin());
    batch_ = batch;
  };
  refused([&] { batch_.block_size = 0; });
  refused([&] { batch_.block_size = INT64_MAX / 4; });  // block 5 is beyond all numbers
  refused([&] { batch_.window = -1; });
  refused([&] { batch_.table = nullptr; });
  refused([&] { batch_.requests = -1; });
  refused([&] { batch_.row_offsets = batch_.row_offsets.first(3); });
  refused([&] { batch_.kv_lengths = batch_.kv_lengths.first(2); });
  refused([&] { row_offsets_[1] = 3; });  // then descends
  refused([&] { row_offsets_[0] = 1; });
  refused([&] { kv_lengths_[0] = 0; });   // fewer tokens than rows
  refused([&] { kv_lengths_[2] = 17; });  // longer than the table
  refused([&] { table_[1] = -2; });
  EXPECT_NO_THROW(build_from_block_tables(batch_, Sharing::kOn, forest_));
}

TEST(TwoLevels, EachLevelIsReadOnce) {
  // System prompt [0, 8), documents A [8, 12) and B [12, 18); rows 0, 3 ask about A, 1, 2 about B.
  const std::vector<TreeNode> nodes = {
      {-1, {{0, 0, 8}}},  {0, {{8, 8, 4}}},   {0, {{12, 8, 6}}},  {1, {{20, 12, 1}}},
      {2, {{21, 14, 1}}}, {2, {{22, 14, 2}}}, {1, {{24, 12, 3}}},
  };
  const std::vector<int32_t> leaf_of_row = {3, 4, 5, 6};
  Forest forest;
  build_from_tree({.nodes = nodes, .leaf_of_row = leaf_of_row, .position_of_row = {}}, Sharing::kOn,
                  forest);
  validate(forest);
  ASSERT_EQ(forest.segments.size(), 7u);
  EXPECT_EQ(segment_of(forest, {0, 1, 2, 3}).value().slots, 8);
  EXPECT_EQ(segment_of(forest, {0, 3}).value().slots, 4);
  EXPECT_EQ(segment_of(forest, {1, 2}).value().slots, 6);
  EXPECT_EQ(segment_of(forest, {2}).value().slots, 2);
  EXPECT_EQ(forest.slots_read(), 8 + 4 + 6 + 1 + 1 + 2 + 3);
  EXPECT_EQ(forest.slots_attended(), 4 * 8 + 2 * 4 + 2 * 6 + 7);
  build_from_tree({.nodes = nodes, .leaf_of_row = leaf_of_row, .position_of_row = {}},
                  Sharing::kOff, forest);
  validate(forest);
  EXPECT_EQ(forest.slots_read(), 4 * 8 + 2 * 4 + 2 * 6 + 7);
}

TEST(TwoLevels, BlockTablesFindThemToo) {
  // Blocks of 2: [1 2 | 3 | own], [1 2 | 3 | own], [1 2 | 4 | own], and a stranger.
  const std::vector<int32_t> table = {1, 2, 3, 5, 1, 2, 3, 6, 1, 2, 4, 7, 8, 9, 10, 11};
  const std::vector<int32_t> row_offsets = {0, 1, 2, 3, 4};
  const std::vector<int64_t> kv_lengths = {7, 8, 7, 8};
  Forest forest;
  build_from_block_tables({.requests = 4,
                           .row_offsets = row_offsets,
                           .kv_lengths = kv_lengths,
                           .table = table.data(),
                           .table_stride = 4,
                           .block_size = 2},
                          Sharing::kOn, forest);
  validate(forest);
  EXPECT_EQ(segment_of(forest, {0, 1, 2}).value().slots, 4);
  EXPECT_EQ(segment_of(forest, {0, 1}).value().slots, 2);
  EXPECT_EQ(segment_of(forest, {3}).value().slots, 8);
  EXPECT_EQ(forest.slots_read(), 4 + 2 + 1 + 2 + (2 + 1) + 8);
}

TEST(DisjointGroups, TwoPromptsInOneBatch) {
  const std::vector<TreeNode> nodes = {{-1, {{0, 0, 5}}}, {-1, {{5, 0, 7}}}};
  const std::vector<int32_t> leaf_of_row = {1, 0, 1, 0, -1};
  Forest forest;
  build_from_tree({.nodes = nodes, .leaf_of_row = leaf_of_row, .position_of_row = {}}, Sharing::kOn,
                  forest);
  validate(forest);
  EXPECT_EQ(segment_of(forest, {1, 3}).value().slots, 5);
  EXPECT_EQ(segment_of(forest, {0, 2}).value().slots, 7);
  EXPECT_EQ(forest.slots_read(), 12);
  EXPECT_TRUE(attended_in(forest, 4, 0, nullptr).empty());
}

TEST(TreeBuilder, RefusesBrokenTrees) {
  Forest forest;
  const std::vector<int32_t> leaf = {0};
  const std::vector<int64_t> positions = {0, 1};
  const auto build = [&](const std::vector<TreeNode>& nodes, std::vector<int32_t> leaves,
                         std::span<const int64_t> position_of_row = {}, int64_t window = 0) {
    build_from_tree({.nodes = nodes,
                     .leaf_of_row = leaves,
                     .position_of_row = position_of_row,
                     .window = window},
                    Sharing::kOn, forest);
  };
  EXPECT_NO_THROW(build({{-1, {{0, 0, 1}}}}, {0}));
  EXPECT_THROW(build({{0, {{0, 0, 1}}}}, {0}), Error) << "its own parent";
  EXPECT_THROW(build({{1, {}}, {-1, {}}}, {0}), Error) << "child before parent";
  EXPECT_THROW(build({{-2, {}}}, {0}), Error);
  EXPECT_THROW(build({{-1, {}}}, {1}), Error) << "no such leaf";
  EXPECT_THROW(build({{-1, {}}}, {-2}), Error);
  EXPECT_THROW(build({{-1, {}}}, {0}, positions), Error) << "two positions for one row";
  EXPECT_THROW(build({{-1, {}}}, {0}, {}, -1), Error) << "negative window";
}

TEST(TreeBuilder, AnOnlyChildGoesOnWhereItsNodeEnds) {
  const std::vector<TreeNode> nodes = {{-1, {{0, 0, 8}}}, {0, {{8, 8, 4}}}, {1, {{20, 12, 2}}}};
  const std::vector<int32_t> leaf_of_row = {2, 2};
  Forest forest;
  build_from_tree({.nodes = nodes, .leaf_of_row = leaf_of_row, .position_of_row = {}}, Sharing::kOn,
                  forest);
  validate(forest);
  ASSERT_EQ(forest.segments.size(), 1u);
  EXPECT_EQ(forest.segments[0].slots, 14);
}

TEST(MaskBuilder, FindsTheSharedPrompt) {
  // A prompt of 128 cells, then 3 requests whose cells take turns; a fourth row sees nothing.
  Mask mask = make_mask(DType::kF16, 4, 1, 192);
  for (int64_t row = 0; row < 3; ++row) {
    for (int64_t column = 0; column < 128; ++column) mask.set(row, column, 0);
    for (int64_t column = 128 + row; column < 188; column += 3) mask.set(row, column, 0);
  }
  mask.set(1, 5, -0.0F);  // no bias either
  Forest forest;
  build_from_mask(mask.batch(), Sharing::kOn, forest);
  validate(forest);
  const auto prompt = segment_of(forest, {0, 1, 2});
  ASSERT_TRUE(prompt);
  EXPECT_EQ(prompt->slots, 128);
  EXPECT_EQ(prompt->visibility, Visibility::kAll);
  EXPECT_EQ(forest.slots_read(), 128 + 60);
  EXPECT_TRUE(says(forest, 4, 0, &mask, [&](int64_t row) { return mask.attended(row); }));
}

TEST(MaskBuilder, WithoutSharingTheRowsOfARequestStillReadTogether) {
  Mask mask = make_mask(DType::kF16, 6, 1, 128);  // two requests of three causal rows
  for (int64_t row = 0; row < 6; ++row) {
    for (int64_t column = 0; column < 64; ++column) mask.set(row, column, 0);
    for (int64_t i = 0; i <= row % 3; ++i) mask.set(row, 64 + row / 3 * 10 + i, 0);
  }
  Forest forest;
  build_from_mask(mask.batch(), Sharing::kOff, forest);
  validate(forest);
  EXPECT_EQ(forest.slots_read(), 2 * (64 + 3));
  EXPECT_TRUE(says(forest, 6, 0, &mask, [&](int64_t row) { return mask.attended(row); }));
}

TEST(MaskBuilder, TheStairsOfACausalPromptAreGathered) {
  Mask mask = make_mask(DType::kF16, 32, 1, 64);
  for (int64_t row = 0; row < 32; ++row) {
    for (int64_t column = 0; column <= row; ++column) mask.set(row, column, 0);
  }
  Forest forest;
  build_from_mask(mask.batch(), Sharing::kOn, forest);
  validate(forest);
  EXPECT_LE(forest.segments.size(), 2u);
  EXPECT_EQ(forest.slots_read(), 32);
  EXPECT_TRUE(says(forest, 32, 0, &mask, [&](int64_t row) { return mask.attended(row); }));
}

TEST(MaskBuilder, NoMaskMeansAllVisible) {
  const MaskBatch batch = {.rows_per_stream = 3, .streams = 2, .columns = 5, .slots_per_block = 8};
  Forest forest;
  for (Sharing sharing : {Sharing::kOn, Sharing::kOff}) {
    build_from_mask(batch, sharing, forest);
    validate(forest);
    EXPECT_EQ(forest.slots_read(), sharing == Sharing::kOn ? 10 : 30);
    EXPECT_TRUE(says(forest, 6, 0, nullptr, [](int64_t row) {
      std::vector<AttendedSlot> all;
      for (int64_t c = 0; c < 5; ++c) all.push_back({row / 3 * 8 + c, c});
      return all;
    }));
  }
}

TEST(MaskBuilder, AllHiddenReadsNothing) {
  const Mask mask = make_mask(DType::kF32, 5, 2, 70);
  Forest forest;
  build_from_mask(mask.batch(), Sharing::kOn, forest);
  validate(forest);
  EXPECT_EQ(forest.rows, 10);
  EXPECT_EQ(forest.slots_read(), 0);
}

TEST(MaskBuilder, RefusesBrokenMasks) {
  const Mask mask = make_mask(DType::kF32, 2, 2, 8);
  Forest forest;
  MaskBatch batch = mask.batch();
  batch.type = DType::kBF16;
  EXPECT_THROW(build_from_mask(batch, Sharing::kOn, forest), Error);
  batch = mask.batch();
  batch.columns = -1;
  EXPECT_THROW(build_from_mask(batch, Sharing::kOn, forest), Error);
  batch = mask.batch();
  batch.slots_per_block = 7;
  EXPECT_THROW(build_from_mask(batch, Sharing::kOn, forest), Error);
}

// --- validate() ----------------------------------------------------------------------------------

class BrokenForest : public ::testing::Test {
 protected:
  BrokenForest() {
    const std::vector<TreeNode> nodes = {{-1, {{0, 0, 4}, {8, 4, 2}}}, {0, {{4, 6, 3}}}};
    const std::vector<int32_t> leaf_of_row = {0, 1, 1};
    const std::vector<int64_t> position_of_row = {5, 7, 8};
    build_from_tree(
        {.nodes = nodes, .leaf_of_row = leaf_of_row, .position_of_row = position_of_row},
        Sharing::kOn, forest_);
  }
  void expect_broken(const char* how) { EXPECT_THROW(validate(forest_), Error) << how; }

  Forest forest_;
};

TEST_F(BrokenForest, IsWholeAtFirst) {
  EXPECT_NO_THROW(validate(forest_));
  ASSERT_GE(forest_.segments.size(), 2u);
}
TEST_F(BrokenForest, SpanRangeBeyondTheEnd) {
  forest_.segments[0].span_end = static_cast<uint32_t>(forest_.spans.size()) + 1;
  expect_broken("span_end");
}
TEST_F(BrokenForest, SpanRangeBackwards) {
  std::swap(forest_.segments[0].span_begin, forest_.segments[0].span_end);
  expect_broken("span_begin > span_end");
}
TEST_F(BrokenForest, RowRangeBeyondTheEnd) {
  forest_.segments[0].row_end = static_cast<uint32_t>(forest_.row_index.size()) + 1;
  expect_broken("row_end");
}
TEST_F(BrokenForest, WrongSum) {
  ++forest_.segments[0].slots;
  expect_broken("slots");
}
TEST_F(BrokenForest, EmptySpan) {
  forest_.segments[0].slots -= forest_.spans[0].count;
  forest_.spans[0].count = 0;
  expect_broken("count 0");
}
TEST_F(BrokenForest, NegativeSlot) {
  forest_.spans[0].slot = -1;
  expect_broken("slot -1");
}
TEST_F(BrokenForest, RowOutOfRange) {
  forest_.row_index.back() = 3;
  expect_broken("row 3 of 3");
}
TEST_F(BrokenForest, RowsNotAscending) {
  std::swap(forest_.row_index[0], forest_.row_index[1]);
  expect_broken("rows descend");
}
TEST_F(BrokenForest, RowTwice) {
  forest_.row_index[1] = forest_.row_index[0];
  expect_broken("row twice");
}
TEST_F(BrokenForest, RowAttendsASlotTwice) {
  for (Span& span : forest_.spans) span.slot = 0;
  expect_broken("overlapping spans");
}
TEST_F(BrokenForest, RowAttendsOneSlotTwice) {
  for (Span& span : forest_.spans) {
    if (span.slot == 4) span.slot = 3;
  }
  expect_broken("spans that overlap by one slot");
}
TEST_F(BrokenForest, OverlapAcrossSegments) {
  Segment again = forest_.segments[0];
  forest_.segments.push_back(again);
  expect_broken("the same segment twice");
}
TEST_F(BrokenForest, PositionsOfAnotherSize) {
  forest_.positions.pop_back();
  expect_broken("positions");
}
TEST_F(BrokenForest, PositionsMissing) {
  for (Segment& segment : forest_.segments) segment.visibility = Visibility::kPositions;
  forest_.positions.clear();
  expect_broken("kPositions without positions");
}
TEST_F(BrokenForest, NegativeRows) {
  forest_.rows = -1;
  expect_broken("rows -1");
}

TEST(SharingFromEnv, OnOffAndNothingElse) {
  const char* before = std::getenv("RELAY_SHARING");
  const std::string saved = before ? before : "";
  unsetenv("RELAY_SHARING");
  EXPECT_EQ(sharing_from_env(), Sharing::kOn);
  setenv("RELAY_SHARING", "off", 1);
  EXPECT_EQ(sharing_from_env(), Sharing::kOff);
  setenv("RELAY_SHARING", "on", 1);
  EXPECT_EQ(sharing_from_env(), Sharing::kOn);
  setenv("RELAY_SHARING", "0", 1);
  EXPECT_THROW(sharing_from_env(), Error);
  before ? setenv("RELAY_SHARING", saved.c_str(), 1) : unsetenv("RELAY_SHARING");
}

}  // namespace
}  // namespace relay::test
