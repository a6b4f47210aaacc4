// Chat templates: messages to prompt, and generated text back to a message. A layer over
// llama.cpp's `common`, where both live. Immutable after construction, so any thread may use it.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_set>
#include <vector>

#include "chat.h"
#include "engine/engine.h"
#include "engine/llama_model.h"

namespace relay::engine {

/// What OutputFormat hides from engine.h.
struct OutputFormat {
  common_chat_params chat;
  common_chat_parser_params parser;
  std::unordered_set<Token> visible;  ///< control tokens the parser wants to see as text
  std::string constrained_by;         ///< the field that asked for the grammar, if one did
  ChatMessage continued;  ///< the beginning of the message that was given, and is no part of the
                          ///< answer

  /// The id of the index-th tool call: the same in every reading of a growing text, though the
  /// model writes none.
  std::string call_id(size_t index) const;

 private:
  mutable std::mutex mutex_;
  mutable std::vector<std::string> call_ids_;  // guarded by mutex_
};

class ChatTemplates {
 public:
  /// template_file: a Jinja template instead of the model's own; empty: the model's, or ChatML if
  /// it has none. template_kwargs_json: an object, the defaults of ChatRequest's; empty: none.
  /// Throws EngineError: kModel if the template does not parse, kInvalidRequest if the object does
  /// not.
  ChatTemplates(const LlamaModel& model, const std::string& template_file,
                const std::string& template_kwargs_json);

  ChatPrompt render(const ChatRequest& chat) const;
  std::vector<Token> render_prefix(const ChatRequest& chat) const;
  ChatMessage parse(const OutputFormatPtr& format, const std::string& text, bool is_partial) const;
  static std::vector<ChatDelta> diff(const ChatMessage& before, const ChatMessage& after);

  std::string source() const;

 private:
  common_chat_templates_inputs make_inputs(const ChatRequest& chat) const;
  common_chat_params apply(const common_chat_templates_inputs& inputs) const;

  const LlamaModel& model_;
  common_chat_templates_ptr templates_;
  std::map<std::string, std::string> kwargs_;  // name -> JSON
};

}  // namespace relay::engine
