// The engine as the server sees it: threads, templates, grammars, refusals.
#include "engine/engine.h"

#include <gtest/gtest.h>
#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <filesystem>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <stdexcept>
#include <thread>

#include "engine/grammar.h"
#include "engine/test_models.h"

namespace relay::engine {
namespace {

using namespace std::chrono_literals;

class Collector : public Sink {
 public:
  struct Choice {
    std::string text;
    std::vector<GeneratedToken> tokens;
    bool finished = false;
    FinishReason reason = FinishReason::kError;
    std::string stop;
  };

  void on_tokens(int32_t choice, TokensDelta delta) override {
    const std::lock_guard lock(mutex_);
    Choice& c = choices[choice];
    c.text += delta.text;
    for (auto& t : delta.tokens) c.tokens.push_back(std::move(t));
    changed_.notify_all();
  }
  void on_choice_finish(int32_t choice, FinishReason reason, const std::string& stop) override {
    const std::lock_guard lock(mutex_);
    choices[choice].finished = true;
    choices[choice].reason = reason;
    choices[choice].stop = stop;
  }
  void on_done(const Usage& u, const RequestTimings& t) override {
    const std::lock_guard lock(mutex_);
    usage = u;
    timings = t;
    over_ = true;
    changed_.notify_all();
  }
  void on_error(ErrorKind kind, const std::string& message) override {
    const std::lock_guard lock(mutex_);
    error = kind;
    error_message = message;
    over_ = true;
    changed_.notify_all();
  }
  void wait() {
    std::unique_lock lock(mutex_);
    ASSERT_TRUE(changed_.wait_for(lock, 120s, [&] { return over_; })) << "no answer";
  }
  void wait_for_tokens(size_t count) {
    std::unique_lock lock(mutex_);
    ASSERT_TRUE(
        changed_.wait_for(lock, 120s, [&] { return over_ || choices[0].tokens.size() >= count; }));
  }
  std::vector<Token> ids(int32_t choice = 0) {
    std::vector<Token> list;
    for (const auto& t : choices[choice].tokens) list.push_back(t.self.token);
    return list;
  }

  std::map<int32_t, Choice> choices;
  Usage usage;
  RequestTimings timings;
  std::optional<ErrorKind> error;
  std::string error_message;

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool over_ = false;
};

EngineOptions small_options() {
  EngineOptions o;
  o.model_path = test_model("tiny");
  o.kv_cells = 2048;
  o.parallel = 16;
  o.batch_tokens = 256;
  o.ubatch_tokens = 128;
  o.threads = 1;
  o.relay = RELAY_TEST_WITH_MODULE;
  o.relay_module = RELAY_TEST_MODULE;
  return o;
}

class EngineTest : public testing::Test {
 protected:
  static void SetUpTestSuite() { engine = Engine::load(small_options()); }
  static void TearDownTestSuite() { engine.reset(); }

  GenerateRequest ask(const std::string& text, int32_t max_tokens) {
    GenerateRequest r;
    r.prompt = engine->tokenize(text, true, false);
    r.max_tokens = max_tokens;
    r.sampling.temperature = 0.0f;
    r.sampling.ignore_eos = true;
    return r;
  }
  std::shared_ptr<Collector> start(const GenerateRequest& request) {
    auto sink = std::make_shared<Collector>();
    last = engine->submit(request, sink);
    EXPECT_TRUE(std::holds_alternative<RequestId>(last))
        << (std::holds_alternative<Refusal>(last) ? std::get<Refusal>(last).message : "");
    return sink;
  }
  std::shared_ptr<Collector> run(const GenerateRequest& request) {
    auto sink = start(request);
    sink->wait();
    return sink;
  }
  Refusal refused(const GenerateRequest& request) {
    const auto result = engine->submit(request, std::make_shared<Collector>());
    if (const auto* r = std::get_if<Refusal>(&result)) return *r;
    ADD_FAILURE() << "accepted";
    return {};
  }

  static std::unique_ptr<Engine> engine;
  SubmitResult last;
};

std::unique_ptr<Engine> EngineTest::engine;

TEST_F(EngineTest, InfoSaysWhatRuns) {
  const ModelInfo& info = engine->info();
  EXPECT_EQ(info.name, std::filesystem::path(test_model("tiny")).stem().string());
  EXPECT_GE(info.kv_cells, 2048);
  EXPECT_EQ(info.relay_active, RELAY_TEST_WITH_MODULE);
  EXPECT_EQ(info.backend.find("Relay is off") == std::string::npos, info.relay_active);
  EXPECT_GT(info.vocab_size, 0);
  EXPECT_GT(info.kv_bytes_per_token, 0);
  EXPECT_FALSE(info.chat_template.empty());
}

TEST_F(EngineTest, TokensRoundTrip) {
  const std::string text = "Grüße, 世界! 12345 <|user|> [INST]";
  EXPECT_EQ(engine->detokenize(engine->tokenize(text, false, false), false), text);
  EXPECT_THROW(engine->detokenize({-1}, true), EngineError);
  EXPECT_THROW(engine->detokenize({1 << 28}, true), EngineError);
}

TEST_F(EngineTest, GreedyIsRepeatable) {
  const auto a = run(ask("The quick brown fox", 12));
  const auto b = run(ask("The quick brown fox", 12));
  EXPECT_EQ(a->choices[0].tokens.size(), 12u);
  EXPECT_EQ(a->ids(), b->ids());
  EXPECT_EQ(a->choices[0].reason, FinishReason::kLength);
  EXPECT_GT(b->usage.cached_tokens, 0);
  EXPECT_EQ(a->usage.completion_tokens, 12);
  EXPECT_GE(a->timings.total, a->timings.time_to_first_token);
}

TEST_F(EngineTest, SeedsAreHonouredAndChoicesDiffer) {
  GenerateRequest r = ask("Once upon a time", 12);
  r.sampling.temperature = 1.0f;
  r.sampling.top_p = 0.95f;
  r.sampling.seed = 7;
  r.n = 3;
  r.cache_salt = "first";
  const auto a = run(r);
  r.cache_salt = "second";
  const auto b = run(r);
  std::set<std::vector<Token>> different;
  for (int32_t c = 0; c < 3; ++c) {
    EXPECT_EQ(a->ids(c).size(), 12u);
    different.insert(a->ids(c));
  }
  EXPECT_GT(different.size(), 1u);
  // The first tokens come from the same logits up to rounding.
  EXPECT_EQ(a->ids(0).front(), b->ids(0).front());
  r.n = 1;
  r.sampling.seed = 8;
  const auto second_choice = run(r);
  EXPECT_EQ(second_choice->ids(0).front(), a->ids(1).front()) << "choice i has seed + i";
}

TEST_F(EngineTest, LogprobsBelongToTheTokens) {
  GenerateRequest r = ask("Four score and seven", 6);
  r.sampling.logprobs = 5;
  const auto out = run(r);
  for (const GeneratedToken& t : out->choices[0].tokens) {
    ASSERT_EQ(t.top.size(), 5u);
    EXPECT_LE(t.self.logprob, 0.0f);
    for (size_t i = 1; i < 5; ++i) EXPECT_GE(t.top[i - 1].logprob, t.top[i].logprob);
    EXPECT_FLOAT_EQ(t.top[0].logprob, t.self.logprob) << "greedy";
  }
}

TEST_F(EngineTest, AStopStringEndsTheAnswer) {
  const auto whole = run(ask("Stop me if", 20));
  const std::string text = whole->choices[0].text;
  ASSERT_GT(text.size(), 8u);
  size_t from = text.size() / 2;
  while ((static_cast<unsigned char>(text[from]) & 0xC0) == 0x80) ++from;
  GenerateRequest r = ask("Stop me if", 20);
  r.stop = {text.substr(from, 4)};
  const auto cut = run(r);
  EXPECT_EQ(cut->choices[0].text, text.substr(0, text.find(r.stop[0])));
  EXPECT_EQ(cut->choices[0].reason, FinishReason::kStop);
  EXPECT_EQ(cut->choices[0].stop, r.stop[0]);
}

TEST_F(EngineTest, AGrammarBindsEvenARandomModel) {
  GenerateRequest r = ask("yes or no?", 10);
  r.sampling.ignore_eos = false;
  r.grammar = "root ::= \"yes\" | \"no\"";
  const auto greedy = run(r);
  EXPECT_TRUE(greedy->choices[0].text == "yes" || greedy->choices[0].text == "no")
      << greedy->choices[0].text;
  EXPECT_EQ(greedy->choices[0].reason, FinishReason::kStop);
  r.sampling.temperature = 1.0f;
  r.sampling.seed = 3;
  r.n = 4;
  const auto sampled = run(r);
  for (auto& [c, choice] : sampled->choices) {
    EXPECT_TRUE(choice.text == "yes" || choice.text == "no") << choice.text;
  }
}

TEST_F(EngineTest, AJsonSchemaBinds) {
  GenerateRequest r = ask("{", 40);
  r.sampling.ignore_eos = false;
  r.json_schema =
      R"({"type":"object","properties":{"a":{"enum":["x","y"]}},"required":["a"],
          "additionalProperties":false})";
  const auto out = run(r);
  std::string text = out->choices[0].text;
  std::erase_if(text, [](char c) { return c == ' ' || c == '\n'; });
  EXPECT_TRUE(text == R"({"a":"x"})" || text == R"({"a":"y"})") << text;
}

TEST_F(EngineTest, RefusalsNameTheirReason) {
  GenerateRequest r = ask("hello", 5);
  r.sampling.ignore_eos = false;
  r.grammar = "root ::= (";
  EXPECT_EQ(refused(r).kind, ErrorKind::kInvalidGrammar);
  r = ask("hello", 5);
  r.json_schema = "{\"type\": \"no such type\"}";
  EXPECT_EQ(refused(r).kind, ErrorKind::kInvalidGrammar);
  EXPECT_EQ(refused(r).param, "json_schema");
  r.json_schema = R"({"type":"boolean"})";
  r.sampling.ignore_eos = true;
  EXPECT_EQ(refused(r).param, "ignore_eos");
  r = ask("hello", 5);
  r.prompt.clear();
  EXPECT_EQ(refused(r).kind, ErrorKind::kInvalidRequest);
  r.prompt = {1 << 28};
  EXPECT_EQ(refused(r).kind, ErrorKind::kInvalidRequest);
  r = ask("hello", 5);
  r.sampling.top_p = 0.0f;
  EXPECT_EQ(refused(r).kind, ErrorKind::kInvalidRequest);
  r = ask("hello", 5);
  r.n = 1000;
  EXPECT_EQ(refused(r).param, "n");
  r = ask("hello", 5);
  for (const int32_t adapter : {-1, 1}) {
    r.adapter = adapter;
    EXPECT_EQ(refused(r).param, "adapter");
  }
  r = ask("hello", 1 << 20);
  const Refusal length = refused(r);
  EXPECT_EQ(length.kind, ErrorKind::kContextLengthExceeded);
  const std::string context = std::to_string(engine->info().context_length) + " tokens";
  const std::string prompt = std::to_string(r.prompt.size()) + " in the prompt";
  EXPECT_NE(length.message.find(context), std::string::npos) << length.message;
  EXPECT_NE(length.message.find(prompt), std::string::npos) << length.message;
}

TEST_F(EngineTest, CancelEndsOneAndFreesItsCells) {
  const auto busy = [&] {
    const EngineStats s = engine->stats();
    return s.kv_cells_used - s.kv_cells_cached;
  };
  const auto out = start(ask("A very long story begins", 1500));
  const RequestId id = std::get<RequestId>(last);
  out->wait_for_tokens(5);
  EXPECT_GT(busy(), 0);
  engine->cancel(id);
  out->wait();
  EXPECT_EQ(out->choices[0].reason, FinishReason::kCancelled);
  for (int i = 0; i < 100 && busy() > 0; ++i) std::this_thread::sleep_for(10ms);
  EXPECT_EQ(busy(), 0) << "its KV is back within a second";
  engine->cancel(id);
  engine->cancel(999999);
}

TEST_F(EngineTest, ChatTemplateRendersAndItsPrefixIsOne) {
  ChatRequest chat;
  chat.messages_json =
      R"([{"role":"system","content":"You are terse. )" + std::string(200, 'x') + R"("}])";
  const std::vector<Token> prefix = engine->render_chat_prefix(chat);
  ASSERT_GT(prefix.size(), 10u);
  for (const char* question : {"Hi", "\\n\\nWhat?", " 42", "\\u4e16"}) {
    ChatRequest full = chat;
    full.messages_json.pop_back();
    full.messages_json += std::string(R"(,{"role":"user","content":")") + question + "\"}]";
    const ChatPrompt prompt = engine->render_chat(full);
    EXPECT_FALSE(prompt.text.empty());
    ASSERT_GT(prompt.tokens.size(), prefix.size());
    const auto same =
        std::mismatch(prefix.begin(), prefix.end(), prompt.tokens.begin()).first - prefix.begin();
    // A question may be joined with the last character of the header before it.
    EXPECT_GE(same + 2, static_cast<std::ptrdiff_t>(prefix.size())) << question;
  }
  const auto kind = [&](const ChatRequest& c) {
    try {
      engine->render_chat(c);
    } catch (const EngineError& e) {
      return e.kind();
    }
    return ErrorKind::kInternal;
  };
  ChatRequest bad;
  bad.messages_json = "[{]";
  EXPECT_EQ(kind(bad), ErrorKind::kInvalidRequest);
  bad.messages_json = "[]";
  EXPECT_EQ(kind(bad), ErrorKind::kInvalidRequest);
  bad = chat;
  bad.tool_choice = "sometimes";
  EXPECT_EQ(kind(bad), ErrorKind::kInvalidRequest);
}

TEST_F(EngineTest, PlainAnswersParseToContent) {
  ChatRequest chat;
  chat.messages_json = R"([{"role":"user","content":"Hi"}])";
  const ChatPrompt prompt = engine->render_chat(chat);
  const ChatMessage half = engine->parse_message(prompt.format, "Hello", true);
  const ChatMessage whole = engine->parse_message(prompt.format, "Hello there", false);
  EXPECT_EQ(whole.content, "Hello there");
  EXPECT_TRUE(whole.tool_calls.empty());
  const auto deltas = engine->diff_messages(half, whole);
  ASSERT_EQ(deltas.size(), 1u);
  EXPECT_EQ(half.content + deltas[0].content, "Hello there");
}

constexpr const char* kWeather =
    R"([{"type":"function","function":{"name":"get_weather","description":"d","parameters":
        {"type":"object","properties":{"unit":{"enum":["c","f"]}},"required":["unit"]}}}])";

TEST_F(EngineTest, AJsonSchemaBindsAChatToo) {
  ChatRequest chat;
  chat.messages_json = R"([{"role":"user","content":"Choose"}])";
  chat.json_schema =
      R"({"type":"object","properties":{"a":{"enum":["x","y"]}},"required":["a"],
          "additionalProperties":false})";
  const ChatPrompt prompt = engine->render_chat(chat);
  GenerateRequest r;
  r.prompt = prompt.tokens;
  r.stop = prompt.stop;
  r.format = prompt.format;
  r.max_tokens = 60;
  r.sampling.temperature = 0.0f;
  const auto out = run(r);
  std::string text = engine->parse_message(prompt.format, out->choices[0].text, false).content;
  std::erase_if(text, [](char c) { return c == ' ' || c == '\n'; });
  EXPECT_TRUE(text == R"({"a":"x"})" || text == R"({"a":"y"})") << out->choices[0].text;
}

constexpr const char* kDanglingReference = R"({"$ref":"#/definitions/none"})";

TEST_F(EngineTest, ASchemaThatCannotBeKeptIsAGrammarErrorOfAChatToo) {
  ChatRequest chat;
  chat.messages_json = R"([{"role":"user","content":"Choose"}])";
  chat.json_schema = kDanglingReference;
  try {
    engine->render_chat(chat);
    ADD_FAILURE() << "the schema was accepted";
  } catch (const EngineError& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kInvalidGrammar);
    EXPECT_EQ(e.param(), "json_schema");
    EXPECT_NE(std::string(e.what()).find("#/definitions/none"), std::string::npos) << e.what();
  }
}

TEST_F(EngineTest, WhatNoGrammarKeepsOfASchemaIsRefused) {
  const auto error_of = [&](const std::string& schema) {
    GenerateRequest r = ask("hello", 5);
    r.sampling.ignore_eos = false;
    r.json_schema = schema;
    const auto result = engine->submit(r, std::make_shared<Collector>());
    const auto* refusal = std::get_if<Refusal>(&result);
    return refusal == nullptr ? std::string("accepted") : refusal->message;
  };
  const auto says = [&](const std::string& schema, const std::string& words) {
    const std::string error = error_of(schema);
    EXPECT_NE(error.find(words), std::string::npos) << schema << ": " << error;
  };
  says(R"({"not":{"type":"string"}})", "'not' is not supported at #.");
  says(R"({"type":"number","minimum":0})", "'minimum'");
  says(R"({"type":"object","properties":{"a":{"type":["null","number"],"maximum":1}}})",
       "#/properties/a");
  says(R"({"type":"array","items":{"type":"string","pattern":"a.*"}})", "#/items");
  says(R"({"anyOf":[{"type":"string"},{"type":"array","uniqueItems":true}]})", "#/anyOf/1");
  says(R"({"$ref":"#/$defs/x","$defs":{"x":{"type":"object","minProperties":1}}})", "#/$defs/x");
  says(R"({"type":"string","pattern":"^((a$"})", "pattern");
  says(R"({"type":"integer","minimum":3,"maximum":7})", "accepted");
  says(R"({"type":"array","uniqueItems":false,"items":{"type":"string","pattern":"^a+$"}})",
       "accepted");
  says(R"({"type":"string","format":"email","title":"t","default":"d"})", "accepted");
}

TEST_F(EngineTest, ALargeGrammarBesideManyOthersIsRefusedForNow) {
  GenerateRequest r = ask("hello", 1);
  r.sampling.ignore_eos = false;
  r.grammar = "root ::= [a]{0,100000}";
  const int64_t limit = GrammarMemory::set_limit(GrammarMemory::total() + (1 << 20));
  const auto result = engine->submit(r, std::make_shared<Collector>());
  r.grammar = "root ::= [a]{0,1000}";
  const auto small = engine->submit(r, std::make_shared<Collector>());
  GrammarMemory::set_limit(limit);
  const auto* refusal = std::get_if<Refusal>(&result);
  ASSERT_NE(refusal, nullptr);
  EXPECT_EQ(refusal->kind, ErrorKind::kQueueFull);
  EXPECT_EQ(refusal->message,
            "Try again later: the grammars of all requests together take too much memory.");
  EXPECT_TRUE(std::holds_alternative<RequestId>(small));
  r.grammar = "root ::= [a]{0,100000}";
  EXPECT_NE(run(r), nullptr);
}

TEST_F(EngineTest, ToolsThatTheTemplateCannotShowAreRefused) {
  ChatRequest chat;
  chat.messages_json = R"([{"role":"user","content":"Weather in Paris?"}])";
  chat.tools_json = kWeather;
  try {
    engine->render_chat(chat);
    ADD_FAILURE() << "the tools were dropped in silence";
  } catch (const EngineError& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kInvalidTemplate);
  }
  chat.tool_choice = "none";
  EXPECT_NO_THROW(engine->render_chat(chat));
}

/// An engine whose template shows tools.
std::unique_ptr<Engine> engine_with_tools(int32_t kv_cells = 2048) {
  EngineOptions options = small_options();
  options.kv_cells = kv_cells;
  options.chat_template_file =
      std::string(RELAY_TEST_TEMPLATES) + "/Qwen-Qwen2.5-7B-Instruct.jinja";
  return Engine::load(options);
}

ChatRequest weather_chat() {
  ChatRequest chat;
  chat.messages_json = R"([{"role":"user","content":"Weather in Paris?"}])";
  chat.tools_json = kWeather;
  return chat;
}

TEST(EngineTools, CallsAreReadFromGrowingText) {
  const auto engine = engine_with_tools();
  ChatRequest chat = weather_chat();
  const ChatPrompt prompt = engine->render_chat(chat);
  EXPECT_NE(prompt.text.find("get_weather"), std::string::npos);
  const std::string text =
      "Let me see.\n<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"unit\": "
      "\"c\"}}\n</tool_call>";
  ChatMessage last;
  std::string content;
  ToolCall call;
  for (size_t n = 1; n <= text.size(); ++n) {
    const ChatMessage now =
        engine->parse_message(prompt.format, text.substr(0, n), n < text.size());
    for (const ChatDelta& d : engine->diff_messages(last, now)) {
      content += d.content;
      if (d.tool_call_index < 0) continue;
      EXPECT_EQ(d.tool_call_index, 0);
      if (!d.tool_call.id.empty()) call.id = d.tool_call.id;
      if (!d.tool_call.name.empty()) call.name = d.tool_call.name;
      call.arguments += d.tool_call.arguments;
    }
    last = now;
  }
  ASSERT_EQ(last.tool_calls.size(), 1u);
  EXPECT_EQ(call.name, "get_weather");
  EXPECT_EQ(call.id, last.tool_calls[0].id);
  EXPECT_FALSE(call.id.empty());
  EXPECT_EQ(call.arguments, last.tool_calls[0].arguments);
  EXPECT_NE(call.arguments.find("\"c\""), std::string::npos);
  EXPECT_EQ(content.substr(0, 11), "Let me see.");

  // So is a tool's schema.
  chat.tools_json = std::string(R"([{"type":"function","function":{"name":"f","parameters":)") +
                    kDanglingReference + "}}]";
  try {
    engine->render_chat(chat);
    ADD_FAILURE() << "the schema was accepted";
  } catch (const EngineError& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kInvalidGrammar);
    EXPECT_EQ(e.param(), "tools[0].function.parameters");
  }
  chat.tools_json = kWeather;

  // The grammar of a required call compiles and binds; a random model may ramble before it.
  for (const char* choice : {"auto", "required"}) {
    chat.tool_choice = choice;
    const ChatPrompt bound = engine->render_chat(chat);
    GenerateRequest r;
    r.prompt = bound.tokens;
    r.format = bound.format;
    r.stop = bound.stop;
    r.max_tokens = 20;
    r.sampling.seed = 1;
    auto sink = std::make_shared<Collector>();
    const auto result = engine->submit(r, sink);
    ASSERT_TRUE(std::holds_alternative<RequestId>(result)) << std::get<Refusal>(result).message;
    sink->wait();
    EXPECT_FALSE(sink->error) << sink->error_message;
    EXPECT_FALSE(sink->choices[0].tokens.empty());
  }
}

/// On a thread with a small stack, as the server's may be.
void on_small_stack(std::function<void()> work) {
  pthread_attr_t attributes;
  ASSERT_EQ(pthread_attr_init(&attributes), 0);
  ASSERT_EQ(pthread_attr_setstacksize(&attributes, size_t{2} << 20), 0);
  const auto run = [](void* data) -> void* {
    (*static_cast<std::function<void()>*>(data))();
    return nullptr;
  };
  pthread_t thread{};
  ASSERT_EQ(pthread_create(&thread, &attributes, run, &work), 0);
  ASSERT_EQ(pthread_join(thread, nullptr), 0);
  pthread_attr_destroy(&attributes);
}

TEST(EngineTools, ArgumentsOfAnyDepthEndNoProcess) {
  const auto engine = engine_with_tools();
  const ChatPrompt prompt = engine->render_chat(weather_chat());
  for (const size_t depth : {400, 1'900, 2'000, 60'000, 1'000'000}) {
    std::string text = "<tool_call>\n{\"name\": \"get_weather\", \"arguments\": {\"unit\": ";
    text += std::string(depth, '[');
    std::string name;
    on_small_stack([&] {
      try {
        name = engine->parse_message(prompt.format, text, true).tool_calls.at(0).name;
      } catch (const std::exception& e) {
        name = e.what();
      }
    });
    EXPECT_EQ(name,
              depth > 100'000 ? "The answer has too many brackets to be parsed." : "get_weather");
  }
}

TEST(EngineTools, AContinuedMessageOfAnyDepthEndsNoProcess) {
  const auto engine = engine_with_tools(32768);
  ChatRequest chat = weather_chat();
  chat.add_generation_prompt = false;
  chat.continue_final_message = true;
  chat.messages_json =
      R"([{"role":"user","content":"Weather?"},{"role":"assistant","content":"<tool_call>\n)"
      R"({\"name\": \"get_weather\", \"arguments\": {\"unit\": )" +
      std::string(20'000, '[') + "\"}]";
  const ChatPrompt prompt = engine->render_chat(chat);
  on_small_stack([&] { EXPECT_NO_THROW(engine->parse_message(prompt.format, "1", true)); });
}

TEST_F(EngineTest, APinnedPromptIsSharedByEverySalt) {
  PinRequest pin;
  pin.name = "licence";
  pin.tokens = engine->tokenize(std::string(600, 'w') + " the end", true, false);
  std::vector<double> progress;
  const PinnedPrompt p =
      engine->pin_prompt(pin, [&](double f, const std::string&) { progress.push_back(f); });
  EXPECT_EQ(p.tokens, static_cast<int32_t>(pin.tokens.size()));
  EXPECT_EQ(p.sha256.size(), 64u);
  EXPECT_EQ(p.bytes, p.tokens * engine->info().kv_bytes_per_token);
  ASSERT_FALSE(progress.empty());
  EXPECT_DOUBLE_EQ(progress.back(), 1.0);
  GenerateRequest r;
  r.prompt = pin.tokens;
  r.prompt.push_back(pin.tokens.back());
  r.max_tokens = 2;
  r.cache_salt = "someone";
  EXPECT_EQ(run(r)->usage.cached_tokens, p.tokens);
  ASSERT_EQ(engine->pinned_prompts().size(), 1u);
  EXPECT_GT(engine->set_pin_ttl(p.id, 1000).expires_at, 0);
  engine->set_pin_ttl(p.id, 1);
  for (int i = 0; i < 500 && !engine->pinned_prompts().empty(); ++i) {
    std::this_thread::sleep_for(10ms);
  }
  EXPECT_TRUE(engine->pinned_prompts().empty()) << "expired";
  EXPECT_THROW(engine->unpin(p.id), EngineError);
  pin.adapter = 1;
  EXPECT_THROW(engine->pin_prompt(pin), EngineError) << "there is none";
  pin.adapter = 0;
  pin.tokens.assign(static_cast<size_t>(engine->info().kv_cells / 2), 5);
  try {
    engine->pin_prompt(pin);
    ADD_FAILURE() << "beyond the budget";
  } catch (const EngineError& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kPinBudgetExceeded);
  }
}

TEST_F(EngineTest, ManyThreadsAtOnce) {
  const EngineStats before = engine->stats();
  std::vector<std::thread> threads;
  std::atomic<int> done = 0;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 4; ++i) {
        GenerateRequest r;
        r.prompt = engine->tokenize("thread " + std::to_string(t) + " request " + std::to_string(i),
                                    true, false);
        r.max_tokens = 6;
        r.sampling.ignore_eos = true;
        auto sink = std::make_shared<Collector>();
        const auto result = engine->submit(r, sink);
        ASSERT_TRUE(std::holds_alternative<RequestId>(result));
        if (i == 2) engine->cancel(std::get<RequestId>(result));
        sink->wait();
        if (!sink->error) ++done;
      }
    });
  }
  for (auto& t : threads) t.join();
  EXPECT_EQ(done, 32);
  const EngineStats after = engine->stats();
  EXPECT_GE(after.finished_length - before.finished_length, 24) << "known when a request ends";
  EXPECT_EQ(after.finished_length + after.finished_cancelled - before.finished_length -
                before.finished_cancelled,
            32);
}

TEST(EngineLife, AFullQueueRefusesAndDrainEmptiesIt) {
  EngineOptions options = small_options();
  options.parallel = 2;
  options.max_queue = 3;
  const auto engine = Engine::load(options);
  EXPECT_FALSE(engine->refuse_if_full(4)) << "two could run and three wait";
  ASSERT_TRUE(engine->refuse_if_full(5));
  GenerateRequest r;
  r.prompt = engine->tokenize("wait for it", true, false);
  r.max_tokens = 60;
  r.sampling.ignore_eos = true;
  std::vector<std::shared_ptr<Collector>> accepted;
  int refused = 1;  // by refuse_if_full()
  for (int i = 0; i < 12; ++i) {
    auto sink = std::make_shared<Collector>();
    const auto result = engine->submit(r, sink);
    if (const auto* refusal = std::get_if<Refusal>(&result)) {
      EXPECT_EQ(refusal->kind, ErrorKind::kQueueFull);
      EXPECT_GT(refusal->retry_after_seconds, 0);
      ++refused;
    } else {
      accepted.push_back(sink);
    }
  }
  EXPECT_GE(refused, 6) << "two run and three wait";
  EXPECT_GE(accepted.size(), 5u);
  EXPECT_EQ(engine->stats().refused, refused);
  EXPECT_TRUE(engine->drain(120s));
  for (const auto& sink : accepted) {
    sink->wait();
    EXPECT_EQ(sink->choices[0].reason, FinishReason::kLength);
  }
  const auto late = engine->submit(r, std::make_shared<Collector>());
  ASSERT_TRUE(std::holds_alternative<Refusal>(late));
  EXPECT_EQ(std::get<Refusal>(late).kind, ErrorKind::kShuttingDown);
}

// llama.cpp rounds cells up, but not what it takes in one step, and ends the process above that.
TEST(EngineLife, AStepIsNoLargerThanTheCellsAskedFor) {
  EngineOptions options = small_options();
  options.kv_cells = 300;
  options.batch_tokens = 2048;
  options.step_seconds = 0;
  const auto engine = Engine::load(options);
  GenerateRequest r;
  r.prompt.assign(400, engine->tokenize("x", false, false).at(0));
  r.max_tokens = 2;
  auto sink = std::make_shared<Collector>();
  ASSERT_TRUE(std::holds_alternative<RequestId>(engine->submit(r, sink)));
  sink->wait();
  EXPECT_EQ(sink->choices[0].reason, FinishReason::kLength);
}

TEST(EngineLife, StopCancelsWhatRuns) {
  const auto engine = Engine::load(small_options());
  GenerateRequest r;
  r.prompt = engine->tokenize("never ending", true, false);
  r.max_tokens = 1500;
  r.sampling.ignore_eos = true;
  auto sink = std::make_shared<Collector>();
  ASSERT_TRUE(std::holds_alternative<RequestId>(engine->submit(r, sink)));
  sink->wait_for_tokens(2);
  EXPECT_FALSE(engine->drain(1ms));
  engine->stop();
  sink->wait();
  EXPECT_EQ(sink->choices[0].reason, FinishReason::kCancelled);
  EXPECT_THROW(engine->unpin("cp_x"), EngineError);
  engine->stop();
}

// Cancelling is a message to the engine thread, and no step.
TEST(EngineLife, AnExceptionBetweenStepsFailsWhatRunsAndNothingElse) {
  class Throws : public Collector {
   public:
    void on_choice_finish(int32_t, FinishReason, const std::string&) override {
      throw std::runtime_error("no room");
    }
  };
  const auto engine = Engine::load(small_options());
  GenerateRequest r;
  r.prompt = engine->tokenize("never ending", true, false);
  r.max_tokens = 1500;
  r.sampling.ignore_eos = true;
  const auto bystander = std::make_shared<Collector>();
  ASSERT_TRUE(std::holds_alternative<RequestId>(engine->submit(r, bystander)));
  const auto broken = std::make_shared<Throws>();
  const SubmitResult id = engine->submit(r, broken);
  ASSERT_TRUE(std::holds_alternative<RequestId>(id));
  broken->wait_for_tokens(1);
  engine->cancel(std::get<RequestId>(id));
  for (const auto& sink : {bystander, std::shared_ptr<Collector>(broken)}) {
    sink->wait();
    EXPECT_EQ(sink->error, ErrorKind::kInternal);
    EXPECT_NE(sink->error_message.find("no room"), std::string::npos) << sink->error_message;
  }
  r.max_tokens = 3;
  const auto next = std::make_shared<Collector>();
  ASSERT_TRUE(std::holds_alternative<RequestId>(engine->submit(r, next)));
  next->wait();
  EXPECT_EQ(next->choices[0].tokens.size(), 3u);
  EXPECT_EQ(engine->stats().running, 0);

  // One that is still there when the engine stops.
  r.max_tokens = 1500;
  const auto last = std::make_shared<Throws>();
  ASSERT_TRUE(std::holds_alternative<RequestId>(engine->submit(r, last)));
  last->wait_for_tokens(1);
  engine->stop();
  last->wait();
  EXPECT_EQ(last->error, ErrorKind::kInternal);
}

TEST(EngineLife, WrongOptionsAndFilesAreErrors) {
  const auto kind = [](const EngineOptions& o) {
    try {
      Engine::load(o);
    } catch (const EngineError& e) {
      EXPECT_STRNE(e.what(), "");
      return e.kind();
    }
    ADD_FAILURE() << "loaded";
    return ErrorKind::kInternal;
  };
  EngineOptions o = small_options();
  o.model_path = "/nonexistent.gguf";
  EXPECT_EQ(kind(o), ErrorKind::kModel);
  o = small_options();
  o.parallel = 0;
  EXPECT_EQ(kind(o), ErrorKind::kInvalidRequest);
  o = small_options();
  o.chat_template_file = "/nonexistent.jinja";
  EXPECT_EQ(kind(o), ErrorKind::kInvalidRequest);
}

}  // namespace
}  // namespace relay::engine
