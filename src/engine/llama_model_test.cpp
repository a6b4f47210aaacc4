// The core over libllama: the books against llama.cpp's own cells, and outputs against the same
// request alone.
#include "engine/llama_model.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <filesystem>
#include <fstream>
#include <random>
#include <set>

#include "engine/backend.h"
#include "engine/engine_core.h"
#include "engine/lora_file.h"
#include "engine/test_adapters.h"
#include "engine/test_models.h"
#include "llama.h"

namespace relay::engine {
namespace {

using Tokens = std::vector<Token>;

struct Output : Sink {
  std::vector<GeneratedToken> tokens;
  Usage usage;
  bool done = false;
  bool failed = false;
  void on_tokens(int32_t, TokensDelta delta) override {
    for (auto& t : delta.tokens) tokens.push_back(std::move(t));
  }
  void on_choice_finish(int32_t, FinishReason, const std::string&) override {}
  void on_done(const Usage& u, const RequestTimings&) override {
    usage = u;
    done = true;
  }
  void on_error(ErrorKind, const std::string& message) override {
    failed = true;
    ADD_FAILURE() << message;
  }
};

EngineOptions small_options(const std::string& shape, int32_t cells) {
  EngineOptions o;
  o.model_path = test_model(shape);
  o.kv_cells = cells;
  o.parallel = 32;
  o.batch_tokens = 256;
  o.ubatch_tokens = 128;
  o.threads = 1;  // tests run side by side
  o.relay = RELAY_TEST_WITH_MODULE;
  o.relay_module = RELAY_TEST_MODULE;
  return o;
}

/// Weights and KV in f32, for answers to be compared.
EngineOptions exact_options(const std::string& shape, int32_t cells) {
  EngineOptions o = small_options(shape, cells);
  o.model_path = test_model(shape, "f32");
  o.cache_type_k = o.cache_type_v = "f32";
  return o;
}

class Bench {
 public:
  Bench(const EngineOptions& options, bool prefix_caching) {
    const auto backend = load_backends(options.relay, options.relay_module);
    EXPECT_EQ(backend.relay_active, options.relay) << backend.line;
    model = LlamaModel::load(options, backend.relay_active, {});
    CoreOptions c;
    c.scheduler.parallel = options.parallel;
    c.scheduler.batch_tokens = options.batch_tokens;
    c.scheduler.adapters = static_cast<int32_t>(options.adapters.size());
    c.prefix_caching = prefix_caching;
    c.step_seconds = 0;
    c.kv_bytes_per_token = model->info().kv_bytes_per_token;
    core = std::make_unique<EngineCore>(*model, *model, c);
  }
  std::shared_ptr<Output> submit(const Tokens& prompt, int32_t max_tokens, int32_t adapter = 0) {
    auto out = std::make_shared<Output>();
    auto r = std::make_unique<Request>();
    r->id = ++last_id;
    r->sink = out;
    r->prompt = prompt;
    r->adapter = adapter;
    r->max_tokens = max_tokens;
    r->logprobs = 5;
    r->ignore_end = true;
    r->samplers.push_back(std::make_unique<GreedySampler>(model->excluded_tokens(true)));
    core->submit(std::move(r));
    return out;
  }
  void check() {
    core->kv().validate();
    ASSERT_EQ(core->kv().cells_used(), model->count_cells());
  }
  void run() {
    int limit = 5000;
    while (core->step()) {
      check();
      if (testing::Test::HasFatalFailure()) return;
      ASSERT_GT(--limit, 0);
    }
  }

  std::unique_ptr<LlamaModel> model;
  std::unique_ptr<EngineCore> core;
  RequestId last_id = 0;
};

Tokens random_tokens(const LlamaModel& model, int32_t count, unsigned seed) {
  std::mt19937 random(seed);
  Tokens tokens(static_cast<size_t>(count));
  for (Token& t : tokens)
    t = static_cast<Token>(random() % static_cast<unsigned>(model.vocab_size()));
  return tokens;
}

Tokens operator+(Tokens a, const Tokens& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// Batches of another size sum in another order, and keys and values are rounded to f16 for
// attention. Where two outputs part, both tokens must have been as good as equal; what follows is
// then another text. Before that, log probabilities must agree.
constexpr float kClose = 2e-3f;
// With KV in q8_0 queries and weights are rounded, too: to bf16 by some kernels, by up to 2^-9 each
// in each of a tiny model's two layers.
constexpr float kCloseRounded = 2 * 2 * 0x1p-9f;

void expect_same(const Output& a, const Output& b, int& identical, float close = kClose) {
  ASSERT_EQ(a.tokens.size(), b.tokens.size());
  for (size_t i = 0; i < a.tokens.size(); ++i) {
    const GeneratedToken& x = a.tokens[i];
    const GeneratedToken& y = b.tokens[i];
    if (x.self.token == y.self.token) {
      ASSERT_NEAR(x.self.logprob, y.self.logprob, close) << "token " << i;
      continue;
    }
    float other = -100.0f;
    for (const TokenLogprob& t : x.top) {
      if (t.token == y.self.token) other = t.logprob;
    }
    ASSERT_NEAR(x.self.logprob, other, close) << "token " << i << " is another one";
    return;
  }
  ++identical;
}

class Shapes : public testing::TestWithParam<const char*> {};

TEST_P(Shapes, ConcurrentRequestsAnswerAsIfAlone) {
  Bench shared(exact_options(GetParam(), 2048), true);
  Bench alone(exact_options(GetParam(), 2048), false);
  const Tokens system = random_tokens(*shared.model, 400, 1);
  std::vector<Tokens> prompts;
  std::vector<std::shared_ptr<Output>> outs;
  for (unsigned i = 0; i < 24; ++i) {
    // Some leave the common prompt early: their prefix ends inside a cached run.
    Tokens prompt(system.begin(), system.end() - (i % 3 == 0 ? 150 + i : 0));
    prompts.push_back(prompt +
                      random_tokens(*shared.model, 3 + static_cast<int32_t>(i % 5), 50 + i));
    outs.push_back(shared.submit(prompts.back(), 12));
  }
  shared.run();
  ASSERT_FALSE(HasFatalFailure());
  // Again, now that everything is cached: the prefixes must still be whole.
  for (size_t i = 0; i < 24; i += 5) {
    prompts.push_back(prompts[i]);
    outs.push_back(shared.submit(prompts[i], 12));
  }
  shared.run();
  int identical = 0;
  for (size_t i = 0; i < prompts.size(); ++i) {
    const auto reference = alone.submit(prompts[i], 12);
    alone.run();
    ASSERT_TRUE(outs[i]->done && reference->done);
    expect_same(*reference, *outs[i], identical);
    if (HasFatalFailure()) return;
  }
  RecordProperty("identical", identical);
  EXPECT_GE(identical, static_cast<int>(prompts.size()) - 2) << "ties are rare";
  EXPECT_LT(shared.core->stats().computed_prompt_tokens, 24 * 100);
}

TEST_P(Shapes, BooksAgreeWithLlamaUnderPressure) {
  Bench bench(small_options(GetParam(), 512), true);
  std::mt19937 random(3);
  const Tokens a = random_tokens(*bench.model, 120, 4);
  const Tokens b = random_tokens(*bench.model, 90, 5);
  std::vector<std::shared_ptr<Output>> outs;
  for (unsigned i = 0; i < 60; ++i) {
    const Tokens& base = i % 2 == 0 ? a : b;
    const auto cut = static_cast<std::ptrdiff_t>(random() % base.size());
    const Tokens prompt = Tokens(base.begin(), base.begin() + cut) +
                          random_tokens(*bench.model, 1 + static_cast<int32_t>(random() % 20), i);
    outs.push_back(bench.submit(prompt, 1 + static_cast<int32_t>(random() % 30)));
    if (i % 7 == 0) bench.core->cancel(i / 2 + 1);
    bench.core->step();
    bench.check();
    ASSERT_FALSE(HasFatalFailure()) << "request " << i;
  }
  bench.run();
  for (const auto& out : outs) EXPECT_TRUE(out->done);
  EXPECT_GT(bench.core->stats().evicted_tokens, 0);
  bench.core->kv().clear_cache();
  EXPECT_EQ(bench.model->count_cells(), 0);
}

INSTANTIATE_TEST_SUITE_P(Tiny, Shapes, testing::Values("tiny", "tiny-phi2", "tiny-gemma2"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::erase(name, '-');
                           return name;
                         });

TEST(LlamaModel, KvOf64RequestsOver4096TokensIsAtMost105Percent) {
  EngineOptions options = small_options("tiny", 8192);
  options.parallel = 64;
  options.batch_tokens = 1024;
  options.ubatch_tokens = 512;
  Bench bench(options, true);
  const Tokens system = random_tokens(*bench.model, 4096, 6);
  for (unsigned i = 0; i < 64; ++i) {
    bench.submit(system + random_tokens(*bench.model, 16, 100 + i), 16);
  }
  int32_t peak = 0;
  while (bench.core->step()) {
    const EngineStats s = bench.core->stats();
    if (s.running == 64) peak = std::max(peak, bench.model->count_cells());
  }
  const int32_t ideal = 4096 + 64 * (16 + 15);
  ASSERT_GT(peak, 0);
  RecordProperty("peak_cells", peak);
  RecordProperty("ideal_cells", ideal);
  std::printf(
      "KV cells of 64 requests over 4096 tokens: %d, ideal %d, ratio %.4f; %lld bytes each\n", peak,
      ideal, static_cast<double>(peak) / ideal,
      static_cast<long long>(bench.model->info().kv_bytes_per_token));
  EXPECT_LE(peak, 1.05 * ideal);
}

TEST(LlamaModel, KvBytesPerToken) {
  Bench bench(small_options("tiny", 256), true);
  // 3 layers, K and V, 2 KV heads of 32 in f16.
  EXPECT_EQ(bench.model->info().kv_bytes_per_token, 3 * 2 * 2 * 32 * 2);
}

TEST(LlamaModel, MoreRowsThanCellsIsToldNotCrashed) {
  Bench bench(small_options("tiny", 256), true);
  Batch batch;
  for (int32_t i = 0; i < 256; ++i) batch.add(1, i, 0, i == 255);
  ASSERT_EQ(bench.model->decode(batch), DecodeStatus::kOk);
  batch.clear();
  batch.add(1, 0, 1, true);
  EXPECT_EQ(bench.model->decode(batch), DecodeStatus::kNoCells);
  EXPECT_EQ(bench.model->count_cells(), 256);
}

TEST(LlamaModel, RefusalsSayWhatIsWrong) {
  EngineOptions options = small_options("tiny", 256);
  const auto message = [&](const EngineOptions& o) {
    try {
      LlamaModel::load(o, o.relay, {});
    } catch (const EngineError& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  EngineOptions bad = options;
  bad.model_path = "/nonexistent/model.gguf";
  EXPECT_NE(message(bad).find("does not exist"), std::string::npos);
  bad = options;
  bad.cache_type_k = "q3_z";
  EXPECT_NE(message(bad).find("q3_z"), std::string::npos);
  bad = options;
  const std::string no_model = testing::TempDir() + "relay-no-model-" + std::to_string(::getpid());
  std::ofstream(no_model) << "This is not a GGUF file.";
  bad.model_path = no_model;
  EXPECT_NE(message(bad).find("could not load"), std::string::npos) << message(bad);
  std::filesystem::remove(no_model);
}

TEST(LlamaModelKv, WhatIsSavedContinuesElsewhereAsItWas) {
  for (const char* type : {"f16", "q8_0"}) {
    EngineOptions options = small_options("tiny", 1024);
    options.cache_type_k = options.cache_type_v = type;
    Bench first(options, true);
    const Tokens prompt = random_tokens(*first.model, 150, 71);
    const Tokens question = random_tokens(*first.model, 5, 72);
    // Others before and beside it: its cells do not lie one after the other.
    first.submit(random_tokens(*first.model, 40, 73), 4);
    first.submit(prompt, 1);
    first.submit(random_tokens(*first.model, 60, 74), 9);
    first.run();
    const Scope scope{0, first.core->kv().salt("")};
    const Tokens kept(prompt.begin(), prompt.end() - 1);
    std::deque<std::vector<uint8_t>> pieces;
    for (int32_t at = 0; at < 149; at += 64) {
      auto piece = first.core->kv().save(scope, kept, at, std::min(64, 149 - at));
      ASSERT_TRUE(piece);
      pieces.push_back(std::move(*piece));
    }
    first.check();

    Bench second(options, true);
    second.submit(random_tokens(*second.model, 33, 75), 3);
    second.run();
    const auto next = [&]() -> std::optional<std::vector<uint8_t>> {
      if (pieces.empty()) return std::nullopt;
      auto piece = std::move(pieces.front());
      pieces.pop_front();
      return piece;
    };
    KvMemory& kv = second.core->kv();
    ASSERT_TRUE(
        kv.restore({0, kv.salt("")}, kept, second.model->kv_layout().bytes_per_token(), next));
    second.check();
    const auto there = first.submit(prompt + question, 12);
    const auto here = second.submit(prompt + question, 12);
    first.run();
    second.run();
    EXPECT_EQ(here->usage.cached_tokens, 149);
    SCOPED_TRACE(type);
    int identical = 0;
    expect_same(*here, *there, identical, type == std::string("q8_0") ? kCloseRounded : kClose);
    EXPECT_EQ(first.model->kv_key(0), second.model->kv_key(0));
    options.cache_type_k = "f32";
    EXPECT_NE(Bench(options, true).model->kv_key(0), first.model->kv_key(0));
  }
}

TEST(LlamaModelKv, SlidingWindowsCannotBeSavedAndSayWhy) {
  Bench bench(small_options("tiny-gemma2", 512), true);
  try {
    bench.model->kv_layout();
    FAIL() << "no error";
  } catch (const EngineError& e) {
    EXPECT_NE(std::string(e.what()).find("sliding-window"), std::string::npos);
  }
}

// --- LoRA adapters

/// A folder with adapters for models of a shape, the first two of which are whole.
class Adapters {
 public:
  explicit Adapters(const std::string& shape) {
    std::filesystem::create_directories(folder_);
    for (unsigned seed : {1u, 2u}) {
      files.push_back({"adapter-" + std::to_string(seed), path("adapter-" + std::to_string(seed))});
      write_test_adapter(shape, seed, files.back().path);
    }
  }
  ~Adapters() { std::filesystem::remove_all(folder_); }
  Adapters(const Adapters&) = delete;
  Adapters& operator=(const Adapters&) = delete;

  std::string path(const std::string& name) const { return folder_ / (name + ".gguf"); }

  std::vector<Adapter> files;

 private:
  const std::filesystem::path folder_ =
      std::filesystem::path(testing::TempDir()) / ("relay-adapters-" + std::to_string(::getpid()));
};

/// What llama.cpp by itself answers, with one adapter for all it computes (empty: none).
Output llama_alone(const EngineOptions& options, const std::string& adapter_path,
                   const Tokens& prompt, int32_t count, const Tokens& excluded) {
  llama_model* model =
      llama_model_load_from_file(options.model_path.c_str(), llama_model_default_params());
  llama_context_params params = llama_context_default_params();
  params.n_ctx = 512;
  params.n_threads = params.n_threads_batch = 1;
  params.type_k = params.type_v = GGML_TYPE_F32;
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
  llama_adapter_lora* adapter = nullptr;
  if (!adapter_path.empty()) adapter = llama_adapter_lora_init(model, adapter_path.c_str());
  llama_context* context = llama_init_from_model(model, params);
  float scale = 1.0f;
  if (adapter != nullptr) llama_set_adapters_lora(context, &adapter, 1, &scale);
  const int32_t vocabulary = llama_vocab_n_tokens(llama_model_get_vocab(model));
  Output out;
  Tokens next = prompt;
  for (int32_t i = 0; i < count; ++i) {
    EXPECT_EQ(
        llama_decode(context, llama_batch_get_one(next.data(), static_cast<int32_t>(next.size()))),
        0);
    const float* logits = llama_get_logits_ith(context, -1);
    std::vector<float> allowed(logits, logits + vocabulary);
    for (const Token t : excluded) allowed[static_cast<size_t>(t)] = -INFINITY;
    const auto best = std::max_element(allowed.begin(), allowed.end());
    GeneratedToken token;
    token.self.token = static_cast<Token>(best - allowed.begin());
    double sum = 0;
    for (int32_t t = 0; t < vocabulary; ++t) sum += std::exp(double{logits[t]} - *best);
    token.self.logprob = static_cast<float>(-std::log(sum));
    for (Token t = 0; t < vocabulary; ++t) {  // those that a rounding could make the best
      if (*best - allowed[static_cast<size_t>(t)] > 0.1f) continue;
      const float logprob = token.self.logprob + allowed[static_cast<size_t>(t)] - *best;
      token.top.push_back({t, {}, logprob});
    }
    out.tokens.push_back(token);
    next = {token.self.token};
  }
  llama_free(context);
  llama_model_free(model);
  return out;
}

class AdapterShapes : public testing::TestWithParam<const char*> {};

TEST_P(AdapterShapes, RequestsSideBySideAnswerAsLlamaDoesWithTheirAdapterAlone) {
  const Adapters adapters(GetParam());
  EngineOptions options = exact_options(GetParam(), 2048);
  options.adapters = adapters.files;
  Bench bench(options, true);
  const Tokens system = random_tokens(*bench.model, 60, 81);
  struct Asked {
    Tokens prompt;
    int32_t adapter;
    std::shared_ptr<Output> out;
  };
  std::vector<Asked> asked;
  for (int32_t round = 0; round < 2; ++round) {  // the second time all is cached
    for (int32_t i = 0; i < 9; ++i) {
      const Tokens prompt =
          system + random_tokens(*bench.model, 4, static_cast<unsigned>(90 + i / 3));
      asked.push_back({prompt, i % 3, bench.submit(prompt, 8, i % 3)});
    }
    bench.run();
    ASSERT_FALSE(HasFatalFailure());
  }
  int identical = 0;
  std::vector<Output> expected;
  const Tokens excluded = bench.model->excluded_tokens(true);
  for (size_t i = 0; i < asked.size(); ++i) {
    const auto& [prompt, adapter, out] = asked[i];
    if (i < 9) {
      const std::string path =
          adapter == 0 ? "" : adapters.files[static_cast<size_t>(adapter) - 1].path;
      expected.push_back(llama_alone(options, path, prompt, 8, excluded));
    }
    ASSERT_TRUE(out->done);
    expect_same(expected[i % 9], *out, identical);
    ASSERT_FALSE(HasFatalFailure()) << "request " << i;
    if (i >= 9) {
      EXPECT_EQ(out->usage.cached_tokens, 63);
    }
  }
  EXPECT_GE(identical, 16) << "ties are rare";
  for (size_t i = 0; i < 9; i += 3) {
    const auto first = [&](size_t of) { return expected[i + of].tokens.front().self; };
    EXPECT_GT(std::abs(first(0).logprob - first(1).logprob), 10 * kClose) << "an adapter matters";
    EXPECT_GT(std::abs(first(1).logprob - first(2).logprob), 10 * kClose) << "and which one";
  }
}

INSTANTIATE_TEST_SUITE_P(Tiny, AdapterShapes, testing::Values("tiny", "tiny-gemma2"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::erase(name, '-');
                           return name;
                         });

TEST(LlamaModelAdapters, SavedKvIsKnownByTheAdaptersFile) {
  const Adapters adapters("tiny");
  EngineOptions options = small_options("tiny", 256);
  options.adapters = adapters.files;
  const auto keys = [&] {
    const BackendReport backend = load_backends(options.relay, options.relay_module);
    const auto model = LlamaModel::load(options, backend.relay_active, {});
    return std::vector<std::string>{model->kv_key(0), model->kv_key(1), model->kv_key(2)};
  };
  const auto before = keys();
  EXPECT_NE(before[0], before[1]);
  EXPECT_NE(before[1], before[2]);
  std::swap(options.adapters[0], options.adapters[1]);
  EXPECT_EQ(keys(), (std::vector<std::string>{before[0], before[2], before[1]}));
  write_test_adapter("tiny", 3, options.adapters[0].path);
  const auto after = keys();
  EXPECT_EQ(after[0], before[0]);
  EXPECT_NE(after[1], before[2]);
}

TEST(LlamaModelAdapters, IdentitiesDifferWithWhateverMayChangeAnAnswer) {
  const Adapters adapters("tiny");
  const std::string copy = adapters.path("copy");
  std::filesystem::copy_file(test_model("tiny"), copy);
  std::filesystem::last_write_time(
      copy, std::filesystem::file_time_type::clock::now() - std::chrono::hours(1));
  EngineOptions options = small_options("tiny", 256);
  options.model_path = copy;
  options.adapters = adapters.files;
  const auto identities = [&] {
    const BackendReport backend = load_backends(options.relay, options.relay_module);
    const auto model = LlamaModel::load(options, backend.relay_active, {});
    model->identify(options);
    return model->info().identities;
  };
  const std::vector<std::string> first = identities();
  ASSERT_EQ(first.size(), 3u);
  EXPECT_EQ(std::set<std::string>(first.begin(), first.end()).size(), 3u);
  options.model_path = test_model("tiny");
  options.model_alias = "other";
  EXPECT_EQ(identities(), first) << "the same files under other names";
  options.model_path = copy;
  std::swap(options.adapters[0], options.adapters[1]);
  EXPECT_EQ(identities(), (std::vector<std::string>{first[0], first[2], first[1]}));
  std::swap(options.adapters[0], options.adapters[1]);

  const auto expect_others = [&](const char* what) {
    const std::vector<std::string> now = identities();
    for (size_t i = 0; i < 3; ++i) EXPECT_NE(now[i], first[i]) << what;
  };
  options.cache_type_v = "q8_0";
  expect_others("KV types");
  options.cache_type_v = EngineOptions().cache_type_v;
  options.template_kwargs_json = R"({"date_string":"today"})";
  expect_others("what templates are given");
  options.template_kwargs_json.clear();
  options.chat_template_file = adapters.path("template");
  std::ofstream(options.chat_template_file) << "{{ messages[0].content }}";
  expect_others("template");
  options.chat_template_file.clear();
  write_test_adapter("tiny", 3, options.adapters[0].path);
  std::vector<std::string> now = identities();
  EXPECT_EQ(now[0], first[0]);
  EXPECT_NE(now[1], first[1]);
  EXPECT_EQ(now[2], first[2]);
  {  // a fine-tune: the same shapes, other weights
    std::fstream file(copy, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(-16, std::ios::end);
    file.write("\1\2\1\2", 4);
  }
  expect_others("weights");
}

TEST(LlamaModelAdapters, RefusalsSayWhatIsWrong) {
  const Adapters adapters("tiny");
  const std::string path = adapters.path("bad");
  const auto refusal = [&](const std::string& shape) {
    EngineOptions options = small_options(shape, 256);
    options.adapters = {{"bad", path}};
    const BackendReport backend = load_backends(options.relay, options.relay_module);
    try {
      LlamaModel::load(options, backend.relay_active, {});
    } catch (const EngineError& e) {
      EXPECT_EQ(e.kind(), ErrorKind::kModel);
      EXPECT_NE(std::string(e.what()).find(path), std::string::npos) << e.what();
      return std::string(e.what());
    }
    return std::string();
  };
  const auto expect_refusal = [&](const std::string& says, const std::string& shape = "tiny") {
    EXPECT_NE(refusal(shape).find(says), std::string::npos) << says << "\n" << refusal(shape);
  };
  std::mt19937 random(1);
  const auto write = [&](const auto& change) {
    AdapterFile file("llama");
    file.add("blk.0.attn_q.weight", 128, 128, random);
    change(file);
    file.write(path);
  };
  expect_refusal("does not exist");
  std::ofstream(path) << "This is not a GGUF file.";
  expect_refusal("is no GGUF file");
  std::filesystem::copy_file(test_model("tiny"), path,
                             std::filesystem::copy_options::overwrite_existing);
  expect_refusal("general.type is 'model'");
  write([](AdapterFile& f) { gguf_set_val_u32(f.keys, "general.type", 7); });
  expect_refusal("it has no general.type");
  write([](AdapterFile& f) { gguf_set_val_str(f.keys, "adapter.type", "dora"); });
  expect_refusal("adapter.type is 'dora'");
  write([](AdapterFile& f) { gguf_set_val_u32(f.keys, "adapter.lora.alpha", 8); });
  expect_refusal("alpha");
  for (const float alpha : {INFINITY, NAN}) {
    write([=](AdapterFile& f) { gguf_set_val_f32(f.keys, "adapter.lora.alpha", alpha); });
    expect_refusal("alpha is not finite");
  }
  write([](AdapterFile& f) {
    const uint32_t tokens[] = {1, 2};
    gguf_set_arr_data(f.keys, "adapter.alora.invocation_tokens", GGUF_TYPE_UINT32, tokens, 2);
  });
  expect_refusal("activated LoRA");
  write([&](AdapterFile& f) { f.add_tensor("blk.0.attn_norm.weight", 128, 1, random); });
  expect_refusal("does not apply its tensor blk.0.attn_norm.weight");
  write([&](AdapterFile& f) { f.add("blk.0.attn_norm.weight", 128, 1, random); });
  expect_refusal("does not apply its tensor blk.0.attn_norm.weight.lora_a");
  for (const char* name : {"blk.0.attn_q.bias", "per_layer_token_embd.weight"}) {
    write([&](AdapterFile& f) { f.add(name, 128, 1, random); });
    expect_refusal("does not apply its tensor " + std::string(name) + ".lora_a");
  }
  write([&](AdapterFile& f) { f.add("token_embd.lora_a.weight", 128, 32064, random); });
  expect_refusal("token_embd.lora_a.weight.lora_a is none of a LoRA's");
  write([&](AdapterFile& f) { f.add_tensor("blk.1.attn_q.weight.lora_b.lora_a", 128, 4, random); });
  expect_refusal("blk.1.attn_q.weight.lora_b.lora_a is none of a LoRA's");
  for (const ggml_type type :
       {GGML_TYPE_I8, GGML_TYPE_I32, GGML_TYPE_F64, GGML_TYPE_Q8_1, GGML_TYPE_Q8_K}) {
    const std::string name = "blk.1.ffn_down.weight.lora_a";
    write([&](AdapterFile& f) { f.add_zeros(name, type, {256, 4}); });
    expect_refusal(name + " of type " + ggml_type_name(type));
  }
  write([&](AdapterFile& f) {
    f.add_zeros("blk.1.attn_q.weight.lora_a", GGML_TYPE_F32, {128, 4});
    f.add_zeros("blk.1.attn_q.weight.lora_b", GGML_TYPE_F32, {0, 128});
  });
  expect_refusal("blk.1.attn_q.weight.lora_b is empty");
  // Of Q and K no logit shows it: the attention may take such scores for none.
  for (const char* weight : {"attn_q", "attn_k", "attn_v", "ffn_down"}) {
    for (const float bad : {NAN, INFINITY}) {
      const std::string name = std::string("blk.1.") + weight + ".weight";
      const bool down = weight == std::string("ffn_down");
      const bool wide = down || weight == std::string("attn_q");
      write([&](AdapterFile& f) {
        f.add_zeros(name + ".lora_a", GGML_TYPE_F32, {down ? 384 : 128, 4});
        const ggml_tensor* b = f.add_zeros(name + ".lora_b", GGML_TYPE_F32, {4, wide ? 128 : 64});
        static_cast<float*>(b->data)[5] = bad;
      });
      expect_refusal(name + ".lora_b has values that are not finite");
    }
  }
  write([](AdapterFile& f) {
    for (const auto& [part, shape] : {std::pair("a", std::vector<int64_t>{384, 4}),
                                      std::pair("b", std::vector<int64_t>{4, 128})}) {
      const ggml_tensor* t =
          f.add_zeros(std::string("blk.1.ffn_down.weight.lora_") + part, GGML_TYPE_F32, shape);
      std::fill_n(static_cast<float*>(t->data), ggml_nelements(t), 3e38f);
    }
  });
  expect_refusal("compute is not finite");
  write([&](AdapterFile& f) { f.add("blk.7.attn_q.weight", 128, 128, random); });
  expect_refusal("blk.7.attn_q.weight");
  write([&](AdapterFile& f) { f.add("blk.1.attn_q.weight", 128, 96, random); });
  expect_refusal("incorrect shape");
  write([](AdapterFile&) {});
  expect_refusal("arch mismatch", "tiny-gemma2");
  std::filesystem::resize_file(path, std::filesystem::file_size(path) - 100);
  expect_refusal("it is cut short");
  AdapterFile embedding("gemma2");
  embedding.add_tensor("token_embd.weight.lora_a", 4, 32064, random);
  embedding.add_tensor("token_embd.weight.lora_b", 4, 128, random);
  embedding.write(path);
  expect_refusal("output matrix, too", "tiny-gemma2");
}

TEST(LlamaModelAdapters, EachExpertHasItsMatrices) {
  const Adapters adapters("tiny");
  const std::string weight = "blk.0.ffn_up_exps.weight";
  AdapterFile model("llama");
  model.add_zeros(weight, GGML_TYPE_F32, {128, 256, 8});
  model.write(adapters.path("model"));
  const auto check = [&](const std::vector<int64_t>& a, const std::vector<int64_t>& b) {
    AdapterFile file("llama");
    file.add_zeros(weight + ".lora_a", GGML_TYPE_F32, a);
    file.add_zeros(weight + ".lora_b", GGML_TYPE_F32, b);
    file.write(adapters.path("experts"));
    try {
      check_lora_file(adapters.path("experts"), {adapters.path("model")});
    } catch (const std::runtime_error& e) {
      return std::string(e.what());
    }
    return std::string();
  };
  const std::string a = "its tensor " + weight + ".lora_a is of ";
  const std::string b = "its tensor " + weight + ".lora_b is of ";
  const std::string not_8 = " matrices, and the model's " + weight + " of 8";
  EXPECT_EQ(check({128, 4, 8}, {4, 256, 8}), "");
  EXPECT_EQ(check({128, 4, 7}, {4, 256, 8}), a + "7" + not_8);
  EXPECT_EQ(check({128, 4, 8}, {4, 256, 7}), b + "7" + not_8);
  EXPECT_EQ(check({128, 4}, {4, 256}), a + "1" + not_8);
  EXPECT_EQ(check({128, 4, 8}, {4, 256, 9}), b + "9" + not_8);
  EXPECT_EQ(check({128, 4, 8, 2}, {4, 256, 8, 2}), a + "16" + not_8);
}

TEST(LlamaModelAdapters, QuantisedOnesAreServed) {
  const Adapters adapters("tiny");
  EngineOptions options = small_options("tiny", 256);
  for (const ggml_type type : {GGML_TYPE_F16, GGML_TYPE_BF16, GGML_TYPE_Q8_0, GGML_TYPE_Q4_0}) {
    AdapterFile file("llama");
    file.add_zeros("blk.0.attn_q.weight.lora_a", type, {128, 32});
    file.add_zeros("blk.0.attn_q.weight.lora_b", type, {32, 128});
    options.adapters.push_back({ggml_type_name(type), adapters.path(ggml_type_name(type))});
    file.write(options.adapters.back().path);
  }
  const BackendReport backend = load_backends(options.relay, options.relay_module);
  EXPECT_NO_THROW(LlamaModel::load(options, backend.relay_active, {}));
}

}  // namespace
}  // namespace relay::engine
