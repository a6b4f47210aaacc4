#include "server/responses.h"

#include <array>

#include "server/json_fields.h"

namespace relay::server {

namespace {

constexpr size_t kMaxParts = 16384;      // of one item
constexpr size_t kUnbounded = SIZE_MAX;  // bounded by the body

/// Fields that are refused unless they ask for nothing (null, false, empty).
constexpr std::array kRefused = {
    std::pair{"previous_response_id", "responses are not stored; send the conversation in 'input'"},
    std::pair{"conversation", "conversations are not stored; send the conversation in 'input'"},
    std::pair{"store", "responses are not stored"},
    std::pair{"background", "responses are not stored"},
    std::pair{"prompt", "prompt templates are not stored"},
    std::pair{"context_management", "nothing is compacted here"},
    std::pair{"max_tool_calls", "there are no built-in tools"},
};

std::string item(const std::string& path, size_t i) { return path + "[" + std::to_string(i) + "]"; }

/// Reads the parts of a request into a chat in OpenAI's older form.
class Translation {
 public:
  Translation(const Json& json, const RequestLimits& limits)
      : body_(json, ""), limits_(limits), chat_(Json::object()) {}

  void run();
  const Json& chat() const { return chat_; }
  Json& echo() { return echo_; }

 private:
  void refuse_memory();
  void input();
  void input_item(const Json& value, const std::string& path);
  void message(const JsonFields& fields);
  void function_call(const JsonFields& fields);
  void tools();
  void text_format();
  Json text_content(const Json& content, const std::string& path);
  Json& assistant_message();

  const JsonFields body_;
  const RequestLimits& limits_;
  Json chat_;
  Json messages_ = Json::array();
  std::string thought_;  // of the assistant's message that follows
  Json echo_;
};

void Translation::refuse_memory() {
  for (const auto& [name, why] : kRefused) {
    const Json* value = body_.find(name);
    if (value == nullptr || *value == Json(false) || (!value->is_primitive() && value->empty())) {
      continue;
    }
    throw unsupported(name, std::string("'") + name + "' is not supported: " + why + ".");
  }
  if (body_.string("truncation", 64).value_or("disabled") != "disabled") {
    throw unsupported("truncation", "'truncation' can only be disabled.");
  }
  if (const Json* include = body_.array("include", 64)) {
    for (const Json& one : *include) {
      // Reasoning is answered in plain and taken back so: nothing to encrypt.
      if (one == "reasoning.encrypted_content") continue;
      throw unsupported("include", "'include' can only name reasoning.encrypted_content.");
    }
  }
  if (body_.integer("top_logprobs", 0, 20).value_or(0) > 0) {
    throw unsupported("top_logprobs",
                      "'top_logprobs' is not supported; /v1/chat/completions is "
                      "the endpoint with log probabilities.");
  }
}

Json Translation::text_content(const Json& content, const std::string& path) {
  if (content.is_string()) return content;
  if (!content.is_array()) {
    throw invalid_request(path, "'" + path + "' must be a string or an array of parts.",
                          "invalid_type");
  }
  if (content.size() > kMaxParts) {
    throw invalid_request(path,
                          "'" + path + "' has more than " + std::to_string(kMaxParts) + " parts.");
  }
  Json parts = Json::array();
  for (size_t i = 0; i < content.size(); ++i) {
    const JsonFields part(content[i], item(path, i));
    const std::string type = part.require_string("type", 64);
    if (type != "input_text" && type != "output_text" && type != "text") {
      throw unsupported(part.name_of("type"),
                        "Parts of type '" + type + "' are not supported, only text.");
    }
    parts.push_back({{"type", "text"}, {"text", part.require_string("text", kUnbounded)}});
  }
  return parts.size() == 1 ? parts[0]["text"] : parts;
}

/// An answer with several items (a thought, a text, calls) is one message of a chat.
Json& Translation::assistant_message() {
  if (messages_.empty() || messages_.back()["role"] != "assistant") {
    messages_.push_back({{"role", "assistant"}});
  }
  Json& message = messages_.back();
  if (!thought_.empty()) {
    std::string before = message.value("reasoning_content", "");
    message["reasoning_content"] = before + thought_;
    thought_.clear();
  }
  return message;
}

void Translation::message(const JsonFields& fields) {
  const std::string role = fields.require_string("role", 64);
  const std::string path = fields.name_of("content");
  Json content = text_content(fields.require("content"), path);
  if (role != "assistant") {
    if (role != "user" && role != "system" && role != "developer") {
      throw invalid_request(fields.name_of("role"),
                            "'role' must be user, assistant, system or developer.");
    }
    messages_.push_back({{"role", role}, {"content", std::move(content)}});
    return;
  }
  const bool continues = !messages_.empty() && messages_.back()["role"] == "assistant" &&
                         messages_.back().contains("content");
  if (continues) messages_.push_back({{"role", "assistant"}});
  assistant_message()["content"] = std::move(content);
}

void Translation::function_call(const JsonFields& fields) {
  Json call{{"id", fields.require_string("call_id", kMaxNameBytes)},
            {"type", "function"},
            {"function",
             {{"name", fields.require_string("name", kMaxNameBytes)},
              {"arguments", fields.require_string("arguments", kUnbounded)}}}};
  Json& message = assistant_message();
  if (!message.contains("tool_calls")) message["tool_calls"] = Json::array();
  message["tool_calls"].push_back(std::move(call));
}

void Translation::input_item(const Json& value, const std::string& path) {
  const JsonFields fields(value, path);
  const bool has_role = fields.find("role") != nullptr;
  const std::string type = fields.string("type", 64).value_or(has_role ? "message" : "");
  if (type == "message") {
    message(fields);
  } else if (type == "function_call") {
    function_call(fields);
  } else if (type == "function_call_output") {
    messages_.push_back(
        {{"role", "tool"},
         {"tool_call_id", fields.require_string("call_id", kMaxNameBytes)},
         {"content", text_content(fields.require("output"), fields.name_of("output"))}});
  } else if (type == "reasoning") {
    if (const Json* content = fields.array("content", kMaxParts)) {
      for (size_t i = 0; i < content->size(); ++i) {
        const JsonFields part((*content)[i], item(fields.name_of("content"), i));
        thought_ += part.require_string("text", kUnbounded);
      }
    }
  } else if (type.empty()) {
    fields.require("type");
  } else {
    throw unsupported(fields.name_of("type"),
                      "Input items of type '" + type + "' are not supported.");
  }
}

void Translation::input() {
  if (const auto instructions = body_.string("instructions", kUnbounded)) {
    messages_.push_back({{"role", "system"}, {"content", *instructions}});
  }
  const Json& given = body_.require("input");
  if (given.is_string()) {
    messages_.push_back({{"role", "user"}, {"content", given}});
  } else {
    const Json* items = body_.array("input", limits_.max_messages);
    if (items->empty()) throw invalid_request("input", "'input' must not be empty.");
    for (size_t i = 0; i < items->size(); ++i) input_item((*items)[i], item("input", i));
  }
  for (Json& message : messages_) {
    const bool silent = message["role"] == "assistant" && !message.contains("content") &&
                        !message.contains("tool_calls");
    if (silent) message["content"] = "";  // a thought alone
  }
  if (messages_.empty()) throw invalid_request("input", "'input' holds no message.");
  chat_["messages"] = std::move(messages_);
}

void Translation::tools() {
  if (const Json* given = body_.array("tools", limits_.max_tools)) {
    Json tools = Json::array();
    for (size_t i = 0; i < given->size(); ++i) {
      const JsonFields tool((*given)[i], item("tools", i));
      const std::string type = tool.require_string("type", 64);
      if (type != "function") {
        throw unsupported(tool.name_of("type"),
                          "Tools of type '" + type + "' are not supported, only functions.");
      }
      Json function{{"name", tool.require_string("name", kMaxNameBytes)}};
      if (const auto about = tool.string("description", kUnbounded)) {
        function["description"] = *about;
      }
      if (const Json* parameters = tool.object("parameters")) function["parameters"] = *parameters;
      if (tool.boolean("strict", false)) function["strict"] = true;
      tools.push_back({{"type", "function"}, {"function", std::move(function)}});
    }
    if (!tools.empty()) chat_["tools"] = std::move(tools);
  }
  if (const Json* choice = body_.find("tool_choice")) chat_["tool_choice"] = *choice;
  chat_["parallel_tool_calls"] = body_.boolean("parallel_tool_calls", true);
}

void Translation::text_format() {
  const Json* text = body_.object("text");
  if (text == nullptr) return;
  const JsonFields fields(*text, "text");
  fields.string("verbosity", 64);
  const Json* format = fields.object("format");
  if (format == nullptr) return;
  const JsonFields format_fields(*format, "text.format");
  const std::string type = format_fields.require_string("type", 64);
  if (type == "json_schema") {
    chat_["response_format"] = {{"type", type},
                                {"json_schema", {{"schema", format_fields.require("schema")}}}};
  } else if (type == "text" || type == "json_object") {
    chat_["response_format"] = {{"type", type}};
  } else {
    throw invalid_request("text.format.type",
                          "'text.format.type' must be text, json_object or json_schema.");
  }
}

void Translation::run() {
  refuse_memory();
  if (const auto model = body_.string("model", kMaxNameBytes)) chat_["model"] = *model;
  input();
  tools();
  text_format();
  chat_["stream"] = body_.boolean("stream", false);
  if (const auto most = body_.integer("max_output_tokens", 1, INT32_MAX)) {
    chat_["max_tokens"] = *most;
  }
  if (const auto value = body_.number("temperature", 0, 2)) chat_["temperature"] = *value;
  if (const auto value = body_.number("top_p", 0, 1)) chat_["top_p"] = *value;
  take_extensions(body_, chat_);
  if (const Json* reasoning = body_.object("reasoning")) {
    const JsonFields fields(*reasoning, "reasoning");
    if (const auto effort = fields.string("effort", 32)) chat_["reasoning_effort"] = *effort;
  }
  body_.object("metadata");
  body_.string("user", kUnbounded);

  const auto repeat = [&](const char* name, const Json& fallback) {
    const Json* value = body_.find(name);
    echo_[name] = value != nullptr ? *value : fallback;
  };
  repeat("instructions", nullptr);
  repeat("max_output_tokens", nullptr);
  repeat("metadata", Json::object());
  repeat("parallel_tool_calls", true);
  repeat("reasoning", {{"effort", nullptr}, {"summary", nullptr}});
  repeat("temperature", 1.0);
  repeat("text", {{"format", {{"type", "text"}}}});
  repeat("tool_choice", "auto");
  repeat("tools", Json::array());
  repeat("top_p", 1.0);
  repeat("user", nullptr);
}

// --- Answers

class ResponsesWriter : public ChatWriter {
 public:
  ResponsesWriter(const ResponseHead& head, Json echo)
      : head_(head), id_(random_id("resp_")), echo_(std::move(echo)) {}

  std::string error_frame(const ApiError& error) override {
    Json body{{"type", "error"},
              {"code", error.code()},
              {"message", error.what()},
              {"param", error.param().empty() ? Json(nullptr) : Json(error.param())}};
    return event(std::move(body));
  }

 protected:
  std::string begin(const engine::Usage& /*usage*/) override {
    const Json response = response_json("in_progress");
    std::string frames = event({{"type", "response.created"}, {"response", response}});
    frames += event({{"type", "response.in_progress"}, {"response", response}});
    return frames;
  }
  std::string open(Block& block) override {
    item_id_ = random_id(prefix_of(block));
    Block empty = block;
    empty.text.clear();
    Json item = item_json(empty, "in_progress");
    if (block.kind != Block::Kind::kCall) item["content"] = Json::array();
    std::string frames =
        event({{"type", "response.output_item.added"}, {"output_index", index()}, {"item", item}});
    if (block.kind != Block::Kind::kCall) {
      frames += event(in_part("response.content_part.added", {{"part", part_json(empty)}}));
    }
    return frames;
  }
  std::string append(const Block& block, const std::string& piece) override {
    switch (block.kind) {
      case Block::Kind::kText:
        return event(
            in_part("response.output_text.delta", {{"delta", piece}, {"logprobs", Json::array()}}));
      case Block::Kind::kThought:
        return event(in_part("response.reasoning_text.delta", {{"delta", piece}}));
      case Block::Kind::kCall:
        return event(in_item("response.function_call_arguments.delta", {{"delta", piece}}));
    }
    return "";
  }
  std::string close(const Block& block, bool cut) override {
    std::string frames;
    switch (block.kind) {
      case Block::Kind::kText:
        frames = event(in_part("response.output_text.done",
                               {{"text", block.text}, {"logprobs", Json::array()}}));
        break;
      case Block::Kind::kThought:
        frames = event(in_part("response.reasoning_text.done", {{"text", block.text}}));
        break;
      case Block::Kind::kCall:
        frames = event(in_item("response.function_call_arguments.done",
                               {{"name", block.name}, {"arguments", block.text}}));
        break;
    }
    if (block.kind != Block::Kind::kCall) {
      frames += event(in_part("response.content_part.done", {{"part", part_json(block)}}));
    }
    items_.push_back(item_json(block, cut ? "incomplete" : "completed"));
    frames += event({{"type", "response.output_item.done"},
                     {"output_index", index()},
                     {"item", items_.back()}});
    return frames;
  }
  std::string finish(const ChatEnd& end) override {
    Json response = whole_response(end);
    const std::string type = "response." + response["status"].get<std::string>();
    return event({{"type", type}, {"response", std::move(response)}});
  }
  Json whole(const ChatEnd& end) override {
    for (const Block& block : blocks()) {
      item_id_ = random_id(prefix_of(block));
      const bool cut = end.cut() && &block == &blocks().back();
      items_.push_back(item_json(block, cut ? "incomplete" : "completed"));
    }
    return whole_response(end);
  }

 private:
  static const char* prefix_of(const Block& block) {
    switch (block.kind) {
      case Block::Kind::kThought:
        return "rs_";
      case Block::Kind::kCall:
        return "fc_";
      case Block::Kind::kText:
        break;
    }
    return "msg_";
  }
  size_t index() const { return blocks().size() - 1; }

  std::string event(Json body) {
    body["sequence_number"] = sequence_number_++;
    return event_frame(body);
  }
  Json in_item(const char* type, const Json& rest) const {
    Json body{{"type", type}, {"item_id", item_id_}, {"output_index", index()}};
    body.update(rest);
    return body;
  }
  Json in_part(const char* type, const Json& rest) const {
    Json body = in_item(type, {{"content_index", 0}});
    body.update(rest);
    return body;
  }
  static Json part_json(const Block& block) {
    if (block.kind == Block::Kind::kThought) {
      return {{"type", "reasoning_text"}, {"text", block.text}};
    }
    return {{"type", "output_text"},
            {"text", block.text},
            {"annotations", Json::array()},
            {"logprobs", Json::array()}};
  }
  Json item_json(const Block& block, const char* status) const {
    Json item;
    item["id"] = item_id_;
    switch (block.kind) {
      case Block::Kind::kText:
        item["type"] = "message";
        item["role"] = "assistant";
        item["content"] = Json::array({part_json(block)});
        break;
      case Block::Kind::kThought:
        item["type"] = "reasoning";
        item["summary"] = Json::array();
        item["content"] = Json::array({part_json(block)});
        break;
      case Block::Kind::kCall:
        item["type"] = "function_call";
        item["call_id"] = block.id;
        item["name"] = block.name;
        item["arguments"] = block.text;
        break;
    }
    item["status"] = status;
    return item;
  }
  Json response_json(const char* status) const {
    Json response{{"id", id_},
                  {"object", "response"},
                  {"created_at", head_.created},
                  {"status", status},
                  {"background", false},
                  {"error", nullptr},
                  {"incomplete_details", nullptr},
                  {"model", head_.model}};
    response.update(echo_);
    response["output"] = items_;
    response["previous_response_id"] = nullptr;
    response["store"] = false;
    response["truncation"] = "disabled";
    response["usage"] = nullptr;
    return response;
  }
  Json whole_response(const ChatEnd& end) {
    Json response = response_json(end.cut() ? "incomplete" : "completed");
    if (end.cut()) response["incomplete_details"] = {{"reason", "max_output_tokens"}};
    const engine::Usage& usage = end.usage;
    response["usage"] = {{"input_tokens", usage.prompt_tokens},
                         {"input_tokens_details",
                          {{"cached_tokens", usage.cached_tokens},
                           {"cache_write_tokens", usage.cache_write_tokens}}},
                         {"output_tokens", usage.completion_tokens},
                         {"output_tokens_details", {{"reasoning_tokens", end.reasoning_tokens}}},
                         {"total_tokens", usage.prompt_tokens + usage.completion_tokens}};
    return response;
  }

  const ResponseHead head_;
  const std::string id_;
  const Json echo_;
  Json items_ = Json::array();  // finished
  std::string item_id_;         // of the block that is open
  int64_t sequence_number_ = 0;
};

}  // namespace

ResponsesRequest parse_responses(std::string_view text, const RequestLimits& limits) {
  const Json json = parse_json(text);
  Translation translation(json, limits);
  translation.run();
  ResponsesRequest request;
  request.chat = read_chat_completion(translation.chat(), limits);
  request.chat.common.schema_param = "text.format.schema";
  request.chat.common.chat_param = "input";
  request.echo = std::move(translation.echo());
  return request;
}

std::unique_ptr<ChatWriter> make_responses_writer(const ResponseHead& head, Json echo) {
  return std::make_unique<ResponsesWriter>(head, std::move(echo));
}

}  // namespace relay::server
