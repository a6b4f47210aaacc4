// What is folded, by costs that are the same on any machine.
#include "cpu/plan/fold.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/plan/plan.h"
#include "cpu/plan/plan_cases.h"

namespace relay {
namespace {

const HeadShape kMha = {.q_heads = 32, .kv_heads = 32, .qk_dim = 128, .v_dim = 128};
const HeadShape kGqa = {.q_heads = 32, .kv_heads = 8, .qk_dim = 128, .v_dim = 128};

Forest folded(const Forest& forest, const PlanOptions& options, const CostModel& costs) {
  FoldScratch scratch;
  Forest out;
  fold_short_segments(forest, options, costs, scratch, out);
  validate(out);
  return out;
}
Forest folded(const Case& c) { return folded(c.forest, c.options, costs_of(c.options)); }

/// The costs of a machine where a partial result costs so many times as much.
CostModel with_results(const PlanOptions& options, double times) {
  CostModel costs = costs_of(options);
  costs.item *= times;
  costs.state *= times;
  costs.store *= times;
  costs.merge *= times;
  return costs;
}

/// For each row what it attends and how: (slot, column, visibility), sorted.
using Attended = std::vector<std::vector<std::tuple<int64_t, int64_t, Visibility>>>;
Attended attended(const Forest& forest) {
  Attended rows(static_cast<size_t>(forest.rows));
  for (const Segment& segment : forest.segments) {
    for (uint32_t row : forest.rows_of(segment)) {
      for (const Span& span : forest.spans_of(segment)) {
        for (int64_t i = 0; i < span.count; ++i) {
          rows[row].emplace_back(span.slot + i, span.column + i, segment.visibility);
        }
      }
    }
  }
  for (auto& row : rows) std::sort(row.begin(), row.end());
  return rows;
}

/// Whether they consist of the same segments.
bool same(const Forest& a, const Forest& b) {
  return std::equal(a.segments.begin(), a.segments.end(), b.segments.begin(), b.segments.end(),
                    [&](const Segment& x, const Segment& y) {
                      return x.slots == y.slots && x.visibility == y.visibility &&
                             std::ranges::equal(a.rows_of(x), b.rows_of(y)) &&
                             std::ranges::equal(a.spans_of(x), b.spans_of(y));
                    });
}

/// A tree of decode rows: node i hangs below parents[i] and has sizes[i] slots; row r ends at
/// leaves[r].
Forest tree(const std::vector<int32_t>& parents, const std::vector<int64_t>& sizes,
            const std::vector<int32_t>& leaves) {
  std::vector<TreeNode> nodes;
  std::vector<int64_t> ends;
  int64_t slot = 0;
  for (size_t i = 0; i < parents.size(); ++i) {
    const int64_t column = parents[i] < 0 ? 0 : ends[static_cast<size_t>(parents[i])];
    nodes.push_back({.parent = parents[i], .spans = {{slot, column, sizes[i]}}});
    ends.push_back(column + sizes[i]);
    slot += sizes[i];
  }
  Forest forest;
  build_from_tree({.nodes = nodes, .leaf_of_row = leaves, .position_of_row = {}}, Sharing::kOn,
                  forest);
  return forest;
}

std::vector<int64_t> slots_of(const Forest& forest) {
  std::vector<int64_t> slots;
  for (const Segment& segment : forest.segments) slots.push_back(segment.slots);
  return slots;
}

TEST(Fold, AShortPrefixIsReadByEachRequestAsWithoutSharing) {
  for (const HeadShape& shape : {kMha, kGqa}) {
    for (int32_t batch : {2, 8, 32}) {
      const Case on = make_case("", shape, DType::kF16, 4, batch, 128, Batch::kShared);
      const Case off = make_case("", shape, DType::kF16, 4, batch, 128, Batch::kApart);
      EXPECT_TRUE(same(folded(on), off.forest)) << batch;
    }
  }
}

TEST(Fold, ALongPrefixIsShared) {
  for (const HeadShape& shape : {kMha, kGqa}) {
    for (int32_t batch : {8, 32}) {
      const Case c = make_case("", shape, DType::kF16, 2048, batch, 128, Batch::kShared);
      EXPECT_TRUE(same(folded(c), c.forest)) << batch;
    }
  }
}

/// The shortest prefix that is shared, if all longer ones are.
int64_t least_shared(const HeadShape& shape, DType type, int32_t batch) {
  int64_t least = 0;
  for (int64_t prefix = 8; prefix <= 2048; prefix += 8) {
    const Case c = make_case("", shape, type, prefix, batch, 128, Batch::kShared);
    const bool shared = same(folded(c), c.forest);
    EXPECT_EQ(folded(c).segments.size(), static_cast<size_t>(batch) + (shared ? 1 : 0));
    if (shared && least == 0) least = prefix;
    EXPECT_EQ(shared, least > 0) << prefix;
  }
  return least;
}

TEST(Fold, TheThresholdIsHigherWhereAKvHeadHasMoreQueryHeads) {
  // Each of them has a partial result, but the KV is read once for all. Measured: some 16 slots
  // for one query head, and 64 to 128 for four.
  for (DType type : {DType::kF16, DType::kBF16}) {
    for (int32_t batch : {8, 32}) {
      const int64_t mha = least_shared(kMha, type, batch);
      const int64_t gqa = least_shared(kGqa, type, batch);
      EXPECT_GT(mha, 8) << batch;
      EXPECT_LE(mha, 32) << batch;
      EXPECT_GE(gqa, 2 * mha) << batch;
      EXPECT_LE(gqa, 256) << batch;
    }
  }
}

TEST(Fold, MoreReadersMakeSharingPayEarlier) {
  EXPECT_LT(least_shared(kGqa, DType::kF16, 32), least_shared(kGqa, DType::kF16, 4));
  EXPECT_LE(least_shared(kMha, DType::kF16, 32), least_shared(kMha, DType::kF16, 2));
}

TEST(Fold, WhatDoesNotFitTheCacheIsShared) {
  // Were unpacking free, sharing would save nothing but reads from memory.
  const Case c = make_case("", kGqa, DType::kF16, 1024, 8, 128, Batch::kShared);
  const Case longer = make_case("", kGqa, DType::kF16, 1032, 8, 128, Batch::kShared);
  CostModel costs = costs_of(c.options);
  costs.few.slot = costs.many.slot = 0;
  costs.many.row = costs.few.row *= 2;  // products take nearly as long as reading from memory
  EXPECT_FALSE(same(folded(c.forest, c.options, costs), c.forest));
  EXPECT_TRUE(same(folded(longer.forest, c.options, costs), longer.forest)) << "too long to fold";
  costs.last_cache_bytes = int64_t{4} << 20;
  EXPECT_TRUE(same(folded(c.forest, c.options, costs), c.forest));
}

TEST(Fold, OneRequestKeepsItsForest) {
  for (int64_t context : {16, 512}) {
    const Case decode = make_case("", kGqa, DType::kF16, 16, 1, context, Batch::kShared);
    EXPECT_TRUE(same(folded(decode), decode.forest));
  }
  const Case prefill = make_case("", kGqa, DType::kF16, 16, 1, 128, Batch::kPrefill);
  EXPECT_TRUE(same(folded(prefill), prefill.forest));
}

TEST(Fold, SeveralLevels) {
  const PlanOptions options = {.shape = kMha, .k_type = DType::kBF16, .v_type = DType::kBF16};
  // A root, eight nodes below it with two requests each.
  const auto forest_of = [](int64_t root, int64_t middle) {
    std::vector<int32_t> parents = {-1};
    std::vector<int64_t> sizes = {root};
    for (int node = 0; node < 8; ++node) {
      parents.push_back(0);
      sizes.push_back(middle);
    }
    std::vector<int32_t> leaves;
    for (int32_t request = 0; request < 16; ++request) {
      leaves.push_back(static_cast<int32_t>(parents.size()));
      parents.push_back(1 + request / 2);
      sizes.push_back(128);
    }
    return tree(parents, sizes, leaves);
  };
  const auto levels = [&](int64_t root, int64_t middle) {
    const Forest before = forest_of(root, middle);
    const Forest after = folded(before, options, costs_of(options));
    EXPECT_EQ(attended(after), attended(before));
    return slots_of(after);
  };
  // Segments of the root, the middle and the requests.
  const auto expected = [](std::vector<int64_t> root, const std::vector<int64_t>& middle,
                           int64_t own) {
    for (int64_t slots : middle) root.insert(root.end(), 8, slots);
    root.insert(root.end(), 16, own);
    return root;
  };
  EXPECT_EQ(levels(512, 512), expected({512}, {512}, 128)) << "all pay";
  EXPECT_EQ(levels(8, 512), expected({}, {520}, 128)) << "the root goes one level down";
  EXPECT_EQ(levels(512, 8), expected({512}, {}, 136)) << "the middle goes to the requests";
  EXPECT_EQ(levels(8, 8), expected({}, {}, 144)) << "all of it goes to the requests";
}

TEST(Fold, RowsWithNothingBelowStay) {
  // Two of four requests have nothing of their own.
  const Forest forest = tree({-1, 0, 0}, {8, 100, 100}, {0, 1, 0, 2});
  const PlanOptions options = {.shape = kMha, .k_type = DType::kF16, .v_type = DType::kF16};
  const Forest after = folded(forest, options, costs_of(options));
  EXPECT_EQ(slots_of(after), (std::vector<int64_t>{8, 108, 108}));
  EXPECT_EQ(after.segments[0].rows(), 2u);
  EXPECT_EQ(attended(after), attended(forest));
}

TEST(Fold, OneOfManyMayGoAlone) {
  // 300 rows of one request and three decoding ones: the prefix pays for neither, but the large one
  // has its own segment of the same kind to go to.
  std::vector<int32_t> leaves(300, 1);
  leaves.insert(leaves.end(), {0, 0, 0});
  const Forest forest = tree({-1, 0}, {64, 256}, leaves);
  const PlanOptions options = {.shape = kGqa, .k_type = DType::kF16, .v_type = DType::kF16};
  const Forest after = folded(forest, options, costs_of(options));
  EXPECT_EQ(slots_of(after), (std::vector<int64_t>{64, 320}));
  EXPECT_EQ(after.segments[0].rows(), 3u);
  EXPECT_EQ(attended(after), attended(forest));
}

TEST(Fold, OnlySegmentsOfOneKindAreJoined) {
  Forest forest = tree({-1, 0, 0}, {8, 100, 100}, {1, 2});
  const PlanOptions options = {.shape = kMha, .k_type = DType::kF16, .v_type = DType::kF16};
  const CostModel costs = with_results(options, 1e6);
  forest.positions = {200, 200};
  for (Visibility of_prefix : {Visibility::kAll, Visibility::kPositions, Visibility::kBias}) {
    for (Visibility own : {Visibility::kAll, Visibility::kPositions, Visibility::kBias}) {
      forest.segments[0].visibility = of_prefix;
      forest.segments[1].visibility = own;
      forest.segments[2].visibility = own;
      EXPECT_EQ(folded(forest, options, costs).segments.size(), of_prefix == own ? 2u : 3u);
    }
  }
}

TEST(Fold, ColumnsOfCausalSegmentsKeepAscending) {
  Forest forest = tree({-1, 0, 0}, {8, 100, 100}, {1, 2});
  const PlanOptions options = {.shape = kMha, .k_type = DType::kF16, .v_type = DType::kF16};
  const CostModel costs = with_results(options, 1e6);
  forest.positions = {200, 200};
  for (Segment& segment : forest.segments) segment.visibility = Visibility::kPositions;
  EXPECT_EQ(folded(forest, options, costs).segments.size(), 2u);
  forest.spans[forest.segments[0].span_begin].column = 300;  // behind what is below
  EXPECT_EQ(folded(forest, options, costs).segments.size(), 3u);
}

TEST(Fold, OfTilesWholeOnesOnly) {
  for (int64_t prefix : {64, 100}) {
    const Case c =
        make_case("", kMha, DType::kBF16, prefix, 4, 128, Batch::kShared, KvLayout::kTiles);
    const CostModel costs = with_results(c.options, 1e6);
    const bool whole = prefix % kTileSlots == 0;
    EXPECT_EQ(folded(c.forest, c.options, costs).segments.size(), whole ? 4u : 5u) << prefix;
  }
}

TEST(Fold, CountersSayWhatIsRead) {
  const Case c = make_case("", kGqa, DType::kF16, 16, 8, 100, Batch::kShared);
  Plan plan;
  remake_plan(plan, c.forest, c.options, costs_of(c.options));
  const PlanSummary summary = summarize(plan);
  EXPECT_EQ(summary.kv_slots_read, 8 * 116);
  EXPECT_EQ(summary.kv_slots_attended, 8 * 116);
  EXPECT_EQ(summary.partials, 0);
}

TEST(Fold, RandomForestsAttendTheSame) {
  // Rows of nested and of crossing sets, all kinds of segments.
  std::mt19937 random(11);
  const auto below = [&](int n) { return static_cast<int>(random() % static_cast<uint32_t>(n)); };
  int changed = 0;
  FoldScratch scratch;  // kept from one to the next, as a plan does
  Forest after;
  for (int round = 0; round < 400; ++round) {
    Forest forest;
    forest.rows = 1 + below(12);
    for (int32_t row = 0; row < forest.rows; ++row) forest.positions.push_back(below(5000));
    int64_t slot = 0;
    for (int s = 0; s < 8; ++s) {
      Segment segment;
      const auto first = static_cast<uint32_t>(below(forest.rows));
      const auto last = first + 1 + static_cast<uint32_t>(below(forest.rows - int(first)));
      segment.span_begin = static_cast<uint32_t>(forest.spans.size());
      segment.row_begin = static_cast<uint32_t>(forest.row_index.size());
      for (uint32_t row = first; row < last; ++row) forest.row_index.push_back(row);
      for (int span = 0; span <= below(3); ++span) {
        const int64_t count = 1 + below(60);
        forest.spans.push_back({slot, slot, count});
        segment.slots += count;
        slot += count + below(2) * 10;
      }
      segment.span_end = static_cast<uint32_t>(forest.spans.size());
      segment.row_end = static_cast<uint32_t>(forest.row_index.size());
      segment.visibility = std::vector{Visibility::kAll, Visibility::kAll, Visibility::kPositions,
                                       Visibility::kBias}[static_cast<size_t>(below(4))];
      forest.segments.push_back(segment);
    }
    const PlanOptions options = {.shape = below(2) == 0 ? kMha : kGqa};
    const CostModel costs = with_results(options, std::vector{0.1, 1.0, 100.0}[round % 3]);
    fold_short_segments(forest, options, costs, scratch, after);
    ASSERT_NO_THROW(validate(after)) << round;
    ASSERT_EQ(attended(after), attended(forest)) << round;
    ASSERT_EQ(after.positions, forest.positions);
    ASSERT_EQ(after.slots_attended(), forest.slots_attended());
    ASSERT_TRUE(same(after, folded(forest, options, costs))) << "a function of its arguments";
    changed += !same(after, forest);
  }
  EXPECT_GT(changed, 100);
}

}  // namespace
}  // namespace relay
