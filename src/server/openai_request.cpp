#include "server/openai_request.h"

#include <array>
#include <charconv>

#include "server/errors.h"
#include "server/json_fields.h"

namespace relay::server {

namespace {

constexpr size_t kUnbounded = SIZE_MAX;  // bounded by the body

/// Fields that ask for something, with the value that asks for nothing (besides null, false, 0 and
/// the empty string, array and object).
struct UnsupportedField {
  const char* name;
  double neutral = 0;
};
constexpr std::array kUnsupportedFields = {
    // OpenAI's
    UnsupportedField{"audio"}, UnsupportedField{"functions"}, UnsupportedField{"function_call"},
    UnsupportedField{"web_search_options"}, UnsupportedField{"suffix"},
    // vLLM's
    UnsupportedField{"allowed_token_ids"}, UnsupportedField{"bad_words"},
    UnsupportedField{"chat_template"}, UnsupportedField{"documents"},
    UnsupportedField{"guided_choice"}, UnsupportedField{"guided_grammar"},
    UnsupportedField{"guided_json"}, UnsupportedField{"guided_regex"},
    UnsupportedField{"include_stop_str_in_output"}, UnsupportedField{"kv_transfer_params"},
    UnsupportedField{"logits_processors"}, UnsupportedField{"mm_processor_kwargs"},
    UnsupportedField{"prompt_embeds"}, UnsupportedField{"prompt_logprobs"},
    UnsupportedField{"stop_token_ids"}, UnsupportedField{"structured_outputs"},
    UnsupportedField{"truncate_prompt_tokens"}, UnsupportedField{"use_beam_search"},
    // llama.cpp's
    UnsupportedField{"dry_multiplier"}, UnsupportedField{"dynatemp_range"},
    UnsupportedField{"lora"}, UnsupportedField{"mirostat"}, UnsupportedField{"samplers"},
    UnsupportedField{"top_n_sigma", -1}, UnsupportedField{"typical_p", 1},
    UnsupportedField{"xtc_probability"}};
/// Of requests of APIs that become a chat: there these have other names, or no use.
constexpr std::array kOnlyInChats = {
    UnsupportedField{"grammar"},  UnsupportedField{"json_schema"},
    UnsupportedField{"logprobs"}, UnsupportedField{"min_tokens"},
    UnsupportedField{"n", 1},     UnsupportedField{"response_format"},
    UnsupportedField{"stop"}};
/// Those that such requests may have as well.
constexpr std::array kExtensions = {
    "cache_salt", "chat_template_kwargs", "frequency_penalty",  "ignore_eos", "logit_bias",
    "min_p",      "presence_penalty",     "repetition_penalty", "seed",       "top_k"};

bool asks_for_nothing(const Json& value, double neutral) {
  if (value.is_boolean()) return !value.get<bool>();
  if (value.is_number()) {
    return value.get<double>() == 0 || value.get<double>() == neutral;
  }
  if (value.is_string()) return value.get_ref<const std::string&>().empty();
  return value.empty();
}

template <typename Fields>
void refuse(const JsonFields& body, const Fields& fields, const std::string& why) {
  for (const UnsupportedField& field : fields) {
    const Json* value = body.find(field.name);
    if (value != nullptr && !asks_for_nothing(*value, field.neutral)) {
      throw unsupported(field.name, std::string("'") + field.name + "' " + why + ".");
    }
  }
}

void refuse_unsupported(const JsonFields& body) {
  refuse(body, kUnsupportedFields, "is not supported");
  if (!body.boolean("skip_special_tokens", true)) {
    throw unsupported("skip_special_tokens", "'skip_special_tokens' can only be true.");
  }
  if (const Json* modalities = body.array("modalities", 16)) {
    for (const Json& modality : *modalities) {
      if (modality != "text") throw unsupported("modalities", "Only the modality text exists.");
    }
  }
}

std::vector<std::string> parse_stop(const JsonFields& body, const RequestLimits& limits) {
  const Json* value = body.find("stop");
  std::vector<std::string> stop;
  if (value == nullptr) return stop;
  const auto add = [&](const Json& item, const std::string& param) {
    if (!item.is_string()) {
      throw invalid_request(param, "'" + param + "' must be a string.", "invalid_type");
    }
    const auto& text = item.get_ref<const std::string&>();
    if (text.empty() || text.size() > limits.max_stop_bytes) {
      throw invalid_request(param, "A stop string must have 1 to " +
                                       std::to_string(limits.max_stop_bytes) + " bytes.");
    }
    stop.push_back(text);
  };
  if (value->is_string() && value->get_ref<const std::string&>().empty()) return stop;
  if (!value->is_array()) {
    add(*value, "stop");
    return stop;
  }
  const Json& items = *body.array("stop", limits.max_stop_strings);
  for (size_t i = 0; i < items.size(); ++i) add(items[i], "stop[" + std::to_string(i) + "]");
  return stop;
}

void parse_logit_bias(const JsonFields& body, const RequestLimits& limits,
                      engine::SamplingParams& sampling) {
  const Json* bias = body.object("logit_bias");
  if (bias == nullptr) return;
  if (bias->size() > limits.max_logit_bias) {
    throw invalid_request("logit_bias", "'logit_bias' has more than " +
                                            std::to_string(limits.max_logit_bias) + " entries.");
  }
  const JsonFields fields(*bias, "logit_bias");
  for (const auto& [key, value] : bias->items()) {
    int32_t token = -1;
    const auto [end, error] = std::from_chars(key.data(), key.data() + key.size(), token);
    if (error != std::errc() || end != key.data() + key.size() || token < 0 ||
        token >= limits.vocab_size) {
      throw invalid_request("logit_bias", "'logit_bias' has the key '" + key.substr(0, 64) +
                                              "', which is no token id of this model (0 to " +
                                              std::to_string(limits.vocab_size - 1) + ").");
    }
    const auto amount = fields.number(key.c_str(), -100, 100);
    if (amount) sampling.logit_bias.emplace_back(token, static_cast<float>(*amount));
  }
}

std::string schema_text(const Json& schema, const std::string& param, const RequestLimits& limits) {
  if (!schema.is_object() && !schema.is_boolean()) {
    throw invalid_request(param, "'" + param + "' must be a JSON schema.", "invalid_type");
  }
  std::string text = dump(schema);
  if (text.size() > limits.max_schema_bytes) {
    throw invalid_request(param, "'" + param + "' is longer than " +
                                     std::to_string(limits.max_schema_bytes) + " bytes.");
  }
  return text;
}

/// response_format, and llama.cpp's `grammar` (GBNF) and `json_schema`: at most one of them.
struct Constraint {
  std::string json_schema;
  std::string schema_param;  ///< where it stood
  std::string grammar;
};
Constraint parse_constraint(const JsonFields& body, const RequestLimits& limits) {
  Constraint constraint;
  if (const Json* format = body.object("response_format")) {
    const JsonFields fields(*format, "response_format");
    const std::string type = fields.require_string("type", 64);
    if (type == "json_object") {
      constraint.schema_param = "response_format.schema";
      const Json* schema = fields.find("schema");  // llama.cpp's extension
      constraint.json_schema = schema != nullptr
                                   ? schema_text(*schema, constraint.schema_param, limits)
                                   : R"({"type":"object"})";
    } else if (type == "json_schema") {
      fields.require("json_schema");
      const JsonFields named(*fields.object("json_schema"), "response_format.json_schema");
      constraint.schema_param = "response_format.json_schema.schema";
      constraint.json_schema =
          schema_text(named.require("schema"), constraint.schema_param, limits);
    } else if (type != "text") {
      throw invalid_request("response_format.type",
                            "'response_format.type' must be text, json_object or json_schema.");
    }
  }
  if (const Json* schema = body.find("json_schema")) {
    if (!constraint.json_schema.empty()) {
      throw invalid_request("json_schema",
                            "'json_schema' and 'response_format' exclude each other.");
    }
    constraint.schema_param = "json_schema";
    constraint.json_schema = schema_text(*schema, constraint.schema_param, limits);
  }
  constraint.grammar = body.string("grammar", limits.max_schema_bytes).value_or("");
  if (!constraint.grammar.empty() && !constraint.json_schema.empty()) {
    throw invalid_request("grammar", "'grammar' and a JSON schema exclude each other.");
  }
  return constraint;
}

engine::SamplingParams parse_sampling(const JsonFields& body, const RequestLimits& limits) {
  engine::SamplingParams sampling;
  const auto set = [](float& target, std::optional<double> value) {
    if (value) target = static_cast<float>(*value);
  };
  set(sampling.temperature, body.number("temperature", 0, 2));
  set(sampling.top_p, body.number("top_p", 0, 1));
  set(sampling.min_p, body.number("min_p", 0, 1));
  set(sampling.presence_penalty, body.number("presence_penalty", -2, 2));
  set(sampling.frequency_penalty, body.number("frequency_penalty", -2, 2));
  set(sampling.repetition_penalty, body.number("repeat_penalty", 0, 10, true));
  set(sampling.repetition_penalty, body.number("repetition_penalty", 0, 10, true));
  sampling.top_k = static_cast<int32_t>(body.integer("top_k", -1, INT32_MAX).value_or(0));
  if (sampling.top_p <= 0) {  // of the nucleus only the most probable token is left
    sampling.top_p = 1;
    sampling.temperature = 0;
  }
  // -1 asks for a random one, as with vLLM and llama.cpp.
  const auto seed = body.integer("seed", INT64_MIN, INT64_MAX);
  if (seed && *seed != -1) {
    const auto bits = static_cast<uint64_t>(*seed);
    sampling.seed = static_cast<uint32_t>(bits ^ (bits >> 32));  // small seeds stay themselves
  }
  sampling.ignore_eos = body.boolean("ignore_eos", false);
  parse_logit_bias(body, limits, sampling);
  return sampling;
}

/// -1: as many as there is room for.
int32_t parse_max_tokens(const JsonFields& body, int32_t fallback, bool none_allowed) {
  for (const char* name : {"max_completion_tokens", "max_tokens", "n_predict"}) {
    const auto value = body.integer(name, -1, INT32_MAX);
    if (!value) continue;
    if (*value == 0 && !none_allowed) {
      throw invalid_request(name, std::string("'") + name +
                                      "' must be at least 1, or -1 for as many as there is room; 0 "
                                      "is for 'echo': true of /v1/completions.");
    }
    return static_cast<int32_t>(*value);
  }
  return fallback;
}

CommonRequest parse_common(const JsonFields& body, const RequestLimits& limits, int32_t max_tokens,
                           bool none_allowed = false) {
  refuse_unsupported(body);
  CommonRequest request;
  request.model = body.string("model", kMaxNameBytes).value_or("");
  request.stream = body.boolean("stream", false);
  if (const Json* options = body.object("stream_options")) {
    if (!request.stream) {
      throw invalid_request("stream_options",
                            "'stream_options' is only allowed together with 'stream': true.");
    }
    const JsonFields fields(*options, "stream_options");
    request.include_usage = fields.boolean("include_usage", false);
    request.continuous_usage_stats =
        fields.boolean("continuous_usage_stats", false) && request.include_usage;
  }
  body.string("user", kUnbounded);  // only its type is checked: nothing here depends on the user

  engine::GenerateRequest& generate = request.generate;
  generate.max_tokens = parse_max_tokens(body, max_tokens, none_allowed);
  generate.n = static_cast<int32_t>(body.integer("n", 1, limits.max_choices).value_or(1));
  if (const auto best_of = body.integer("best_of", 1, limits.max_choices)) {
    if (*best_of != generate.n) throw unsupported("best_of", "'best_of' must be equal to 'n'.");
  }
  generate.sampling = parse_sampling(body, limits);
  generate.stop = parse_stop(body, limits);
  generate.cache_salt = body.string("cache_salt", kMaxNameBytes).value_or("");
  if (body.integer("min_tokens", 0, INT32_MAX).value_or(0) > 0 &&
      (!generate.sampling.ignore_eos || !generate.stop.empty())) {
    throw unsupported("min_tokens",
                      "'min_tokens' is only supported with 'ignore_eos' and without 'stop'.");
  }
  return request;
}

// --- Chat ---------------------------------------------------------------------------------------

void check_content(const Json& content, const std::string& param) {
  if (content.is_string()) return;
  if (!content.is_array()) {
    throw invalid_request(param, "'" + param + "' must be a string or an array of text parts.",
                          "invalid_type");
  }
  for (size_t i = 0; i < content.size(); ++i) {
    const std::string part_path = param + "[" + std::to_string(i) + "]";
    const JsonFields part(content[i], part_path);
    const std::string type = part.require_string("type", 64);
    if (type != "text") {
      throw unsupported(part_path + ".type",
                        "Content parts of type '" + type + "' are not supported, only text.");
    }
    part.require_string("text", kUnbounded);
  }
}

/// null is the same as nothing, but templates see a difference.
void drop_nulls(Json& object) {
  for (auto it = object.begin(); it != object.end();) {
    if (it->is_null()) {
      it = object.erase(it);
    } else {
      ++it;
    }
  }
}

/// For JSON that is the text of a field: some templates parse it, as far as it goes.
void check_inner_json(const std::string& text, const std::string& param) {
  const size_t begin = text.find_first_not_of(" \t\r\n");
  if (begin == std::string::npos || (text[begin] != '{' && text[begin] != '[')) return;
  if (const auto cost = too_costly(text)) {
    throw invalid_request(param, "'" + param + "' is too much to parse: " + cost->why +
                                     " at byte " + std::to_string(cost->offset) + ".");
  }
}

/// Checks the calls and fills in what clients leave out.
void check_tool_calls(Json& calls, const std::string& path) {
  for (size_t i = 0; i < calls.size(); ++i) {
    const std::string call_path = path + "[" + std::to_string(i) + "]";
    const JsonFields call(calls[i], call_path);
    call.string("id", kMaxNameBytes);
    if (call.string("type", 64).value_or("function") != "function") {
      throw unsupported(call_path + ".type", "Only tool calls of type function are supported.");
    }
    call.require("function");
    const JsonFields function(*call.object("function"), call_path + ".function");
    function.require_string("name", kMaxNameBytes);
    const std::string arguments = function.require_string("arguments", kUnbounded);
    check_inner_json(arguments, call_path + ".function.arguments");
    drop_nulls(calls[i]);
    calls[i]["type"] = "function";
    if (arguments.empty()) calls[i]["function"]["arguments"] = "{}";
  }
}

/// Checks the message and leaves out what says nothing.
void check_message(Json& value, const std::string& path) {
  const JsonFields message(value, path);
  const std::string role = message.require_string("role", 64);
  const bool known = role == "system" || role == "developer" || role == "user" ||
                     role == "assistant" || role == "tool";
  if (!known) {
    throw invalid_request(path + ".role", "'" + path +
                                              ".role' must be system, developer, user, assistant "
                                              "or tool.");
  }
  const Json* calls = message.array("tool_calls", 1024);
  const bool has_calls = calls != nullptr && !calls->empty();
  if (has_calls && role != "assistant") {
    throw invalid_request(path + ".tool_calls", "Only assistant messages have 'tool_calls'.");
  }
  message.string("name", kMaxNameBytes);
  message.string("reasoning_content", kUnbounded);
  if (role == "tool") message.require_string("tool_call_id", kMaxNameBytes);
  const Json* content = message.find("content");
  if (content != nullptr) {
    check_content(*content, path + ".content");
    if (role == "tool" && content->is_string()) {
      check_inner_json(content->get_ref<const std::string&>(), path + ".content");
    }
  } else if (role != "assistant" || !has_calls) {
    message.require("content");
  }
  drop_nulls(value);
  if (has_calls) check_tool_calls(value["tool_calls"], path + ".tool_calls");
  if (!has_calls) value.erase("tool_calls");
}

std::string checked_messages(const JsonFields& body, const RequestLimits& limits) {
  body.require("messages");
  Json messages = *body.array("messages", limits.max_messages);
  if (messages.empty()) throw invalid_request("messages", "'messages' must not be empty.");
  for (size_t i = 0; i < messages.size(); ++i) {
    check_message(messages[i], "messages[" + std::to_string(i) + "]");
  }
  return dump(messages);
}

void check_tool(Json& value, const std::string& path) {
  const JsonFields tool(value, path);
  if (tool.require_string("type", 64) != "function") {
    throw unsupported(path + ".type", "Only tools of type function are supported.");
  }
  tool.require("function");
  const JsonFields function(*tool.object("function"), path + ".function");
  const std::string name = function.require_string("name", kMaxNameBytes);
  if (name.empty()) throw invalid_request(path + ".function.name", "A tool needs a name.");
  function.string("description", kUnbounded);
  function.object("parameters");
  drop_nulls(value["function"]);
}

/// The tools of this name; there must be one.
void add_tools_named(const Json& tools, const std::string& name, Json& chosen) {
  const size_t before = chosen.size();
  for (const Json& tool : tools) {
    if (tool["function"]["name"] == name) chosen.push_back(tool);
  }
  if (chosen.size() > before) return;
  throw invalid_request("tool_choice",
                        "'tool_choice' names '" + name + "', which is not among 'tools'.");
}

/// {"type":"function","function":{"name"}}, or with the name beside the type as in /v1/responses.
std::string name_of_choice(const JsonFields& choice, const char* path) {
  if (const Json* function = choice.object("function")) {
    return JsonFields(*function, std::string(path) + ".function")
        .require_string("name", kMaxNameBytes);
  }
  if (choice.find("name") == nullptr) choice.require("function");
  return choice.require_string("name", kMaxNameBytes);
}

/// tool_choice as an object: what may be called is what is offered.
void choose_tools(const Json& choice, Json& tools, engine::ChatRequest& chat) {
  const JsonFields fields(choice, "tool_choice");
  const std::string type = fields.require_string("type", 64);
  Json chosen = Json::array();
  if (type == "function") {
    add_tools_named(tools, name_of_choice(fields, "tool_choice"), chosen);
    chat.tool_choice = "required";
    chat.parallel_tool_calls = false;
  } else if (type == "allowed_tools") {
    const Json* nested = fields.object("allowed_tools");
    const JsonFields allowed(nested != nullptr ? *nested : choice,
                             nested != nullptr ? "tool_choice.allowed_tools" : "tool_choice");
    chat.tool_choice = allowed.string("mode", 64).value_or("auto");
    if (chat.tool_choice != "auto" && chat.tool_choice != "required") {
      throw invalid_request("tool_choice", "The mode of allowed tools must be auto or required.");
    }
    allowed.require("tools");
    const Json& list = *allowed.array("tools", 1024);
    if (list.empty()) throw invalid_request("tool_choice", "'allowed_tools' names no tool.");
    for (const Json& one : list) {
      add_tools_named(tools,
                      name_of_choice(JsonFields(one, "tool_choice.allowed_tools.tools"),
                                     "tool_choice.allowed_tools.tools"),
                      chosen);
    }
  } else {
    throw unsupported("tool_choice.type",
                      "'tool_choice.type' can only be function or allowed_tools.");
  }
  tools = std::move(chosen);
}

void parse_tools(const JsonFields& body, const RequestLimits& limits, engine::ChatRequest& chat) {
  const Json* given = body.array("tools", limits.max_tools);
  Json tools = given != nullptr ? *given : Json::array();
  const bool have_tools = !tools.empty();
  for (size_t i = 0; i < tools.size(); ++i) {
    check_tool(tools[i], "tools[" + std::to_string(i) + "]");
  }
  chat.parallel_tool_calls = body.boolean("parallel_tool_calls", true);

  const Json* choice = body.find("tool_choice");
  if (choice != nullptr && choice->is_object()) {
    choose_tools(*choice, tools, chat);
  } else if (choice != nullptr) {
    chat.tool_choice = *body.string("tool_choice", 64);
    if (chat.tool_choice != "auto" && chat.tool_choice != "none" &&
        chat.tool_choice != "required") {
      throw invalid_request("tool_choice",
                            "'tool_choice' must be auto, none, required or name a function.");
    }
    if (chat.tool_choice == "required" && !have_tools) {
      throw invalid_request("tool_choice", "'tool_choice' required needs 'tools'.");
    }
  }
  if (have_tools) chat.tools_json = dump(tools);
}

engine::ChatRequest parse_chat_prompt(const JsonFields& body, const RequestLimits& limits) {
  engine::ChatRequest chat;
  chat.messages_json = checked_messages(body, limits);
  parse_tools(body, limits, chat);
  if (const Json* kwargs = body.object("chat_template_kwargs")) {
    chat.template_kwargs_json = dump(*kwargs);
  }
  chat.reasoning_effort = body.string("reasoning_effort", 32).value_or("");
  chat.add_generation_prompt = body.boolean("add_generation_prompt", true);
  chat.continue_final_message = body.boolean("continue_final_message", false);
  if (chat.continue_final_message) {
    if (body.find("add_generation_prompt") != nullptr && chat.add_generation_prompt) {
      throw invalid_request(
          "continue_final_message",
          "'continue_final_message' and 'add_generation_prompt' exclude each other.");
    }
    if (body.require("messages").back()["role"] != "assistant") {
      throw invalid_request("continue_final_message",
                            "'continue_final_message' needs an assistant message at the end.");
    }
    chat.add_generation_prompt = false;
  }
  return chat;
}

// --- Text completions

bool is_token_list(const Json& value) {
  return value.is_array() && !value.empty() && value[0].is_number();
}

Prompt parse_tokens(const Json& list, const std::string& param, const RequestLimits& limits) {
  return Prompt{"", parse_token_list(list, param, limits), false};
}

std::vector<Prompt> parse_prompts(const JsonFields& body, const RequestLimits& limits) {
  const Json& value = body.require("prompt");
  if (value.is_string()) return {Prompt{value.get<std::string>(), {}, true}};
  if (!value.is_array()) {
    throw invalid_request("prompt",
                          "'prompt' must be a string, an array of strings, an array of tokens, or "
                          "an array of arrays of tokens.",
                          "invalid_type");
  }
  if (value.empty()) throw invalid_request("prompt", "'prompt' must not be empty.");
  if (is_token_list(value)) return {parse_tokens(value, "prompt", limits)};

  body.array("prompt", limits.max_prompts);
  std::vector<Prompt> prompts;
  for (size_t i = 0; i < value.size(); ++i) {
    const std::string param = "prompt[" + std::to_string(i) + "]";
    if (value[i].is_string()) {
      prompts.push_back({value[i].get<std::string>(), {}, true});
    } else if (is_token_list(value[i])) {
      prompts.push_back(parse_tokens(value[i], param, limits));
    } else {
      throw invalid_request(param, "'" + param + "' must be a string or a list of tokens.",
                            "invalid_type");
    }
  }
  return prompts;
}

}  // namespace

std::vector<engine::Token> parse_token_list(const Json& list, const std::string& param,
                                            const RequestLimits& limits) {
  std::vector<engine::Token> tokens;
  tokens.reserve(list.size());
  for (const Json& item : list) {
    const bool valid = item.is_number_unsigned() &&
                       item.get<uint64_t>() < static_cast<uint64_t>(limits.vocab_size);
    if (!valid) {
      throw invalid_request(param, "'" + param + "' must hold token ids of this model (0 to " +
                                       std::to_string(limits.vocab_size - 1) + ").");
    }
    tokens.push_back(item.get<engine::Token>());
  }
  return tokens;
}

ChatCompletionRequest parse_chat_completion(std::string_view text, const RequestLimits& limits) {
  return read_chat_completion(parse_json(text), limits);
}

ChatCompletionRequest read_chat_completion(const Json& json, const RequestLimits& limits) {
  const JsonFields body(json, "");
  ChatCompletionRequest request;
  request.common = parse_common(body, limits, /*max_tokens=*/-1);
  request.common.logprobs = body.boolean("logprobs", false);
  const auto top = body.integer("top_logprobs", 0, 20);
  if (top && *top > 0 && !request.common.logprobs) {
    throw invalid_request("top_logprobs", "'top_logprobs' needs 'logprobs': true.");
  }
  if (request.common.logprobs) {
    request.common.generate.sampling.logprobs = static_cast<int32_t>(top.value_or(0));
  }
  request.chat = parse_chat_prompt(body, limits);
  Constraint constraint = parse_constraint(body, limits);
  if (!constraint.grammar.empty() && !request.chat.tools_json.empty()) {
    throw invalid_request("grammar", "'grammar' and 'tools' exclude each other.");
  }
  request.common.schema_param = std::move(constraint.schema_param);
  request.chat.json_schema = std::move(constraint.json_schema);
  // Not by way of the template: most of them know schemas only.
  request.common.generate.grammar = std::move(constraint.grammar);
  return request;
}

void take_extensions(const JsonFields& body, Json& chat) {
  refuse_unsupported(body);
  refuse(body, kOnlyInChats, "belongs to /v1/chat/completions");
  for (const char* name : kExtensions) {
    if (const Json* value = body.find(name)) chat[name] = *value;
  }
}

CompletionRequest parse_completion(std::string_view text, const RequestLimits& limits) {
  const Json json = parse_json(text);
  const JsonFields body(json, "");
  CompletionRequest request;
  constexpr int32_t kDefaultMaxTokens = 16;  // OpenAI's
  request.echo = body.boolean("echo", false);
  request.common = parse_common(body, limits, kDefaultMaxTokens, /*none_allowed=*/request.echo);
  for (const char* name : {"messages", "tools"}) {
    if (const Json* value = body.find(name); value != nullptr && !value->empty()) {
      throw unsupported(name, std::string("'") + name + "' belongs to /v1/chat/completions.");
    }
  }
  request.prompts = parse_prompts(body, limits);
  request.add_special_tokens = body.boolean("add_special_tokens", true);
  if (const auto logprobs = body.integer("logprobs", 0, 20)) {
    request.common.logprobs = true;
    request.common.generate.prompt_logprobs = request.echo;
    request.common.generate.sampling.logprobs = static_cast<int32_t>(*logprobs);
  }
  Constraint constraint = parse_constraint(body, limits);
  request.common.schema_param = std::move(constraint.schema_param);
  request.common.generate.json_schema = std::move(constraint.json_schema);
  request.common.generate.grammar = std::move(constraint.grammar);
  return request;
}

CachedPromptRequest parse_cached_prompt(std::string_view text, const RequestLimits& limits) {
  const Json json = parse_json(text);
  const JsonFields body(json, "");
  CachedPromptRequest request;
  request.model = body.string("model", kMaxNameBytes).value_or("");
  request.name = body.string("name", kMaxNameBytes).value_or("");
  request.chat = parse_chat_prompt(body, limits);
  request.cache_salt = body.string("cache_salt", kMaxNameBytes).value_or("");
  request.ttl_seconds = body.integer("ttl", 0, INT32_MAX).value_or(0);
  return request;
}

int64_t parse_cached_prompt_ttl(std::string_view text) {
  const Json json = parse_json(text);
  const JsonFields body(json, "");
  body.require("ttl");
  return *body.integer("ttl", 0, INT32_MAX);
}

engine::ChatRequest parse_prompt_file_json(std::string_view text, const RequestLimits& limits) {
  Json json = parse_json(text);
  if (json.is_array()) json = Json{{"messages", std::move(json)}};
  return parse_chat_prompt(JsonFields(json, ""), limits);
}

}  // namespace relay::server
