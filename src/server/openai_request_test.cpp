#include "server/openai_request.h"

#include <gtest/gtest.h>

#include "server/errors.h"
#include "server/json.h"

namespace relay::server {
namespace {

const RequestLimits kLimits = [] {
  RequestLimits limits;
  limits.vocab_size = 100;
  return limits;
}();

constexpr const char* kUser = R"([{"role":"user","content":"hi"}])";

/// A chat request with more fields.
std::string chat(const std::string& fields) {
  return std::string(R"({"messages":)") + kUser + (fields.empty() ? "" : "," + fields) + "}";
}

ChatCompletionRequest parsed(const std::string& fields) {
  return parse_chat_completion(chat(fields), kLimits);
}

/// "param/code" of the refusal.
template <typename Parse>
std::string refusal(Parse parse) {
  try {
    parse();
  } catch (const ApiError& error) {
    EXPECT_EQ(error.status(), 400);
    EXPECT_NE(std::string(error.what()), "");
    return error.param() + "/" + error.code();
  }
  return "(accepted)";
}
std::string chat_refusal(const std::string& fields) {
  return refusal([&] { parse_chat_completion(chat(fields), kLimits); });
}
std::string text_refusal(const std::string& body) {
  return refusal([&] { parse_completion(body, kLimits); });
}

TEST(ChatRequest, Defaults) {
  const ChatCompletionRequest request = parsed("");
  EXPECT_EQ(request.common.model, "");
  EXPECT_FALSE(request.common.stream);
  EXPECT_EQ(request.common.generate.max_tokens, -1);
  EXPECT_EQ(request.common.generate.n, 1);
  EXPECT_EQ(request.common.generate.sampling.temperature, 1.0f);
  EXPECT_EQ(request.common.generate.sampling.logprobs, -1);
  EXPECT_FALSE(request.common.generate.sampling.seed);
  EXPECT_EQ(Json::parse(request.chat.messages_json), Json::parse(kUser));
  EXPECT_TRUE(request.chat.add_generation_prompt);
}

TEST(ChatRequest, NullAndUnknownFieldsAreAccepted) {
  const ChatCompletionRequest request = parsed(
      R"("stream":null,"stop":null,"tools":null,"logit_bias":null,"n":null,"functions":null,
         "response_format":null,"max_tokens":null,"made_up":{"a":[1]},"store":true,
         "prompt_cache_key":"k","service_tier":"auto","suffix":"","mirostat":0,"typical_p":1.0)");
  EXPECT_EQ(request.common.generate.n, 1);
}

TEST(ChatRequest, Everything) {
  const ChatCompletionRequest request = parsed(
      R"("model":"m","stream":true,"stream_options":{"include_usage":true,
         "continuous_usage_stats":true},"max_tokens":5,"max_completion_tokens":7,"temperature":0,
         "top_p":0.5,"top_k":-1,"min_p":0.1,"n":3,"stop":["a","b"],"seed":42,
         "presence_penalty":-2,"frequency_penalty":2,"repetition_penalty":1.1,
         "logit_bias":{"7":-100,"99":1.5},"logprobs":true,"top_logprobs":20,"user":"u",
         "ignore_eos":true,"cache_salt":"s","reasoning_effort":"low",
         "chat_template_kwargs":{"enable_thinking":false})");
  EXPECT_EQ(request.common.model, "m");
  EXPECT_TRUE(request.common.continuous_usage_stats);
  const engine::GenerateRequest& generate = request.common.generate;
  EXPECT_EQ(generate.max_tokens, 7);
  EXPECT_EQ(generate.n, 3);
  EXPECT_EQ(generate.stop, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(generate.sampling.seed, 42u);
  EXPECT_EQ(generate.sampling.logprobs, 20);
  EXPECT_EQ(generate.sampling.logit_bias,
            (std::vector<std::pair<engine::Token, float>>{{7, -100.f}, {99, 1.5f}}));
  EXPECT_TRUE(generate.sampling.ignore_eos);
  EXPECT_EQ(generate.cache_salt, "s");
  EXPECT_EQ(request.chat.reasoning_effort, "low");
  EXPECT_EQ(request.chat.template_kwargs_json, R"({"enable_thinking":false})");
}

TEST(ChatRequest, WrongTypesAndRangesNameTheParam) {
  const std::vector<std::pair<const char*, const char*>> cases = {
      {R"("temperature":"hot")", "temperature/invalid_type"},
      {R"("temperature":2.5)", "temperature/invalid_value"},
      {R"("top_p":-0.1)", "top_p/invalid_value"},
      {R"("n":0)", "n/invalid_value"},
      {R"("n":1.5)", "n/invalid_type"},
      {R"("n":1e30)", "n/invalid_value"},
      {R"("max_tokens":0)", "max_tokens/invalid_value"},
      {R"("max_tokens":-3)", "max_tokens/invalid_value"},
      {R"("max_tokens":true)", "max_tokens/invalid_type"},
      {R"("max_tokens":18446744073709551615)", "max_tokens/invalid_value"},
      {R"("stream":"yes")", "stream/invalid_type"},
      {R"("stream_options":{"include_usage":true})", "stream_options/invalid_value"},
      {R"("stop":5)", "stop/invalid_type"},
      {R"("stop":[""])", "stop[0]/invalid_value"},
      {R"("logit_bias":{"100":1})", "logit_bias/invalid_value"},
      {R"("logit_bias":{"7x":1})", "logit_bias/invalid_value"},
      {R"("logit_bias":{"7":101})", "logit_bias.7/invalid_value"},
      {R"("top_logprobs":3)", "top_logprobs/invalid_value"},
      {R"("logprobs":true,"top_logprobs":21)", "top_logprobs/invalid_value"},
      {R"("model":7)", "model/invalid_type"},
      {R"("user":7)", "user/invalid_type"},
      {R"("response_format":{"type":"xml"})", "response_format.type/invalid_value"},
      {R"("response_format":{"type":"json_schema"})",
       "response_format.json_schema/missing_required_parameter"},
      {R"("response_format":{"type":"json_schema","json_schema":{"name":"x"}})",
       "response_format.json_schema.schema/missing_required_parameter"},
      {R"("tools":[{"type":"function"}])", "tools[0].function/missing_required_parameter"},
      {R"("tools":[{"type":"function","function":{"name":"f","parameters":3}}])",
       "tools[0].function.parameters/invalid_type"},
      {R"("tool_choice":"required")", "tool_choice/invalid_value"},
      {R"("tool_choice":"maybe")", "tool_choice/invalid_value"},
      {R"("tool_choice":{"type":"function","function":{"name":"g"}})", "tool_choice/invalid_value"},
  };
  for (const auto& [fields, expected] : cases) EXPECT_EQ(chat_refusal(fields), expected) << fields;
}

TEST(ChatRequest, WhatCannotBeKeptIsAnError) {
  for (const char* fields :
       {R"("functions":[{"name":"f"}])", R"("function_call":"auto")", R"("audio":{"voice":"a"})",
        R"("modalities":["text","audio"])", R"("guided_json":{"type":"object"})",
        R"("structured_outputs":{"regex":"a"})", R"("stop_token_ids":[1])", R"("best_of":2)",
        R"("use_beam_search":true)", R"("prompt_logprobs":1)", R"("min_tokens":5)",
        R"("skip_special_tokens":false)", R"("include_stop_str_in_output":true)",
        R"("chat_template":"{{ x }}")", R"("mirostat":2)", R"("typical_p":0.9)"}) {
    EXPECT_NE(chat_refusal(fields).find("/unsupported_parameter"), std::string::npos) << fields;
  }
  EXPECT_EQ(chat_refusal(R"("min_tokens":5,"ignore_eos":true)"), "(accepted)");
}

TEST(ChatRequest, Messages) {
  const auto with = [](const std::string& messages) {
    return refusal([&] { parse_chat_completion(R"({"messages":)" + messages + "}", kLimits); });
  };
  EXPECT_EQ(refusal([] { parse_chat_completion("{}", kLimits); }),
            "messages/missing_required_parameter");
  EXPECT_EQ(refusal([] { parse_chat_completion("[]", kLimits); }), "/invalid_type");
  EXPECT_EQ(with("[]"), "messages/invalid_value");
  EXPECT_EQ(with("{}"), "messages/invalid_type");
  EXPECT_EQ(with("[3]"), "messages[0]/invalid_type");
  EXPECT_EQ(with(R"([{"content":"x"}])"), "messages[0].role/missing_required_parameter");
  EXPECT_EQ(with(R"([{"role":"robot","content":"x"}])"), "messages[0].role/invalid_value");
  EXPECT_EQ(with(R"([{"role":"user"}])"), "messages[0].content/missing_required_parameter");
  EXPECT_EQ(with(R"([{"role":"user","content":7}])"), "messages[0].content/invalid_type");
  EXPECT_EQ(with(R"([{"role":"tool","content":"x"}])"),
            "messages[0].tool_call_id/missing_required_parameter");
  EXPECT_EQ(with(R"([{"role":"user","content":[{"type":"image_url","image_url":{}}]}])"),
            "messages[0].content[0].type/unsupported_parameter");
  EXPECT_EQ(with(R"([{"role":"assistant","tool_calls":[{"function":{"name":"f"}}]}])"),
            "messages[0].tool_calls[0].function.arguments/missing_required_parameter");
  EXPECT_EQ(with(R"([{"role":"user","content":[{"type":"text","text":"a"}]},
                     {"role":"assistant","content":null,"tool_calls":[{"id":"1","type":"function",
                      "function":{"name":"f","arguments":"{}"}}]},
                     {"role":"tool","tool_call_id":"1","content":"42"}])"),
            "(accepted)");
}

TEST(ChatRequest, JsonWithinTextIsBounded) {
  const auto outcome = [](const std::string& arguments, const std::string& content) {
    Json messages = Json::parse(R"([{"role":"user","content":"x"},
        {"role":"assistant","tool_calls":[{"function":{"name":"f"}}]},
        {"role":"tool","tool_call_id":"1"}])");
    messages[1]["tool_calls"][0]["function"]["arguments"] = arguments;
    messages[2]["content"] = content;
    return refusal([&] { parse_chat_completion(dump(Json{{"messages", messages}}), kLimits); });
  };
  const std::string deep = " {\"a\":" + std::string(100, '[') + std::string(100, ']') + "}";
  std::string wide = "{\"k\":1";
  for (int i = 0; i < 20'000; ++i) wide += ",\"" + std::to_string(i) + "\":1";
  for (const std::string& json : {deep, wide + "}"}) {
    EXPECT_EQ(outcome(json, "x"), "messages[1].tool_calls[0].function.arguments/invalid_value");
    EXPECT_EQ(outcome("{}", json), "messages[2].content/invalid_value");
    EXPECT_EQ(outcome("{}", "It says " + json), "(accepted)") << "text, whatever it holds";
  }
}

TEST(ChatRequest, ANamedToolIsTheOnlyOne) {
  const ChatCompletionRequest request = parsed(
      R"("tools":[{"type":"function","function":{"name":"f"}},
                  {"type":"function","function":{"name":"g"}}],
         "tool_choice":{"type":"function","function":{"name":"g"}})");
  EXPECT_EQ(request.chat.tool_choice, "required");
  const Json tools = Json::parse(request.chat.tools_json);
  ASSERT_EQ(tools.size(), 1u);
  EXPECT_EQ(tools[0]["function"]["name"], "g");
}

TEST(ChatRequest, WhatRealClientsSend) {
  const engine::SamplingParams sampling =
      parsed(R"("top_p":0,"temperature":1,"seed":-1)").common.generate.sampling;
  EXPECT_EQ(sampling.temperature, 0) << "as greedy";
  EXPECT_EQ(sampling.top_p, 1);
  EXPECT_FALSE(sampling.seed) << "a random one";
  EXPECT_TRUE(parsed(R"("seed":-2)").common.generate.sampling.seed);
  for (const char* name : {"max_tokens", "n_predict", "max_completion_tokens"}) {
    const std::string field = std::string("\"").append(name).append("\":-1");
    EXPECT_EQ(parsed(field).common.generate.max_tokens, -1) << name;
  }

  const Json tools =
      Json::parse(parsed(R"("tools":[{"type":"function","function":{"name":"f","description":null,
                          "parameters":null}}])")
                      .chat.tools_json);
  EXPECT_EQ(tools, Json::parse(R"([{"type":"function","function":{"name":"f"}}])"));

  const ChatCompletionRequest history = parse_chat_completion(
      R"({"messages":[
        {"role":"user","content":"x","name":null,"tool_calls":null},
        {"role":"assistant","content":null,"reasoning_content":null,"refusal":null,
         "tool_calls":[{"id":null,"function":{"name":"f","arguments":""}}]},
        {"role":"assistant","content":"y","tool_calls":[]},
        {"role":"user","content":"z"}]})",
      kLimits);
  const auto any_order = [](const std::string& text) { return nlohmann::json::parse(text); };
  EXPECT_EQ(any_order(history.chat.messages_json), any_order(R"([
        {"role":"user","content":"x"},
        {"role":"assistant",
         "tool_calls":[{"function":{"name":"f","arguments":"{}"},"type":"function"}]},
        {"role":"assistant","content":"y"},
        {"role":"user","content":"z"}])"));
}

TEST(ChatRequest, AllowedToolsAreThoseOffered) {
  const std::string tools = R"("tools":[{"type":"function","function":{"name":"f"}},
                                        {"type":"function","function":{"name":"g"}},
                                        {"type":"function","function":{"name":"h"}}],)";
  for (const char* choice :
       {R"({"type":"allowed_tools","allowed_tools":{"mode":"required","tools":[
            {"type":"function","function":{"name":"h"}},
            {"type":"function","function":{"name":"f"}}]}})",
        R"({"type":"allowed_tools","mode":"required","tools":[{"type":"function","name":"h"},
                                                              {"type":"function","name":"f"}]})"}) {
    const ChatCompletionRequest request = parsed(tools + R"("tool_choice":)" + choice);
    EXPECT_EQ(request.chat.tool_choice, "required");
    EXPECT_TRUE(request.chat.parallel_tool_calls);
    const Json offered = Json::parse(request.chat.tools_json);
    ASSERT_EQ(offered.size(), 2u);
    EXPECT_EQ(offered[0]["function"]["name"], "h");
  }
  const auto refused = [&](const std::string& allowed) {
    return chat_refusal(tools + R"("tool_choice":{"type":"allowed_tools","allowed_tools":)" +
                        allowed + "}");
  };
  EXPECT_EQ(refused(R"({"mode":"none","tools":[{"type":"function","function":{"name":"f"}}]})"),
            "tool_choice/invalid_value");
  EXPECT_EQ(refused(R"({"tools":[]})"), "tool_choice/invalid_value");
  EXPECT_EQ(refused(R"({"tools":[{"type":"function","function":{"name":"x"}}]})"),
            "tool_choice/invalid_value");
}

TEST(ChatRequest, Constraints) {
  EXPECT_EQ(parsed(R"("response_format":{"type":"json_object"})").chat.json_schema,
            R"({"type":"object"})");
  EXPECT_EQ(parsed(R"("response_format":{"type":"json_schema","json_schema":{"name":"n",
                     "schema":{"type":"array"}}})")
                .chat.json_schema,
            R"({"type":"array"})");
  EXPECT_EQ(parsed(R"("response_format":{"type":"text"})").chat.json_schema, "");
  EXPECT_EQ(parsed(R"("grammar":"root ::= \"a\"")").common.generate.grammar, R"(root ::= "a")");
  EXPECT_EQ(chat_refusal(R"("grammar":"x","response_format":{"type":"json_object"})"),
            "grammar/invalid_value");
}

TEST(ChatRequest, ContinueFinalMessage) {
  EXPECT_EQ(chat_refusal(R"("continue_final_message":true)"),
            "continue_final_message/invalid_value");
  const ChatCompletionRequest request = parse_chat_completion(
      R"({"messages":[{"role":"assistant","content":"a"}],"continue_final_message":true})",
      kLimits);
  EXPECT_TRUE(request.chat.continue_final_message);
  EXPECT_FALSE(request.chat.add_generation_prompt);
}

TEST(TextRequest, AllFormsOfPrompt) {
  const auto prompts = [](const std::string& prompt) {
    return parse_completion(R"({"prompt":)" + prompt + "}", kLimits).prompts;
  };
  EXPECT_EQ(prompts(R"("hi")")[0].text, "hi");
  EXPECT_EQ(prompts(R"(["a","b"])")[1].text, "b");
  EXPECT_EQ(prompts("[1,2,99]")[0].tokens, (std::vector<engine::Token>{1, 2, 99}));
  EXPECT_EQ(prompts("[[1],[2,3]]")[1].tokens, (std::vector<engine::Token>{2, 3}));
  EXPECT_FALSE(prompts("[1]")[0].is_text);
}

TEST(TextRequest, SixteenTokensAreTheDefault) {
  const auto max_tokens = [](const std::string& fields) {
    return parse_completion(R"({"prompt":"a")" + fields + "}", kLimits).common.generate.max_tokens;
  };
  EXPECT_EQ(max_tokens(""), 16);
  EXPECT_EQ(max_tokens(R"(,"max_tokens":null)"), 16);
  EXPECT_EQ(max_tokens(R"(,"max_tokens":5)"), 5);
  EXPECT_EQ(max_tokens(R"(,"n_predict":-1)"), -1);
}

TEST(TextRequest, Refusals) {
  EXPECT_EQ(text_refusal("{}"), "prompt/missing_required_parameter");
  EXPECT_EQ(text_refusal(R"({"prompt":7})"), "prompt/invalid_type");
  EXPECT_EQ(text_refusal(R"({"prompt":[]})"), "prompt/invalid_value");
  EXPECT_EQ(text_refusal(R"({"prompt":[100]})"), "prompt/invalid_value");
  EXPECT_EQ(text_refusal(R"({"prompt":[-1]})"), "prompt/invalid_value");
  EXPECT_EQ(text_refusal(R"({"prompt":[1,"a"]})"), "prompt/invalid_value");
  EXPECT_EQ(text_refusal(R"({"prompt":["a",[]]})"), "prompt[1]/invalid_type");
  EXPECT_EQ(text_refusal(R"({"prompt":["a",null]})"), "prompt[1]/invalid_type");
  EXPECT_EQ(text_refusal(R"({"prompt":[[1],[100]]})"), "prompt[1]/invalid_value");
  EXPECT_EQ(text_refusal(R"({"prompt":"a","logprobs":21})"), "logprobs/invalid_value");
  EXPECT_EQ(text_refusal(R"({"prompt":"a","max_tokens":0})"), "max_tokens/invalid_value");
  EXPECT_EQ(text_refusal(R"({"prompt":"a","suffix":"b"})"), "suffix/unsupported_parameter");
  EXPECT_EQ(text_refusal(R"({"prompt":"a","messages":[{}]})"), "messages/unsupported_parameter");
}

TEST(Completion, EchoTakesNoTokensAndScoresThePrompt) {
  const auto scored =
      parse_completion(R"({"prompt":"a","echo":true,"logprobs":2,"max_tokens":0})", kLimits);
  EXPECT_EQ(scored.common.generate.max_tokens, 0);
  EXPECT_TRUE(scored.common.generate.prompt_logprobs);
  EXPECT_EQ(scored.common.generate.sampling.logprobs, 2);
  EXPECT_FALSE(
      parse_completion(R"({"prompt":"a","logprobs":2})", kLimits).common.generate.prompt_logprobs);
}

TEST(PromptFile, ArrayOrObject) {
  EXPECT_EQ(Json::parse(parse_prompt_file_json(kUser, kLimits).messages_json), Json::parse(kUser));
  EXPECT_EQ(Json::parse(parse_prompt_file_json(chat(""), kLimits).messages_json),
            Json::parse(kUser));
  EXPECT_THROW(parse_prompt_file_json("[]", kLimits), ApiError);
  EXPECT_THROW(parse_prompt_file_json("\"x\"", kLimits), ApiError);
}

TEST(CachedPrompt, Ttl) {
  EXPECT_EQ(parse_cached_prompt_ttl(R"({"ttl":60})"), 60);
  EXPECT_THROW(parse_cached_prompt_ttl("{}"), ApiError);
  EXPECT_THROW(parse_cached_prompt_ttl(R"({"ttl":-1})"), ApiError);
}

}  // namespace
}  // namespace relay::server
