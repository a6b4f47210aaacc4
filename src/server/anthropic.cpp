#include "server/anthropic.h"

#include "server/json_fields.h"

namespace relay::server {

namespace {

constexpr size_t kMaxBlocks = 16384;     // of one message
constexpr size_t kUnbounded = SIZE_MAX;  // bounded by the body

/// Reads the parts of a request into a chat in OpenAI's form.
class Translation {
 public:
  Translation(const Json& json, const RequestLimits& limits)
      : body_(json, ""), limits_(limits), chat_(Json::object()) {}

  /// What a chat's prompt depends on.
  void prompt();
  /// How the answer is made.
  void generation();

  const Json& chat() const { return chat_; }
  bool caches() const { return caches_; }
  const std::string& schema_param() const { return schema_param_; }

 private:
  void system();
  void message(const Json& value, const std::string& path);
  void user(const Json& blocks, const std::string& path);
  void assistant(const Json& blocks, const std::string& path);
  void tools();
  void tool_choice();
  void thinking();
  void context_management();
  void output_config();
  void note_cache_control(const JsonFields& fields);
  /// A text block as a part of OpenAI's; other types are refused.
  Json text_part(const JsonFields& block);
  /// A string, or an array of text blocks, as OpenAI's content.
  Json text_content(const Json& content, const std::string& path);
  void add(Json message) { messages_.push_back(std::move(message)); }
  void add_user(Json parts);

  const JsonFields body_;
  const RequestLimits& limits_;
  Json chat_;
  Json messages_ = Json::array();
  std::string schema_param_;  // where the schema stood
  bool caches_ = false;
};

std::string item(const std::string& path, size_t i) { return path + "[" + std::to_string(i) + "]"; }

/// Refuses what is no array, or one of too many.
void check_blocks(const Json& content, const std::string& path) {
  if (!content.is_array()) {
    throw invalid_request(path, "'" + path + "' must be a string or an array of content blocks.",
                          "invalid_type");
  }
  if (content.size() > kMaxBlocks) {
    throw invalid_request(
        path, "'" + path + "' has more than " + std::to_string(kMaxBlocks) + " content blocks.");
  }
}

void Translation::note_cache_control(const JsonFields& fields) {
  const Json* hint = fields.object("cache_control");
  if (hint == nullptr) return;
  const JsonFields control(*hint, fields.name_of("cache_control"));
  if (control.require_string("type", 64) != "ephemeral") {
    throw invalid_request(control.name_of("type"), "'cache_control.type' must be ephemeral.");
  }
  control.string("ttl", 16);
  caches_ = true;
}

Json Translation::text_part(const JsonFields& block) {
  const std::string type = block.require_string("type", 64);
  if (type != "text") {
    throw unsupported(block.name_of("type"),
                      "Content blocks of type '" + type + "' are not supported here, only text.");
  }
  note_cache_control(block);
  return Json{{"type", "text"}, {"text", block.require_string("text", kUnbounded)}};
}

Json Translation::text_content(const Json& content, const std::string& path) {
  if (content.is_string()) return content;
  Json parts = Json::array();
  check_blocks(content, path);
  for (size_t i = 0; i < content.size(); ++i) {
    parts.push_back(text_part(JsonFields(content[i], item(path, i))));
  }
  // Templates take a string more surely than parts.
  return parts.size() == 1 ? parts[0]["text"] : parts;
}

void Translation::system() {
  const Json* value = body_.find("system");
  if (value == nullptr) return;
  Json content = text_content(*value, "system");
  if (!content.empty()) add(Json{{"role", "system"}, {"content", std::move(content)}});
}

/// Several user messages in a row are one: many templates insist on turns.
void Translation::add_user(Json parts) {
  if (parts.empty()) return;
  if (!messages_.empty() && messages_.back()["role"] == "user") {
    Json& before = messages_.back()["content"];
    if (before.is_string()) before = Json::array({Json{{"type", "text"}, {"text", before}}});
    for (Json& part : parts) before.push_back(std::move(part));
    return;
  }
  Json content = parts.size() == 1 ? parts[0]["text"] : parts;
  add(Json{{"role", "user"}, {"content", std::move(content)}});
}

void Translation::user(const Json& blocks, const std::string& path) {
  Json parts = Json::array();
  for (size_t i = 0; i < blocks.size(); ++i) {
    const JsonFields block(blocks[i], item(path, i));
    if (block.string("type", 64).value_or("") != "tool_result") {
      parts.push_back(text_part(block));
      continue;
    }
    if (!parts.empty()) {
      throw invalid_request(block.name_of("type"), "tool_result blocks come before any text.");
    }
    note_cache_control(block);
    const Json* given = block.find("content");
    Json content = given != nullptr ? text_content(*given, block.name_of("content")) : Json("");
    if (content.is_array() && content.empty()) content = "";
    if (block.boolean("is_error", false)) {
      // OpenAI's tool messages have no other place for it.
      if (content.is_string()) {
        content = "Error: " + content.get<std::string>();
      } else {
        content.insert(content.begin(), Json{{"type", "text"}, {"text", "Error: "}});
      }
    }
    add(Json{{"role", "tool"},
             {"tool_call_id", block.require_string("tool_use_id", kMaxNameBytes)},
             {"content", std::move(content)}});
  }
  add_user(std::move(parts));
}

void Translation::assistant(const Json& blocks, const std::string& path) {
  std::string text;
  std::string thought;
  Json calls = Json::array();
  for (size_t i = 0; i < blocks.size(); ++i) {
    const JsonFields block(blocks[i], item(path, i));
    const std::string type = block.require_string("type", 64);
    if (type == "thinking") {
      thought += block.require_string("thinking", kUnbounded);
    } else if (type == "tool_use") {
      note_cache_control(block);
      block.require("input");
      calls.push_back(Json{{"id", block.require_string("id", kMaxNameBytes)},
                           {"type", "function"},
                           {"function",
                            {{"name", block.require_string("name", kMaxNameBytes)},
                             {"arguments", dump(*block.object("input"))}}}});
    } else {
      text += text_part(block)["text"].get_ref<const std::string&>();
    }
  }
  Json message{{"role", "assistant"}};
  if (!text.empty() || calls.empty()) message["content"] = std::move(text);
  if (!thought.empty()) message["reasoning_content"] = std::move(thought);
  if (!calls.empty()) message["tool_calls"] = std::move(calls);
  add(std::move(message));
}

void Translation::message(const Json& value, const std::string& path) {
  const JsonFields fields(value, path);
  const std::string role = fields.require_string("role", 64);
  if (role != "user" && role != "assistant") {
    throw invalid_request(path + ".role", "'" + path +
                                              ".role' must be user or assistant; a system prompt "
                                              "goes into 'system'.");
  }
  const Json& content = fields.require("content");
  const std::string content_path = path + ".content";
  if (!content.is_string()) check_blocks(content, content_path);
  const Json blocks =
      content.is_string() ? Json::array({Json{{"type", "text"}, {"text", content}}}) : content;
  if (role == "user") {
    if (blocks.empty()) {
      throw invalid_request(content_path, "'" + content_path + "' must not be empty.");
    }
    user(blocks, content_path);
  } else {
    assistant(blocks, content_path);
  }
}

void Translation::tools() {
  const Json* given = body_.array("tools", limits_.max_tools);
  if (given == nullptr) return;
  Json tools = Json::array();
  for (size_t i = 0; i < given->size(); ++i) {
    const JsonFields tool((*given)[i], item("tools", i));
    const std::string type = tool.string("type", 64).value_or("custom");
    if (type != "custom") {
      throw unsupported(tool.name_of("type"),
                        "Tools of type '" + type + "' are not supported, only the client's own.");
    }
    note_cache_control(tool);
    Json function{{"name", tool.require_string("name", kMaxNameBytes)}};
    if (const auto about = tool.string("description", kUnbounded)) function["description"] = *about;
    tool.require("input_schema");
    function["parameters"] = *tool.object("input_schema");
    if (tool.boolean("strict", false)) function["strict"] = true;
    tools.push_back(Json{{"type", "function"}, {"function", std::move(function)}});
  }
  if (!tools.empty()) chat_["tools"] = std::move(tools);
}

void Translation::tool_choice() {
  const Json* given = body_.object("tool_choice");
  if (given == nullptr) return;
  const JsonFields choice(*given, "tool_choice");
  const std::string type = choice.require_string("type", 64);
  if (type == "tool") {
    chat_["tool_choice"] = {{"type", "function"},
                            {"function", {{"name", choice.require_string("name", kMaxNameBytes)}}}};
  } else if (type == "auto" || type == "none") {
    chat_["tool_choice"] = type;
  } else if (type == "any") {
    chat_["tool_choice"] = "required";
  } else {
    throw invalid_request("tool_choice.type",
                          "'tool_choice.type' must be auto, any, tool or none.");
  }
  if (choice.boolean("disable_parallel_tool_use", false)) chat_["parallel_tool_calls"] = false;
}

void Translation::thinking() {
  const Json* given = body_.object("thinking");
  if (given == nullptr) return;
  const std::string type = JsonFields(*given, "thinking").require_string("type", 64);
  if (type != "enabled" && type != "disabled" && type != "adaptive") {
    throw invalid_request("thinking.type",
                          "'thinking.type' must be enabled, disabled or adaptive.");
  }
  // Templates of models that think know this name; the others never think.
  if (type != "adaptive") chat_["chat_template_kwargs"]["enable_thinking"] = type == "enabled";
}

void Translation::output_config() {
  const Json* format = body_.object("output_format");  // as it was called before
  std::string path = "output_format";
  if (const Json* given = body_.object("output_config")) {
    const JsonFields config(*given, "output_config");
    if (const auto effort = config.string("effort", 32)) chat_["reasoning_effort"] = *effort;
    if (const Json* its = config.object("format")) {
      format = its;
      path = config.name_of("format");
    }
  }
  if (format == nullptr) return;
  const JsonFields fields(*format, path);
  if (fields.require_string("type", 64) != "json_schema") {
    throw invalid_request(fields.name_of("type"),
                          "'" + fields.name_of("type") + "' must be json_schema.");
  }
  schema_param_ = fields.name_of("schema");
  chat_["response_format"] = {{"type", "json_schema"},
                              {"json_schema", {{"schema", fields.require("schema")}}}};
}

void Translation::context_management() {
  const Json* given = body_.object("context_management");
  if (given == nullptr) return;
  const Json* edits = JsonFields(*given, "context_management").array("edits", kMaxBlocks);
  for (size_t i = 0; edits != nullptr && i < edits->size(); ++i) {
    const JsonFields edit((*edits)[i], item("context_management.edits", i));
    // Thoughts are what the client sends back: to keep all is to do nothing.
    if (edit.require_string("type", 64) == "clear_thinking_20251015") {
      const Json* keep = edit.find("keep");
      if (keep != nullptr && *keep == "all") continue;
    }
    throw unsupported(edit.name_of("type"),
                      "The server keeps no conversation that it could edit; the one edit it takes "
                      "is clear_thinking_20251015 with 'keep' set to all.");
  }
}

void Translation::prompt() {
  context_management();
  for (const char* name : {"container", "mcp_servers"}) {
    const Json* value = body_.find(name);
    if (value != nullptr && !value->empty()) {
      throw unsupported(name, std::string("'") + name + "' is not supported.");
    }
  }
  body_.object("chat_template_kwargs");  // thinking() adds to it
  take_extensions(body_, chat_);
  note_cache_control(body_);
  if (const auto model = body_.string("model", kMaxNameBytes)) chat_["model"] = *model;
  system();
  body_.require("messages");
  const Json& given = *body_.array("messages", limits_.max_messages);
  if (given.empty()) throw invalid_request("messages", "'messages' must not be empty.");
  for (size_t i = 0; i < given.size(); ++i) message(given[i], item("messages", i));
  // An answer that the client has begun is continued.
  const Json& last = messages_.back();
  if (last["role"] == "assistant") {
    if (last.contains("tool_calls")) {
      throw invalid_request("messages", "After a tool_use block comes its tool_result.");
    }
    chat_["continue_final_message"] = true;
  }
  chat_["messages"] = std::move(messages_);
  tools();
  tool_choice();
  thinking();
  output_config();
}

void Translation::generation() {
  body_.require("max_tokens");
  chat_["max_tokens"] = *body_.integer("max_tokens", 1, INT32_MAX);
  chat_["stream"] = body_.boolean("stream", false);
  if (const auto value = body_.number("temperature", 0, 1)) chat_["temperature"] = *value;
  if (const auto value = body_.number("top_p", 0, 1)) chat_["top_p"] = *value;
  if (const Json* stop = body_.array("stop_sequences", limits_.max_stop_strings)) {
    for (size_t i = 0; i < stop->size(); ++i) {
      const Json& text = (*stop)[i];
      const std::string path = item("stop_sequences", i);
      if (!text.is_string()) {
        throw invalid_request(path, "'" + path + "' must be a string.", "invalid_type");
      }
      const size_t size = text.get_ref<const std::string&>().size();
      if (size == 0 || size > limits_.max_stop_bytes) {
        throw invalid_request(path, "A stop sequence must have 1 to " +
                                        std::to_string(limits_.max_stop_bytes) + " bytes.");
      }
    }
    chat_["stop"] = *stop;
  }
  body_.object("metadata");
}

ChatCompletionRequest read_chat(const Translation& translation, const RequestLimits& limits) {
  ChatCompletionRequest chat = read_chat_completion(translation.chat(), limits);
  chat.common.schema_param = translation.schema_param();
  return chat;
}

// --- Answers

class MessagesWriter : public ChatWriter {
 public:
  MessagesWriter(const ResponseHead& head, bool caches)
      : id_(random_id("msg_")), model_(head.model), caches_(caches) {}

  std::string error_frame(const ApiError& error) override {
    return "event: error\ndata: " + error.anthropic_body() + "\n\n";
  }

 protected:
  std::string begin(const engine::Usage& usage) override {
    Json message = message_json();
    message["content"] = Json::array();
    message["stop_reason"] = nullptr;
    message["stop_sequence"] = nullptr;
    message["usage"] = usage_json(usage);
    return event_frame({{"type", "message_start"}, {"message", std::move(message)}});
  }
  std::string open(Block& block) override {
    Json content;
    switch (block.kind) {
      case Block::Kind::kText:
        content = {{"type", "text"}, {"text", ""}};
        break;
      case Block::Kind::kThought:
        content = {{"type", "thinking"}, {"thinking", ""}, {"signature", ""}};
        break;
      case Block::Kind::kCall:
        content = {{"type", "tool_use"}, {"id", block.id}, {"name", block.name}};
        content["input"] = Json::object();
        break;
    }
    return event_frame({{"type", "content_block_start"},
                        {"index", blocks().size() - 1},
                        {"content_block", std::move(content)}});
  }
  std::string append(const Block& block, const std::string& piece) override {
    Json delta;
    switch (block.kind) {
      case Block::Kind::kText:
        delta = {{"type", "text_delta"}, {"text", piece}};
        break;
      case Block::Kind::kThought:
        delta = {{"type", "thinking_delta"}, {"thinking", piece}};
        break;
      case Block::Kind::kCall:
        delta = {{"type", "input_json_delta"}, {"partial_json", piece}};
        break;
    }
    return event_frame({{"type", "content_block_delta"},
                        {"index", blocks().size() - 1},
                        {"delta", std::move(delta)}});
  }
  std::string close(const Block& /*block*/, bool /*cut*/) override {
    return event_frame({{"type", "content_block_stop"}, {"index", blocks().size() - 1}});
  }
  std::string finish(const ChatEnd& end) override {
    Json delta;
    set_stop(delta, end);
    return event_frame({{"type", "message_delta"},
                        {"delta", std::move(delta)},
                        {"usage", usage_json(end.usage)}}) +
           event_frame({{"type", "message_stop"}});
  }
  Json whole(const ChatEnd& end) override {
    Json message = message_json();
    Json content = Json::array();
    for (const Block& block : blocks()) {
      switch (block.kind) {
        case Block::Kind::kText:
          content.push_back({{"type", "text"}, {"text", block.text}});
          break;
        case Block::Kind::kThought:
          content.push_back({{"type", "thinking"}, {"thinking", block.text}, {"signature", ""}});
          break;
        case Block::Kind::kCall:
          content.push_back({{"type", "tool_use"},
                             {"id", block.id},
                             {"name", block.name},
                             {"input", input_of(block)}});
          break;
      }
    }
    message["content"] = std::move(content);
    set_stop(message, end);
    message["usage"] = usage_json(end.usage);
    return message;
  }

 private:
  Json message_json() const {
    return {{"id", id_}, {"type", "message"}, {"role", "assistant"}, {"model", model_}};
  }
  /// An answer cut short may end within a call's arguments; an object is what clients expect. The
  /// same for arguments that would take too much to parse.
  static Json input_of(const Block& block) {
    try {
      Json input = parse_json(block.text);
      return input.is_object() ? input : Json::object();
    } catch (const ApiError&) {
      return Json::object();
    }
  }
  void set_stop(Json& json, const ChatEnd& end) const {
    const bool calls = !blocks().empty() && blocks().back().kind == Block::Kind::kCall;
    const char* reason = end.reason == engine::FinishReason::kLength ? "max_tokens"
                         : calls                                     ? "tool_use"
                         : !end.stop_string.empty()                  ? "stop_sequence"
                                                                     : "end_turn";
    json["stop_reason"] = reason;
    json["stop_sequence"] = end.stop_string.empty() ? Json(nullptr) : Json(end.stop_string);
  }
  /// The three kinds of input tokens add up to the prompt.
  Json usage_json(const engine::Usage& usage) const {
    const int32_t written = caches_ ? usage.cache_write_tokens : 0;
    return {{"input_tokens", usage.prompt_tokens - usage.cached_tokens - written},
            {"cache_creation_input_tokens", written},
            {"cache_read_input_tokens", usage.cached_tokens},
            {"output_tokens", usage.completion_tokens}};
  }

  const std::string id_;
  const std::string model_;
  const bool caches_;
};

}  // namespace

MessagesRequest parse_messages(std::string_view text, const RequestLimits& limits) {
  const Json json = parse_json(text);
  Translation translation(json, limits);
  translation.prompt();
  translation.generation();
  return {read_chat(translation, limits), translation.caches()};
}

ChatCompletionRequest parse_count_tokens(std::string_view text, const RequestLimits& limits) {
  const Json json = parse_json(text);
  Translation translation(json, limits);
  translation.prompt();
  return read_chat(translation, limits);
}

std::unique_ptr<ChatWriter> make_messages_writer(const ResponseHead& head, bool caches) {
  return std::make_unique<MessagesWriter>(head, caches);
}

}  // namespace relay::server
