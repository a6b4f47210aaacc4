// Whole graphs on ggml's CPU backend with the hooks in place.
#include "cpu_hooks.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "statistics.h"
#include "test_graphs.h"

namespace relay::ggml {
namespace {

using test::AttentionCase;
using test::Graph;

// f16 and bf16 products; the suite of ggml allows 5e-4.
constexpr double kTolerance = 2e-5;
/// q8_0: for few rows, queries are rounded to 8 bits in blocks of 32, as ggml does. Of normally
/// distributed values the largest of 32 is some 2.1 standard deviations, so that the variance of
/// rounding is (2.1 / 127)^2 / 12 = 2.3e-5 of the queries', and so of the logits'. Of the weights
/// and what they sum up it is as much, and the values' own spread adds to it: twice that.
constexpr double kToleranceOfBytes = 4.6e-5;

ggml_backend_dev_t cpu() {
  static const ggml_backend_dev_t device = [] {
    ggml_backend_load(GGML_CPU_MODULE);
    ggml_backend_dev_t d = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    install_hooks(d);
    return d;
  }();
  return device;
}

template <typename Function>
Function cpu_function(const char* name) {
  return reinterpret_cast<Function>(
      ggml_backend_reg_get_proc_address(ggml_backend_dev_backend_reg(cpu()), name));
}

ggml_backend_ptr new_backend(int threads = 2) {
  ggml_backend_ptr backend(ggml_backend_dev_init(cpu(), nullptr));
  cpu_function<ggml_backend_set_n_threads_t>("ggml_backend_set_n_threads")(backend.get(), threads);
  return backend;
}

int64_t served() { return Statistics::instance().nodes(Verdict::kServed); }

void compute(ggml_backend_t backend, Graph& graph) {
  ASSERT_EQ(ggml_backend_graph_compute(backend, graph.cgraph()), GGML_STATUS_SUCCESS);
}

void expect_served(const AttentionCase& c, int threads = 2) {
  ggml_backend_ptr backend = new_backend(threads);
  Graph graph;
  graph.add(c);
  graph.fill(backend.get(), 1);
  const int64_t before = served();
  compute(backend.get(), graph);
  EXPECT_EQ(served(), before + 1);
  EXPECT_LT(graph.error(0), c.k_type == GGML_TYPE_Q8_0 ? kToleranceOfBytes : kTolerance);
}

TEST(CpuHooks, Serves) {
  expect_served({});
  expect_served({.mask = false});
  expect_served({.kv_heads = 8});
  expect_served({.kv_heads = 1, .k_dim = 96, .v_dim = 64});
  expect_served({.rows = 1});
  expect_served({.slots = 513, .rows = 70});
  expect_served({.sinks = true});
  expect_served({.max_bias = 8.0f});
  expect_served({.heads = 12, .kv_heads = 4, .max_bias = 8.0f});
  expect_served({.softcap = 5.0f});
  expect_served({.k_type = GGML_TYPE_F32, .v_type = GGML_TYPE_F32});
  for (int rows : {1, 5, 40}) {
    expect_served({.rows = rows, .k_type = GGML_TYPE_Q8_0, .v_type = GGML_TYPE_Q8_0});
  }
  expect_served({.k_type = GGML_TYPE_Q4_0, .v_type = GGML_TYPE_IQ4_NL});
}

TEST(CpuHooks, Streams) {
  expect_served({.streams = 3});
  expect_served({.rows = 1, .streams = 4});
  expect_served({.streams = 3, .shared_mask = true});
  expect_served({.streams = 3, .mask = false, .sinks = true});
  expect_served({.streams = 2, .max_bias = 8.0f, .softcap = 5.0f});
}

TEST(CpuHooks, AnyNumberOfThreads) {
  for (int threads : {1, 2, 3, 5, 8}) expect_served({.rows = 9}, threads);
}

TEST(CpuHooks, MaskComputedByTheGraph) {
  for (int threads : {1, 4}) {
    expect_served({.computed_mask = true}, threads);
    expect_served({.streams = 3, .computed_mask = true}, threads);
  }
}

TEST(CpuHooks, ManyComputedMasksInOneGraph) {
  ggml_backend_ptr backend = new_backend(3);
  Graph graph;
  const AttentionCase c{.slots = 130, .rows = 9, .computed_mask = true};
  const AttentionCase other{.slots = 70, .rows = 4, .computed_mask = true};
  graph.add(c);
  graph.add(other);
  graph.add_with_mask_of(c, 0);  // so the first two overlap, ...
  graph.add(c);                  // and this one follows them
  graph.add_with_mask_of(c, 3);
  for (unsigned seed : {1u, 2u, 3u}) {
    graph.fill(backend.get(), seed);
    const int64_t before = served();
    compute(backend.get(), graph);
    EXPECT_EQ(served(), before + 5);
    for (size_t i = 0; i < 5; ++i) EXPECT_LT(graph.error(i), kTolerance) << i;
  }
}

TEST(CpuHooks, OnePlanForAllLayersThatShareAMask) {
  ggml_backend_ptr backend = new_backend();
  Graph graph;
  const AttentionCase window{.slots = 64};
  graph.add({});
  graph.add(window);
  for (int layer = 0; layer < 3; ++layer) {
    graph.add_with_mask_of({}, 0);
    graph.add_with_mask_of(window, 1);
  }
  graph.fill(backend.get(), 1);
  const int64_t before = Statistics::instance().plans();
  compute(backend.get(), graph);
  EXPECT_EQ(Statistics::instance().plans(), before + 2);
  for (size_t i = 0; i < 8; ++i) EXPECT_LT(graph.error(i), kTolerance) << i;
}

TEST(CpuHooks, FollowsTheMaskFromStepToStep) {
  ggml_backend_ptr backend = new_backend();
  Graph small;
  Graph large;
  small.add({.slots = 40, .rows = 2});
  large.add({.slots = 700, .rows = 30});
  for (unsigned seed = 0; seed < 6; ++seed) {
    Graph& graph = seed % 3 == 1 ? large : small;
    graph.fill(backend.get(), seed);
    compute(backend.get(), graph);
    EXPECT_LT(graph.error(0), kTolerance);
  }
}

TEST(CpuHooks, HandsOnAndMixes) {
  ggml_backend_ptr backend = new_backend();
  Graph graph;
  graph.add({});
  graph.add({.mask_heads = 8});
  graph.add({});
  graph.fill(backend.get(), 1);
  const int64_t before = served();
  const int64_t per_head = Statistics::instance().nodes(Verdict::kMaskPerHead);
  compute(backend.get(), graph);
  EXPECT_EQ(served(), before + 2);
  EXPECT_EQ(Statistics::instance().nodes(Verdict::kMaskPerHead), per_head + 1);
  EXPECT_LT(graph.error(0), kTolerance);
  EXPECT_LT(graph.error(1), 1e-3);  // ggml's own: V accumulates in f16
  EXPECT_LT(graph.error(2), kTolerance);
}

TEST(CpuHooks, ReferenceImplementationStaysGgmls) {
  ggml_backend_ptr backend = new_backend();
  cpu_function<void (*)(ggml_backend_t, bool)>("ggml_backend_cpu_set_use_ref")(backend.get(), true);
  Graph graph;
  graph.add({});
  graph.fill(backend.get(), 1);
  const int64_t before = served();
  compute(backend.get(), graph);
  EXPECT_EQ(served(), before);
  EXPECT_LT(graph.error(0), 1e-3);
}

TEST(CpuHooks, GraphIsAsBeforeAfterwards) {
  ggml_backend_ptr backend = new_backend();
  Graph graph;
  graph.add({.sinks = true, .max_bias = 8.0f, .softcap = 3.0f});
  graph.fill(backend.get(), 1);
  const ggml_tensor before = *graph.node(0);
  compute(backend.get(), graph);
  EXPECT_EQ(std::memcmp(&before, graph.node(0), sizeof(before)), 0);

  // An aborted computation ends early, and the node must be restored all the same.
  cpu_function<ggml_backend_set_abort_callback_t>("ggml_backend_set_abort_callback")(
      backend.get(), [](void*) { return true; }, nullptr);
  Graph longer;
  longer.add({});
  longer.add({});
  longer.fill(backend.get(), 1);
  const ggml_tensor second = *longer.node(1);
  EXPECT_EQ(ggml_backend_graph_compute(backend.get(), longer.cgraph()), GGML_STATUS_ABORTED);
  EXPECT_EQ(std::memcmp(&second, longer.node(1), sizeof(second)), 0);
}

TEST(CpuHooks, NodeListedManyTimes) {  // test-backend-ops perf does that
  ggml_backend_ptr backend = new_backend();
  Graph graph;
  graph.add({});
  for (int i = 0; i < 20; ++i) ggml_graph_add_node(graph.cgraph(), graph.node(0));
  graph.fill(backend.get(), 1);
  compute(backend.get(), graph);
  EXPECT_LT(graph.error(0), kTolerance);
}

TEST(CpuHooks, GraphWithoutAttention) {
  ggml_backend_ptr backend = new_backend();
  ggml_context_ptr context(
      ggml_init({.mem_size = 1 << 20, .mem_buffer = nullptr, .no_alloc = true}));
  ggml_tensor* a = ggml_new_tensor_1d(context.get(), GGML_TYPE_F32, 4);
  ggml_tensor* sum = ggml_add(context.get(), a, a);
  ggml_cgraph* graph = ggml_new_graph(context.get());
  ggml_build_forward_expand(graph, sum);
  ggml_backend_buffer_ptr buffer(ggml_backend_alloc_ctx_tensors(context.get(), backend.get()));
  const float values[4] = {1, 2, 3, 4};
  ggml_backend_tensor_set(a, values, 0, sizeof(values));
  ASSERT_EQ(ggml_backend_graph_compute(backend.get(), graph), GGML_STATUS_SUCCESS);
  float result[4];
  ggml_backend_tensor_get(sum, result, 0, sizeof(result));
  EXPECT_EQ(result[3], 8.0f);
}

TEST(CpuHooks, BackendsInSeveralThreadsAtOnce) {
  cpu();
  std::atomic<int> good{0};
  std::vector<std::thread> hosts;
  for (int t = 0; t < 4; ++t) {
    hosts.emplace_back([t, &good] {
      for (int round = 0; round < 5; ++round) {
        ggml_backend_ptr backend = new_backend(1 + t % 2);
        Graph graph;
        graph.add({.slots = 100 + 50 * t, .rows = 3 + t, .computed_mask = round % 2 == 1});
        graph.add({.slots = 64, .rows = 1 + t});
        graph.fill(backend.get(), unsigned(t));
        compute(backend.get(), graph);
        if (graph.error(0) < kTolerance && graph.error(1) < kTolerance) ++good;
      }
    });
  }
  for (std::thread& host : hosts) host.join();
  EXPECT_EQ(good, 20);
}

TEST(CpuHooks, LivingBackendsSurviveTheirRemoval) {
  ggml_backend_ptr backend = new_backend();
  Graph graph;
  graph.add({});
  graph.fill(backend.get(), 1);
  remove_hooks();
  const int64_t before = served();
  compute(backend.get(), graph);
  EXPECT_EQ(served(), before);
  EXPECT_LT(graph.error(0), 1e-3);
  backend.reset();
  install_hooks(cpu());
}

}  // namespace
}  // namespace relay::ggml
