// Attention on the GPU against the double-precision oracle: every head size and ratio, lengths at
// the edges of blocks and tiles, every way to share, every feature, and random forests.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "core/test_env.h"
#include "cuda/cuda_case.h"

namespace relay::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
const std::vector<DType> kTypes = {DType::kBF16, DType::kF16};
const std::vector<int32_t> kDims = {64, 80, 96, 128, 192, 256};

/// Cycles through what a case is not about, so that every run sees all of it.
template <typename T>
T nth(const std::vector<T>& values, size_t i) {
  return values[i % values.size()];
}

CudaConfig varied(CudaConfig config, size_t i) {
  config.cache = nth(kCachePlacements, i);
  config.q_rows = nth(kRowsPlacements, i);
  config.out_rows = nth(kRowsPlacements, i / 3);
  config.slack = static_cast<int32_t>(i % 4);
  return config;
}

/// Decode rows, a verify row or six, a prefill chunk and padding over one prompt of `shared`
/// blocks.
ForestCase mixed_batch(int64_t block_size, int64_t shared, uint64_t seed, bool causal = true,
                       int64_t window = 0) {
  TableWriter w(block_size, seed);
  const std::vector<int32_t> prompt = w.blocks(shared);
  w.request(prompt, 9);
  w.request(prompt, 33, 6);
  w.padding();
  w.request(prompt, 1);
  w.request(prompt, 70, 45);
  w.request(prompt, 17, 2);
  w.request({}, 40, 3);  // one that shares nothing
  return w.finish(causal, window);
}

/// `requests` decode rows over a prompt, each with a context of its own.
ForestCase decode_batch(int64_t block_size, int64_t shared, int32_t requests, uint64_t seed) {
  TableWriter w(block_size, seed);
  const std::vector<int32_t> prompt = w.blocks(shared);
  for (int32_t i = 0; i < requests; ++i) w.request(prompt, 1 + i * 7 % 40);
  return w.finish();
}

// --- Shapes --------------------------------------------------------------------------------------

TEST(CudaShapes, HeadSizes) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const DType type : kTypes) {
    for (const int32_t dim : kDims) {
      for (const int32_t group : {1, 4}) {
        const size_t i = cases.size();
        cases.push_back({.name = "head size " + std::to_string(dim),
                         .config = varied(config_of(type, dim, 2, group), i),
                         .forest = mixed_batch(16, 11, 100 + i)});
      }
    }
  }
  run_cases(std::move(cases));
}

TEST(CudaShapes, HeadGroups) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const int32_t group : {1, 2, 3, 4, 5, 7, 8, 16, 64, 71}) {
    for (const int32_t kv_heads : {1, 2, 3}) {
      if (group > 16 && kv_heads > 1) continue;  // those are of multi-query models
      for (const DType type : kTypes) {
        const size_t i = cases.size();
        const int32_t dim = group % 2 ? 64 : 128;
        cases.push_back({.name = std::to_string(group) + " query heads of a KV head",
                         .config = varied(config_of(type, dim, kv_heads, group), i),
                         .forest = mixed_batch(16, 7, 200 + i)});
      }
    }
  }
  run_cases(std::move(cases));
}

TEST(CudaShapes, Layouts) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const CachePlacement cache : kCachePlacements) {
    for (const RowsPlacement q : kRowsPlacements) {
      const size_t i = cases.size();
      CudaConfig config = config_of(nth(kTypes, i), nth(kDims, i), 2, 3);
      config.cache = cache;
      config.q_rows = q;
      config.out_rows = nth(kRowsPlacements, i / 2);
      cases.push_back({.name = "layouts",
                       .config = config,
                       .forest = mixed_batch(nth<int64_t>({16, 64, 48}, i), 5, 300 + i)});
    }
  }
  run_cases(std::move(cases));
}

// --- Lengths -------------------------------------------------------------------------------------

const std::vector<int64_t> kBlockSizes = {16, 32, 48, 64, 128};

std::vector<int64_t> edge_lengths() {
  std::vector<int64_t> lengths;
  for (int64_t n = 1; n <= 130; n += 2) lengths.push_back(n);
  for (const int64_t n : {16, 32, 48, 64, 80, 96, 112, 128, 192, 256, 320, 384}) {
    lengths.push_back(n);
  }
  return lengths;
}

TEST(CudaLengths, OfRequestsForThemselves) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const int64_t block_size : kBlockSizes) {
    for (const DType type : kTypes) {
      const size_t i = cases.size();
      TableWriter w(block_size, 400 + i);
      for (const int64_t length : edge_lengths()) w.request({}, length);
      cases.push_back({.name = "blocks of " + std::to_string(block_size),
                       .config = varied(config_of(type, 64, 1, 4), i),
                       .forest = w.finish(),
                       .reads = Reads::kOfForest});
    }
  }
  run_cases(std::move(cases));
}

TEST(CudaLengths, OfContextsBehindAPrefix) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const int64_t block_size : kBlockSizes) {
    for (const int64_t shared : {0, 1, 2, 5}) {
      const size_t i = cases.size();
      TableWriter w(block_size, 500 + i);
      const std::vector<int32_t> prompt = w.blocks(shared);
      for (const int64_t length : edge_lengths()) w.request(prompt, length);
      cases.push_back({.name = std::to_string(shared) + " blocks of " + std::to_string(block_size),
                       .config = varied(config_of(nth(kTypes, i), 128, 1, 2), i),
                       .forest = w.finish(),
                       .reads = shared == 0 || shared * block_size >= kWorthSharing
                                    ? Reads::kOfForest
                                    : Reads::kAny});
    }
  }
  run_cases(std::move(cases));
}

TEST(CudaLengths, OfBatchesOfOne) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const int64_t length :
       {1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257, 1000, 4096, 5001}) {
    const size_t i = cases.size();
    TableWriter w(nth(kBlockSizes, i), 600 + i);
    w.request({}, length);
    cases.push_back({.name = "one request of " + std::to_string(length),
                     .config = varied(config_of(nth(kTypes, i), nth(kDims, i), 2, 4), i),
                     .forest = w.finish()});
  }
  run_cases(std::move(cases));
}

TEST(CudaLengths, OfPaddingInBetween) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (int where = 0; where < 8; ++where) {
    const size_t i = cases.size();
    TableWriter w(16, 700 + i);
    const std::vector<int32_t> prompt = w.blocks(4);
    if (where & 1) w.padding(3);
    w.request(prompt, 5);
    w.request(prompt, 20, 3);
    if (where & 2) w.padding(2);
    w.request(prompt, 0);
    w.request({}, 33);
    if (where & 4) w.padding(70);
    cases.push_back({.name = "padding " + std::to_string(where),
                     .config = varied(config_of(nth(kTypes, i), 64, 2, 2), i),
                     .forest = w.finish()});
    cases.back().config.check = true;
  }
  TableWriter nothing(16, 710);
  nothing.blocks(3);
  nothing.padding(5);
  cases.push_back({.name = "nothing but padding",
                   .config = config_of(DType::kBF16, 64, 2, 2),
                   .forest = nothing.finish()});
  run_cases(std::move(cases));
}

TEST(CudaLengths, LongPrefixes) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  std::vector<int64_t> prefixes = {8192, 12'000};
  if (scale() > 1) prefixes.push_back(65'536);
  for (const int64_t prefix : prefixes) {
    for (const int32_t requests : {1, 3, 64}) {
      const size_t i = cases.size();
      TableWriter w(16, 800 + i);
      const std::vector<int32_t> prompt =
          w.blocks(scale() < 0.2 ? 64 : (prefix + 15) / 16);  // under a checker: short
      for (int32_t r = 0; r < requests; ++r) w.request(prompt, 1 + r % 50);
      cases.push_back(
          {.name = std::to_string(requests) + " requests over " + std::to_string(prefix),
           .config = varied(config_of(nth(kTypes, i), 128, 1, 4), i),
           .forest = w.finish(),
           .reads = Reads::kOfForest});
    }
  }
  run_cases(std::move(cases));
}

// --- Rows ----------------------------------------------------------------------------------------

TEST(CudaRows, OfVerification) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (int32_t rows = 2; rows <= 8; ++rows) {
    for (const int32_t group : {1, 4, 8}) {
      const size_t i = cases.size();
      TableWriter w(16, 900 + i);
      const std::vector<int32_t> prompt = w.blocks(9);
      for (int32_t r = 0; r < 6; ++r) w.request(prompt, rows + r * 11, rows);
      w.request(prompt, 0, rows);  // its rows are the prompt's last
      w.request({}, rows, rows);   // there is nothing before its rows
      cases.push_back({.name = std::to_string(rows) + " rows per request",
                       .config = varied(config_of(nth(kTypes, i), nth(kDims, i), 1, group), i),
                       .forest = w.finish()});
    }
  }
  run_cases(std::move(cases));
}

TEST(CudaRows, OfPrefillAmongDecoding) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const int32_t chunk : {100, 128, 255, 257, 512, 700}) {
    for (const DType type : kTypes) {
      const size_t i = cases.size();
      TableWriter w(nth(kBlockSizes, i), 1000 + i);
      const std::vector<int32_t> prompt = w.blocks(3);
      for (int32_t r = 0; r < 5; ++r) w.request(prompt, 3 + 30 * r);
      w.request(prompt, chunk + 37, chunk);  // the second chunk of a prompt
      w.request(prompt, 8, 4);
      w.request({}, chunk, chunk);  // the first of another
      for (int32_t r = 0; r < 3; ++r) w.request(prompt, 50 - r);
      cases.push_back({.name = "chunk of " + std::to_string(chunk),
                       .config = varied(config_of(type, nth(kDims, i / 2), 1, 1 + i % 4), i),
                       .forest = w.finish()});
    }
  }
  run_cases(std::move(cases));
}

TEST(CudaRows, OfTwoChunksOfOnePrompt) {
  RELAY_REQUIRE_GPU();
  // Both read in the same blocks, as two requests with the same prompt do: rows see less than
  // others of blocks that they share.
  std::vector<CudaCase> cases;
  for (const DType type : kTypes) {
    TableWriter w(16, 1100 + cases.size());
    const std::vector<int32_t> prompt = w.blocks(40);
    w.table(prompt, 640, 200);
    w.table(prompt, 512, 130);
    w.table(prompt, 333, 1);
    w.table(prompt, 96, 96);
    cases.push_back({.name = "chunks", .config = config_of(type, 128, 2, 4), .forest = w.finish()});
  }
  run_cases(std::move(cases));
}

TEST(CudaRows, OfManyRequests) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const int32_t requests : {1, 2, 3, 7, 16, 33, 64, 128, 255, 256, cuda::kMaxRequests}) {
    const size_t i = cases.size();
    cases.push_back({.name = std::to_string(requests) + " requests",
                     .config = varied(config_of(nth(kTypes, i), 64, 1, i % 2 ? 4 : 1), i),
                     .forest = decode_batch(16, 12, requests, 1200 + i),
                     .reads = Reads::kOfForest});
  }
  run_cases(std::move(cases));
}

// --- Sharing -------------------------------------------------------------------------------------

TEST(CudaSharing, SamplesOfOnePrompt) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const DType type : kTypes) {
    for (const int32_t kv_heads : {1, 4}) {
      const size_t i = cases.size();
      TableWriter w(16, 1300 + i);
      const std::vector<int32_t> prompt = w.blocks(70);
      for (int32_t r = 0; r < 16; ++r) w.request(prompt, 30 + r);
      cases.push_back({.name = "16 samples",
                       .config = varied(config_of(type, 128, kv_heads, 4), i),
                       .forest = w.finish(),
                       .reads = Reads::kOfForest});
    }
  }
  run_cases(std::move(cases));
}

TEST(CudaSharing, TwoAndThreeLevels) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const int64_t block_size : kBlockSizes) {
    for (const bool third : {false, true}) {
      const size_t i = cases.size();
      TableWriter w(block_size, 1400 + i);
      const int64_t enough = (kWorthSharing + block_size - 1) / block_size;
      const std::vector<int32_t> system = w.blocks(2 * enough + 1);
      for (int32_t a = 0; a < 4; ++a) {
        std::vector<int32_t> document = system;
        for (const int32_t block : w.blocks(enough + a)) document.push_back(block);
        for (int32_t b = 0; b < 3; ++b) {
          std::vector<int32_t> question = document;
          if (third) {
            for (const int32_t block : w.blocks(enough + b)) question.push_back(block);
          }
          for (int32_t c = 0; c < (third ? 3 : 1); ++c) w.request(question, 5 + 9 * c + b);
        }
      }
      cases.push_back({.name = third ? "three levels" : "two levels",
                       .config = varied(config_of(nth(kTypes, i), 128, 2, 2), i),
                       .forest = w.finish(),
                       .reads = Reads::kOfForest});
    }
  }
  run_cases(std::move(cases));
}

TEST(CudaSharing, Staircases) {
  RELAY_REQUIRE_GPU();
  // Each request shares another number of blocks with the longest: every block has other readers.
  std::vector<CudaCase> cases;
  for (const int32_t steps : {2, 5, 17, 33, 64}) {
    for (const int order : {0, 1, 2}) {  // rising, falling, mixed
      const size_t i = cases.size();
      TableWriter w(16, 1500 + i);
      const std::vector<int32_t> trunk = w.blocks(steps);
      std::vector<int32_t> heights(steps);
      std::iota(heights.begin(), heights.end(), 1);
      Random random(derive_seed(i, 0x57a));
      if (order == 1) std::reverse(heights.begin(), heights.end());
      if (order == 2) random.shuffle(heights);
      for (const int32_t height : heights) {
        w.request({trunk.begin(), trunk.begin() + height}, 3 + height % 20);
      }
      // What comes first leads: a tall one does, so that much can be shared.
      const bool shares = order == 1 && steps > 8;
      cases.push_back({.name = "staircase of " + std::to_string(steps),
                       .config = varied(config_of(nth(kTypes, i), 64, 1, 1 + i % 4), i),
                       .forest = w.finish(),
                       .reads = shares ? Reads::kFewer : Reads::kAny});
    }
  }
  run_cases(std::move(cases));
}

TEST(CudaSharing, EverythingSharedWithSomebody) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const int64_t block_size : {16, 64}) {
    const size_t i = cases.size();
    TableWriter w(block_size, 1600 + i);
    const std::vector<int32_t> a = w.blocks(8), b = w.blocks(3);
    std::vector<int32_t> ab = a;
    ab.insert(ab.end(), b.begin(), b.end());
    for (int32_t r = 0; r < 3; ++r) w.request(a, 0);
    for (int32_t r = 0; r < 4; ++r) w.request(ab, 0);
    w.request(b, 0);  // the same blocks at other columns
    w.request(b, 0);
    cases.push_back({.name = "nobody is alone",
                     .config = varied(config_of(nth(kTypes, i), 128, 2, 3), i),
                     .forest = w.finish()});
  }
  run_cases(std::move(cases));
}

TEST(CudaSharing, PartialLastBlocks) {
  RELAY_REQUIRE_GPU();
  // The same block last, of which each has another part, or the same.
  std::vector<CudaCase> cases;
  for (const int64_t block_size : kBlockSizes) {
    const size_t i = cases.size();
    TableWriter w(block_size, 1700 + i);
    const std::vector<int32_t> prompt = w.blocks(5);
    for (const int64_t part : {1, 5, 5, 9, 15}) w.table(prompt, 4 * block_size + part);
    w.table(prompt, 5 * block_size);
    w.table(prompt, 3 * block_size + 7, 4);
    w.request(prompt, 12);
    cases.push_back({.name = "partial blocks of " + std::to_string(block_size),
                     .config = varied(config_of(nth(kTypes, i), nth(kDims, i), 1, 4), i),
                     .forest = w.finish()});
  }
  run_cases(std::move(cases));
}

TEST(CudaSharing, SameBlocksAtOtherColumns) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const bool slopes : {false, true}) {
    const size_t i = cases.size();
    TableWriter w(16, 1800 + i);
    const std::vector<int32_t> text = w.blocks(6);
    for (int64_t before = 0; before < 4; ++before) {
      for (int32_t twice = 0; twice < 2; ++twice) {
        std::vector<int32_t> table = w.blocks(before);
        table.insert(table.end(), text.begin(), text.end());
        w.request(table, 10 + before);
      }
    }
    // One request that has the same block in two columns.
    std::vector<int32_t> doubled = text;
    doubled.insert(doubled.end(), text.begin(), text.end());
    w.request(doubled, 3);
    CudaConfig config = varied(config_of(nth(kTypes, i), 128, 2, 2), i);
    config.slopes = slopes;
    cases.push_back(
        {.name = "other columns", .config = config, .forest = w.finish(), .reads = Reads::kFewer});
  }
  run_cases(std::move(cases));
}

TEST(CudaSharing, SharedColumnsBehindPrivateOnes) {
  RELAY_REQUIRE_GPU();
  // Tables that are equal in columns 5 to 9 but not before, in every other column, or in turns
  // with different partners.
  std::vector<CudaCase> cases;
  for (const int kind : {0, 1, 2}) {
    for (const int64_t block_size : {16, 64}) {
      const size_t i = cases.size();
      TableWriter w(block_size, 1900 + i);
      const std::vector<int32_t> common = w.blocks(24);
      for (int32_t r = 0; r < 9; ++r) {
        std::vector<int32_t> table = w.blocks(14);
        for (int32_t column = 0; column < 14; ++column) {
          if (kind == 0 && column >= 5 && column < 10) table[column] = common[column];
          if (kind == 1 && column % 2 == 1) table[column] = common[column];
          if (kind == 2 && (column + r) % 3 != 0) table[column] = common[column + 7 * (r % 2)];
        }
        w.table(table, 14 * block_size - r * 3, r % 4 == 3 ? 5 : 1);
      }
      cases.push_back({.name = "columns, kind " + std::to_string(kind),
                       .config = varied(config_of(nth(kTypes, i), nth(kDims, i), 1, 4), i),
                       .forest = w.finish(),
                       .reads = kind == 0 ? Reads::kFewer : Reads::kAny});
    }
  }
  run_cases(std::move(cases));
}

TEST(CudaSharing, OnlyWhereItIsFaster) {
  RELAY_REQUIRE_GPU();
  const std::lock_guard lock(gpu_mutex());
  const DeviceStream stream;
  const auto shared_segments = [&](int32_t requests, int64_t shared_slots, int32_t least) {
    TableWriter w(16, 4100);
    const std::vector<int32_t> prompt = w.blocks(shared_slots / 16);
    for (int32_t i = 0; i < requests; ++i) w.request(prompt, 16);
    const ForestCase forest = w.finish();
    const BatchLimits limits = limits_of(forest, 0);
    DeviceOperator device(config_of(DType::kBF16, 128, 8, 4), limits);
    device.upload(host_batch(forest, limits, requests, 1));
    cuda::PlanOptions options = device.options(cuda::Path::kAuto, Sharing::kOn, true, 0);
    options.min_shared_slots = least;
    const DevicePlan plan(options, stream);
    cuda::plan_batch(*plan, device.batch(), stream.get());
    return cuda::summarize(*plan, stream.get()).shared_segments;
  };
  EXPECT_EQ(shared_segments(32, 256, 0), 0);
  EXPECT_EQ(shared_segments(32, 512, 0), 1);
  EXPECT_EQ(shared_segments(2, 512, 0), 0);
  EXPECT_EQ(shared_segments(2, 4096, 0), 1);
  EXPECT_EQ(shared_segments(2, 512, 64), 1);
  EXPECT_EQ(shared_segments(32, 256, 272), 0);
  setenv("RELAY_CUDA_MIN_SHARED_SLOTS", "64", 1);
  EXPECT_EQ(shared_segments(2, 512, 0), 1);
  for (const char* wrong : {"0", "-64", "many", "64 "}) {
    setenv("RELAY_CUDA_MIN_SHARED_SLOTS", wrong, 1);
    EXPECT_THROW(shared_segments(2, 512, 0), Error) << wrong;
  }
  unsetenv("RELAY_CUDA_MIN_SHARED_SLOTS");
}

// --- Logits --------------------------------------------------------------------------------------

/// A case of crafted tensors.
CudaCase crafted(const std::string& name, const CudaConfig& config, const ForestCase& forest,
                 std::function<void(OperatorCase&)> edit) {
  return {.name = name,
          .config = config,
          .forest = forest,
          .statistics = false,
          .edit = std::move(edit)};
}

TEST(CudaLogits, LargeOnes) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const DType type : kTypes) {
    for (const float sharpness : {30.0f, 300.0f}) {
      for (const int32_t dim : {64, 128}) {
        const size_t i = cases.size();
        CudaConfig config = varied(config_of(type, dim, 2, 2), i);
        config.sharpness = sharpness;
        cases.push_back(crafted("sharp", config, mixed_batch(16, 15, 2000 + i), {}));
      }
    }
  }
  run_cases(std::move(cases));
}

/// Overwrites all keys (or values) that anybody attends.
void set_all(KvTensor& tensor, const ForestCase& forest,
             const std::function<std::vector<float>(int64_t slot, int64_t head)>& value) {
  const std::vector<bool> used = forest.used_slots();
  for (size_t slot = 0; slot < used.size(); ++slot) {
    for (int32_t head = 0; used[slot] && head < tensor.heads(); ++head) {
      tensor.set(static_cast<int64_t>(slot), head, value(static_cast<int64_t>(slot), head));
    }
  }
}

TEST(CudaLogits, AllEqual) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const DType type : kTypes) {
    const ForestCase forest = mixed_batch(16, 15, 2100);
    const CudaConfig config = config_of(type, 128, 2, 2);
    cases.push_back(crafted("equal keys", config, forest, [forest](OperatorCase& op) {
      std::vector<float> key(128);
      for (size_t i = 0; i < key.size(); ++i) key[i] = static_cast<float>(i % 7) - 3.0f;
      set_all(op.kv.k, forest, [&](int64_t, int64_t) { return key; });
    }));
    cases.push_back(crafted("q is zero", config, forest, [](OperatorCase& op) {
      const std::vector<float> zero(128, 0.0f);
      for (int64_t row = 0; row < op.rows; ++row) {
        for (int32_t head = 0; head < op.config.shape.q_heads; ++head) op.q.set(row, head, zero);
      }
    }));
    cases.push_back(crafted("scale zero", config, forest, [](OperatorCase& op) { op.scale = 0; }));
  }
  run_cases(std::move(cases));
}

TEST(CudaLogits, OneFarAboveOrBelow) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const DType type : kTypes) {
    for (const float size : {20.0f, -20.0f, 300.0f}) {
      for (const int64_t token : {0, 63, 64, 150, 239}) {
        const ForestCase forest = mixed_batch(16, 15, 2200 + cases.size());
        const int64_t slot = forest.path(forest.requests[0])[token];
        // Along q of row 0, whose logit becomes size * |q|^2 / sqrt(d).
        cases.push_back(
            crafted("one key", config_of(type, 128, 1, 2), forest, [slot, size](OperatorCase& op) {
              const auto* q = static_cast<const float*>(op.q.oracle_view().data);
              std::vector<float> key(q, q + 128);
              for (float& x : key) x *= size;
              op.kv.k.set(slot, 0, key);
            }));
      }
    }
  }
  run_cases(std::move(cases));
}

TEST(CudaLogits, RisingAndFalling) {
  RELAY_REQUIRE_GPU();
  // Rising keys rescale the state at every tile, falling ones never; other rows do the opposite.
  std::vector<CudaCase> cases;
  for (const DType type : kTypes) {
    for (const float step : {0.01f, 0.1f, 3.0f, -0.01f, -0.1f}) {
      const ForestCase forest = decode_batch(16, 30, 20, 2300 + cases.size());
      const std::vector<int64_t> path = forest.path(forest.requests[0]);
      cases.push_back(crafted("steps of " + std::to_string(step), config_of(type, 64, 1, 4), forest,
                              [path, step](OperatorCase& op) {
                                const auto* q = static_cast<const float*>(op.q.oracle_view().data);
                                for (size_t t = 0; t < path.size(); ++t) {
                                  std::vector<float> key(q, q + 64);
                                  for (float& x : key) x *= step * static_cast<float>(t);
                                  op.kv.k.set(path[t], 0, key);
                                }
                              }));
    }
  }
  run_cases(std::move(cases));
}

TEST(CudaLogits, SoftCaps) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const DType type : kTypes) {
    for (const float cap : {1.0f, 30.0f, 50.0f}) {
      for (const float sharpness : {1.0f, 4.0f}) {
        const size_t i = cases.size();
        CudaConfig config = varied(config_of(type, nth(kDims, i), 2, 2), i);
        config.softcap = cap;
        config.sharpness = sharpness;
        cases.push_back({.name = "softcap " + std::to_string(cap),
                         .config = config,
                         .forest = mixed_batch(16, 15, 2400 + i)});
      }
    }
  }
  for (const float sharpness : {30.0f, 1000.0f}) {  // tanh of huge arguments is 1
    CudaConfig config = config_of(DType::kBF16, 128, 2, 2);
    config.softcap = 30.0f;
    config.sharpness = sharpness;
    cases.push_back(crafted("saturated softcap", config, mixed_batch(16, 15, 2450), {}));
  }
  run_cases(std::move(cases));
}

TEST(CudaLogits, Slopes) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const DType type : kTypes) {
    for (const bool causal : {true, false}) {
      for (const int32_t group : {1, 5}) {
        const size_t i = cases.size();
        CudaConfig config = varied(config_of(type, nth(kDims, i), 2, group), i);
        config.slopes = true;
        cases.push_back({.name = "slopes",
                         .config = config,
                         .forest = mixed_batch(nth(kBlockSizes, i), 9, 2500 + i, causal)});
      }
    }
  }
  run_cases(std::move(cases));
}

TEST(CudaLogits, Sinks) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const DType type : kTypes) {
    for (const bool lse : {true, false}) {
      const size_t i = cases.size();
      CudaConfig config = varied(config_of(type, 128, 2, 3), i);
      config.sinks = true;
      config.lse = lse;
      cases.push_back({.name = "sinks", .config = config, .forest = mixed_batch(16, 15, 2600 + i)});
      // Some take all, some nothing.
      cases.push_back(
          crafted("extreme sinks", config, mixed_batch(16, 15, 2650 + i),
                  [](OperatorCase& op) { op.sinks = {1e4f, -1e4f, 60.0f, -kInf, -1e30f, 0.0f}; }));
    }
  }
  run_cases(std::move(cases));
}

TEST(CudaLogits, WithoutLse) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const DType type : kTypes) {
    for (const int64_t shared : {0, 15}) {
      const size_t i = cases.size();
      CudaConfig config = varied(config_of(type, 128, 2, 2), i);
      config.lse = false;
      cases.push_back(
          {.name = "no lse", .config = config, .forest = mixed_batch(16, shared, 2700 + i)});
    }
  }
  run_cases(std::move(cases));
}

TEST(CudaLogits, ExtremeValues) {
  RELAY_REQUIRE_GPU();
  // Weights that sum to 1 leave the mean of equal values as it is, up to the largest.
  std::vector<CudaCase> cases;
  for (const float value : {60000.0f, -60000.0f, 0x1p-24f, 0.0f}) {
    for (const DType type : kTypes) {
      const ForestCase forest = mixed_batch(16, 9, 2800 + cases.size());
      cases.push_back(crafted("values of " + std::to_string(value), config_of(type, 64, 1, 2),
                              forest, [forest, value](OperatorCase& op) {
                                const std::vector<float> v(64, value);
                                set_all(op.kv.v, forest, [&](int64_t, int64_t) { return v; });
                              }));
    }
  }
  run_cases(std::move(cases));
}

// --- Visibility ----------------------------------------------------------------------------------

TEST(CudaVisibility, Windows) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const int64_t window :
       {1, 2, 3, 7, 15, 16, 17, 31, 33, 47, 63, 64, 65, 100, 127, 128, 129, 200}) {
    const size_t i = cases.size();
    cases.push_back(
        {.name = "window " + std::to_string(window),
         .config = varied(config_of(nth(kTypes, i), nth(kDims, i), 1, 1 + i % 5), i),
         .forest = mixed_batch(nth(kBlockSizes, i), 3 + i % 7, 2900 + i, true, window)});
  }
  run_cases(std::move(cases));
}

TEST(CudaVisibility, WindowsOfRequestsFarApart) {
  RELAY_REQUIRE_GPU();
  // On one long trunk: what lies between has left both windows, or was never in one, and is NaN.
  std::vector<CudaCase> cases;
  for (const int64_t window : {5, 20, 70, 130}) {
    for (const DType type : kTypes) {
      const size_t i = cases.size();
      TableWriter w(16, 3000 + i);
      const std::vector<int32_t> trunk = w.blocks(50);
      w.table(trunk, 100, 3);
      w.table(trunk, 403);
      w.table(trunk, 400, 90);
      w.request(trunk, 5);
      w.request(trunk, 40, 33);
      w.table(trunk, 1);
      cases.push_back({.name = "window " + std::to_string(window),
                       .config = varied(config_of(type, nth(kDims, i), 2, 2), i),
                       .forest = w.finish(true, window)});
    }
  }
  run_cases(std::move(cases));
}

TEST(CudaVisibility, NotCausal) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  for (const DType type : kTypes) {
    for (const int64_t block_size : {16, 64}) {
      const size_t i = cases.size();
      cases.push_back({.name = "not causal",
                       .config = varied(config_of(type, nth(kDims, i + 2), 2, 2), i),
                       .forest = mixed_batch(block_size, 6, 3100 + i, false)});
    }
  }
  run_cases(std::move(cases));
}

TEST(CudaVisibility, NanOfOneRequestIsItsOwn) {
  RELAY_REQUIRE_GPU();
  TableWriter w(16, 3200);
  const std::vector<int32_t> prompt = w.blocks(12);
  for (const int64_t own : {40, 50, 60}) w.request(prompt, own);
  const ForestCase forest = w.finish();
  const int64_t spoilt = forest.path(forest.requests[1])[200];
  const CudaConfig config = config_of(DType::kBF16, 128, 2, 2);
  const auto op = make_operator(config, forest, [&](OperatorCase& o) { o.kv.v.poison(spoilt, 0); });

  const std::lock_guard lock(gpu_mutex());
  const BatchLimits limits = limits_of(forest, 0);
  const DeviceStream stream;
  DeviceOperator device(config, limits);
  device.upload(*op, forest);
  device.upload(host_batch(forest, limits, 3, 1));
  for (const cuda::Path path : kernel_paths()) {
    SCOPED_TRACE(name_of(path));
    const DevicePlan plan(device.options(path, Sharing::kOn, true, 0), stream);
    cuda::plan_batch(*plan, device.batch(), stream.get());
    cuda::attend(*plan, device.inputs(), stream.get());
    stream.wait("NaN of one request");
    OutputTensor out(op->config, 3);
    ASSERT_EQ(device.download(out, 3), "");
    for (int64_t row = 0; row < 3; ++row) {
      for (int64_t head = 0; head < 4; ++head) {
        for (int64_t j = 0; j < 128; ++j) {
          ASSERT_EQ(std::isnan(out.out(row, head, j)), row == 1 && head < 2)
              << "row " << row << ", head " << head;
        }
      }
    }
  }
}

// --- fp8 -----------------------------------------------------------------------------------------

TEST(CudaFp8, CodesAreWhatTheyDecodeTo) {
  for (int bits = 0; bits < 256; ++bits) {
    const float value = from_e4m3(static_cast<uint8_t>(bits));
    if (std::isnan(value)) {
      EXPECT_EQ(bits & 0x7f, 0x7f);
    } else {
      EXPECT_EQ(to_e4m3(value), bits);
    }
  }
  EXPECT_EQ(from_e4m3(0x7e), 448.0f);
  EXPECT_EQ(from_e4m3(0x38), 1.0f);
  EXPECT_EQ(from_e4m3(0x01), 0x1p-9f);
  EXPECT_EQ(to_e4m3(1e9f), 0x7e);
  EXPECT_EQ(to_e4m3(1.0625f), 0x38);  // a tie goes to even
  EXPECT_EQ(to_e4m3(1.1875f), 0x3a);
}

/// All types and head sizes over an fp8 cache.
void run_fp8_cases(const std::string& name, float q_scale, uint64_t seed) {
  std::vector<CudaCase> cases;
  for (const DType type : kTypes) {
    for (const int32_t dim : kDims) {
      const size_t i = cases.size();
      CudaConfig config = varied(fp8_config_of(type, dim, 2, 1 + i % 5), i);
      config.q_scale = q_scale;
      cases.push_back({.name = name,
                       .config = config,
                       .forest = mixed_batch(nth(kBlockSizes, i), 7, seed + i)});
    }
  }
  run_cases(std::move(cases));
}

TEST(CudaFp8, HeadSizesAndTypes) {
  RELAY_REQUIRE_GPU();
  run_fp8_cases("fp8 cache", 0, 3300);
}

TEST(CudaFp8, QueriesToo) {
  RELAY_REQUIRE_GPU();
  run_fp8_cases("fp8 queries", kQueryScale, 3500);
}

TEST(CudaFp8, Scales) {
  RELAY_REQUIRE_GPU();
  std::vector<CudaCase> cases;
  const std::vector<std::pair<float, float>> kScales = {
      {1.0f, 1.0f}, {0.03125f, 1.0f}, {1.0f, 0.017f}, {0.0371234f, 2.5f}};
  for (const auto& [k_scale, v_scale] : kScales) {
    for (const DType type : kTypes) {
      const size_t i = cases.size();
      CudaConfig config = varied(fp8_config_of(type, 128, 2, 4), i);
      config.k_scale = k_scale;
      config.v_scale = v_scale;
      config.softcap = i % 3 == 1 ? 20.0f : 0.0f;
      config.sinks = i % 3 == 2;
      cases.push_back({.name = "fp8 scales",
                       .config = config,
                       .forest = mixed_batch(16, 12, 3400 + i, true, i % 2 ? 50 : 0)});
    }
  }
  run_cases(std::move(cases));
}

// --- Random --------------------------------------------------------------------------------------

TEST(CudaRandom, Forests) {
  RELAY_REQUIRE_GPU();
  // Elements of K and V together, and (row, slot, head) triples: what the host gets through.
  constexpr double kMaxElements = 3e6;
  constexpr double kMaxTriples = 3e6;
  // run_cases() would take a part of them once more.
  const std::vector<uint64_t> all = seeds(300);
  std::vector<std::string> reports(all.size());
  parallel_for(all.size(), [&](size_t i) {
    Random random(derive_seed(all[i], 0xc0da));
    const CudaConfig config = random_cuda_config(random);
    const HeadShape& shape = config.shape;
    ForestLimits limits;
    limits.max_slots = std::clamp<int64_t>(
        static_cast<int64_t>(kMaxElements / (2.0 * shape.qk_dim * shape.kv_heads)), 512, 16384);
    limits.max_attended = static_cast<int64_t>(kMaxTriples / shape.q_heads);
    reports[i] = run_case({.name = "seed " + std::to_string(all[i]),
                           .config = config,
                           .forest = generate_tables(all[i], limits)});
  });
  for (size_t i = 0; i < all.size(); ++i) {
    EXPECT_EQ(reports[i], "") << "RELAY_TEST_SEEDS=1 RELAY_TEST_SEED=" << all[i] << " "
                              << repeat_command();
  }
}

}  // namespace
}  // namespace relay::test
