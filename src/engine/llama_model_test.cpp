// The core over libllama: the books against llama.cpp's own cells, and outputs against the same
// request alone.
#include "engine/llama_model.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <deque>
#include <filesystem>
#include <fstream>
#include <random>

#include "engine/backend.h"
#include "engine/engine_core.h"
#include "engine/test_models.h"

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
    c.prefix_caching = prefix_caching;
    c.step_seconds = 0;
    c.kv_bytes_per_token = model->info().kv_bytes_per_token;
    core = std::make_unique<EngineCore>(*model, *model, c);
  }
  std::shared_ptr<Output> submit(const Tokens& prompt, int32_t max_tokens) {
    auto out = std::make_shared<Output>();
    auto r = std::make_unique<Request>();
    r->id = ++last_id;
    r->sink = out;
    r->prompt = prompt;
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

void expect_same(const Output& a, const Output& b, int& identical) {
  ASSERT_EQ(a.tokens.size(), b.tokens.size());
  for (size_t i = 0; i < a.tokens.size(); ++i) {
    const GeneratedToken& x = a.tokens[i];
    const GeneratedToken& y = b.tokens[i];
    if (x.self.token == y.self.token) {
      ASSERT_NEAR(x.self.logprob, y.self.logprob, kClose) << "token " << i;
      continue;
    }
    float other = -100.0f;
    for (const TokenLogprob& t : x.top) {
      if (t.token == y.self.token) other = t.logprob;
    }
    ASSERT_NEAR(x.self.logprob, other, kClose) << "token " << i << " is another one";
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
    ASSERT_TRUE(kv.restore({0, kv.salt("")}, kept, second.model->kv_layout().bytes_per_token(), next));
    second.check();
    const auto there = first.submit(prompt + question, 12);
    const auto here = second.submit(prompt + question, 12);
    first.run();
    second.run();
    EXPECT_EQ(here->usage.cached_tokens, 149);
    int identical = 0;
    expect_same(*here, *there, identical);
    EXPECT_EQ(first.model->kv_key(), second.model->kv_key());
    options.cache_type_k = "f32";
    EXPECT_NE(Bench(options, true).model->kv_key(), first.model->kv_key());
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

}  // namespace
}  // namespace relay::engine
