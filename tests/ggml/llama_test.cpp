// Whole models on an unmodified libllama, before and after it has loaded the module: the same
// tokens in the same batches must give the same logits.
#include <ggml-backend.h>
#include <gtest/gtest.h>
#include <llama.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "synth/shapes.h"
#include "synth/write_model.h"

namespace relay {
namespace {

constexpr int kSequences = 4;
constexpr int kPrompt = 90;
constexpr int kSteps = 4;
constexpr int kChunk = 20;
constexpr int kThreads = 2;

struct Variant {
  std::string shape;
  ggml_type kv_type;
  bool unified;

  /// How far Relay's logits may lie from the host's (rms, relative), by what the host rounds: with
  /// f16 the queries of its plain attention (its flash attention would add up V in f16); with q8_0,
  /// which it has in flash attention only, queries to bytes, and V is added up in f16.
  double bound() const { return kv_type == GGML_TYPE_F16 ? 1e-3 : 1.2e-2; }
  llama_flash_attn_type host_attention() const {
    return kv_type == GGML_TYPE_F16 ? LLAMA_FLASH_ATTN_TYPE_DISABLED : LLAMA_FLASH_ATTN_TYPE_AUTO;
  }

  std::string name() const {
    return shape + ", KV " + ggml_type_name(kv_type) + (unified ? ", unified" : ", streams");
  }
};

std::vector<Variant> variants() {
  std::vector<Variant> all;
  for (const char* shape : {"tiny", "tiny-gemma2", "tiny-phi2"}) {
    for (ggml_type type : {GGML_TYPE_F16, GGML_TYPE_Q8_0}) {
      for (bool unified : {true, false}) all.push_back({shape, type, unified});
    }
  }
  return all;
}

using Model = std::unique_ptr<llama_model, decltype(&llama_model_free)>;
using Context = std::unique_ptr<llama_context, decltype(&llama_free)>;

class Batch {
 public:
  explicit Batch(int capacity) : batch_(llama_batch_init(capacity, 0, 1)) {}
  ~Batch() { llama_batch_free(batch_); }
  Batch(const Batch&) = delete;
  Batch& operator=(const Batch&) = delete;

  void add(llama_token token, int position, int sequence, bool logits = true) {
    const int i = batch_.n_tokens++;
    batch_.token[i] = token;
    batch_.pos[i] = position;
    batch_.n_seq_id[i] = 1;
    batch_.seq_id[i][0] = sequence;
    batch_.logits[i] = logits;
  }
  void clear() { batch_.n_tokens = 0; }
  llama_batch& get() { return batch_; }

 private:
  llama_batch batch_;
};

// Any tokens will do, as long as they are always the same.
llama_token token_at(int position, int sequence) {
  return 100 + (position * 37 + sequence * 101) % 900;
}

// A shared prompt, some steps of all sequences, then steps mixed with a longer piece of one more.
std::vector<float> trace(llama_model* model, const Variant& variant,
                         llama_flash_attn_type attention) {
  llama_context_params params = llama_context_default_params();
  params.n_ctx = variant.unified ? 512 : 512 * (kSequences + 1);
  params.n_batch = params.n_ubatch = 512;
  params.n_seq_max = kSequences + 1;
  params.n_threads = params.n_threads_batch = kThreads;
  params.type_k = params.type_v = variant.kv_type;
  params.kv_unified = variant.unified;
  params.flash_attn_type = attention;
  const Context context(llama_init_from_model(model, params), llama_free);
  if (context == nullptr) return {};

  const int vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
  std::vector<float> logits;
  Batch batch(512);
  const auto decode = [&] {
    ASSERT_EQ(llama_decode(context.get(), batch.get()), 0) << variant.name();
    for (int i = 0; i < batch.get().n_tokens; ++i) {
      if (!batch.get().logits[i]) continue;
      const float* row = llama_get_logits_ith(context.get(), i);
      logits.insert(logits.end(), row, row + vocabulary);
    }
    batch.clear();
  };

  for (int i = 0; i < kPrompt; ++i) batch.add(token_at(i, 0), i, 0, i % 30 == 29);
  decode();
  for (int s = 1; s <= kSequences; ++s) {
    llama_memory_seq_cp(llama_get_memory(context.get()), 0, s, -1, -1);
  }
  for (int step = 0; step < kSteps; ++step) {
    for (int s = 0; s < kSequences; ++s) batch.add(token_at(kPrompt + step, s), kPrompt + step, s);
    if (step == kSteps - 1 && variant.unified) {
      for (int i = 0; i < kChunk; ++i) {
        batch.add(token_at(kPrompt + i, kSequences), kPrompt + i, kSequences, i == kChunk - 1);
      }
    }
    decode();
  }
  return logits;
}

double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double squares = 0.0;
  double norm = 0.0;
  for (size_t i = 0; i < a.size(); ++i) {
    squares += (double(a[i]) - b[i]) * (double(a[i]) - b[i]);
    norm += double(a[i]) * a[i];
  }
  return std::sqrt(squares / norm);
}

TEST(LlamaWithModule, GivesTheSameLogits) {
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("relay-ggml-" + std::to_string(::getpid()));
  std::filesystem::create_directories(folder);
  const std::filesystem::path statistics = folder / "statistics.json";
  setenv("RELAY_STATS_FILE", statistics.c_str(), 1);
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  ASSERT_NE(ggml_backend_load(GGML_CPU_MODULE), nullptr);
  llama_backend_init();

  std::map<std::string, Model> models;
  std::vector<std::vector<float>> stock;
  for (const Variant& variant : variants()) {
    if (!models.contains(variant.shape)) {
      synth::Request request;
      request.shape = synth::find_shape(variant.shape);
      request.output = folder / (variant.shape + ".gguf");
      request.type = "f32";  // the weights' rounding is not what is tested
      synth::write_model(request);
      models.emplace(variant.shape, Model(llama_model_load_from_file(request.output.c_str(),
                                                                     llama_model_default_params()),
                                          llama_model_free));
    }
    llama_model* model = models.at(variant.shape).get();
    ASSERT_NE(model, nullptr) << variant.shape;
    stock.push_back(trace(model, variant, variant.host_attention()));
    ASSERT_FALSE(stock.back().empty()) << variant.name();
  }

  ggml_backend_reg_t registry = ggml_backend_load(GGML_RELAY_MODULE);
  ASSERT_NE(registry, nullptr);
  size_t i = 0;
  for (const Variant& variant : variants()) {
    const std::vector<float> relay =
        trace(models.at(variant.shape).get(), variant, LLAMA_FLASH_ATTN_TYPE_AUTO);
    ASSERT_EQ(relay.size(), stock[i].size()) << variant.name();
    EXPECT_NE(relay, stock[i]) << "Relay took no part in " << variant.name();
    const double error = difference(stock[i], relay);
    std::printf("%s: %.1e\n", variant.name().c_str(), error);
    EXPECT_LT(error, variant.bound()) << variant.name();
    ++i;
  }

  ggml_backend_unload(registry);  // writes the statistics
  std::ifstream file(statistics);
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  EXPECT_NE(text.find("\"handed_on\": {}"), std::string::npos) << text;
  EXPECT_EQ(text.find("\"served\": 0"), std::string::npos) << text;
  models.clear();
  llama_backend_free();
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace relay
