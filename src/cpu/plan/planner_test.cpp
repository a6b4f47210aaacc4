// Plans by a fixed cost model, and what is predicted of them: no clock is read here.
#include "cpu/plan/planner.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cpu/plan/cost_model.h"
#include "cpu/plan/merge_tree.h"
#include "cpu/plan/plan.h"
#include "cpu/plan/plan_cases.h"
#include "cpu/plan/schedule.h"
#include "relay/forest.h"

namespace relay {
namespace {

std::vector<Case> realistic_cases() {
  struct Named {
    const char* name;
    HeadShape shape;
  };
  const Named shapes[] = {
      {"1B", {.q_heads = 32, .kv_heads = 8, .qk_dim = 64, .v_dim = 64}},
      {"7B", {.q_heads = 32, .kv_heads = 32, .qk_dim = 128, .v_dim = 128}},
      {"8B", {.q_heads = 32, .kv_heads = 8, .qk_dim = 128, .v_dim = 128}},
  };
  struct Stored {
    DType type;
    KvLayout layout;
  };
  const Stored stored[] = {{DType::kF16, KvLayout::kRows},
                           {DType::kBF16, KvLayout::kRows},
                           {DType::kBF16, KvLayout::kTiles}};
  std::vector<Case> cases;
  for (const Named& s : shapes) {
    for (const Stored& kv : stored) {
      for (int64_t prefix : {512, 2048, 4096, 16384}) {
        for (int32_t batch : {1, 2, 5, 8, 16, 32, 64}) {
          for (int64_t context : {16, 128, 512, 0}) {
            for (Batch kind : {Batch::kShared, Batch::kApart, Batch::kPrefill}) {
              // A tree's node that grows row by row is cut where no tile begins.
              const bool cut_anywhere = kv.layout == KvLayout::kRows;
              if (kind == Batch::kPrefill && (context != 128 || !cut_anywhere)) continue;
              cases.push_back(
                  make_case(s.name, s.shape, kv.type, prefix, batch, context, kind, kv.layout));
            }
          }
        }
      }
    }
  }
  return cases;
}

PlanPtr plan_of(const Case& c, int32_t threads) {
  PlanOptions options = c.options;
  options.threads = threads;
  PlanPtr plan(new Plan);
  remake_plan(*plan, c.forest, options, costs_of(options));
  return plan;
}

/// Seconds of all items, uncut, at the memory speed that a thread has beside so many.
double bare_seconds(const Case& c, int32_t threads) {
  PlanOptions options = c.options;
  options.threads = threads;
  const CostModel costs = costs_of(options);
  options.threads = 1;
  PlanPtr plan(new Plan);
  remake_plan(*plan, c.forest, options, costs);
  return simulate(*plan).busy;
}

bool in_tiles(const Case& c) { return c.options.layout == KvLayout::kTiles; }

/// Below that a thread has a few dozen slots, and their number decides: 5 % are less than the least
/// that it can have more than another.
bool is_tiny(const Schedule& schedule) { return schedule.seconds < 50e-6; }

TEST(Balance, EightThreadsIdleUnderFivePercent) {
  double sum = 0;
  const std::vector<Case> cases = realistic_cases();
  for (const Case& c : cases) {
    const Schedule schedule = simulate(*plan_of(c, 8));
    sum += schedule.idle_share();
    if (is_tiny(schedule)) continue;
    EXPECT_LT(schedule.idle_share(), 0.05) << c.name << ": " << schedule.seconds * 1e6 << " us";
  }
  EXPECT_LT(sum / static_cast<double>(cases.size()), 0.01) << "mean";
}

/// Seconds of the least that can be an item: a head's tile of the segment with most rows.
double tile_seconds(const Case& c, int32_t threads) {
  PlanOptions options = c.options;
  options.threads = threads;
  int64_t rows = 0;
  for (const Segment& s : c.forest.segments) rows = std::max<int64_t>(rows, s.rows());
  return costs_of(options).kv_seconds(
      false, 1, kTileSlots, static_cast<double>(kTileSlots * rows * options.shape.group()));
}

TEST(Balance, CuttingCostsLittleForOneToSixtyFourThreads) {
  // Idle threads and what cutting adds, merging included, against an even share of the bare work.
  // The table is that of docs/performance.md.
  const std::vector<Case> cases = realistic_cases();
  std::printf("threads  idle: mean  worst  all that cutting costs: mean\n");
  for (int32_t threads = 1; threads <= 64; threads += threads < 8 ? 1 : 7) {
    double sum = 0;
    double idle = 0;
    double worst_idle = 0;
    for (const Case& c : cases) {
      const double bare = bare_seconds(c, threads) / threads;
      const Schedule schedule = simulate(*plan_of(c, threads));
      const double seconds = schedule.seconds;
      EXPECT_GE(seconds, bare * (1 - 1e-9)) << c.name;
      const double uncut = in_tiles(c) ? tile_seconds(c, threads) : 0;
      EXPECT_LT(seconds, (threads <= 8 ? 1.08 : 1.11) * bare + 20e-6 + uncut)
          << threads << " threads, " << c.name;
      sum += 1 - bare / seconds;
      idle += schedule.idle_share();
      if (!is_tiny(schedule)) worst_idle = std::max(worst_idle, schedule.idle_share());
    }
    const auto all = static_cast<double>(cases.size());
    std::printf("%7d  %10.4f %6.3f %30.4f\n", threads, idle / all, worst_idle, sum / all);
    EXPECT_LT(sum / all, 0.001 * threads + 0.027) << threads;
  }
}

TEST(Balance, SurvivesCostsThatAreWrong) {
  // Planned by one model, run by another whose costs are up to 1.5 times as high or low.
  const std::vector<Case> cases = realistic_cases();
  double worst = 0;
  double sum = 0;
  int count = 0;
  for (size_t i = 0; i < cases.size(); i += 7) {
    const PlanPtr plan = plan_of(cases[i], 8);
    for (int wrong = 0; wrong < 8; ++wrong) {
      CostModel costs = costs_of(plan->options);
      const auto bend = [&](int bit) { return (wrong >> bit & 1) != 0 ? 1.5 : 1 / 1.5; };
      costs.few.slot *= bend(0);
      costs.few.row *= bend(0);
      costs.many.slot *= bend(1);
      costs.state *= bend(2);
      costs.store *= bend(2);
      costs.merge *= bend(2);
      costs.item *= bend(2);
      costs.byte *= bend(0);
      const Schedule schedule = simulate(*plan, costs);
      if (schedule.seconds < 50e-6) continue;
      worst = std::max(worst, schedule.idle_share());
      sum += schedule.idle_share();
      ++count;
    }
  }
  EXPECT_LT(sum / count, 0.01);
  EXPECT_LT(worst, 0.08);
}

TEST(Balance, OneThreadHasNothingToCut) {
  const HeadShape shape = {.q_heads = 32, .kv_heads = 8, .qk_dim = 64, .v_dim = 64};
  const Case c = make_case("1B", shape, DType::kF16, 4096, 4, 128, Batch::kShared);
  EXPECT_EQ(plan_of(c, 1)->items.size(), 5u) << "a prefix and four contexts";
}

TEST(Cutting, WhatComesLastIsMergedByAllThreads) {
  // One row and a head for each thread: were the last item one of all heads, seven threads would
  // wait for the eighth.
  const HeadShape shape = {.q_heads = 32, .kv_heads = 8, .qk_dim = 64, .v_dim = 64};
  const PlanPtr plan = plan_of(make_case("", shape, DType::kF16, 4096, 1, 16, Batch::kShared), 8);
  ASSERT_GE(plan->items.size(), 16u);
  ASSERT_GT(plan->partials, 1);
  std::vector<int> heads(8, 0);
  for (size_t i = plan->items.size() - 8; i < plan->items.size(); ++i) {
    const WorkItem& item = plan->items[i];
    ASSERT_EQ(item.head_end - item.head_begin, 1);
    ++heads[static_cast<size_t>(item.head_begin)];
  }
  EXPECT_EQ(heads, std::vector<int>(8, 1));
}

TEST(Cutting, ManyRowsGoApartBeforeManyPartialsAreMade) {
  // 512 rows for twice as many threads as heads.
  const HeadShape shape = {.q_heads = 8, .kv_heads = 8, .qk_dim = 64, .v_dim = 64};
  const Case c = make_case("", shape, DType::kF16, 512, 1, 0, Batch::kPrefill);
  const auto row_tiles = [&](int32_t threads) {
    const PlanPtr plan = plan_of(c, threads);
    size_t most = 0;
    for (const Plan::Block& block : plan->blocks) {
      most = std::max<size_t>(most, block.rows());
    }
    return 512 / most;
  };
  EXPECT_EQ(row_tiles(8), 1u);
  EXPECT_EQ(row_tiles(16), 2u);
  EXPECT_EQ(row_tiles(64), 2u) << "256 query rows stay together";
}

TEST(Cutting, EverySlotOfEveryHeadOnce) {
  for (const Case& c : realistic_cases()) {
    const PlanPtr plan = plan_of(c, 8);
    // Causal segments lose the slots that none of a row tile's rows sees; here each is seen.
    const int64_t heads = c.options.shape.kv_heads;
    std::vector<int64_t> of_segment(plan->forest.segments.size(), 0);
    for (const WorkItem& item : plan->items) {
      of_segment[item.segment] += item.slots * item.rows() * (item.head_end - item.head_begin);
    }
    for (size_t s = 0; s < of_segment.size(); ++s) {
      const Segment& segment = plan->forest.segments[s];
      const int64_t all = segment.slots * segment.rows() * heads;
      if (segment.visibility == Visibility::kPositions) {
        ASSERT_LE(of_segment[s], all) << c.name;
      } else {
        ASSERT_EQ(of_segment[s], all) << c.name;
      }
    }
  }
}

TEST(Cutting, HiddenSlotsCostNothing) {
  // 512 new tokens over themselves: a good half of the triangle is hidden.
  const HeadShape shape = {.q_heads = 8, .kv_heads = 2, .qk_dim = 64, .v_dim = 64};
  Case c = make_case("", shape, DType::kF16, 0, 1, 0, Batch::kPrefill);
  const PlanPtr causal = plan_of(c, 4);
  double row_slots = 0;
  for (const WorkItem& item : causal->items) {
    row_slots += item.row_slots * (item.head_end - item.head_begin);
  }
  const double square = 512.0 * 512 * shape.q_heads;
  EXPECT_GT(row_slots, square / 2);
  EXPECT_LT(row_slots, square * 0.52);
  for (Segment& s : c.forest.segments) s.visibility = Visibility::kAll;
  EXPECT_LT(simulate(*causal).busy, 0.7 * simulate(*plan_of(c, 4)).busy);
}

bool same(const Plan& a, const Plan& b) {
  const auto equal = [](const WorkItem& x, const WorkItem& y) {
    return x.segment == y.segment && x.row_begin == y.row_begin && x.row_end == y.row_end &&
           x.span == y.span && x.span_offset == y.span_offset && x.slots == y.slots &&
           x.head_begin == y.head_begin && x.head_end == y.head_end && x.few == y.few &&
           x.block == y.block && x.chunk == y.chunk && x.cost == y.cost;
  };
  return a.first_partial == b.first_partial && a.partial_begin == b.partial_begin &&
         std::equal(a.items.begin(), a.items.end(), b.items.begin(), b.items.end(), equal);
}

TEST(Cutting, DependsOnItsArgumentsAlone) {
  PlanPtr used(new Plan);
  for (const Case& c : realistic_cases()) {
    PlanOptions options = c.options;
    options.threads = 6;
    remake_plan(*used, c.forest, options, costs_of(options));  // in the memory of another plan
    ASSERT_TRUE(same(*used, *plan_of(c, 6))) << c.name;
  }
}

TEST(Cutting, OneRequestIsPlannedAlikeWithSharingAndWithout) {
  const HeadShape shape = {.q_heads = 32, .kv_heads = 8, .qk_dim = 64, .v_dim = 64};
  for (int64_t context : {16, 100, 512}) {
    const Case on = make_case("", shape, DType::kF16, 4096, 1, context, Batch::kShared);
    const Case off = make_case("", shape, DType::kF16, 4096, 1, context, Batch::kApart);
    for (int32_t threads : {1, 2, 8, 64}) {
      EXPECT_TRUE(same(*plan_of(on, threads), *plan_of(off, threads))) << threads;
    }
  }
}

// --- Simulation ----------------------------------------------------------------------------------

/// `rows` rows of two KV heads; blocks and items are added by hand.
struct Sketch {
  Plan plan;
  std::vector<uint32_t> results;  // [rows]
  std::vector<uint32_t> before;   // [row_index]: results of the row's earlier blocks

  Sketch(int32_t threads, int32_t rows, double merge_seconds) {
    plan.options.shape = {.q_heads = 2, .kv_heads = 2, .qk_dim = 1, .v_dim = 1};
    plan.options.threads = threads;
    plan.forest.rows = rows;
    plan.merge_seconds = merge_seconds;
    plan.partial_begin.assign(static_cast<size_t>(rows) + 1, 0);
    plan.alike.assign(static_cast<size_t>(rows), 1);
    results.assign(static_cast<size_t>(rows), 0);
  }

  void block(const std::vector<uint32_t>& rows, uint32_t chunks) {
    Plan::Block block;
    block.row_begin = static_cast<uint32_t>(plan.row_index.size());
    block.rows_at = block.row_begin;
    for (uint32_t row : rows) {
      plan.row_index.push_back(row);
      before.push_back(results[row]);
      results[row] += chunks;
    }
    block.row_end = static_cast<uint32_t>(plan.row_index.size());
    block.chunks = chunks;
    plan.blocks.push_back(block);
    for (size_t r = 0; r < results.size(); ++r) {
      plan.partial_begin[r + 1] = plan.partial_begin[r] + (results[r] > 1 ? results[r] : 0);
    }
    plan.partials = plan.partial_begin.back();
    plan.first_partial.clear();
    for (size_t i = 0; i < before.size(); ++i) {
      const uint32_t row = plan.row_index[i];
      plan.first_partial.push_back(results[row] > 1 ? plan.partial_begin[row] + before[i]
                                                    : Plan::kDirect);
    }
  }

  void item(uint32_t block, uint32_t chunk, int32_t head_begin, int32_t head_end, double seconds) {
    WorkItem item;
    item.segment = 0;
    item.block = block;
    item.chunk = chunk;
    item.row_begin = plan.blocks[block].row_begin;
    item.row_end = plan.blocks[block].row_end;
    item.head_begin = head_begin;
    item.head_end = head_end;
    item.cost = seconds;
    plan.items.push_back(item);
  }
};

TEST(Simulation, WhoeverComesSecondMerges) {
  Sketch s(2, 1, 0.5);
  s.block({0}, 2);
  s.item(0, 0, 0, 2, 5);
  s.item(0, 1, 0, 2, 3);
  const Schedule schedule = simulate(s.plan);
  EXPECT_EQ(schedule.merging, 2 * 0.5) << "once for each head";
  EXPECT_EQ(schedule.seconds, 5 + 1);
  EXPECT_EQ(schedule.busy, 5 + 3 + 1);
  EXPECT_DOUBLE_EQ(schedule.idle_share(), 3.0 / 12);
}

TEST(Simulation, WhoeverIsLastMergesWhatTheOthersHaveMerged) {
  Sketch s(4, 1, 1);
  s.block({0}, 4);
  s.item(0, 0, 0, 2, 5);
  s.item(0, 1, 0, 2, 9);  // with the first, and with the two others together
  s.item(0, 2, 0, 2, 3);
  s.item(0, 3, 0, 2, 4);  // with the third
  const Schedule schedule = simulate(s.plan);
  EXPECT_EQ(schedule.merging, 2 * 3);
  EXPECT_EQ(schedule.seconds, 9 + 2 * 2);
}

TEST(Simulation, HeadsAreMergedApart) {
  Sketch s(2, 1, 0.5);
  s.block({0}, 2);
  s.item(0, 0, 0, 2, 1);
  s.item(0, 1, 0, 1, 5);
  s.item(0, 1, 1, 2, 4);
  const Schedule schedule = simulate(s.plan);
  EXPECT_EQ(schedule.merging, 1);
  EXPECT_EQ(schedule.seconds, 5 + 0.5) << "each thread merges one head";
  EXPECT_EQ(schedule.idle_share(), 0);
}

TEST(Simulation, ARowOfTwoBlocksIsMergedWithTheLast) {
  Sketch s(2, 2, 0.25);
  s.block({0, 1}, 1);
  s.block({0}, 1);  // row 1 has one result, and nothing to merge
  s.item(0, 0, 0, 2, 4);
  s.item(1, 0, 0, 2, 6);
  const Schedule schedule = simulate(s.plan);
  EXPECT_EQ(schedule.merging, 2 * 0.25);
  EXPECT_EQ(schedule.seconds, 6 + 0.5);
}

TEST(Simulation, NobodyTakesAnItemWhileMerging) {
  Sketch s(2, 3, 2);
  s.block({0}, 2);
  s.block({1}, 1);
  s.block({2}, 1);
  s.item(0, 0, 0, 2, 1);
  s.item(0, 1, 0, 2, 2);  // merges until 6
  s.item(1, 0, 0, 2, 3);  // begins at 1
  s.item(2, 0, 0, 2, 2);  // begins at 4, on the same thread
  const Schedule schedule = simulate(s.plan);
  EXPECT_EQ(schedule.seconds, 6);
  EXPECT_EQ(schedule.busy, 1 + 2 + 4 + 3 + 2);
  EXPECT_EQ(schedule.idle_share(), 0);
}

TEST(MergeTree, EachLeafJoinsOnceWhateverTheOrder) {
  std::mt19937 random(7);
  for (uint32_t count = 1; count <= 40; ++count) {
    std::vector<uint32_t> order(count);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random);
    std::vector<bool> half_there(count);
    std::vector<std::set<uint32_t>> merged(count);  // what lies where the first leaf did
    uint32_t roots = 0;
    for (uint32_t i = 0; i < count; ++i) {
      merged[order[i]] = {order[i]};
      uint32_t height = 0;
      bool second = true;
      climb(order[i], count, [&](uint32_t left, uint32_t right) {
        ++height;
        second = half_there[right];
        half_there[right] = !second;
        if (second) merged[left].merge(merged[right]);
        return second;
      });
      EXPECT_LE(height, tree_height(count));
      if (second) {
        ++roots;
        EXPECT_EQ(i, count - 1) << "only the last one reaches the root";
      }
    }
    EXPECT_EQ(roots, 1u);
    EXPECT_EQ(merged[0].size(), count);
    EXPECT_EQ(std::count(half_there.begin(), half_there.end(), true), 0)
        << "ready to be used again";
  }
}

TEST(MergeTree, HeadsHaveBits) {
  EXPECT_EQ(head_words(1), 1);
  EXPECT_EQ(head_words(64), 1);
  EXPECT_EQ(head_words(65), 2);
  EXPECT_EQ(head_bits(0, 64, 0), ~uint64_t{0});
  EXPECT_EQ(head_bits(2, 5, 0), 0b11100u);
  EXPECT_EQ(head_bits(60, 70, 0), uint64_t{15} << 60);
  EXPECT_EQ(head_bits(60, 70, 1), 63u);
  EXPECT_EQ(head_bits(0, 3, 1), 0u);
  std::vector<int> heads;
  each_head(head_bits(63, 130, 1), 1, [&](int32_t head) { heads.push_back(head); });
  EXPECT_EQ(heads.size(), 64u);
  EXPECT_EQ(heads.front(), 64);
  EXPECT_EQ(heads.back(), 127);
}

TEST(Simulation, AnyItemMayTakeLonger) {
  Sketch s(2, 3, 0);
  s.block({0}, 1);
  s.block({1}, 1);
  s.block({2}, 1);
  s.item(0, 0, 0, 2, 10);  // not the last to end, but the one that could
  s.item(1, 0, 0, 2, 8);
  s.item(2, 0, 0, 2, 2.5);
  const Schedule schedule = simulate(s.plan);
  EXPECT_EQ(schedule.seconds, 10.5);
  EXPECT_DOUBLE_EQ(schedule.worst, 10 * 1.1);
}

TEST(Simulation, NothingToDoIsNoIdleness) {
  const Schedule schedule = simulate(Sketch(4, 0, 1).plan);
  EXPECT_EQ(schedule.seconds, 0);
  EXPECT_EQ(schedule.idle_share(), 0);
}

TEST(Simulation, EveryPartialIsMergedOnce) {
  for (const Case& c : realistic_cases()) {
    const PlanPtr plan = plan_of(c, 8);
    int64_t merges = 0;
    for (uint32_t results : plan->results) merges += results > 1 ? results - 1 : 0;
    const double merging = static_cast<double>(merges) * c.options.shape.kv_heads *
                           costs_of(plan->options).merge * c.options.shape.group();
    ASSERT_NEAR(simulate(*plan).merging, merging, 1e-9 * merging) << c.name;
    ASSERT_EQ(simulate(*plan).seconds, simulate(*plan, costs_of(plan->options)).seconds) << c.name;
  }
}

// --- Costs ---------------------------------------------------------------------------------------

const PlanOptions kOptions = {.shape = {.q_heads = 32, .kv_heads = 8, .qk_dim = 64, .v_dim = 64},
                              .threads = 4};

TEST(Costs, NoiseDoesNotChangeWhatPlansAreMadeWith) {
  const CostModel fixed = costs_of(kOptions);
  CostModel measured = fixed;
  // Another clock, and each cost off by up to a tenth.
  measured.few.slot *= 2.5 * 1.1;
  measured.few.row *= 2.5 * 0.9;
  measured.many.slot *= 2.5 * 1.05;
  measured.many.row *= 2.5 * 1.1;
  measured.state *= 2.5 * 0.95;
  measured.store *= 2.5 * 1.1;
  measured.merge *= 2.5 * 0.9;
  measured.byte *= 2.5;
  const CostModel coarse = coarse_cost_model(fixed, measured);
  EXPECT_EQ(coarse.few.slot, fixed.few.slot);
  EXPECT_EQ(coarse.few.row, fixed.few.row);
  EXPECT_EQ(coarse.many.slot, fixed.many.slot);
  EXPECT_EQ(coarse.many.row, fixed.many.row);
  EXPECT_EQ(coarse.state, fixed.state);
  EXPECT_EQ(coarse.store, fixed.store);
  EXPECT_EQ(coarse.merge, fixed.merge);
  EXPECT_EQ(coarse.byte, fixed.byte);
}

TEST(Costs, OtherRatiosDo) {
  const CostModel fixed = costs_of(kOptions);
  CostModel measured = fixed;
  measured.few.row *= 4.3;
  measured.merge /= 1.9;
  measured.many.slot = 0;  // what noise may make of a small one
  const CostModel coarse = coarse_cost_model(fixed, measured);
  EXPECT_EQ(coarse.few.row, 4 * fixed.few.row);
  EXPECT_EQ(coarse.merge, fixed.merge / 2);
  EXPECT_EQ(coarse.many.slot, fixed.many.slot);
}

TEST(Costs, AreMeasuredOnce) {
  for (DType type : {DType::kF32, DType::kF16, DType::kBF16, DType::kQ8_0, DType::kCustom}) {
    PlanOptions options = kOptions;
    options.k_type = options.v_type = type;
    const CostModel first = measured_costs(options, 1e10);
    const CostModel second = measured_costs(options, 1e10);
    EXPECT_EQ(first.few.row, second.few.row);
    EXPECT_EQ(first.many.slot, second.many.slot);
    for (const double cost : {first.few.slot + first.few.row, first.many.row, first.state,
                              first.store, first.merge, first.byte, first.item}) {
      EXPECT_GT(cost, 0) << to_string(type);
      EXPECT_LT(cost, 1e-3) << to_string(type);
    }
  }
}

TEST(Costs, HeadsInTilesAreReadApartAtNoCost) {
  PlanOptions options = kOptions;
  options.k_type = options.v_type = DType::kBF16;
  const auto reading = [&](KvLayout layout, double heads) {
    options.layout = layout;
    CostModel costs = costs_of(options);
    costs.locate = 0;
    return costs.kv_seconds(false, heads, 64, 0) / heads;
  };
  EXPECT_DOUBLE_EQ(reading(KvLayout::kTiles, 1), reading(KvLayout::kTiles, 8));
  EXPECT_GT(reading(KvLayout::kRows, 1), 1.1 * reading(KvLayout::kRows, 8));
}

TEST(Costs, GrowWithTheWork) {
  const CostModel costs = costs_of(kOptions);
  for (bool few : {true, false}) {
    EXPECT_GT(costs.kv_seconds(few, 1, 128, 128 * 60), costs.kv_seconds(few, 1, 64, 64 * 60));
    EXPECT_GT(costs.kv_seconds(few, 1, 64, 64 * 60), costs.kv_seconds(few, 1, 64, 64 * 50));
    EXPECT_GT(costs.kv_seconds(few, 2, 64, 64 * 60), costs.kv_seconds(few, 1, 64, 64 * 60));
  }
}

}  // namespace
}  // namespace relay
