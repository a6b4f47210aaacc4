#include "measure/operator.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <random>
#include <span>

#include "cpu/plan/cache_size.h"
#include "cpu/plan/cost_model.h"
#include "cpu/plan/plan.h"
#include "cpu/plan/schedule.h"
#include "measure/kv_buffer.h"

namespace relay::measure {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// A part of a sequence begins where a tile does.
int64_t aligned(const OpProblem& p, int64_t slots) {
  if (p.layout == KvLayout::kRows) return slots;
  return (slots + kTileSlots - 1) / kTileSlots * kTileSlots;
}
/// Where the context of request `row` begins.
int64_t context_slot(const OpProblem& p, int64_t row) {
  return aligned(p, p.prefix) + row * aligned(p, p.context);
}
int64_t cache_slots(const OpProblem& p) { return context_slot(p, p.batch); }

/// K and V of one layer: [slot][head][dim], or [head] and then in tiles.
struct Layer {
  KvBuffer k, v;
  std::vector<float> out_on, out_off;

  KvCache cache(const OpProblem& p) {
    const auto plane = [&](KvBuffer& buffer, int32_t dim) {
      const int64_t vector = row_bytes(p.kv_type, dim);
      const bool tiles = p.layout == KvLayout::kTiles;
      return KvPlane{.type = p.kv_type,
                     .data = buffer.data(),
                     .block_stride = 0,
                     .slot_stride = tiles ? vector : vector * p.shape.kv_heads,
                     .head_stride = tiles ? vector * cache_slots(p) : vector,
                     .unpack = nullptr};
    };
    KvCache cache{.k = plane(k, p.shape.qk_dim), .v = plane(v, p.shape.v_dim), .layout = p.layout};
    if (p.layout == KvLayout::kTiles) cache.block_size = cache_slots(p);
    return cache;
  }
};

/// One way of running: its plan, workspace and the layers' inputs.
struct Way {
  PlanPtr plan;
  Workspace workspace;
  std::vector<AttentionInputs> inputs;
  std::vector<double> seconds;
  std::vector<double> idle_shares;
  std::vector<double> build_seconds;
  std::vector<double> plan_seconds;
};

/// When a thread was in one layer's operator.
struct Stay {
  Clock::time_point start;
  Clock::time_point end;
};

/// Part of the threads' time between the first one's start and the last one's end that they were
/// not at work.
double idle_share(std::span<const std::vector<Stay>> threads, size_t layer) {
  Clock::time_point start = threads[0][layer].start;
  Clock::time_point end = threads[0][layer].end;
  Clock::duration busy{};
  for (const std::vector<Stay>& stays : threads) {
    start = std::min(start, stays[layer].start);
    end = std::max(end, stays[layer].end);
    busy += stays[layer].end - stays[layer].start;
  }
  const auto whole =
      static_cast<double>((end - start).count()) * static_cast<double>(threads.size());
  return whole > 0 ? 1 - static_cast<double>(busy.count()) / whole : 0;
}

/// Builds and plans as for a new batch; a plan is remade in place, as engines do step after step.
void plan_batch(const OpProblem& p, Sharing sharing, int32_t threads, Way& way) {
  const PlanOptions options = {.shape = p.shape,
                               .k_type = p.kv_type,
                               .v_type = p.kv_type,
                               .layout = p.layout,
                               .threads = threads};
  Forest forest;
  for (int i = 0; i < 8; ++i) {
    Clock::time_point start = Clock::now();
    build_batch(p, sharing, forest);
    way.build_seconds.push_back(seconds_since(start));
    start = Clock::now();
    if (way.plan) {
      remake_plan(*way.plan, forest, options);
    } else {
      way.plan = make_plan(forest, options);
    }
    way.plan_seconds.push_back(seconds_since(start));
  }
  way.workspace.fit(*way.plan);
}

/// All layers, one after the other; the time of one.
double run_layers(Way& way, ThreadPool& pool) {
  const size_t layers = way.inputs.size();
  std::vector<std::vector<Stay>> stays(pool.size(), std::vector<Stay>(layers));
  const Clock::time_point start = Clock::now();
  pool.run([&](int32_t thread) {
    for (size_t layer = 0; layer < layers; ++layer) {
      Stay& stay = stays[thread][layer];
      stay.start = Clock::now();
      attend(*way.plan, way.inputs[layer], way.workspace, thread);
      stay.end = Clock::now();
      pool.barrier().wait();
    }
  });
  const double seconds = seconds_since(start) / static_cast<double>(layers);
  for (size_t layer = 0; layer < layers; ++layer) {
    way.idle_shares.push_back(idle_share(stays, layer));
  }
  return seconds;
}

OpMeasurement measurement_of(const OpProblem& p, const Way& way, double read_bytes) {
  OpMeasurement m;
  m.time = timing_of(way.seconds);
  m.build_seconds = quantile(way.build_seconds, 0.5);
  m.plan_seconds = quantile(way.plan_seconds, 0.5);
  m.idle_share = quantile(way.idle_shares, 0.5);
  m.predicted_idle_share = simulate(*way.plan).idle_share();
  if (read_bytes > 0) {
    const CostModel costs = measured_costs(options_of(*way.plan), read_bytes);
    m.predicted_seconds = simulate(*way.plan, costs).seconds;
  }
  m.plan = summarize(*way.plan);
  m.flops = m.plan.flops;
  m.bytes_read = static_cast<double>(m.plan.kv_slots_read) * static_cast<double>(slot_bytes(p));
  return m;
}

}  // namespace

void check(const OpProblem& p) {
  check_batch(p);
  check_options({.shape = p.shape,
                 .k_type = p.kv_type,
                 .v_type = p.kv_type,
                 .layout = p.layout,
                 .threads = 1});
}

void build_batch(const OpProblem& p, Sharing sharing, Forest& forest) {
  std::vector<TreeNode> nodes = {{.parent = -1, .spans = {}}};
  if (p.prefix > 0) nodes[0].spans = {{.slot = 0, .column = 0, .count = p.prefix}};
  std::vector<int32_t> leaf_of_row;
  for (int32_t row = 0; row < p.batch; ++row) {
    TreeNode leaf{.parent = 0, .spans = {}};
    if (p.context > 0) {
      leaf.spans = {{.slot = context_slot(p, row), .column = p.prefix, .count = p.context}};
    }
    leaf_of_row.push_back(static_cast<int32_t>(nodes.size()));
    nodes.push_back(std::move(leaf));
  }
  build_from_tree({.nodes = nodes, .leaf_of_row = leaf_of_row, .position_of_row = {}, .window = 0},
                  sharing, forest);
}

OpResult run_op(const OpProblem& p, ThreadPool& pool, int rounds, double read_bytes) {
  check(p);
  if (rounds < 1) throw Error("bench op: needs at least one round");
  const int64_t slots = cache_slots(p);
  const int64_t k_bytes = slots * p.shape.kv_heads * row_bytes(p.kv_type, p.shape.qk_dim);
  const int64_t v_bytes = slots * p.shape.kv_heads * row_bytes(p.kv_type, p.shape.v_dim);

  OpResult result;
  result.problem = p;
  result.rounds = rounds;
  result.ideal_bytes = static_cast<double>((p.prefix + p.context * p.batch) * slot_bytes(p));
  result.layers = static_cast<int>(
      std::clamp<int64_t>(4 * last_level_cache_bytes() / (k_bytes + v_bytes) + 1, 2, 2048));
  result.predicted = relay_speedup(p);

  std::vector<float> q(static_cast<int64_t>(p.batch) * p.shape.q_heads * p.shape.qk_dim);
  std::mt19937_64 random(1);
  std::normal_distribution<float> normal;
  for (float& value : q) value = normal(random);

  std::vector<Layer> layers(result.layers);
  for (size_t i = 0; i < layers.size(); ++i) {
    layers[i].k.resize(k_bytes);
    layers[i].v.resize(v_bytes);
    fill_random(p.kv_type, layers[i].k, 2 * i + 1);
    fill_random(p.kv_type, layers[i].v, 2 * i + 2);
    layers[i].out_on.resize(static_cast<int64_t>(p.batch) * p.shape.q_heads * p.shape.v_dim);
    layers[i].out_off.resize(layers[i].out_on.size());
  }

  Way on, off;
  plan_batch(p, Sharing::kOn, pool.size(), on);
  plan_batch(p, Sharing::kOff, pool.size(), off);
  for (Layer& layer : layers) {
    AttentionInputs inputs;
    inputs.q = {.type = DType::kF32,
                .data = q.data(),
                .row_stride = int64_t{4} * p.shape.q_heads * p.shape.qk_dim,
                .head_stride = int64_t{4} * p.shape.qk_dim};
    inputs.kv = layer.cache(p);
    inputs.scale = 1.0f / std::sqrt(static_cast<float>(p.shape.qk_dim));
    inputs.out = {.type = DType::kF32,
                  .data = layer.out_on.data(),
                  .row_stride = int64_t{4} * p.shape.q_heads * p.shape.v_dim,
                  .head_stride = int64_t{4} * p.shape.v_dim};
    on.inputs.push_back(inputs);
    inputs.out.data = layer.out_off.data();
    off.inputs.push_back(inputs);
  }
  validate(*on.plan, on.inputs[0]);
  validate(*off.plan, off.inputs[0]);

  for (Way* way : {&on, &off}) {  // warm up: page tables, clocks
    run_layers(*way, pool);
    way->idle_shares.clear();
  }
  for (int round = 0; round < rounds; ++round) {
    // Whoever goes first may find the other's leftovers in the cache: take turns.
    Way* order[2] = {&on, &off};
    if (round % 2 == 1) std::swap(order[0], order[1]);
    for (Way* way : order) way->seconds.push_back(run_layers(*way, pool));
  }

  double largest = 0, squares = 0;
  for (size_t i = 0; i < layers[0].out_on.size(); ++i) {
    const double value = layers[0].out_on[i];
    largest = std::max(largest, std::fabs(value - layers[0].out_off[i]));
    squares += value * value;
  }
  result.difference = largest / std::sqrt(squares / static_cast<double>(layers[0].out_on.size()));
  result.on = measurement_of(p, on, read_bytes);
  result.off = measurement_of(p, off, read_bytes);
  return result;
}

}  // namespace relay::measure
