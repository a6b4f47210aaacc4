// What a host does with a plan over time: one graph for many steps, one plan for many layers, two
// plans in two streams, tokens written into the cache and attended.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "core/numeric.h"
#include "core/test_env.h"
#include "cuda/cuda_case.h"

namespace relay::test {
namespace {

/// A forest with the tensors and the answers of one configuration.
struct Step {
  Step(const CudaConfig& config_, const ForestCase& forest_)
      : config(config_),
        forest(forest_),
        op(make_operator(config, forest)),
        oracle(*op, truth_of(forest), {arithmetic_on_gpu(config)}, forest.seed, 60'000) {}

  std::string compare(const OutputTensor& output) const {
    return oracle.compare(*op, output, arithmetic_on_gpu(config));
  }

  CudaConfig config;
  ForestCase forest;
  std::unique_ptr<OperatorCase> op;
  Oracle oracle;
};

std::vector<std::unique_ptr<Step>> make_steps(size_t count,
                                              const std::function<CudaConfig(size_t)>& config,
                                              const std::function<ForestCase(size_t)>& forest) {
  std::vector<std::unique_ptr<Step>> steps(count);
  parallel_for(count, [&](size_t i) { steps[i] = std::make_unique<Step>(config(i), forest(i)); });
  return steps;
}

/// Random steps of a server whose caches have blocks of 16.
ForestCase server_step(uint64_t seed, bool causal = true) {
  ForestLimits limits;
  limits.max_rows = 96;
  limits.max_prefix = 2048;
  limits.max_slots = 6000;
  limits.max_attended = 120'000;
  ForestCase c;
  for (uint64_t draw = 0; c.block_size != 16 || c.causal != causal; ++draw) {
    c = generate_tables(derive_seed(seed, 0x57e + draw), limits);
  }
  c.window = 0;  // a plan has one window for all of its batches
  return c;
}

struct Server : ::testing::TestWithParam<DType> {};

TEST_P(Server, OneGraphServesManySteps) {
  RELAY_REQUIRE_GPU();
  CudaConfig config = config_of(GetParam(), 128, 2, 4);
  config.check = true;
  const size_t count = sampled(24).size();
  const auto steps = make_steps(
      count, [&](size_t) { return config; }, [](size_t i) { return server_step(i + 1); });
  BatchLimits limits = limits_of(steps[0]->forest, 2);
  for (const auto& step : steps) limits = larger(limits, limits_of(step->forest, 2));

  const std::lock_guard lock(gpu_mutex());
  const DeviceStream stream;
  DeviceOperator device(config, limits);
  for (const cuda::Path path : kernel_paths()) {
    for (const Sharing sharing : {Sharing::kOn, Sharing::kOff}) {
      SCOPED_TRACE(std::string(name_of(path)) + (sharing == Sharing::kOn ? ", shared" : ", alone"));
      const DevicePlan plan(device.options(path, sharing, true, 0), stream);
      device.upload(*steps[0]->op, steps[0]->forest);
      device.upload(decoy_batch(limits, limits.requests, 7));
      const auto enqueue = [&] {
        cuda::plan_batch(*plan, device.batch(), stream.get());
        cuda::attend(*plan, device.inputs(), stream.get());
      };
      enqueue();  // as hosts do before they capture
      stream.wait("warm-up of a graph");
      const DeviceGraph graph(stream, enqueue);
      for (size_t i = 0; i < count; ++i) {
        const Step& step = *steps[i];
        SCOPED_TRACE("step " + std::to_string(i) + ", " + step.forest.describe());
        device.upload(*step.op, step.forest);
        device.upload(host_batch(step.forest, limits, limits.requests, i));
        device.reset_output();
        graph.launch(stream);
        stream.wait("a step of a graph");
        OutputTensor output(step.op->config, step.forest.rows());
        ASSERT_EQ(device.download(output, step.forest.rows()), "");
        ASSERT_EQ(step.compare(output), "");
        ASSERT_EQ(device.changed_inputs(), "");
        ASSERT_NO_THROW(cuda::check_batch(*plan, stream.get()));
      }
      ASSERT_EQ(plan.broken_guards(), "");
    }
  }
}

TEST_P(Server, OnePlanServesManySteps) {
  RELAY_REQUIRE_GPU();
  // Not captured: batches of fewer requests, one after the other without waiting in between.
  const CudaConfig config = config_of(GetParam(), 64, 1, 7);
  const size_t count = sampled(16).size();
  const auto steps = make_steps(
      count, [&](size_t) { return config; }, [](size_t i) { return server_step(i + 101); });
  BatchLimits limits = limits_of(steps[0]->forest, 0);
  for (const auto& step : steps) limits = larger(limits, limits_of(step->forest, 0));

  const std::lock_guard lock(gpu_mutex());
  const DeviceStream stream;
  std::vector<std::unique_ptr<DeviceOperator>> devices;
  for (const auto& step : steps) {
    devices.push_back(std::make_unique<DeviceOperator>(config, limits));
    devices.back()->upload(*step->op, step->forest);
    devices.back()->upload(
        host_batch(step->forest, limits, static_cast<int32_t>(step->forest.requests.size()), 1));
  }
  for (const cuda::Path path : kernel_paths()) {
    SCOPED_TRACE(name_of(path));
    const DevicePlan plan(devices[0]->options(path, Sharing::kOn, true, 0), stream);
    for (const auto& device : devices) device->reset_output();
    for (size_t i = 0; i < count; ++i) {
      cuda::Batch batch = devices[i]->batch();
      if (i % 2 == 1) batch.rows = static_cast<int32_t>(steps[i]->forest.rows());
      cuda::plan_batch(*plan, batch, stream.get());
      cuda::attend(*plan, devices[i]->inputs(), stream.get());
    }
    stream.wait("steps in a row");
    for (size_t i = 0; i < count; ++i) {
      SCOPED_TRACE("step " + std::to_string(i) + ", " + steps[i]->forest.describe());
      OutputTensor output(steps[i]->op->config, steps[i]->forest.rows());
      ASSERT_EQ(devices[i]->download(output, steps[i]->forest.rows()), "");
      ASSERT_EQ(steps[i]->compare(output), "");
    }
    ASSERT_EQ(plan.broken_guards(), "");
  }
}

TEST_P(Server, OnePlanServesManyLayers) {
  RELAY_REQUIRE_GPU();
  // Layers with caches of their own, in any layout, with other features, in one graph.
  const ForestCase forest = server_step(77);
  const auto config_of_layer = [&](size_t i) {
    CudaConfig config = config_of(GetParam(), 96, 2, 3);
    config.cache = kCachePlacements[i % kCachePlacements.size()];
    config.q_rows = kRowsPlacements[i % 3];
    config.out_rows = kRowsPlacements[i / 2 % 3];
    config.softcap = i == 1 ? 30.0f : 0.0f;
    config.slopes = i == 2;
    config.sinks = i == 3;
    config.lse = i != 4;
    return config;
  };
  const auto layers = make_steps(6, config_of_layer, [&](size_t i) {
    ForestCase c = forest;
    c.seed = i + 1;
    return c;
  });
  const BatchLimits limits = limits_of(forest, 0);
  const int32_t requests = static_cast<int32_t>(forest.requests.size());

  const std::lock_guard lock(gpu_mutex());
  const DeviceStream stream;
  std::vector<std::unique_ptr<DeviceOperator>> devices;
  for (const auto& layer : layers) {
    devices.push_back(std::make_unique<DeviceOperator>(layer->config, limits));
    devices.back()->upload(*layer->op, layer->forest);
    devices.back()->upload(host_batch(forest, limits, requests, 1));
  }
  for (const cuda::Path path : kernel_paths()) {
    SCOPED_TRACE(name_of(path));
    const DevicePlan plan(devices[0]->options(path, Sharing::kOn, true, 0), stream);
    const auto enqueue = [&] {
      cuda::plan_batch(*plan, devices[0]->batch(), stream.get());
      for (const auto& device : devices) cuda::attend(*plan, device->inputs(), stream.get());
    };
    enqueue();
    stream.wait("layers");
    const DeviceGraph graph(stream, enqueue);
    for (const auto& device : devices) device->reset_output();
    for (int step = 0; step < 3; ++step) graph.launch(stream);  // steps follow without a pause
    stream.wait("layers in a graph");
    for (size_t i = 0; i < layers.size(); ++i) {
      SCOPED_TRACE("layer " + std::to_string(i));
      OutputTensor output(layers[i]->op->config, forest.rows());
      ASSERT_EQ(devices[i]->download(output, forest.rows()), "");
      ASSERT_EQ(layers[i]->compare(output), "");
    }
    ASSERT_EQ(plan.broken_guards(), "");
  }
}

TEST_P(Server, TwoPlansInTwoStreams) {
  RELAY_REQUIRE_GPU();
  const auto steps = make_steps(
      2, [&](size_t i) { return config_of(GetParam(), i == 0 ? 128 : 64, 2, 4); },
      [](size_t i) { return server_step(i + 201); });
  const std::lock_guard lock(gpu_mutex());
  const DeviceStream streams[2];
  std::vector<std::unique_ptr<DeviceOperator>> devices;
  for (const auto& step : steps) {
    const BatchLimits limits = limits_of(step->forest, 0);
    devices.push_back(std::make_unique<DeviceOperator>(step->config, limits));
    devices.back()->upload(*step->op, step->forest);
    devices.back()->upload(host_batch(step->forest, limits, limits.requests, 1));
  }
  for (const cuda::Path path : kernel_paths()) {
    SCOPED_TRACE(name_of(path));
    const DevicePlan a(devices[0]->options(path, Sharing::kOn, true, 0), streams[0]);
    const DevicePlan b(devices[1]->options(path, Sharing::kOn, true, 0), streams[1]);
    for (const auto& device : devices) device->reset_output();
    for (int round = 0; round < 20; ++round) {
      for (const int i : {0, 1}) {
        const cuda::Plan& plan = i == 0 ? *a : *b;
        cuda::plan_batch(plan, devices[i]->batch(), streams[i].get());
        cuda::attend(plan, devices[i]->inputs(), streams[i].get());
      }
    }
    for (const int i : {0, 1}) {
      streams[i].wait("one of two streams");
      OutputTensor output(steps[i]->op->config, steps[i]->forest.rows());
      ASSERT_EQ(devices[i]->download(output, steps[i]->forest.rows()), "");
      ASSERT_EQ(steps[i]->compare(output), "") << "stream " << i;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Types, Server, ::testing::Values(DType::kBF16, DType::kF16),
                         [](const auto& type) {
                           return type.param == DType::kBF16 ? "bf16" : "f16";
                         });

// --- Writing KV ----------------------------------------------------------------------------------

/// Writes all used slots of a case into an empty cache, in a random order, with padding and
/// strides; then the cache must hold what it would have been uploaded with.
void check_write(const CudaConfig& config, uint64_t seed) {
  SCOPED_TRACE(config.describe());
  TableWriter w(16, seed);
  w.request(w.blocks(3), 21);
  w.request({}, 5);
  const ForestCase forest = w.finish();
  const auto op = make_operator(config, forest);
  const bool fp8 = config.kv_type == DType::kF8E4M3;
  const BatchLimits limits = limits_of(forest, 0);

  std::vector<int64_t> slots;
  const std::vector<bool> used = forest.used_slots();
  for (size_t slot = 0; slot < used.size(); ++slot) {
    if (used[slot]) slots.push_back(static_cast<int64_t>(slot));
  }
  Random random(derive_seed(seed, 0x3b));
  random.shuffle(slots);
  slots.insert(slots.begin() + 1, {-1, -7});
  slots.push_back(-1);

  // [token][K heads | V heads] with gaps, K and V of a token side by side.
  const int64_t dim = config.shape.qk_dim, heads = config.shape.kv_heads;
  const int64_t head_stride = 2 * dim + 16, row_stride = 2 * heads * head_stride + 32;
  std::vector<unsigned char> tokens(slots.size() * row_stride, 0xff);
  for (size_t token = 0; token < slots.size(); ++token) {
    if (slots[token] < 0) continue;
    for (int64_t i = 0; i < 2 * heads; ++i) {
      const KvTensor& tensor = i < heads ? op->kv.k : op->kv.v;
      const std::span<const float> values = tensor.decoded(slots[token], i % heads);
      unsigned char* to = tokens.data() + token * row_stride + i * head_stride;
      for (int64_t j = 0; j < dim; ++j) {
        const uint16_t bits = config.type == DType::kBF16 ? to_bf16(values[j]) : to_f16(values[j]);
        std::memcpy(to + 2 * j, &bits, sizeof(bits));
      }
    }
  }

  const std::lock_guard lock(gpu_mutex());
  const DeviceStream stream;
  DeviceOperator device(config, limits);
  device.upload(*op, forest);
  const DevicePlan plan(device.options(cuda::Path::kMma, Sharing::kOn, true, 0), stream);
  // A cache of its own with the same strides, all NaN.
  const cuda::Inputs inputs = device.inputs();
  const auto k_at = static_cast<const unsigned char*>(inputs.k);
  const int64_t v_offset = static_cast<const unsigned char*>(inputs.v) - k_at;
  const DeviceBuffer cache(device.cache_bytes().size());
  cuda::Inputs to = inputs;
  to.k = cache.data();
  to.v = cache.as<unsigned char>() + v_offset;
  const DeviceBuffer from = DeviceBuffer::of<unsigned char>(tokens);
  const DeviceBuffer where = DeviceBuffer::of<int64_t>(slots);
  cuda::write_kv(*plan,
                 {.k = from.data(),
                  .v = from.as<unsigned char>() + heads * head_stride,
                  .k_row_stride = row_stride,
                  .k_head_stride = head_stride,
                  .v_row_stride = row_stride,
                  .v_head_stride = head_stride,
                  .tokens = static_cast<int32_t>(slots.size()),
                  .slots = where.as<int64_t>()},
                 to, stream.get());
  stream.wait("writing KV");
  const std::vector<unsigned char> got = cache.download();
  const std::vector<unsigned char>& expected = device.cache_bytes();
  EXPECT_EQ(cache.broken_guards("the cache"), "");
  EXPECT_EQ(from.download(), tokens) << "the tokens changed";
  int64_t wrong = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    // Grid values times a power of two are exact in bf16, and come back as the same code (or as
    // the other zero).
    const bool zeros = fp8 && ((got[i] | expected[i]) & 0x7f) == 0;
    if (got[i] != expected[i] && !zeros && wrong++ == 0) {
      ADD_FAILURE() << "byte " << i << " is " << int{got[i]} << ", should be " << int{expected[i]};
    }
  }
  EXPECT_EQ(wrong, 0);
}

TEST(CudaWriteKv, PutsTokensWhereTheyBelong) {
  RELAY_REQUIRE_GPU();
  uint64_t seed = 0;
  for (const CachePlacement placement : kCachePlacements) {
    for (const DType type : {DType::kBF16, DType::kF16}) {
      const std::vector<int32_t> dims = {64, 80, 96, 128, 192, 256};
      const int32_t dim = dims[seed % dims.size()];
      CudaConfig config = config_of(type, dim, 1 + static_cast<int32_t>(seed % 3), 1);
      config.cache = placement;
      check_write(config, ++seed);
      config = fp8_config_of(type, dim, 2, 1);
      config.cache = placement;
      config.k_scale = 0.03125f;
      config.v_scale = seed % 2 ? 1.0f : 0.015625f;
      check_write(config, ++seed);
      if (HasFailure()) return;
    }
  }
}

TEST(CudaWriteKv, NothingAtAll) {
  RELAY_REQUIRE_GPU();
  const CudaConfig config = config_of(DType::kBF16, 64, 1, 1);
  TableWriter w(16);
  w.request({}, 5);
  const ForestCase forest = w.finish();
  const auto op = make_operator(config, forest);
  const std::lock_guard lock(gpu_mutex());
  const DeviceStream stream;
  DeviceOperator device(config, limits_of(forest, 0));
  device.upload(*op, forest);
  device.upload(host_batch(forest, limits_of(forest, 0), 1, 1));
  const DevicePlan plan(device.options(cuda::Path::kMma, Sharing::kOn, true, 0), stream);
  EXPECT_NO_THROW(cuda::write_kv(*plan, {}, device.inputs(), stream.get()));
  stream.wait("writing nothing");
  EXPECT_EQ(device.changed_inputs(), "");
}

}  // namespace
}  // namespace relay::test
