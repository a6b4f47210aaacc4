#include "server/responses.h"

#include <gtest/gtest.h>

#include "server/event_reader.h"
#include "server/test_deltas.h"

namespace relay::server {
namespace {

const RequestLimits kLimits{.vocab_size = 100};

ResponsesRequest parse(const std::string& fields) {
  return parse_responses("{" + fields + "}", kLimits);
}
Json chat_of(const std::string& fields) {
  return Json::parse(parse(fields).chat.chat.messages_json);
}
std::string refusal(const std::string& fields) {
  try {
    parse(fields);
  } catch (const ApiError& error) {
    return error.param() + "/" + error.code();
  }
  return "accepted";
}

TEST(Responses, TextBecomesAChat) {
  EXPECT_EQ(chat_of(R"("input":"hi","instructions":"Be kind.")"),
            Json::parse(R"([{"role":"system","content":"Be kind."},
                            {"role":"user","content":"hi"}])"));
  const ResponsesRequest request = parse(R"("input":"hi","max_output_tokens":5,"stream":true,
      "text":{"format":{"type":"json_schema","name":"n","schema":{"type":"object"}}})");
  EXPECT_EQ(request.chat.common.generate.max_tokens, 5);
  EXPECT_EQ(request.chat.chat.json_schema, R"({"type":"object"})");
  EXPECT_EQ(request.chat.common.schema_param, "text.format.schema");
  EXPECT_EQ(request.echo["max_output_tokens"], 5);
  EXPECT_EQ(request.echo["tool_choice"], "auto");
}

TEST(Responses, ItemsOfAnAnswerAreOneMessage) {
  const Json chat =
      chat_of(R"("input":[{"role":"user","content":[{"type":"input_text","text":"q"}]},
      {"type":"reasoning","id":"rs","summary":[],"content":[{"type":"reasoning_text","text":"hm"}]},
      {"type":"message","role":"assistant","content":[{"type":"output_text","text":"I look."}]},
      {"type":"function_call","call_id":"c1","name":"f","arguments":"{}"},
      {"type":"function_call","call_id":"c2","name":"g","arguments":"{}"},
      {"type":"function_call_output","call_id":"c1","output":"1"},
      {"type":"function_call_output","call_id":"c2","output":[{"type":"input_text","text":"2"}]}])");
  ASSERT_EQ(chat.size(), 4u);
  EXPECT_EQ(chat[1]["content"], "I look.");
  EXPECT_EQ(chat[1]["reasoning_content"], "hm");
  EXPECT_EQ(chat[1]["tool_calls"].size(), 2u);
  EXPECT_EQ(chat[3]["tool_call_id"], "c2");
  EXPECT_EQ(chat[3]["content"], "2");
}

TEST(Responses, WhatNeedsMemoryIsRefusedByName) {
  EXPECT_EQ(refusal(R"("input":"a","previous_response_id":"resp_1")"),
            "previous_response_id/unsupported_parameter");
  EXPECT_EQ(refusal(R"("input":"a","store":true)"), "store/unsupported_parameter");
  EXPECT_EQ(refusal(R"("input":"a","store":false)"), "accepted");
  EXPECT_EQ(refusal(R"("input":"a","background":true)"), "background/unsupported_parameter");
  EXPECT_EQ(refusal(R"("input":"a","conversation":"c")"), "conversation/unsupported_parameter");
  EXPECT_EQ(refusal(R"("input":"a","prompt":{"id":"p"})"), "prompt/unsupported_parameter");
  EXPECT_EQ(refusal(R"("input":"a","include":["file_search_call.results"])"),
            "include/unsupported_parameter");
  EXPECT_EQ(refusal(R"("input":"a","truncation":"auto")"), "truncation/unsupported_parameter");
  EXPECT_EQ(refusal(R"("input":[{"type":"item_reference","id":"x"}])"),
            "input[0].type/unsupported_parameter");
}

TEST(Responses, RefusesByItsOwnNames) {
  EXPECT_EQ(refusal(""), "input/missing_required_parameter");
  EXPECT_EQ(refusal(R"("input":[])"), "input/invalid_value");
  EXPECT_EQ(refusal(R"("input":7)"), "input/invalid_type");
  EXPECT_EQ(refusal(R"("input":[{"type":"reasoning","id":"r"}])"), "input/invalid_value");
  EXPECT_EQ(refusal(R"("input":[{"role":"user","content":[{"type":"input_image"}]}])"),
            "input[0].content[0].type/unsupported_parameter");
  for (const char* hosted :
       {"web_search", "web_search_preview", "file_search", "computer_use_preview", "computer",
        "code_interpreter", "image_generation", "local_shell", "shell", "apply_patch", "mcp",
        "custom", "namespace", "tool_search"}) {
    const std::string tool = R"({"type":")" + std::string(hosted) + R"("})";
    EXPECT_EQ(refusal(R"("input":"a","tools":[)" + tool + "]"),
              "tools[0].type/unsupported_parameter")
        << hosted;
    EXPECT_EQ(refusal(R"("input":"a","tools":[{"type":"function","name":"f"},)" + tool + "]"),
              "tools[1].type/unsupported_parameter")
        << hosted;
    EXPECT_EQ(refusal(R"("input":"a","tool_choice":)" + tool).substr(0, 11), "tool_choice")
        << hosted;
  }
  EXPECT_EQ(refusal(R"("input":"a","max_output_tokens":0)"), "max_output_tokens/invalid_value");
}

TEST(Responses, WhatTheApiLacksIsKeptOrRefused) {
  const ResponsesRequest request = parse(
      R"("input":"a","top_k":7,"frequency_penalty":0.5,"chat_template_kwargs":{"a":1},"n":1)");
  EXPECT_EQ(request.chat.common.generate.sampling.top_k, 7);
  EXPECT_FLOAT_EQ(request.chat.common.generate.sampling.frequency_penalty, 0.5f);
  EXPECT_EQ(request.chat.chat.template_kwargs_json, R"({"a":1})");
  for (const std::string name : {"grammar", "guided_json", "json_schema", "logprobs", "min_tokens",
                                 "n", "response_format", "stop", "structured_outputs"}) {
    EXPECT_EQ(refusal(R"("input":"a",")" + name + "\":7"), name + "/unsupported_parameter");
  }
}

TEST(ResponsesWriter, StreamsItems) {
  const auto writer = make_responses_writer(head(), parse(R"("input":"a")").echo);
  const engine::Usage usage{.prompt_tokens = 10, .completion_tokens = 4, .cached_tokens = 6};
  std::string frames;
  writer->delta(content("Hel"), usage, frames);
  writer->delta(content("lo"), usage, frames);
  engine::ChatDelta call;
  call.tool_call_index = 0;
  call.tool_call = {"c1", "f", "{}"};
  writer->delta(call, usage, frames);
  const engine::ChatMessage message;
  writer->end({message, engine::FinishReason::kLength, "", usage, 3}, frames);

  const std::vector<Json> events = read_events(frames);
  EXPECT_EQ(
      types_of(events),
      (std::vector<std::string>{
          "response.created", "response.in_progress", "response.output_item.added",
          "response.content_part.added", "response.output_text.delta", "response.output_text.delta",
          "response.output_text.done", "response.content_part.done", "response.output_item.done",
          "response.output_item.added", "response.function_call_arguments.delta",
          "response.function_call_arguments.done", "response.output_item.done",
          "response.incomplete"}));
  for (size_t i = 0; i < events.size(); ++i) EXPECT_EQ(events[i]["sequence_number"], i);
  EXPECT_EQ(events[6]["text"], "Hello");
  EXPECT_EQ(events[4]["item_id"], events[2]["item"]["id"]);
  EXPECT_EQ(events[9]["output_index"], 1);
  const Json& response = events.back()["response"];
  EXPECT_EQ(response["id"], events[0]["response"]["id"]);
  EXPECT_EQ(response["incomplete_details"]["reason"], "max_output_tokens");
  EXPECT_EQ(response["output"][0]["content"][0]["text"], "Hello");
  EXPECT_EQ(response["output"][1]["call_id"], "c1");
  EXPECT_EQ(events[8]["item"]["status"], "completed");
  EXPECT_EQ(events[12]["item"]["status"], "incomplete") << "the call was cut";
  EXPECT_EQ(response["output"], Json::array({events[8]["item"], events[12]["item"]}));
  EXPECT_EQ(response["usage"]["output_tokens_details"]["reasoning_tokens"], 3);
  EXPECT_EQ(response["usage"]["input_tokens_details"]["cached_tokens"], 6);
  EXPECT_EQ(response["store"], false);
}

TEST(ResponsesWriter, WholeAnswers) {
  const engine::ChatMessage message{"Hello", "hm", {{"c1", "f", "{}"}}};
  const Json body = Json::parse(make_responses_writer(head(), parse(R"("input":"a")").echo)
                                    ->body({message, engine::FinishReason::kStop, "", {}}));
  EXPECT_EQ(body["status"], "completed");
  ASSERT_EQ(body["output"].size(), 3u);
  EXPECT_EQ(body["output"][0]["type"], "reasoning");
  EXPECT_EQ(body["output"][1]["content"][0]["text"], "Hello");
  EXPECT_EQ(body["output"][2]["name"], "f");
  const Json cut = Json::parse(make_responses_writer(head(), parse(R"("input":"a")").echo)
                                   ->body({message, engine::FinishReason::kLength, "", {}}));
  EXPECT_EQ(cut["status"], "incomplete");
  EXPECT_EQ(cut["output"][1]["status"], "completed");
  EXPECT_EQ(cut["output"][2]["status"], "incomplete");
}

}  // namespace
}  // namespace relay::server
