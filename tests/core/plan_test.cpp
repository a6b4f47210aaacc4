// Plans and workspaces: reuse, determinism to the bit, and what a summary promises.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "core/bent_costs.h"
#include "core/checker.h"
#include "core/forest_generator.h"
#include "core/operator_case.h"
#include "core/precision.h"
#include "core/test_env.h"

// Every allocation of this program is counted: planning again and running must make none.
namespace {
std::atomic<int64_t> allocations{0};

void* counted(std::size_t size) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  if (void* memory = std::malloc(size > 0 ? size : 1)) return memory;
  throw std::bad_alloc();
}
void* counted(std::size_t size, std::align_val_t alignment) {
  allocations.fetch_add(1, std::memory_order_relaxed);
  const auto unit = static_cast<std::size_t>(alignment);
  if (void* memory = std::aligned_alloc(unit, (size + unit - 1) / unit * unit)) return memory;
  throw std::bad_alloc();
}
}  // namespace

void* operator new(std::size_t size) { return counted(size); }
void* operator new[](std::size_t size) { return counted(size); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return counted(size, alignment);
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
  return counted(size, alignment);
}
// Sanitizers replace each form by itself, so none may be left to them.
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return std::malloc(size > 0 ? size : 1);
}
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept {
  allocations.fetch_add(1, std::memory_order_relaxed);
  return std::malloc(size > 0 ? size : 1);
}
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { std::free(memory); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

namespace relay::test {
namespace {

using Bits = std::vector<unsigned char>;

/// A random case of moderate size with its forest.
struct Subject {
  explicit Subject(uint64_t seed, double size = 1.0) : seed(seed) {
    Random random(derive_seed(seed, 0x9a));
    config = random_config(random);
    ForestLimits limits;
    const double dims = config.shape.qk_dim + config.shape.v_dim;
    limits.max_slots = std::clamp<int64_t>(
        static_cast<int64_t>(size * 1e6 / (dims * config.shape.kv_heads)), 128, 8192);
    limits.max_attended =
        std::max<int64_t>(256, static_cast<int64_t>(size * 3e7 / (dims * config.shape.q_heads)));
    forest_case = generate_forest(seed, limits);
    if (!forest_case.causal) config.slopes = false;
    op = std::make_unique<OperatorCase>(config, forest_case.rows(), forest_case.block_size,
                                        forest_case.blocks, forest_case.used_slots(), seed);
    op->window = forest_case.window;
    build_from_tree(forest_case, Sharing::kOn, seed, forest);
  }

  Bits run(const Plan& plan, Workspace& workspace, int32_t threads, Threading threading) {
    op->out.reset();
    run_plan(plan, op->inputs(), workspace, threads, threading, seed);
    return op->out.bits();
  }
  std::string describe() const {
    return forest_case.describe() + "\n" + config.describe() + "\n" + repeat_command();
  }

  uint64_t seed;
  OperatorConfig config;
  ForestCase forest_case;
  std::unique_ptr<OperatorCase> op;
  Forest forest;
};

class Determinism : public ::testing::TestWithParam<uint64_t> {};

TEST_P(Determinism, SameBitsWhoeverRunsThePlan) {
  Subject s(GetParam());
  SCOPED_TRACE(s.describe());
  Random random(derive_seed(GetParam(), 0x9b));
  const int32_t threads = static_cast<int32_t>(random.between(1, 16));
  for_each_isa([&](const std::string&) {
    const PlanPtr plan = make_plan(s.forest, s.op->options(threads));
    Workspace workspace(*plan);
    const Bits first = s.run(*plan, workspace, threads, Threading::kInTurn);
    ASSERT_EQ(s.run(*plan, workspace, threads, Threading::kInTurn), first) << "rerun";
    ASSERT_EQ(s.run(*plan, workspace, threads, Threading::kInRandomTurn), first) << "any order";
    for (int i = 0; i < 3; ++i) {
      ASSERT_EQ(s.run(*plan, workspace, threads, Threading::kReal), first) << "real threads";
    }
    const PlanPtr again = make_plan(s.forest, s.op->options(threads));
    Workspace fresh(*again);
    ASSERT_EQ(s.run(*again, fresh, threads, Threading::kReal), first) << "another plan like it";
  });
}

TEST_P(Determinism, LayersWithOnlyABarrierBetween) {
  // Threads go from layer to layer without leaving: one plan, one workspace, many operators.
  Subject s(GetParam(), 0.2);
  SCOPED_TRACE(s.describe());
  constexpr int32_t kThreads = 5;
  constexpr int kLayers = 6;
  for_each_isa([&](const std::string&) {
    const PlanPtr plan = make_plan(s.forest, s.op->options(kThreads));
    Workspace workspace(*plan);
    const Bits expected = s.run(*plan, workspace, kThreads, Threading::kInTurn);
    std::vector<OutputTensor> outputs;
    for (int i = 0; i < kLayers; ++i) outputs.emplace_back(s.config, s.op->rows);
    std::vector<AttentionInputs> inputs;
    for (OutputTensor& output : outputs) inputs.push_back(s.op->inputs(output));
    std::barrier barrier(kThreads);
    std::vector<std::thread> threads;
    for (int32_t thread = 0; thread < kThreads; ++thread) {
      threads.emplace_back([&, thread] {
        for (int layer = 0; layer < kLayers; ++layer) {
          attend(*plan, inputs[layer], workspace, thread);
          barrier.arrive_and_wait();
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
    for (const OutputTensor& output : outputs) ASSERT_EQ(output.bits(), expected);
  });
}

INSTANTIATE_TEST_SUITE_P(Seeds, Determinism, ::testing::ValuesIn(seeds(20)));

TEST(OnePlan, ServesConcurrentWorkspaces) {
  Subject s(3, 0.3);
  const PlanPtr plan = make_plan(s.forest, s.op->options(2));
  Workspace first(*plan);
  const Bits expected = s.run(*plan, first, 2, Threading::kInTurn);
  std::vector<OutputTensor> outputs;
  for (int i = 0; i < 4; ++i) outputs.emplace_back(s.config, s.op->rows);
  std::vector<std::thread> users;
  for (OutputTensor& output : outputs) {
    users.emplace_back([&] {
      Workspace workspace(*plan);
      const AttentionInputs inputs = s.op->inputs(output);
      for (int32_t thread = 0; thread < 2; ++thread) attend(*plan, inputs, workspace, thread);
    });
  }
  for (std::thread& user : users) user.join();
  for (const OutputTensor& output : outputs) EXPECT_EQ(output.bits(), expected);
}

class Reuse : public ::testing::TestWithParam<uint64_t> {};

TEST_P(Reuse, RemadePlansAndKeptWorkspaces) {
  // Small, large, small, other shapes: the same plan object and workspace throughout must give what
  // fresh ones give.
  std::vector<std::unique_ptr<Subject>> batches;
  for (double size : {0.02, 0.6, 0.05, 1.0, 0.02, 0.4}) {
    batches.push_back(std::make_unique<Subject>(
        derive_seed(GetParam(), 0x100 + batches.size()) % 1'000'000, size));
  }
  SCOPED_TRACE(repeat_command());
  for_each_isa([&](const std::string&) {
    PlanPtr kept_plan = make_plan(batches[0]->forest, batches[0]->op->options(1));
    Workspace kept_workspace(*kept_plan);
    Random random(derive_seed(GetParam(), 0x9c));
    for (const auto& batch : batches) {
      SCOPED_TRACE(batch->describe());
      const int32_t threads = static_cast<int32_t>(random.between(1, 16));
      const PlanOptions options = batch->op->options(threads);
      remake_plan(*kept_plan, batch->forest, options);
      kept_workspace.fit(*kept_plan);
      const Bits kept = batch->run(*kept_plan, kept_workspace, threads, Threading::kReal);
      const PlanPtr plan = make_plan(batch->forest, options);
      Workspace workspace(*plan);
      ASSERT_EQ(batch->run(*plan, workspace, threads, Threading::kInTurn), kept);
    }
  });
}

TEST_P(Reuse, WorkspaceMoves) {
  Subject s(GetParam(), 0.05);
  const PlanPtr plan = make_plan(s.forest, s.op->options(2));
  Workspace workspace(*plan);
  const Bits expected = s.run(*plan, workspace, 2, Threading::kInTurn);
  Workspace moved = std::move(workspace);
  EXPECT_EQ(s.run(*plan, moved, 2, Threading::kInTurn), expected);
  Workspace assigned;
  assigned = std::move(moved);
  EXPECT_EQ(s.run(*plan, assigned, 2, Threading::kInTurn), expected);
}

INSTANTIATE_TEST_SUITE_P(Seeds, Reuse, ::testing::ValuesIn(seeds(6)));

TEST_P(Reuse, PlanningAgainAndRunningAllocateNothing) {
  Subject s(GetParam(), 0.3);
  SCOPED_TRACE(s.describe());
  constexpr int32_t kThreads = 3;
  const PlanOptions options = s.op->options(kThreads);
  for_each_isa([&](const std::string&) {
    const PlanPtr plan = make_plan(s.forest, options);
    Workspace workspace(*plan);
    const AttentionInputs inputs = s.op->inputs();
    const auto allocations_of = [](const auto& work) {
      const int64_t before = allocations.load();
      work();
      return allocations.load() - before;
    };
    remake_plan(*plan, s.forest, options);  // at its working size from here on
    workspace.fit(*plan);
    EXPECT_EQ(allocations_of([&] { remake_plan(*plan, s.forest, options); }), 0) << "remake_plan";
    EXPECT_EQ(allocations_of([&] { workspace.fit(*plan); }), 0) << "fit";
    EXPECT_EQ(allocations_of([&] {
                for (int32_t thread = 0; thread < kThreads; ++thread) {
                  attend(*plan, inputs, workspace, thread);
                }
              }),
              0)
        << "attend";
  });
}

// --- Batch composition ---------------------------------------------------------------------------

/// How far two results of one row may lie apart (rms, relative), by what the kernels round: each
/// about so far from the truth, over 537 slots of random values. To lose one slot would make 0.04.
double most_apart(Form form) {
  switch (form) {
    case Form::kF32:
      return 2e-6;
    case Form::kBF16Sums:
      return 2e-4;
    case Form::kBF16:
    case Form::kBF16Keys:
      return 8e-3;
    case Form::kBytes:
      return 1.2e-2;
  }
  throw std::logic_error("no such form");
}

TEST(BatchComposition, ARowDoesNotDependOnWhoSharesBeyondRounding) {
  // Request 0 alone, then with ever more others on its prefix: each within the bound of the oracle,
  // and the row among others no further from the row alone than rounding makes it.
  for (DType type : {DType::kF16, DType::kBF16, DType::kQ8_0}) {
    OperatorConfig config;
    config.shape = {.q_heads = 8, .kv_heads = 2, .qk_dim = 64, .v_dim = 64};
    config.k_type = config.v_type = type;
    std::vector<int64_t> contexts = {37};
    contexts.insert(contexts.end(), 31, 20);
    const ForestCase all = shared_prefix_case(500, contexts);
    OperatorCase op(config, all.rows(), all.block_size, all.blocks, all.used_slots(), 17);
    std::map<std::string, std::vector<double>> alone;  // row 0 by itself, of each kernel set
    for (size_t others : {0, 1, 3, 7, 31}) {
      // Rows of requests beyond attend nothing; row 0 stays what it is.
      ForestCase some = all;
      for (size_t i = 1 + others; i < some.requests.size(); ++i) {
        some.requests[i] = {.node = -1, .kv_length = 0, .rows = 1};
      }
      Forest forest;
      build_from_tree(some, Sharing::kOn, 1, forest);
      const Oracle oracle(op, truth_of(some), arithmetics_for(config), 17);
      for_each_isa([&](const std::string& isa) {
        SCOPED_TRACE(std::to_string(others) + " others");
        op.out.reset();
        attend_forest(forest, op.options(2), op.inputs());
        ASSERT_EQ(oracle.compare(op, op.out, arithmetic_of(isa, config.shape, type, type)), "");
        std::vector<double> row;
        for (int32_t head = 0; head < config.shape.q_heads; ++head) {
          for (int32_t j = 0; j < config.shape.v_dim; ++j) row.push_back(op.out.out(0, head, j));
        }
        const std::vector<double>& before = alone.try_emplace(isa, row).first->second;
        double apart = 0;
        double size = 0;
        for (size_t i = 0; i < row.size(); ++i) {
          apart += (row[i] - before[i]) * (row[i] - before[i]);
          size += before[i] * before[i];
        }
        const Precision precision = precision_of(isa, config.shape, type, type);
        ASSERT_LE(std::sqrt(apart / size),
                  std::max(most_apart(precision.few), most_apart(precision.many)));
      });
    }
  }
}

TEST(BatchComposition, OrderOfRequestsDoesNotMatterBeyondRounding) {
  ForestLimits limits;
  limits.max_rows = 40;
  limits.max_slots = 2000;
  for (uint64_t seed : seeds(6)) {
    ForestCase c = generate_forest(seed, limits);
    Random random(derive_seed(seed, 0x9d));
    random.shuffle(c.requests);
    c.index_rows();
    OperatorConfig config;
    config.shape = {.q_heads = 4, .kv_heads = 2, .qk_dim = 64, .v_dim = 64};
    config.k_type = config.v_type = DType::kF16;
    OperatorCase op(config, c.rows(), c.block_size, c.blocks, c.used_slots(), seed);
    op.window = c.window;
    Forest forest;
    build_from_tree(c, Sharing::kOn, seed, forest);
    const Oracle oracle(op, truth_of(c), arithmetics_for(config), seed);
    for_each_isa([&](const std::string& isa) {
      op.out.reset();
      attend_forest(forest, op.options(3), op.inputs());
      ASSERT_EQ(
          oracle.compare(op, op.out, arithmetic_of(isa, config.shape, DType::kF16, DType::kF16)),
          "")
          << c.describe();
    });
  }
}

// --- Folding -------------------------------------------------------------------------------------

TEST(Folding, AFoldedPrefixGivesTheBitsOfNoSharing) {
  const ForestCase c = shared_prefix_case(20, {100, 37, 64, 1, 250, 8});
  for (DType type : {DType::kF32, DType::kF16, DType::kBF16, DType::kQ8_0}) {
    OperatorConfig config;
    config.shape = {.q_heads = 8, .kv_heads = 2, .qk_dim = 64, .v_dim = 64};
    config.k_type = config.v_type = type;
    OperatorCase op(config, c.rows(), c.block_size, c.blocks, c.used_slots(), 5);
    const auto bits_of = [&](Sharing sharing) {
      Forest forest;
      build_from_tree(c, sharing, 5, forest);
      const PlanPtr plan = make_plan_by_bent_costs(forest, op.options(2), 1e3);
      Workspace workspace(*plan);
      op.out.reset();
      run_plan(*plan, op.inputs(), workspace, 2, Threading::kReal, 5);
      return op.out.bits();
    };
    for_each_isa([&](const std::string&) {
      EXPECT_EQ(bits_of(Sharing::kOn), bits_of(Sharing::kOff)) << to_string(type);
    });
  }
}

// --- Summaries -----------------------------------------------------------------------------------

TEST(Summary, CountsReadsAndWork) {
  const ForestCase c = shared_prefix_case(1000, {10, 20, 30, 40});
  PlanOptions options;
  options.shape = {.q_heads = 8, .kv_heads = 2, .qk_dim = 64, .v_dim = 32};
  Forest forest;
  build_from_tree(c, Sharing::kOn, 1, forest);
  const PlanSummary on = summarize(*make_plan_of_slow_memory(forest, options));
  EXPECT_EQ(on.kv_slots_read, 1100);
  EXPECT_EQ(on.kv_slots_attended, 4100);
  EXPECT_GT(on.items, 0);
  EXPECT_DOUBLE_EQ(on.flops, 2.0 * 4100 * 8 * (64 + 32));
  EXPECT_GE(on.partials, 4 * 8 * 2) << "a prefix and a context each";
  EXPECT_GT(on.workspace_bytes, 0);

  build_from_tree(c, Sharing::kOff, 1, forest);
  const PlanSummary off = summarize(*make_plan(forest, options));
  EXPECT_EQ(off.kv_slots_read, 4100);
  EXPECT_EQ(off.kv_slots_attended, 4100);
  EXPECT_DOUBLE_EQ(off.flops, on.flops);
}

TEST(Summary, CountsAFoldedPrefixOncePerRequest) {
  const ForestCase c = shared_prefix_case(10, {10, 20, 30, 40});
  PlanOptions options;
  options.shape = {.q_heads = 8, .kv_heads = 2, .qk_dim = 64, .v_dim = 32};
  Forest forest;
  build_from_tree(c, Sharing::kOn, 1, forest);
  const PlanSummary summary = summarize(*make_plan_by_bent_costs(forest, options, 1e3));
  EXPECT_EQ(summary.kv_slots_read, 4 * 10 + 100);
  EXPECT_EQ(summary.kv_slots_attended, 4 * 10 + 100);
  EXPECT_EQ(summary.partials, 0);
}

TEST(Summary, ManyRowsMayBeReadInTilesButNeverOftenerThanAlone) {
  // 256 rows do not fit one item: a segment is read once per row tile.
  const ForestCase c = shared_prefix_case(2000, std::vector<int64_t>(256, 1));
  PlanOptions options;
  options.shape = {.q_heads = 32, .kv_heads = 8, .qk_dim = 128, .v_dim = 128};
  Forest forest;
  build_from_tree(c, Sharing::kOn, 1, forest);
  const PlanSummary summary = summarize(*make_plan(forest, options));
  EXPECT_LE(summary.kv_slots_read, summary.kv_slots_attended);
  EXPECT_GE(summary.kv_slots_read, 2000 + 256);
}

}  // namespace
}  // namespace relay::test
