// Every documented refusal of the GPU operator, and batches that are wrong only on the device: they
// spoil nobody's memory and no other request.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "core/test_env.h"
#include "cuda/cuda_case.h"

namespace relay::test {
namespace {

/// Runs f; empty if it throws relay::Error with a message, else what it did instead.
std::string refused(const std::function<void()>& f) {
  try {
    f();
  } catch (const Error& e) {
    return *e.what() ? "" : "refused without a word";
  } catch (const std::exception& e) {
    return std::string("threw something else: ") + e.what();
  }
  return "accepted";
}

// --- Options -------------------------------------------------------------------------------------

cuda::PlanOptions good_options() {
  return {.shape = {.q_heads = 8, .kv_heads = 2, .qk_dim = 128, .v_dim = 128},
          .max_requests = 8,
          .max_rows = 16,
          .max_blocks = 20,
          .block_size = 16,
          .cache_blocks = 100};
}

void expect_refused(const char* why, const std::function<void(cuda::PlanOptions&)>& change) {
  cuda::PlanOptions options = good_options();
  change(options);
  EXPECT_EQ(refused([&] { cuda::workspace_bytes(options); }), "") << why;
  const DeviceStream stream;
  const DeviceBuffer memory(1 << 20);
  EXPECT_EQ(refused([&] { cuda::make_plan(options, memory.data(), 1 << 20, stream.get()); }), "")
      << why;
  stream.wait(why);
}

TEST(CudaErrors, Options) {
  RELAY_REQUIRE_GPU();
  using Options = cuda::PlanOptions;
  EXPECT_GT(cuda::workspace_bytes(good_options()), 0u);
  for (const int32_t dim : {0, -64, 16, 63, 72, 100, 160, 512}) {
    expect_refused("head size", [&](Options& o) { o.shape.qk_dim = o.shape.v_dim = dim; });
  }
  expect_refused("other values than keys", [](Options& o) { o.shape.v_dim = 64; });
  expect_refused("heads no multiple", [](Options& o) { o.shape.q_heads = 9; });
  expect_refused("no heads", [](Options& o) { o.shape.q_heads = 0; });
  expect_refused("no KV heads", [](Options& o) { o.shape.kv_heads = 0; });
  expect_refused("negative heads", [](Options& o) { o.shape.q_heads = o.shape.kv_heads = -2; });
  expect_refused("f32 queries", [](Options& o) { o.q_type = o.kv_type = DType::kF32; });
  expect_refused("8-bit queries", [](Options& o) { o.q_type = o.kv_type = DType::kF8E4M3; });
  expect_refused("mixed types", [](Options& o) { o.kv_type = DType::kF16; });
  expect_refused("q8_0", [](Options& o) { o.kv_type = DType::kQ8_0; });
  for (const int32_t value : {0, -1}) {
    expect_refused("max_requests", [&](Options& o) { o.max_requests = value; });
    expect_refused("max_rows", [&](Options& o) { o.max_rows = value; });
    expect_refused("max_blocks", [&](Options& o) { o.max_blocks = value; });
    expect_refused("cache_blocks", [&](Options& o) { o.cache_blocks = value; });
  }
  expect_refused("max_requests", [](Options& o) { o.max_requests = cuda::kMaxRequests + 1; });
  for (const int32_t size : {0, -16, 1, 8, 17, 24}) {
    expect_refused("block_size", [&](Options& o) { o.block_size = size; });
  }
  expect_refused("negative window", [](Options& o) { o.window = -1; });
  expect_refused("window without causal", [](Options& o) {
    o.window = 5;
    o.causal = false;
  });
  if (compute_capability() / 10 != 9) {
    expect_refused("wgmma on another GPU", [](Options& o) { o.path = cuda::Path::kWgmma; });
  }
}

TEST(CudaErrors, Workspace) {
  RELAY_REQUIRE_GPU();
  const cuda::PlanOptions options = good_options();
  const size_t bytes = cuda::workspace_bytes(options);
  const DeviceStream stream;
  const DeviceBuffer memory(bytes + 256);
  const auto make = [&](void* at, size_t size) {
    return refused([&] { cuda::make_plan(options, at, size, stream.get()); });
  };
  EXPECT_EQ(make(memory.data(), bytes - 1), "");
  EXPECT_EQ(make(memory.data(), 0), "");
  EXPECT_EQ(make(nullptr, bytes), "");
  EXPECT_EQ(make(memory.as<char>() + 16, bytes), "");
  EXPECT_EQ(make(memory.data(), bytes), "accepted");
  stream.wait("plans of workspaces");
}

TEST(CudaErrors, OptionsAreThoseOfThePlan) {
  RELAY_REQUIRE_GPU();
  const DeviceStream stream;
  const DevicePlan plan(good_options(), stream);
  stream.wait("a plan");
  EXPECT_EQ(cuda::options_of(*plan).max_blocks, 20);
  EXPECT_EQ(cuda::options_of(*plan).shape, good_options().shape);
  EXPECT_NE(cuda::device_name().find('('), std::string::npos) << cuda::device_name();
}

// --- Batches and inputs --------------------------------------------------------------------------

/// Eight requests over one prompt of 12 blocks, the second half of them verify rows; on the device
/// with a plan of each path, and what they compute when nothing is wrong.
class CudaBatch {
 public:
  static constexpr int32_t kRequests = 8;

  explicit CudaBatch(bool check) : forest_(make_forest()) {
    config_ = config_of(DType::kBF16, 128, 2, 2);
    config_.check = check;
    config_.slack = 3;
    limits_ = limits_of(forest_, config_.slack);
    op_ = make_operator(config_, forest_);
    device_ = std::make_unique<DeviceOperator>(config_, limits_);
    device_->upload(*op_, forest_);
    batch_ = host_batch(forest_, limits_, kRequests, 5);
    device_->upload(batch_);
  }

  static ForestCase make_forest() {
    TableWriter w(16, 41);
    const std::vector<int32_t> prompt = w.blocks(12);
    for (int32_t i = 0; i < kRequests; ++i) w.request(prompt, 7 + 5 * i, i < 4 ? 1 : 3);
    return w.finish();
  }

  cuda::PlanOptions options(cuda::Path path) const {
    return device_->options(path, Sharing::kOn, true, 0);
  }
  int32_t rows() const { return forest_.rows(); }

  /// Plans and attends what is on the device; empty, or what memory was damaged.
  std::string run(const cuda::Plan& plan, const DeviceStream& stream, OutputTensor& output,
                  bool all_rows) {
    device_->reset_output();
    cuda::plan_batch(plan, device_->batch(), stream.get());
    cuda::attend(plan, device_->inputs(), stream.get());
    stream.wait("a batch that may be wrong");
    const std::string report = device_->download(output, rows());
    // Rows of a request that is wrong may be left alone.
    const bool only_missing = report.find("overwritten") == std::string::npos &&
                              report.find("bytes behind") == std::string::npos &&
                              report.find("bytes before") == std::string::npos;
    if (!report.empty() && (all_rows || !only_missing)) return report;
    return device_->changed_inputs();
  }

  ForestCase forest_;
  CudaConfig config_;
  BatchLimits limits_;
  std::unique_ptr<OperatorCase> op_;
  std::unique_ptr<DeviceOperator> device_;
  HostBatch batch_;
};

TEST(CudaErrors, Batches) {
  RELAY_REQUIRE_GPU();
  const std::lock_guard lock(gpu_mutex());
  const DeviceStream stream;
  CudaBatch b(false);
  const DevicePlan plan(b.options(cuda::Path::kMma), stream);
  const auto plan_with = [&](const std::function<void(cuda::Batch&)>& change) {
    cuda::Batch batch = b.device_->batch();
    change(batch);
    return refused([&] { cuda::plan_batch(*plan, batch, stream.get()); });
  };
  EXPECT_EQ(plan_with([](cuda::Batch&) {}), "accepted");
  EXPECT_EQ(plan_with([](cuda::Batch& x) { x.query_starts = nullptr; }), "");
  EXPECT_EQ(plan_with([](cuda::Batch& x) { x.kv_lengths = nullptr; }), "");
  EXPECT_EQ(plan_with([](cuda::Batch& x) { x.table = nullptr; }), "");
  EXPECT_EQ(plan_with([](cuda::Batch& x) { x.requests = -1; }), "");
  EXPECT_EQ(plan_with([&](cuda::Batch& x) { x.requests = b.limits_.requests + 1; }), "");
  EXPECT_EQ(plan_with([](cuda::Batch& x) { x.rows = -1; }), "");
  EXPECT_EQ(plan_with([&](cuda::Batch& x) { x.rows = b.limits_.rows + 1; }), "");
  EXPECT_EQ(plan_with([&](cuda::Batch& x) { x.table_stride = b.limits_.blocks - 1; }), "");
  EXPECT_EQ(plan_with([](cuda::Batch& x) { x.table_stride = 0; }), "");
  stream.wait("refused batches");
  EXPECT_EQ(b.device_->changed_inputs(), "");
}

TEST(CudaErrors, NoRequestsAtAll) {
  RELAY_REQUIRE_GPU();
  const std::lock_guard lock(gpu_mutex());
  const DeviceStream stream;
  CudaBatch b(true);
  for (const cuda::Path path : kernel_paths()) {
    const DevicePlan plan(b.options(path), stream);
    cuda::Batch batch = b.device_->batch();
    batch.requests = 0;
    b.device_->reset_output();
    EXPECT_NO_THROW(cuda::plan_batch(*plan, batch, stream.get()));
    EXPECT_NO_THROW(cuda::attend(*plan, b.device_->inputs(), stream.get()));
    stream.wait("no requests");
    EXPECT_NO_THROW(cuda::check_batch(*plan, stream.get()));
    OutputTensor untouched(b.op_->config, 0);
    EXPECT_EQ(b.device_->download(untouched, 0), "");
  }
}

TEST(CudaErrors, Inputs) {
  RELAY_REQUIRE_GPU();
  const std::lock_guard lock(gpu_mutex());
  const DeviceStream stream;
  CudaBatch b(false);
  for (const cuda::Path path : kernel_paths()) {
    SCOPED_TRACE(name_of(path));
    const DevicePlan plan(b.options(path), stream);
    cuda::plan_batch(*plan, b.device_->batch(), stream.get());
    b.device_->reset_output();
    const auto attend_with = [&](const std::function<void(cuda::Inputs&)>& change) {
      cuda::Inputs inputs = b.device_->inputs();
      change(inputs);
      return refused([&] { cuda::attend(*plan, inputs, stream.get()); });
    };
    using In = cuda::Inputs;
    const auto moved = [](const void* p) { return static_cast<const char*>(p) + 8; };
    EXPECT_EQ(attend_with([](In& x) { x.q = nullptr; }), "");
    EXPECT_EQ(attend_with([](In& x) { x.out = nullptr; }), "");
    EXPECT_EQ(attend_with([](In& x) { x.k = nullptr; }), "");
    EXPECT_EQ(attend_with([](In& x) { x.v = nullptr; }), "");
    EXPECT_EQ(attend_with([&](In& x) { x.q = moved(x.q); }), "");
    EXPECT_EQ(attend_with([&](In& x) { x.k = moved(x.k); }), "");
    EXPECT_EQ(attend_with([&](In& x) { x.v = moved(x.v); }), "");
    EXPECT_EQ(attend_with([](In& x) { x.out = static_cast<char*>(x.out) + 8; }), "");
    for (int64_t In::* stride :
         {&In::q_row_stride, &In::q_head_stride, &In::out_row_stride, &In::out_head_stride,
          &In::k_block_stride, &In::k_slot_stride, &In::k_head_stride, &In::v_block_stride,
          &In::v_slot_stride, &In::v_head_stride}) {
      EXPECT_EQ(attend_with([&](In& x) { x.*stride += 8; }), "");
      EXPECT_EQ(attend_with([&](In& x) { x.*stride += 1; }), "");
    }
    EXPECT_EQ(attend_with([](In& x) { x.softcap = -1.0f; }), "");
    EXPECT_EQ(attend_with([](In& x) { x.scale = -1.0f; }), "");
    // fp8 queries over a cache that is not.
    EXPECT_EQ(attend_with([](In& x) { x.q_scale = static_cast<const float*>(x.out); }), "");
    stream.wait("refused inputs");
    OutputTensor untouched(b.op_->config, 0);
    EXPECT_EQ(b.device_->download(untouched, 0), "") << "refused, but something was launched";
    EXPECT_EQ(attend_with([](In&) {}), "accepted");
    stream.wait("inputs that are right");
    OutputTensor output(b.op_->config, b.rows());
    EXPECT_EQ(b.device_->download(output, b.rows()), "");
  }
}

// --- Wrong only on the device --------------------------------------------------------------------

struct Fault {
  const char* name;
  std::vector<int32_t> requests;  ///< that are wrong, the first one first
  std::function<void(HostBatch&)> change;
};

/// Faults of request 3, a decode row, of 6, which has three rows, or of 0, which comes first.
std::vector<Fault> faults(const BatchLimits& limits) {
  const auto id = [](int32_t request, int64_t column, int32_t block) {
    return [=](HostBatch& b) { b.table[request * b.table_stride + column] = block; };
  };
  const auto length = [](int32_t request, int32_t tokens) {
    return [=](HostBatch& b) { b.kv_lengths[request] = tokens; };
  };
  constexpr int32_t kMax = std::numeric_limits<int32_t>::max();
  constexpr int32_t kMin = std::numeric_limits<int32_t>::min();
  return {
      {"negative block of a prompt", {3}, id(3, 4, -1)},
      {"negative block of its own", {3}, id(3, 12, -1)},
      {"first block", {3}, id(3, 0, -5)},
      {"block behind the cache", {3}, id(3, 12, limits.cache_blocks)},
      {"block far behind the cache", {6}, id(6, 7, kMax)},
      {"block far before the cache", {6}, id(6, 13, kMin)},
      {"length zero", {3}, length(3, 0)},
      {"length negative", {3}, length(3, -20)},
      {"length lowest", {6}, length(6, kMin)},
      {"length below the rows", {6}, length(6, 2)},
      {"length beyond the table", {3}, length(3, limits.blocks * limits.block_size + 1)},
      {"length far beyond the table", {6}, length(6, kMax)},
      {"a block of the first request", {0}, id(0, 2, -1)},
      {"the length of the first request", {0}, length(0, kMax)},
      {"two requests",
       {3, 6},
       [=](HostBatch& b) {
         length(6, kMax)(b);
         id(3, 1, kMax)(b);
       }},
  };
}

TEST(CudaErrors, FaultsOfOneRequestAreItsOwn) {
  RELAY_REQUIRE_GPU();
  const std::lock_guard lock(gpu_mutex());
  const DeviceStream stream;
  for (const bool check : {true, false}) {
    CudaBatch b(check);
    for (const cuda::Path path : kernel_paths()) {
      for (const Sharing sharing : {Sharing::kOn, Sharing::kOff}) {
        SCOPED_TRACE(std::string(name_of(path)) + (check ? ", checked" : ", not checked") +
                     (sharing == Sharing::kOn ? ", shared" : ", alone"));
        cuda::PlanOptions options = b.options(path);
        options.sharing = sharing;
        const DevicePlan plan(options, stream);
        b.device_->upload(b.batch_);
        OutputTensor clean(b.op_->config, b.rows()), output(b.op_->config, b.rows());
        ASSERT_EQ(b.run(*plan, stream, clean, true), "");
        if (check) {
          ASSERT_NO_THROW(cuda::check_batch(*plan, stream.get()));
        }

        for (const Fault& fault : faults(b.limits_)) {
          SCOPED_TRACE(fault.name);
          HostBatch wrong = b.batch_;
          fault.change(wrong);
          b.device_->upload(wrong);
          ASSERT_EQ(b.run(*plan, stream, output, false), "");
          if (check) {
            try {
              cuda::check_batch(*plan, stream.get());
              ADD_FAILURE() << "not noticed";
            } catch (const Error& e) {
              const std::string name = "request " + std::to_string(fault.requests[0]);
              EXPECT_NE(std::string(e.what()).find(name), std::string::npos) << e.what();
            }
          }
          std::vector<bool> right(b.rows());
          for (int32_t row = 0; row < b.rows(); ++row) {
            right[row] = std::find(fault.requests.begin(), fault.requests.end(),
                                   b.forest_.request_of_row[row]) == fault.requests.end();
          }
          ASSERT_EQ(disagreement(b.op_->config, clean, output, b.rows(), right), "");
        }

        // The next batch is as good as ever.
        b.device_->upload(b.batch_);
        ASSERT_EQ(b.run(*plan, stream, output, true), "");
        ASSERT_EQ(output.bits(), clean.bits());
        if (check) {
          ASSERT_NO_THROW(cuda::check_batch(*plan, stream.get()));
        }
        ASSERT_EQ(plan.broken_guards(), "");
      }
    }
  }
}

TEST(CudaErrors, QueryStartsOutOfOrder) {
  RELAY_REQUIRE_GPU();
  // Nothing is known of such a batch's rows, but memory stays as it was.
  const std::lock_guard lock(gpu_mutex());
  const DeviceStream stream;
  CudaBatch b(true);
  constexpr int32_t kMax = std::numeric_limits<int32_t>::max();
  const std::vector<std::function<void(HostBatch&)>> changes = {
      [&](HostBatch& x) { x.query_starts.back() = b.limits_.rows + 1; },
      [](HostBatch& x) { x.query_starts.back() = kMax; },
      [](HostBatch& x) { x.query_starts[3] = -1; },
      [](HostBatch& x) { x.query_starts[5] = 1; },
      [](HostBatch& x) { x.query_starts[5] = kMax; },
  };
  for (const cuda::Path path : kernel_paths()) {
    SCOPED_TRACE(name_of(path));
    const DevicePlan plan(b.options(path), stream);
    for (size_t i = 0; i < changes.size(); ++i) {
      SCOPED_TRACE("change " + std::to_string(i));
      HostBatch wrong = b.batch_;
      changes[i](wrong);
      b.device_->upload(wrong);
      b.device_->reset_output();
      cuda::plan_batch(*plan, b.device_->batch(), stream.get());
      cuda::attend(*plan, b.device_->inputs(), stream.get());
      stream.wait("query_starts out of order");
      EXPECT_THROW(cuda::check_batch(*plan, stream.get()), Error);
      EXPECT_EQ(b.device_->changed_inputs(), "");
      EXPECT_EQ(plan.broken_guards(), "");
      // All rows within the limits may have been written, none behind them.
      OutputTensor any(b.op_->config, b.limits_.rows);
      const std::string report = b.device_->download(any, b.limits_.rows);
      EXPECT_EQ(report.find("overwritten"), std::string::npos) << report;
      EXPECT_EQ(report.find("bytes behind"), std::string::npos) << report;
    }
  }
}

}  // namespace
}  // namespace relay::test
