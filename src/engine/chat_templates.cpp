#include "engine/chat_templates.h"

#include <algorithm>
#include <fstream>
#include <random>
#include <sstream>

#include "common.h"
#include "engine/json_schema.h"
#include "json.h"

namespace relay::engine {

namespace {

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  if (!file) {
    throw EngineError(ErrorKind::kInvalidRequest, "The chat template " + path + " cannot be read.");
  }
  // llama.cpp would take the model's own instead.
  if (text.str().find_first_not_of(" \t\r\n") == std::string::npos) {
    throw EngineError(ErrorKind::kInvalidRequest, "The chat template " + path + " is empty.");
  }
  return text.str();
}

common_json parse_json(const std::string& text, const char* what) {
  try {
    return common_json::parse(text);
  } catch (const std::exception& e) {
    throw EngineError(ErrorKind::kInvalidRequest, std::string(what) + " is not JSON: " + e.what());
  }
}

void require(bool ok, const char* message, const char* param = "") {
  if (!ok) throw EngineError(ErrorKind::kInvalidRequest, message, param);
}

/// Adds the object's members, each as JSON.
void add_kwargs(const std::string& json, std::map<std::string, std::string>& kwargs) {
  if (json.empty()) return;
  const common_json object = parse_json(json, "chat_template_kwargs");
  require(object.is_object(), "chat_template_kwargs must be an object.", "chat_template_kwargs");
  for (const auto& item : object.items()) {
    require(item.key() != "enable_thinking" || item.value().is_boolean(),
            "enable_thinking must be a boolean.", "chat_template_kwargs");
    kwargs[item.key()] = item.value().dump();
  }
}

/// Templates make grammars of schemas too, but do not say that it was a schema they failed on, and
/// have the same needs of it.
void use_plain_schemas(common_chat_templates_inputs& inputs, const std::string& tools_json) {
  if (!inputs.json_schema.empty()) {
    inputs.json_schema = plain_schema(inputs.json_schema, "json_schema");
    schema_to_grammar(inputs.json_schema, "json_schema");
  }
  if (inputs.tool_choice == COMMON_CHAT_TOOL_CHOICE_NONE) return;
  if (inputs.tools.empty()) return;
  const common_json tools = parse_json(tools_json, "tools");
  SchemaBudget budget;
  for (size_t i = 0; i < inputs.tools.size(); ++i) {
    std::string& parameters = inputs.tools[i].parameters;
    if (parameters.empty()) continue;
    const std::string param = "tools[" + std::to_string(i) + "].function.parameters";
    const common_json& function = tools.at(i).at("function");
    const bool strict = function.contains("strict") && function.at("strict") == true;
    parameters = plain_tool_schema(parameters, inputs.tools[i].name, param, strict, budget);
  }
}

std::string new_call_id() {
  static thread_local std::mt19937_64 random{std::random_device{}()};
  static constexpr char kLetters[] = "0123456789abcdefghijklmnopqrstuvwxyz";
  std::string id = "call_";
  for (int i = 0; i < 24; ++i) id += kLetters[random() % 36];
  return id;
}

/// What the parser reads of a continued message begins with what was given of it, or with as much
/// of that as it is sure of.
void remove_beginning(const std::string& given, std::string& text) {
  if (text.starts_with(given)) {
    text.erase(0, given.size());
  } else if (given.starts_with(text)) {
    text.clear();
  }
}

common_chat_msg to_common(const ChatMessage& message) {
  common_chat_msg m;
  m.role = "assistant";
  m.content = message.content;
  m.reasoning_content = message.reasoning;
  for (const ToolCall& call : message.tool_calls) {
    m.tool_calls.push_back({call.name, call.arguments, call.id});
  }
  return m;
}

}  // namespace

std::string OutputFormat::call_id(size_t index) const {
  const std::lock_guard lock(mutex_);
  while (call_ids_.size() <= index) call_ids_.push_back(new_call_id());
  return call_ids_[index];
}

ChatTemplates::ChatTemplates(const LlamaModel& model, const std::string& template_file,
                             const std::string& template_kwargs_json)
    : model_(model) {
  add_kwargs(template_kwargs_json, kwargs_);
  const std::string source = template_file.empty() ? std::string() : read_file(template_file);
  try {
    templates_ = common_chat_templates_init(model.model(), source);
  } catch (const std::exception& e) {
    // llama.cpp has printed where, and throws an exception without words.
    const std::string why = e.what();
    throw EngineError(ErrorKind::kModel,
                      "The chat template " +
                          (template_file.empty() ? "of " + model.info().path : template_file) +
                          " does not parse" + (why == "std::exception" ? "." : ": " + why));
  }
}

common_chat_templates_inputs ChatTemplates::make_inputs(const ChatRequest& chat) const {
  common_chat_templates_inputs inputs;
  try {
    inputs.messages = common_chat_msgs_parse_oaicompat(parse_json(chat.messages_json, "messages"));
    if (!chat.tools_json.empty()) {
      inputs.tools = common_chat_tools_parse_oaicompat(parse_json(chat.tools_json, "tools"));
    }
    inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(chat.tool_choice);
  } catch (const EngineError&) {
    throw;
  } catch (const std::exception& e) {
    throw EngineError(ErrorKind::kInvalidRequest, e.what());
  }
  require(!inputs.messages.empty(), "messages must not be empty.");
  require(chat.grammar.empty() || chat.json_schema.empty(),
          "Only one of grammar and json_schema can be given.");
  const bool uses_tools =
      !inputs.tools.empty() && inputs.tool_choice != COMMON_CHAT_TOOL_CHOICE_NONE;
  require(!uses_tools || chat.grammar.empty(), "A grammar cannot be combined with tools.");
  require(!(chat.add_generation_prompt && chat.continue_final_message),
          "add_generation_prompt and continue_final_message exclude each other.");
  if (chat.continue_final_message) {
    const common_chat_msg& last = inputs.messages.back();
    require(last.role == "assistant" && last.tool_calls.empty(),
            "continue_final_message needs an assistant's message without tool calls at the end.");
    inputs.continue_final_message = COMMON_CHAT_CONTINUATION_AUTO;
  }
  inputs.json_schema = chat.json_schema;
  inputs.grammar = chat.grammar;
  inputs.parallel_tool_calls = chat.parallel_tool_calls;
  inputs.add_generation_prompt = chat.add_generation_prompt;
  inputs.reasoning_format = COMMON_REASONING_FORMAT_DEEPSEEK;
  inputs.chat_template_kwargs = kwargs_;
  add_kwargs(chat.template_kwargs_json, inputs.chat_template_kwargs);
  if (const auto it = inputs.chat_template_kwargs.find("enable_thinking");
      it != inputs.chat_template_kwargs.end()) {
    inputs.enable_thinking = it->second == "true";
  }
  if (chat.reasoning_effort == "none") {
    inputs.enable_thinking = false;
  } else if (!chat.reasoning_effort.empty()) {
    inputs.chat_template_kwargs["reasoning_effort"] = common_json(chat.reasoning_effort).dump();
  }
  return inputs;
}

std::string ChatTemplates::source() const { return common_chat_templates_source(templates_.get()); }

common_chat_params ChatTemplates::apply(const common_chat_templates_inputs& inputs) const {
  try {
    return common_chat_templates_apply(templates_.get(), inputs);
  } catch (const std::exception& e) {
    throw EngineError(ErrorKind::kInvalidTemplate,
                      std::string("The chat template cannot render this request: ") + e.what());
  }
}

ChatPrompt ChatTemplates::render(const ChatRequest& chat) const {
  common_chat_templates_inputs inputs = make_inputs(chat);
  auto format = std::make_shared<OutputFormat>();
  // What a template cannot express it drops in silence; here a request is kept or refused.
  if (!inputs.tools.empty() && inputs.tool_choice != COMMON_CHAT_TOOL_CHOICE_NONE &&
      !common_chat_templates_get_caps(templates_.get())["supports_tools"]) {
    throw EngineError(ErrorKind::kInvalidTemplate,
                      "The chat template of this model has no place for tools.", "tools");
  }
  use_plain_schemas(inputs, chat.tools_json);
  format->chat = apply(inputs);
  format->constrained_by = !inputs.json_schema.empty() ? "json_schema"
                           : !inputs.grammar.empty()   ? "grammar"
                           : !inputs.tools.empty()     ? "tools"
                                                       : "";
  const bool constrained =
      !inputs.json_schema.empty() || !inputs.grammar.empty() ||
      (!inputs.tools.empty() && inputs.tool_choice == COMMON_CHAT_TOOL_CHOICE_REQUIRED);
  if (constrained && format->chat.grammar.empty()) {
    throw EngineError(ErrorKind::kInvalidTemplate,
                      "The chat template of this model gives no grammar for this output format.",
                      format->constrained_by);
  }
  format->parser = common_chat_parser_params(format->chat);
  format->parser.reasoning_format = inputs.reasoning_format;
  format->parser.is_continuation = inputs.continue_final_message != COMMON_CHAT_CONTINUATION_NONE;
  if (inputs.continue_final_message != COMMON_CHAT_CONTINUATION_NONE) {
    const common_chat_msg& last = inputs.messages.back();
    format->continued.content = last.content.empty() ? last.render_content() : last.content;
    format->continued.reasoning = last.reasoning_content;
  }
  if (!format->chat.parser.empty()) format->parser.parser.load(format->chat.parser);
  for (const std::string& text : format->chat.preserved_tokens) {
    const auto ids = common_tokenize(model_.vocab(), text, false, true);
    if (ids.size() == 1) format->visible.insert(ids.front());
  }
  ChatPrompt prompt;
  prompt.text = format->chat.prompt;
  prompt.tokens = model_.tokenize(prompt.text, true, true);
  prompt.stop = format->chat.additional_stops;
  prompt.format = std::move(format);
  return prompt;
}

std::vector<Token> ChatTemplates::render_prefix(const ChatRequest& chat) const {
  // Rendering the messages alone would not do: a template may end them differently, or refuse a
  // chat without a user. So two chats that begin with them and then differ at once.
  ChatRequest request = chat;
  request.add_generation_prompt = true;
  request.continue_final_message = false;
  common_chat_templates_inputs inputs = make_inputs(request);
  common_chat_msg turn;
  turn.role = inputs.messages.back().role == "user" ? "assistant" : "user";
  std::vector<std::vector<Token>> rendered;
  inputs.messages.push_back(turn);
  for (const char* content : {"A", "7"}) {
    inputs.messages.back().content = content;
    rendered.push_back(model_.tokenize(apply(inputs).prompt, true, true));
  }
  const auto end =
      std::mismatch(rendered[0].begin(), rendered[0].end(), rendered[1].begin(), rendered[1].end())
          .first;
  return {rendered[0].begin(), end};
}

ChatMessage ChatTemplates::parse(const OutputFormatPtr& format, const std::string& text,
                                 bool is_partial) const {
  if (!format) return ChatMessage{text, {}, {}};
  common_chat_msg m;
  try {
    m = common_chat_parse(text, is_partial, format->parser);
  } catch (const std::exception& e) {
    throw EngineError(ErrorKind::kInternal, e.what());
  }
  ChatMessage message;
  message.content = m.content.empty() ? m.render_content() : m.content;
  message.reasoning = m.reasoning_content;
  remove_beginning(format->continued.content, message.content);
  remove_beginning(format->continued.reasoning, message.reasoning);
  for (const common_chat_tool_call& call : m.tool_calls) {
    const std::string id = call.id.empty() ? format->call_id(message.tool_calls.size()) : call.id;
    message.tool_calls.push_back({id, call.name, call.arguments});
  }
  return message;
}

std::vector<ChatDelta> ChatTemplates::diff(const ChatMessage& before, const ChatMessage& after) {
  std::vector<ChatDelta> deltas;
  try {
    for (const auto& d : common_chat_msg_diff::compute_diffs(to_common(before), to_common(after))) {
      ChatDelta delta;
      delta.content = d.content_delta;
      delta.reasoning = d.reasoning_content_delta;
      if (d.tool_call_index != std::string::npos) {
        delta.tool_call_index = static_cast<int32_t>(d.tool_call_index);
        delta.tool_call = {d.tool_call_delta.id, d.tool_call_delta.name,
                           d.tool_call_delta.arguments};
      }
      deltas.push_back(std::move(delta));
    }
  } catch (const std::exception& e) {
    throw EngineError(ErrorKind::kInternal, e.what());
  }
  return deltas;
}

}  // namespace relay::engine
