#include "server/anthropic.h"

#include <gtest/gtest.h>

#include "server/event_reader.h"
#include "server/test_deltas.h"

namespace relay::server {
namespace {

const RequestLimits kLimits{.vocab_size = 100};

std::string request_text(const std::string& messages, const std::string& more = "") {
  return R"({"model":"m","max_tokens":9,"messages":)" + messages + more + "}";
}
MessagesRequest parse(const std::string& messages, const std::string& more = "") {
  return parse_messages(request_text(messages, more), kLimits);
}
Json chat_of(const std::string& messages, const std::string& more = "") {
  return Json::parse(parse(messages, more).chat.chat.messages_json);
}
std::string refusal(const std::string& messages, const std::string& more = "") {
  try {
    parse(messages, more);
  } catch (const ApiError& error) {
    return error.param() + "/" + error.code();
  }
  return "accepted";
}
constexpr const char* kHi = R"([{"role":"user","content":"hi"}])";

TEST(Messages, TextBecomesAChat) {
  const MessagesRequest request = parse(
      kHi, R"(,"system":[{"type":"text","text":"Be kind.","cache_control":{"type":"ephemeral"}}],
             "stop_sequences":["END"],"temperature":0.5,"top_k":7,"top_p":0.25,"stream":true)");
  EXPECT_EQ(Json::parse(request.chat.chat.messages_json),
            Json::parse(R"([{"role":"system","content":"Be kind."},
                            {"role":"user","content":"hi"}])"));
  EXPECT_TRUE(request.caches);
  EXPECT_TRUE(request.chat.common.stream);
  EXPECT_EQ(request.chat.common.generate.max_tokens, 9);
  EXPECT_EQ(request.chat.common.generate.stop, (std::vector<std::string>{"END"}));
  EXPECT_FLOAT_EQ(request.chat.common.generate.sampling.temperature, 0.5f);
  EXPECT_EQ(request.chat.common.generate.sampling.top_k, 7);
}

TEST(Messages, ToolsAndTheirResults) {
  const std::string messages = R"([{"role":"user","content":"weather?"},
    {"role":"assistant","content":[{"type":"thinking","thinking":"hm","signature":"s"},
      {"type":"text","text":"I look."},
      {"type":"tool_use","id":"t1","name":"weather","input":{"city":"Ulm"}}]},
    {"role":"user","content":[
      {"type":"tool_result","tool_use_id":"t1","content":[{"type":"text","text":"no station"}],
       "is_error":true},
      {"type":"text","text":"And now?"}]},
    {"role":"user","content":"Please."}])";
  const Json chat = chat_of(messages);
  ASSERT_EQ(chat.size(), 4u);
  EXPECT_EQ(chat[1]["content"], "I look.");
  EXPECT_EQ(chat[1]["reasoning_content"], "hm");
  EXPECT_EQ(chat[1]["tool_calls"][0]["function"]["arguments"], R"({"city":"Ulm"})");
  EXPECT_EQ(chat[2]["role"], "tool");
  EXPECT_EQ(chat[2]["content"], "Error: no station");
  EXPECT_EQ(chat[3]["content"].size(), 2u) << "messages of the user in a row are one";

  const MessagesRequest chosen =
      parse(kHi, R"(,"tools":[{"name":"weather","input_schema":{"type":"object"}}],
                     "tool_choice":{"type":"any","disable_parallel_tool_use":true})");
  EXPECT_EQ(chosen.chat.chat.tool_choice, "required");
  EXPECT_FALSE(chosen.chat.chat.parallel_tool_calls);
  EXPECT_EQ(Json::parse(chosen.chat.chat.tools_json)[0]["function"]["name"], "weather");
}

TEST(Messages, AnAnswerBegunIsContinued) {
  EXPECT_TRUE(parse(R"([{"role":"user","content":"a"},{"role":"assistant","content":"Once"}])")
                  .chat.chat.continue_final_message);
  EXPECT_FALSE(parse(kHi).chat.chat.continue_final_message);
}

TEST(Messages, SchemasNameTheirPlace) {
  const MessagesRequest request = parse(
      kHi, R"(,"output_config":{"format":{"type":"json_schema","schema":{"type":"object"}}})");
  EXPECT_EQ(request.chat.chat.json_schema, R"({"type":"object"})");
  EXPECT_EQ(request.chat.common.schema_param, "output_config.format.schema");
}

TEST(Messages, RefusesByItsOwnNames) {
  EXPECT_EQ(refusal("[]"), "messages/invalid_value");
  EXPECT_EQ(refusal(R"([{"role":"system","content":"x"}])"), "messages[0].role/invalid_value");
  EXPECT_EQ(refusal(R"([{"role":"user","content":7}])"), "messages[0].content/invalid_type");
  EXPECT_EQ(refusal(R"([{"role":"user","content":[]}])"), "messages[0].content/invalid_value");
  EXPECT_EQ(refusal(R"([{"role":"user","content":[]}])", R"(,"system":"Be kind.")"),
            "messages[0].content/invalid_value");
  EXPECT_EQ(refusal(R"([{"role":"user","content":[{"type":"image"}]}])"),
            "messages[0].content[0].type/unsupported_parameter");
  EXPECT_EQ(refusal(R"([{"role":"user","content":[{"type":"text","text":"a"},
                         {"type":"tool_result","tool_use_id":"t"}]}])"),
            "messages[0].content[1].type/invalid_value");
  EXPECT_EQ(refusal(kHi, R"(,"temperature":1.5)"), "temperature/invalid_value");
  EXPECT_EQ(refusal(kHi, R"(,"stop_sequences":[""])"), "stop_sequences[0]/invalid_value");
  EXPECT_EQ(refusal(kHi, R"(,"mcp_servers":[{}])"), "mcp_servers/unsupported_parameter");
  EXPECT_EQ(
      refusal(kHi, R"(,"context_management":{"edits":[{"type":"clear_tool_uses_20250919"}]})"),
      "context_management.edits[0].type/unsupported_parameter");
  EXPECT_EQ(refusal(kHi, R"(,"context_management":{"edits":[
                               {"type":"clear_thinking_20251015","keep":{"value":1}}]})"),
            "context_management.edits[0].type/unsupported_parameter");
  EXPECT_EQ(refusal(kHi, R"(,"tools":[{"type":"web_search_20250305","name":"w"}])"),
            "tools[0].type/unsupported_parameter");
  EXPECT_EQ(refusal(kHi, R"(,"tools":[{"name":"w"}])"),
            "tools[0].input_schema/missing_required_parameter");
  EXPECT_EQ(refusal(kHi, R"(,"tool_choice":{"type":"tool","name":"w"})"),
            "tool_choice/invalid_value");
  EXPECT_EQ(refusal(kHi, R"(,"cache_control":{"type":"forever"})"),
            "cache_control.type/invalid_value");
  EXPECT_THROW(parse_messages(R"({"messages":[{"role":"user","content":"a"}]})", kLimits), ApiError)
      << "max_tokens is required";
  EXPECT_NO_THROW(parse_count_tokens(R"({"messages":[{"role":"user","content":"a"}]})", kLimits));
}

TEST(Messages, WhatTheApiLacksIsKeptOrRefused) {
  const MessagesRequest request =
      parse(kHi, R"(,"chat_template_kwargs":{"a":1},"thinking":{"type":"disabled"},"min_p":0.5,
             "presence_penalty":0.25,"n":1,"stop":null,"logprobs":false,
             "output_format":{"type":"json_schema","schema":{"type":"object"}})");
  EXPECT_EQ(request.chat.chat.template_kwargs_json, R"({"a":1,"enable_thinking":false})");
  EXPECT_FLOAT_EQ(request.chat.common.generate.sampling.min_p, 0.5f);
  EXPECT_FLOAT_EQ(request.chat.common.generate.sampling.presence_penalty, 0.25f);
  EXPECT_EQ(request.chat.chat.json_schema, R"({"type":"object"})");
  EXPECT_EQ(request.chat.common.schema_param, "output_format.schema");
  for (const std::string name : {"grammar", "guided_json", "json_schema", "logprobs", "min_tokens",
                                 "n", "response_format", "stop", "structured_outputs"}) {
    const std::string field = ",\"" + name + "\":7";
    EXPECT_EQ(refusal(kHi, field), name + "/unsupported_parameter");
    EXPECT_THROW(parse_count_tokens(request_text(kHi, field), kLimits), ApiError) << name;
  }
  EXPECT_EQ(refusal(kHi, R"(,"chat_template_kwargs":5,"thinking":{"type":"enabled"})"),
            "chat_template_kwargs/invalid_type");
  EXPECT_EQ(refusal(kHi, R"(,"output_format":{"type":"xml"})"), "output_format.type/invalid_value");
}

TEST(Messages, ErrorsInAnthropicsForm) {
  const Json body = Json::parse(invalid_request("messages", "It is wrong.").anthropic_body());
  EXPECT_EQ(body, Json::parse(R"({"type":"error","error":{"type":"invalid_request_error",
                                  "message":"messages: It is wrong."}})"));
  const ApiError full(429, "rate_limit_error", "rate_limit_exceeded", "full");
  EXPECT_EQ(Json::parse(full.anthropic_body())["error"]["type"], "rate_limit_error");
}

engine::Usage usage() {
  return {.prompt_tokens = 10, .completion_tokens = 4, .cached_tokens = 6, .cache_write_tokens = 4};
}

TEST(MessagesWriter, StreamsBlocks) {
  const auto writer = make_messages_writer(head(), false);
  std::string frames;
  writer->delta({}, usage(), frames);  // a token without text yet
  engine::ChatDelta thought;
  thought.reasoning = "hm";
  writer->delta(thought, usage(), frames);
  writer->delta(content("Hel"), usage(), frames);
  writer->delta(content("lo"), usage(), frames);
  engine::ChatDelta call;
  call.tool_call_index = 0;
  call.tool_call = {"c1", "weather", ""};
  writer->delta(call, usage(), frames);
  call.tool_call = {"c1", "", R"({"a":1})"};
  writer->delta(call, usage(), frames);
  call.tool_call_index = 1;
  call.tool_call = {"c2", "time", "{}"};
  writer->delta(call, usage(), frames);
  const engine::ChatMessage message;
  writer->end({message, engine::FinishReason::kStop, "", usage()}, frames);

  const std::vector<Json> events = read_events(frames);
  EXPECT_EQ(
      types_of(events),
      (std::vector<std::string>{
          "message_start", "content_block_start", "content_block_delta", "content_block_stop",
          "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
          "content_block_start", "content_block_delta", "content_block_stop", "content_block_start",
          "content_block_delta", "content_block_stop", "message_delta", "message_stop"}));
  EXPECT_EQ(events[0]["message"]["usage"]["input_tokens"], 4);
  EXPECT_EQ(events[0]["message"]["usage"]["cache_read_input_tokens"], 6);
  EXPECT_EQ(events[2]["delta"]["thinking"], "hm");
  EXPECT_EQ(events[6]["delta"]["text"], "lo");
  EXPECT_EQ(events[8]["content_block"]["id"], "c1");
  EXPECT_EQ(events[9]["delta"]["partial_json"], R"({"a":1})");
  EXPECT_EQ(events[11]["index"], 3);
  EXPECT_EQ(events[14]["delta"]["stop_reason"], "tool_use");
  EXPECT_EQ(events[14]["usage"]["output_tokens"], 4);
}

TEST(MessagesWriter, WholeAnswersAndWhyTheyEnd) {
  const engine::ChatMessage text{"Hello", "hm", {}};
  const auto whole = [&](const engine::ChatMessage& message, engine::FinishReason reason,
                         const std::string& stop, bool caches = false) {
    return Json::parse(
        make_messages_writer(head(), caches)->body({message, reason, stop, usage()}));
  };
  const Json stopped = whole(text, engine::FinishReason::kStop, "END", true);
  EXPECT_EQ(stopped["content"][0]["thinking"], "hm");
  EXPECT_EQ(stopped["content"][1], (Json{{"type", "text"}, {"text", "Hello"}}));
  EXPECT_EQ(stopped["stop_reason"], "stop_sequence");
  EXPECT_EQ(stopped["stop_sequence"], "END");
  EXPECT_EQ(stopped["usage"]["cache_creation_input_tokens"], 4);
  EXPECT_EQ(stopped["usage"]["input_tokens"], 0);
  EXPECT_EQ(whole(text, engine::FinishReason::kStop, "")["stop_reason"], "end_turn");
  EXPECT_EQ(whole(text, engine::FinishReason::kLength, "")["stop_reason"], "max_tokens");
  const engine::ChatMessage cut{"", "", {{"c1", "weather", R"({"city":)"}}};
  const Json call = whole(cut, engine::FinishReason::kLength, "");
  EXPECT_EQ(call["content"][0]["input"], Json::object());
  EXPECT_EQ(call["stop_reason"], "max_tokens");
}

TEST(MessagesWriter, ArgumentsAreParsedAsDeepAsRequestsAre) {
  const auto input_of = [](size_t depth) {
    const std::string text = R"({"a":)" + std::string(depth, '[') + std::string(depth, ']') + "}";
    const engine::ChatMessage message{"", "", {{"c1", "weather", text}}};
    const std::string body = make_messages_writer(head(), false)
                                 ->body({message, engine::FinishReason::kStop, "", usage()});
    const Json input = Json::parse(body)["content"][0]["input"];
    return input.empty() ? std::string() : input.dump();
  };
  const size_t most = kMaxJsonDepth - 1;  // in an object
  EXPECT_EQ(input_of(most), R"({"a":)" + std::string(most, '[') + std::string(most, ']') + "}");
  EXPECT_EQ(input_of(most + 1), "");
  EXPECT_EQ(input_of(60'000), "");
}

}  // namespace
}  // namespace relay::server
