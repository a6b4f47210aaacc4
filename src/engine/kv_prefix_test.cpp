// A learned prefix before every sequence: what its file may hold, and that a model answers as if it
// had computed these keys and values itself.
#include "engine/kv_prefix.h"

#include <ggml.h>
#include <gguf.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <memory>

#include "engine/backend.h"
#include "engine/llama_model.h"
#include "engine/test_models.h"
#include "llama.h"

namespace relay::engine {
namespace {

namespace fs = std::filesystem;

constexpr int32_t kPositions = 8;

/// A file that is gone with the test.
struct File {
  fs::path path = fs::temp_directory_path() / ("relay-kv-prefix-" + std::to_string(::getpid()));
  ~File() {
    std::error_code ignored;
    fs::remove(path, ignored);
  }
};

/// As scripts/kv_prefix_from_peft.py writes it; `change` has the last word about the header.
void write(const KvPrefix& prefix, const fs::path& path,
           const std::function<void(gguf_context*)>& change = {}) {
  const std::unique_ptr<gguf_context, void (*)(gguf_context*)> file(gguf_init_empty(), gguf_free);
  gguf_set_val_str(file.get(), "general.architecture", "kvprefix");
  gguf_set_val_u32(file.get(), "kvprefix.positions", static_cast<uint32_t>(prefix.positions));
  gguf_set_val_u32(file.get(), "kvprefix.layer_count", static_cast<uint32_t>(prefix.layers));
  gguf_set_val_u32(file.get(), "kvprefix.head_count_kv", static_cast<uint32_t>(prefix.kv_heads));
  gguf_set_val_u32(file.get(), "kvprefix.head_size", static_cast<uint32_t>(prefix.head_size));
  const std::unique_ptr<ggml_context, void (*)(ggml_context*)> tensors(
      ggml_init({.mem_size = size_t{64} << 20, .mem_buffer = nullptr, .no_alloc = false}),
      ggml_free);
  const auto add = [&](const std::string& name, const std::vector<float>& values) {
    ggml_tensor* tensor =
        ggml_new_tensor_1d(tensors.get(), GGML_TYPE_F32, static_cast<int64_t>(values.size()));
    std::memcpy(tensor->data, values.data(), values.size() * sizeof(float));
    ggml_set_name(tensor, name.c_str());
    gguf_add_tensor(file.get(), tensor);
  };
  for (size_t layer = 0; layer < prefix.keys.size(); ++layer) {
    add("layer." + std::to_string(layer) + ".key", prefix.keys[layer]);
    add("layer." + std::to_string(layer) + ".value", prefix.values[layer]);
  }
  if (change) change(file.get());
  ASSERT_TRUE(gguf_write_to_file(file.get(), path.c_str(), false));
}

KvPrefix some_prefix(int32_t layers = 3, int32_t kv_heads = 2, int32_t head_size = 32) {
  KvPrefix prefix{kPositions, layers, kv_heads, head_size, {}, {}};
  const auto elements = static_cast<size_t>(prefix.positions * prefix.row());
  for (int32_t layer = 0; layer < layers; ++layer) {
    std::vector<float> rows(elements);
    for (size_t i = 0; i < elements; ++i) {
      rows[i] = std::sin(static_cast<float>(i) + static_cast<float>(100 * layer));
    }
    prefix.keys.push_back(rows);
    for (float& value : rows) value = -value;
    prefix.values.push_back(rows);
  }
  return prefix;
}

void expect_refused(const std::function<void()>& call, const std::string& why) {
  try {
    call();
    ADD_FAILURE() << "not refused: " << why;
  } catch (const std::runtime_error& e) {
    EXPECT_NE(std::string(e.what()).find(why), std::string::npos) << e.what();
  }
}

TEST(KvPrefix, ReadsWhatWasWritten) {
  const File file;
  const KvPrefix prefix = some_prefix();
  write(prefix, file.path);
  const KvPrefix read = read_kv_prefix(file.path);
  EXPECT_EQ(read.positions, kPositions);
  EXPECT_EQ(read.kv_heads, 2);
  EXPECT_EQ(read.head_size, 32);
  EXPECT_EQ(read.keys, prefix.keys);
  EXPECT_EQ(read.values, prefix.values);
}

TEST(KvPrefix, RefusesOtherFiles) {
  const File file;
  const auto refused = [&](const KvPrefix& prefix, const std::string& why,
                           const std::function<void(gguf_context*)>& change = {}) {
    write(prefix, file.path, change);
    expect_refused([&] { read_kv_prefix(file.path); }, why);
  };
  expect_refused([] { read_kv_prefix("/does/not/exist"); }, "cannot be read");
  expect_refused([] { parse_kv_prefix({}); }, "not a GGUF file");
  refused(some_prefix(), "not a KV prefix",
          [](gguf_context* f) { gguf_set_val_str(f, "general.architecture", "llama"); });
  refused(some_prefix(), "not a KV prefix",
          [](gguf_context* f) { gguf_set_val_u32(f, "general.architecture", 1); });
  refused(some_prefix(), "no kvprefix.positions",
          [](gguf_context* f) { gguf_remove_key(f, "kvprefix.positions"); });
  refused(some_prefix(), "no kvprefix.head_size",
          [](gguf_context* f) { gguf_set_val_str(f, "kvprefix.head_size", "32"); });
  refused(some_prefix(), "kvprefix.positions is 0",
          [](gguf_context* f) { gguf_set_val_u32(f, "kvprefix.positions", 0); });
  refused(some_prefix(), "kvprefix.positions is 4294967295",
          [](gguf_context* f) { gguf_set_val_u32(f, "kvprefix.positions", UINT32_MAX); });
  refused(some_prefix(), "is not of",
          [](gguf_context* f) { gguf_set_val_u32(f, "kvprefix.positions", 9); });
  refused(some_prefix(), "for each layer",
          [](gguf_context* f) { gguf_set_val_u32(f, "kvprefix.layer_count", 2); });
  KvPrefix prefix = some_prefix();
  prefix.values[1][5] = std::numeric_limits<float>::quiet_NaN();
  refused(prefix, "layer.1.value holds NaN");
}

TEST(KvPrefix, RefusesWhateverIsCutOff) {
  const File file;
  write(some_prefix(), file.path);
  std::ifstream stream(file.path, std::ios::binary);
  const std::string text(std::istreambuf_iterator<char>(stream), {});
  const std::span bytes(reinterpret_cast<const uint8_t*>(text.data()), text.size());
  EXPECT_NO_THROW(parse_kv_prefix(bytes));
  for (size_t size = 0; size + 32 < bytes.size(); size += 13) {
    // In memory of its own, so that a sanitizer sees each byte read beyond.
    const std::vector<uint8_t> part(bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(size));
    EXPECT_THROW(parse_kv_prefix(part), std::runtime_error) << size;
  }
}

KvLayout layout_of(ggml_type type, uint32_t layers = 3, int64_t elements = 64) {
  KvLayout layout;
  layout.layers = layers;
  layout.tensors.assign(size_t{2} * layers, {type, ggml_row_size(type, elements)});
  return layout;
}

TEST(KvPrefix, PutsKeysIntoTheModelsOrder) {
  const KvPrefix prefix = some_prefix();
  const auto halves = kv_bytes(prefix, layout_of(GGML_TYPE_F32), KeyOrder::kHalves);
  const auto neighbours = kv_bytes(prefix, layout_of(GGML_TYPE_F32), KeyOrder::kNeighbours);
  ASSERT_EQ(halves.size(), neighbours.size());
  const auto* a = reinterpret_cast<const float*>(halves.data());
  const auto* b = reinterpret_cast<const float*>(neighbours.data());
  for (int i = 0; i < 16; ++i) {
    EXPECT_EQ(b[32 + 2 * i], a[32 + i]);  // the second head
    EXPECT_EQ(b[32 + 2 * i + 1], a[32 + 16 + i]);
  }
  const size_t keys = 3 * prefix.keys[0].size();
  EXPECT_EQ(std::memcmp(a + keys, b + keys, keys * sizeof(float)), 0);  // values as they are
}

TEST(KvPrefix, RefusesCachesThatCannotHoldIt) {
  const auto refused = [](const KvPrefix& prefix, const KvLayout& layout, const std::string& why) {
    expect_refused([&] { kv_bytes(prefix, layout, KeyOrder::kHalves); }, why);
  };
  refused(some_prefix(), layout_of(GGML_TYPE_F32, 4), "the model has 4");
  refused(some_prefix(), layout_of(GGML_TYPE_F32, 3, 128), "128 elements a position");
  refused(some_prefix(), layout_of(GGML_TYPE_Q8_0), "cannot be stored in q8_0");
  KvLayout layout = layout_of(GGML_TYPE_F32);
  layout.tensors.pop_back();
  refused(some_prefix(), layout, "do not all store values");
  KvPrefix large = some_prefix();
  large.keys[0][0] = 70000;
  refused(large, layout_of(GGML_TYPE_F16), "too large for KV in f16");
  EXPECT_NO_THROW(kv_bytes(large, layout_of(GGML_TYPE_BF16), KeyOrder::kHalves));
}

// --- with a model

EngineOptions options_of(const std::string& shape) {
  EngineOptions o;
  o.model_path = test_model(shape, "f32");
  o.kv_cells = 512;
  o.parallel = 4;
  o.threads = 1;
  o.cache_type_k = o.cache_type_v = "f32";
  o.relay = RELAY_TEST_WITH_MODULE;
  o.relay_module = RELAY_TEST_MODULE;
  return o;
}

std::unique_ptr<LlamaModel> load(const EngineOptions& options) {
  const auto backend = load_backends(options.relay, options.relay_module);
  return LlamaModel::load(options, backend.relay_active, {});
}

std::vector<float> decode(LlamaModel& model, SeqId seq, int32_t from, int32_t count,
                          int32_t first_token) {
  Batch batch;
  for (int32_t i = 0; i < count; ++i) {
    batch.add(first_token + 7 * i, from + i, seq, i == count - 1);
  }
  EXPECT_EQ(model.decode(batch), DecodeStatus::kOk);
  const auto logits = model.logits(count - 1);
  return {logits.begin(), logits.end()};
}

/// What the model has computed for its sequence 0, as somebody would have learnt it.
KvPrefix computed_prefix(LlamaModel& model, bool neighbours) {
  llama_context* context = model.context();
  const auto state_of = [&](SeqId seq) {
    std::vector<uint8_t> state(llama_state_seq_get_size(context, seq));
    llama_state_seq_get_data(context, state.data(), state.size(), seq);
    return state;
  };
  model.share(0, 1, 0, 1);
  const KvLayout layout = read_kv_layout(state_of(1));
  const auto bytes = take_kv(layout, state_of(0), 0, kPositions);
  KvPrefix prefix;
  prefix.positions = kPositions;
  prefix.layers = static_cast<int32_t>(layout.layers);
  prefix.kv_heads = llama_model_n_head_kv(model.model());
  prefix.head_size =
      static_cast<int32_t>(layout.tensors[0].row_bytes / sizeof(float)) / prefix.kv_heads;
  const auto elements = static_cast<size_t>(kPositions * prefix.row());
  const auto* at = reinterpret_cast<const float*>(bytes.data());
  for (int32_t i = 0; i < 2 * prefix.layers; ++i, at += elements) {
    std::vector<float> rows(at, at + elements);
    if (i >= prefix.layers) {
      prefix.values.push_back(rows);
      continue;
    }
    const auto size = static_cast<size_t>(prefix.head_size);
    std::vector<float> ordered = rows;
    for (size_t e = 0; neighbours && e < elements; ++e) {
      const size_t in_head = e % size;
      ordered[e - in_head + in_head / 2 + in_head % 2 * size / 2] = rows[e];
    }
    prefix.keys.push_back(ordered);
  }
  return prefix;
}

float largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  float largest = 0;
  for (size_t i = 0; i < a.size(); ++i) largest = std::max(largest, std::fabs(a[i] - b[i]));
  return largest;
}

class KvPrefixOfAModel : public testing::TestWithParam<const char*> {};

TEST_P(KvPrefixOfAModel, IsAsIfTheModelHadComputedIt) {
  const File file;
  EngineOptions options = options_of(GetParam());
  std::vector<float> expected;
  int32_t cells = 0;
  {
    const auto model = load(options);
    cells = model->info().kv_cells;
    decode(*model, 0, 0, kPositions, 100);
    write(computed_prefix(*model, std::string(GetParam()) == "tiny"), file.path);
    expected = decode(*model, 0, kPositions, 4, 500);
  }
  options.kv_prefix = file.path;
  const auto model = load(options);
  EXPECT_EQ(model->info().kv_prefix, kPositions);
  EXPECT_EQ(model->info().kv_cells, cells - kPositions);
  EXPECT_EQ(model->count_cells(), 0);
  // The same keys and values, the same products; other cells, perhaps another order of additions.
  const float tolerance = 1e-5F * std::fabs(*std::max_element(expected.begin(), expected.end()));
  for (const SeqId seq : {0, 3}) {
    EXPECT_LE(largest_difference(decode(*model, seq, 0, 4, 500), expected), tolerance) << seq;
  }
  EXPECT_EQ(model->count_cells(), 8);
  // A sequence that has given all its cells up begins after the prefix again, by sharing too.
  model->remove(0, 0, 4);
  EXPECT_LE(largest_difference(decode(*model, 0, 0, 4, 500), expected), tolerance);
  model->share(0, 1, 0, 3);
  EXPECT_EQ(model->count_cells(), 8);
  Batch batch;
  batch.add(500 + 7 * 3, 3, 1, true);
  ASSERT_EQ(model->decode(batch), DecodeStatus::kOk);
  const auto logits = model->logits(0);
  EXPECT_LE(largest_difference({logits.begin(), logits.end()}, expected), tolerance);

  // And it matters.
  options.kv_prefix.clear();
  EXPECT_GT(largest_difference(decode(*load(options), 0, 0, 4, 500), expected), 100 * tolerance);
}

INSTANTIATE_TEST_SUITE_P(Orders, KvPrefixOfAModel, testing::Values("tiny", "tiny-phi2"),
                         [](const auto& shape) {
                           return std::string(shape.param) == "tiny" ? "neighbours" : "halves";
                         });

TEST(KvPrefix, OfAnotherModelIsRefused) {
  const File file;
  EngineOptions options = options_of("tiny");
  options.kv_prefix = file.path;
  const auto refused = [&](const KvPrefix& prefix, const std::string& why) {
    write(prefix, file.path);
    expect_refused([&] { load(options); }, why);
  };
  refused(some_prefix(2), "the model has 3");
  refused(some_prefix(3, 4), "4 KV heads, and the model 2");
  refused(some_prefix(3, 2, 64), "64 elements a position");
  options.cache_type_k = "q8_0";
  refused(some_prefix(), "cannot be stored in q8_0");
  options = options_of("tiny-gemma2");
  options.kv_prefix = file.path;
  refused(some_prefix(4), "sliding windows");
}

}  // namespace
}  // namespace relay::engine
