#include "server/generation.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <map>
#include <set>
#include <thread>

#include "server/event_queue.h"
#include "server/event_reader.h"
#include "server/fake_engine.h"
#include "server/json.h"
#include "server/metrics.h"
#include "server/responses.h"

namespace relay::server {
namespace {

/// Counts the wakes and waits for them.
struct Bell {
  std::mutex mutex;
  std::condition_variable rung;
  int count = 0;
  std::function<void()> ringer() {
    return [this] {
      const std::lock_guard lock(mutex);
      ++count;
      rung.notify_all();
    };
  }
  void wait(int seen) {
    std::unique_lock lock(mutex);
    ASSERT_TRUE(rung.wait_for(lock, std::chrono::seconds(10), [&] { return count > seen; }));
  }
};

struct Fixture {
  explicit Fixture(FakeScript script) : engine(std::make_shared<FakeEngine>(std::move(script))) {}
  ~Fixture() { engine->stop(); }

  GenerationContext context() {
    GenerationContext context;
    context.engine = engine;
    context.model = "m";
    context.fingerprint = "fp";
    context.caller_salt = salt;
    context.max_queued_bytes = max_queued_bytes;
    context.max_prompt_logprobs = 20;
    context.wake = bell.ringer();
    return context;
  }
  RequestLimits limits() const {
    RequestLimits limits;
    limits.vocab_size = 256;
    return limits;
  }
  std::unique_ptr<Generation> chat(const std::string& fields) {
    return Generation::start(
        parse_chat_completion(R"({"messages":[{"role":"user","content":"hi"}])" + fields + "}",
                              limits()),
        context());
  }
  std::unique_ptr<Generation> text(const std::string& body) {
    return Generation::start(parse_completion(body, limits()), context());
  }
  Generation::State finish(Generation& generation, std::string& frames) {
    for (;;) {
      int seen = 0;
      {
        const std::lock_guard lock(bell.mutex);
        seen = bell.count;
      }
      const Generation::State state = generation.advance(frames);
      if (state != Generation::State::kRunning) return state;
      bell.wait(seen);
      if (testing::Test::HasFatalFailure()) return Generation::State::kFailed;
    }
  }
  Json whole(Generation& generation) {
    std::string frames;
    EXPECT_EQ(finish(generation, frames), Generation::State::kDone);
    EXPECT_EQ(frames, "");
    return Json::parse(generation.body());
  }

  Bell bell;
  std::string salt;
  size_t max_queued_bytes = 1 << 20;
  std::shared_ptr<FakeEngine> engine;
};

/// The JSON of each `data:` frame; checks the framing, and that [DONE] comes once, at the end.
std::vector<Json> split(const std::string& frames, bool done = true) {
  std::vector<Json> chunks;
  size_t at = 0;
  bool ended = false;
  while (at < frames.size()) {
    const size_t end = frames.find("\n\n", at);
    EXPECT_NE(end, std::string::npos);
    const std::string frame = frames.substr(at, end - at);
    EXPECT_EQ(frame.rfind("data: ", 0), 0u) << frame;
    EXPECT_FALSE(ended);
    if (frame == "data: [DONE]") {
      ended = true;
    } else {
      chunks.push_back(Json::parse(frame.substr(6)));
    }
    at = end + 2;
  }
  EXPECT_EQ(ended, done);
  return chunks;
}

std::string joined_content(const std::vector<Json>& chunks) {
  std::string text;
  for (const Json& chunk : chunks) {
    for (const Json& choice : chunk["choices"]) {
      if (choice["delta"].contains("content") && choice["delta"]["content"].is_string()) {
        text += choice["delta"]["content"].get<std::string>();
      }
    }
  }
  return text;
}

TEST(Generation, WholeChat) {
  Fixture fixture({});
  const auto generation = fixture.chat("");
  const Json body = fixture.whole(*generation);
  EXPECT_EQ(body["object"], "chat.completion");
  EXPECT_EQ(body["model"], "m");
  EXPECT_EQ(body["system_fingerprint"], "fp");
  EXPECT_EQ(body["id"].get<std::string>().rfind("chatcmpl-", 0), 0u);
  const Json& choice = body["choices"][0];
  EXPECT_EQ(choice["message"]["role"], "assistant");
  EXPECT_EQ(choice["message"]["content"], "Hello, world!");
  EXPECT_EQ(choice["finish_reason"], "stop");
  EXPECT_TRUE(choice["logprobs"].is_null());
  EXPECT_EQ(body["usage"]["completion_tokens"], 4);
  EXPECT_EQ(body["usage"]["prompt_tokens_details"]["cached_tokens"], 3);
  EXPECT_EQ(body["usage"]["prompt_tokens_details"]["cache_write_tokens"], 0);
  EXPECT_EQ(body["usage"]["total_tokens"], body["usage"]["prompt_tokens"].get<int>() + 4);
}

TEST(Generation, StreamedChat) {
  Fixture fixture({});
  const auto generation = fixture.chat(R"(,"stream":true)");
  std::string frames;
  ASSERT_EQ(fixture.finish(*generation, frames), Generation::State::kDone);
  const std::vector<Json> chunks = split(frames);
  ASSERT_EQ(chunks.size(), 5u);  // one for each token, one with the reason
  EXPECT_EQ(joined_content(chunks), "Hello, world!");
  EXPECT_EQ(chunks[0]["choices"][0]["delta"],
            Json::parse(R"({"role":"assistant","content":"Hello"})"));
  EXPECT_FALSE(chunks[1]["choices"][0]["delta"].contains("role"));
  EXPECT_EQ(chunks[4]["choices"][0]["delta"], Json::object());
  EXPECT_EQ(chunks[4]["choices"][0]["finish_reason"], "stop");
  for (size_t i = 0; i < 4; ++i) EXPECT_TRUE(chunks[i]["choices"][0]["finish_reason"].is_null());
  for (const Json& chunk : chunks) {
    EXPECT_EQ(chunk["object"], "chat.completion.chunk");
    EXPECT_EQ(chunk["id"], chunks[0]["id"]);
    EXPECT_FALSE(chunk.contains("usage"));
  }
}

TEST(Generation, StreamUsage) {
  Fixture fixture({});
  const auto generation = fixture.chat(R"(,"stream":true,"stream_options":{"include_usage":true})");
  std::string frames;
  fixture.finish(*generation, frames);
  const std::vector<Json> chunks = split(frames);
  for (size_t i = 0; i + 1 < chunks.size(); ++i) EXPECT_TRUE(chunks[i]["usage"].is_null());
  EXPECT_EQ(chunks.back()["choices"], Json::array());
  EXPECT_EQ(chunks.back()["usage"]["completion_tokens"], 4);
  EXPECT_EQ(chunks.back()["usage"]["prompt_tokens_details"]["cached_tokens"], 3);

  const auto continuous = fixture.chat(
      R"(,"stream":true,"stream_options":{"include_usage":true,"continuous_usage_stats":true})");
  frames.clear();
  fixture.finish(*continuous, frames);
  EXPECT_EQ(split(frames)[1]["usage"]["completion_tokens"], 2);
}

TEST(Generation, TextHeldBackSendsTheRoleOnceAndKeepsLogprobs) {
  FakeScript script;
  script.pieces = {"", "\xe2\x82\xac", "", ""};
  Fixture fixture(script);
  const auto generation = fixture.chat(R"(,"stream":true,"logprobs":true)");
  std::string frames;
  fixture.finish(*generation, frames);
  const std::vector<Json> chunks = split(frames);
  ASSERT_EQ(chunks.size(), 3u);
  EXPECT_EQ(chunks[0]["choices"][0]["delta"]["content"], "");
  EXPECT_EQ(joined_content(chunks), "\xe2\x82\xac");
  size_t logprobs = 0;
  for (const Json& chunk : chunks) {
    const Json& field = chunk["choices"][0]["logprobs"];
    if (!field.is_null()) logprobs += field["content"].size();
  }
  EXPECT_EQ(logprobs, 4u);
}

TEST(Generation, Logprobs) {
  Fixture fixture({});
  const Json body = fixture.whole(*fixture.chat(R"(,"logprobs":true,"top_logprobs":2)"));
  const Json& content = body["choices"][0]["logprobs"]["content"];
  ASSERT_EQ(content.size(), 4u);
  EXPECT_EQ(content[0]["token"], "Hello");
  EXPECT_EQ(content[0]["bytes"], Json::parse("[72,101,108,108,111]"));
  EXPECT_EQ(content[0]["logprob"], -0.5);
  EXPECT_EQ(content[0]["top_logprobs"].size(), 2u);

  const Json legacy = fixture.whole(*fixture.text(R"({"prompt":"p","logprobs":1})"));
  const Json& lists = legacy["choices"][0]["logprobs"];
  EXPECT_EQ(lists["tokens"], Json::parse(R"(["Hello",", ","world","!"])"));
  EXPECT_EQ(lists["text_offset"], Json::parse("[0,5,7,12]"));
  EXPECT_EQ(lists["token_logprobs"].size(), 4u);
  EXPECT_EQ(lists["top_logprobs"][0]["B"], -1.0);
}

TEST(Generation, PartialCharactersInLogprobs) {
  int64_t offset = 0;
  const std::vector<engine::GeneratedToken> tokens = {{{1, "\xe2\x82", -1.0f}, {}},
                                                      {{2, "\xac", -INFINITY}, {}}};
  const Json legacy = completion_logprobs(tokens, false, offset);
  EXPECT_EQ(legacy["tokens"], Json::parse(R"(["bytes:\\xe2\\x82","bytes:\\xac"])"));
  EXPECT_EQ(legacy["token_logprobs"][1], -9999.0);
  EXPECT_EQ(offset, 1);
  const Json chat = chat_logprobs(tokens);
  EXPECT_EQ(chat["content"][0]["bytes"], Json::parse("[226,130]"));
  EXPECT_NO_THROW(Json::parse(dump(chat)));
}

TEST(Generation, SeveralPromptsAndChoices) {
  Fixture fixture({});
  const auto generation = fixture.text(R"({"prompt":["a","bc"],"n":2,"echo":true})");
  const Json body = fixture.whole(*generation);
  ASSERT_EQ(body["choices"].size(), 4u);
  EXPECT_EQ(body["object"], "text_completion");
  EXPECT_EQ(body["choices"][3]["index"], 3);
  EXPECT_EQ(body["choices"][1]["text"], "aHello, world!");
  EXPECT_EQ(body["choices"][2]["text"], "bcHello, world!");
  EXPECT_EQ(body["usage"]["prompt_tokens"], 3);
  EXPECT_EQ(body["usage"]["completion_tokens"], 16);
}

TEST(Generation, StreamedChoicesOfSeveralPromptsAreNumberedThrough) {
  Fixture fixture({});
  const auto generation = fixture.text(R"({"prompt":["a","bc"],"n":2,"stream":true})");
  std::string frames;
  fixture.finish(*generation, frames);
  std::set<int> numbers;
  for (const Json& chunk : split(frames)) {
    for (const Json& choice : chunk["choices"]) numbers.insert(choice["index"].get<int>());
  }
  EXPECT_EQ(numbers, (std::set<int>{0, 1, 2, 3}));
}

TEST(EventQueue, WakesOnceUntilItIsEmptiedAndAgainWhenItOverflows) {
  int woken = 0;
  EventQueue queue(100, [&] { ++woken; });
  queue.push({}, 40);
  queue.push({}, 40);
  EXPECT_EQ(woken, 1);
  std::vector<Event> events;
  queue.take(events);
  EXPECT_EQ(events.size(), 2u);
  queue.push({}, 60);
  EXPECT_EQ(woken, 2);
  EXPECT_FALSE(queue.overflowed()) << "what was taken has made room";
  queue.push({}, 60);
  EXPECT_TRUE(queue.overflowed());
  EXPECT_EQ(woken, 3) << "a reader that waits for room must hear of it";
}

TEST(Generation, StreamedTextWithEcho) {
  Fixture fixture({});
  const auto generation = fixture.text(R"({"prompt":[104,105],"stream":true,"echo":true})");
  std::string frames;
  fixture.finish(*generation, frames);
  const std::vector<Json> chunks = split(frames);
  EXPECT_EQ(chunks[0]["choices"][0]["text"], "hiHello");
  EXPECT_EQ(chunks.back()["choices"][0]["text"], "");
  EXPECT_EQ(chunks.back()["choices"][0]["finish_reason"], "stop");
}

TEST(Generation, EchoWithLogprobsScoresThePrompt) {
  Fixture fixture({});
  const auto generation =
      fixture.text(R"({"prompt":"abc","echo":true,"logprobs":1,"max_tokens":0})");
  const Json body = fixture.whole(*generation);
  const Json& choice = body["choices"][0];
  EXPECT_EQ(choice["text"], "abc");
  EXPECT_EQ(choice["finish_reason"], "length");
  EXPECT_EQ(choice["logprobs"]["tokens"], (Json{"a", "b", "c"}));
  EXPECT_EQ(choice["logprobs"]["token_logprobs"], (Json{nullptr, -0.25, -0.25}));
  EXPECT_EQ(choice["logprobs"]["text_offset"], (Json{0, 1, 2}));
  EXPECT_EQ(choice["logprobs"]["top_logprobs"],
            (Json{nullptr, {{"?", -2.0}, {"b", -0.25}}, {{"?", -2.0}, {"c", -0.25}}}));
  EXPECT_EQ(body["usage"]["completion_tokens"], 0);
}

TEST(Generation, StreamedEchoSendsThePromptsLogprobsWithTheFirstToken) {
  Fixture fixture({});
  std::string frames;
  fixture.finish(
      *fixture.text(R"({"prompt":"ab","echo":true,"logprobs":0,"stream":true,"max_tokens":1})"),
      frames);
  const std::vector<Json> chunks = split(frames);
  const Json& first = chunks[0]["choices"][0];
  EXPECT_EQ(first["text"], "abHello");
  EXPECT_EQ(first["logprobs"]["token_logprobs"], (Json{nullptr, -0.25, -0.5}));
  EXPECT_EQ(first["logprobs"]["text_offset"], (Json{0, 1, 2}));
}

TEST(Generation, PromptLogprobsOfARequestAreBounded) {
  Fixture fixture({});
  EXPECT_THROW(fixture.text(R"({"prompt":["abcd","abcd"],"echo":true,"logprobs":2})"), ApiError);
  EXPECT_TRUE(fixture.engine->drain(std::chrono::seconds(5))) << "nothing of it is left running";
}

TEST(Generation, Length) {
  Fixture fixture({});
  const Json body = fixture.whole(*fixture.chat(R"(,"max_tokens":2)"));
  EXPECT_EQ(body["choices"][0]["finish_reason"], "length");
  EXPECT_EQ(body["choices"][0]["message"]["content"], "Hello, ");
}

FakeScript tool_script() {
  FakeScript script;
  script.has_format = true;
  script.pieces = {"CALL ", "weather ", "{\"city\":", "\"Ulm\"}"};
  return script;
}

TEST(Generation, ToolCall) {
  Fixture fixture(tool_script());
  const Json body = fixture.whole(
      *fixture.chat(R"(,"tools":[{"type":"function","function":{"name":"weather"}}])"));
  const Json& choice = body["choices"][0];
  EXPECT_EQ(choice["finish_reason"], "tool_calls");
  EXPECT_TRUE(choice["message"]["content"].is_null());
  const Json& call = choice["message"]["tool_calls"][0];
  EXPECT_EQ(call["function"]["name"], "weather");
  EXPECT_EQ(call["function"]["arguments"], R"({"city":"Ulm"})");
  EXPECT_EQ(call["id"].get<std::string>().rfind("call_", 0), 0u);
}

// The whole text is read at each step, so a reader that is behind must not take them one by one.
TEST(Generation, ABacklogIsReadAtOnce) {
  FakeScript script;
  script.has_format = true;
  script.pieces.assign(1000, "ab");
  Fixture fixture(script);
  const auto generation = fixture.chat(R"(,"stream":true,"n":2)");
  while (fixture.engine->running > 0) std::this_thread::yield();
  std::string frames;
  ASSERT_EQ(fixture.finish(*generation, frames), Generation::State::kDone);
  EXPECT_EQ(fixture.engine->parses, 4) << "once for the tokens and once for the end, of each";
  std::map<int, std::string> texts;
  for (const Json& chunk : split(frames)) {
    const Json& choice = chunk["choices"][0];
    texts[choice["index"]] += choice["delta"].value("content", "");
  }
  std::string whole;
  for (int i = 0; i < 1000; ++i) whole += "ab";
  EXPECT_EQ(texts, (std::map<int, std::string>{{0, whole}, {1, whole}}));
}

TEST(Generation, StreamedToolCall) {
  Fixture fixture(tool_script());
  const auto generation = fixture.chat(R"(,"stream":true)");
  std::string frames;
  fixture.finish(*generation, frames);
  std::string arguments;
  int names = 0;
  int roles = 0;
  const std::vector<Json> chunks = split(frames);
  for (const Json& chunk : chunks) {
    const Json& delta = chunk["choices"][0]["delta"];
    roles += delta.contains("role");
    if (!delta.contains("tool_calls")) continue;
    const Json& call = delta["tool_calls"][0];
    EXPECT_EQ(call["index"], 0);
    if (call["function"].contains("name")) {
      ++names;
      EXPECT_EQ(call["id"].get<std::string>().rfind("call_", 0), 0u);
    }
    arguments += call["function"]["arguments"].get<std::string>();
  }
  EXPECT_EQ(roles, 1);
  EXPECT_EQ(names, 1);
  EXPECT_EQ(arguments, R"({"city":"Ulm"})");
  EXPECT_EQ(chunks.back()["choices"][0]["finish_reason"], "tool_calls");
}

/// Status and code of what start() throws.
template <typename Start>
std::pair<int, std::string> refusal(Start start) {
  try {
    start();
  } catch (const ApiError& error) {
    return {error.status(), error.code()};
  }
  return {200, ""};
}

TEST(Generation, Refusals) {
  FakeScript script;
  script.max_requests = 1;
  script.endless = true;
  script.step = std::chrono::milliseconds(1);
  Fixture fixture(script);
  try {
    fixture.chat(R"(,"max_tokens":990)");
    FAIL();
  } catch (const ApiError& error) {
    EXPECT_EQ(error.code(), "context_length_exceeded");
    EXPECT_EQ(error.param(), "messages");
    EXPECT_NE(std::string(error.what()).find("1000 tokens"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("990"), std::string::npos);
  }
  EXPECT_EQ(refusal([&] {
              fixture.text(R"({"prompt":"p","response_format":{"type":"json_schema",
                             "json_schema":{"schema":{"type":"bad"}}}})");
            }),
            std::make_pair(400, std::string("invalid_grammar")));
  EXPECT_EQ(refusal([&] {
              Generation::start(parse_chat_completion(
                                    R"({"messages":[{"role":"user","content":"untemplatable"}]})",
                                    fixture.limits()),
                                fixture.context());
            }),
            std::make_pair(400, std::string("invalid_chat_template")));
  const auto schema_error = [&](const std::string& fields) {
    try {
      fixture.chat(fields);
    } catch (const ApiError& error) {
      return std::make_pair(error.code(), error.param());
    }
    return std::make_pair(std::string("none"), std::string());
  };
  const std::string code = "invalid_grammar";
  EXPECT_EQ(schema_error(R"(,"response_format":{"type":"json_schema",
                             "json_schema":{"schema":{"type":"bad"}}})"),
            std::make_pair(code, std::string("response_format.json_schema.schema")));
  EXPECT_EQ(schema_error(R"(,"response_format":{"type":"json_object","schema":{"type":"bad"}})"),
            std::make_pair(code, std::string("response_format.schema")));
  EXPECT_EQ(schema_error(R"(,"json_schema":{"type":"bad"})"),
            std::make_pair(code, std::string("json_schema")));
  // The second of two prompts does not fit: the first one must not be left running.
  EXPECT_EQ(refusal([&] { fixture.text(R"({"prompt":["a","b"]})"); }),
            std::make_pair(429, std::string("rate_limit_exceeded")));
  EXPECT_TRUE(fixture.engine->drain(std::chrono::seconds(5)));
  EXPECT_EQ(fixture.engine->cancelled, 1);
}

TEST(Generation, FailureInMidStream) {
  FakeScript script;
  script.fail_after = 2;
  Fixture fixture(script);
  const auto generation = fixture.chat(R"(,"stream":true)");
  std::string frames;
  EXPECT_EQ(fixture.finish(*generation, frames), Generation::State::kFailed);
  EXPECT_EQ(generation->error().status(), 500);
  EXPECT_EQ(split(frames, /*done=*/false).size(), 2u);
}

TEST(Generation, GivingUpCancels) {
  FakeScript script;
  script.endless = true;
  script.step = std::chrono::milliseconds(1);
  Fixture fixture(script);
  {
    const auto generation = fixture.chat(R"(,"stream":true)");
    std::string frames;
    fixture.bell.wait(0);
    generation->advance(frames);
    EXPECT_EQ(fixture.engine->running, 1);
  }
  EXPECT_TRUE(fixture.engine->drain(std::chrono::seconds(5)));
  EXPECT_EQ(fixture.engine->cancelled, 1);
}

TEST(Generation, EngineStoppingIsAnError) {
  FakeScript script;
  script.endless = true;
  script.step = std::chrono::milliseconds(1);
  Fixture fixture(script);
  const auto generation = fixture.chat("");
  fixture.engine->stop();
  std::string frames;
  EXPECT_EQ(fixture.finish(*generation, frames), Generation::State::kFailed);
  EXPECT_EQ(generation->error().status(), 503);
}

TEST(Generation, SlowReaderOverflows) {
  FakeScript script;
  script.endless = true;
  Fixture fixture(script);
  fixture.max_queued_bytes = 10000;
  const auto generation = fixture.chat(R"(,"stream":true)");
  const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  while (!generation->overflowed() && std::chrono::steady_clock::now() < until) {
    std::this_thread::yield();
  }
  EXPECT_TRUE(generation->overflowed());
}

TEST(Generation, ResponsesCountTheTokensOfThoughts) {
  FakeScript script;
  script.has_format = true;
  script.pieces = {"THINK h", "mm", "|Hel", "lo"};  // the fake's text has a token for each byte
  Fixture fixture(script);
  for (const char* stream : {"false", "true"}) {
    ResponsesRequest request =
        parse_responses(R"({"input":"hi","stream":)" + std::string(stream) + "}", fixture.limits());
    const auto generation = Generation::start(
        std::move(request.chat), fixture.context(), [&](const ResponseHead& head) {
          return make_responses_writer(head, std::move(request.echo));
        });
    std::string frames;
    ASSERT_EQ(fixture.finish(*generation, frames), Generation::State::kDone);
    const Json response = generation->stream() ? read_events(frames).back()["response"]
                                               : Json::parse(generation->body());
    EXPECT_EQ(response["output"][1]["content"][0]["text"], "Hello");
    EXPECT_EQ(response["usage"]["output_tokens"], 4);
    EXPECT_EQ(response["usage"]["output_tokens_details"]["reasoning_tokens"], 3);
  }
}

TEST(Generation, Salts) {
  Fixture fixture({});
  fixture.salt = "key#1";
  fixture.whole(*fixture.chat(""));
  EXPECT_EQ(fixture.engine->last_request().cache_salt, "key#1");
  EXPECT_EQ(fixture.engine->last_request().pin_salt, "");
  const auto salt_of = [&](const std::string& key, const std::string& field) {
    fixture.salt = key;
    fixture.whole(*fixture.chat(R"(,"cache_salt":")" + field + '"'));
    EXPECT_EQ(fixture.engine->last_request().pin_salt, pin_salt(field)) << "whatever the key";
    return fixture.engine->last_request().cache_salt;
  };
  // A client's salt divides what its key has, and leads into nobody else's.
  const std::set<std::string> salts{"",
                                    "key#0",
                                    "key#1",
                                    salt_of("", "a"),
                                    salt_of("key#0", "a"),
                                    salt_of("key#1", "a"),
                                    salt_of("key#1", "b"),
                                    salt_of("", "key#1"),
                                    salt_of("key#0", "key#1"),
                                    pin_salt("a"),
                                    pin_salt("b")};
  EXPECT_EQ(salts.size(), 11u);
}

TEST(Metrics, NamesAndLabels) {
  FakeEngine engine({});
  Metrics metrics("m");
  metrics.on_first_token(0.1);
  engine::RequestTimings timings;
  timings.total = 2;
  metrics.on_request_end(engine::FinishReason::kStop, {}, timings);
  metrics.on_request_end(engine::FinishReason::kCancelled, {}, timings);
  const std::string text = metrics.render(&engine, /*sharing=*/true);
  for (const char* line :
       {R"(vllm:kv_cache_usage_perc{model_name="m",engine="0"} 0.25)",
        R"(vllm:num_requests_running{model_name="m",engine="0"} 0)",
        R"(vllm:request_success_total{model_name="m",engine="0",finished_reason="stop"} 0)",
        R"(relay:kv_bytes_read_total{model_name="m",engine="0",kind="shared"} 50)",
        "# TYPE vllm:prefix_cache_hits_total counter", "# TYPE vllm:num_requests_waiting gauge",
        "# TYPE vllm:time_to_first_token_seconds histogram"}) {
    EXPECT_NE(text.find(line), std::string::npos) << line << "\n" << text;
  }
  EXPECT_NE(text.find("vllm:e2e_request_latency_seconds_count"), std::string::npos);
  EXPECT_EQ(metrics.render(nullptr, true).find("vllm:kv_cache_usage_perc"), std::string::npos);
}

}  // namespace
}  // namespace relay::server
