#include "server/generation.h"

#include <algorithm>
#include <iterator>
#include <map>
#include <stdexcept>
#include <utility>

#include "base/unix_time.h"

namespace relay::server {

std::string effective_salt(const std::string& caller, const std::string& client) {
  return client.empty() ? caller : caller + "/salt/" + client;
}

std::string pin_salt(const std::string& client) { return client.empty() ? "" : "salt/" + client; }

Generation::Generation(Api api, CommonRequest common, GenerationContext context)
    : api_(api), common_(std::move(common)), context_(std::move(context)) {
  head_.api = api;
  head_.id = random_id(api == Api::kChat ? "chatcmpl-" : "cmpl-");
  head_.model = context_.model;
  head_.fingerprint = context_.fingerprint;
  head_.created = unix_now();
  common_.generate.adapter = context_.adapter;
  common_.generate.pin_salt = pin_salt(common_.generate.cache_salt);
  common_.generate.cache_salt = effective_salt(context_.caller_salt, common_.generate.cache_salt);
  queue_ = std::make_shared<EventQueue>(context_.max_queued_bytes, std::move(context_.wake));
}

Generation::~Generation() { cancel(); }

template <typename Work>
auto Generation::with_api_errors(const std::string& param, Work work) {
  try {
    return work();
  } catch (const engine::EngineError& error) {
    throw from_engine(error.kind(), error.what(),
                      error.param().empty() ? param : field_of(error.param()));
  }
}

std::string Generation::field_of(const std::string& engine_param) const {
  if (engine_param == "json_schema") return common_.schema_param;
  if (engine_param == "prompt" && api_ == Api::kChat) return common_.chat_param;
  return engine_param;
}

std::unique_ptr<Generation> Generation::start(ChatCompletionRequest request,
                                              GenerationContext context) {
  return start(std::move(request), std::move(context), nullptr);
}

std::unique_ptr<Generation> Generation::start(ChatCompletionRequest request,
                                              GenerationContext context, const MakeWriter& make) {
  std::unique_ptr<Generation> self(
      new Generation(Api::kChat, std::move(request.common), std::move(context)));
  if (make) self->writer_ = make(self->head_);
  engine::ChatPrompt prompt = self->with_api_errors(
      self->common_.chat_param, [&] { return self->context_.engine->render_chat(request.chat); });
  self->format_ = prompt.format;

  engine::GenerateRequest generate = self->common_.generate;
  generate.prompt = std::move(prompt.tokens);
  generate.format = prompt.format;
  generate.stop.insert(generate.stop.end(), prompt.stop.begin(), prompt.stop.end());
  self->submit(std::move(generate), "");
  return self;
}

std::unique_ptr<Generation> Generation::start(CompletionRequest request,
                                              GenerationContext context) {
  std::unique_ptr<Generation> self(
      new Generation(Api::kCompletion, std::move(request.common), std::move(context)));
  const engine::Engine& engine = *self->context_.engine;
  int64_t prompt_logprobs = 0;
  for (Prompt& prompt : request.prompts) {
    self->with_api_errors("prompt", [&] {
      if (prompt.is_text) {
        // The caller wrote the whole prompt, so control tokens in it are the caller's own.
        prompt.tokens = engine.tokenize(prompt.text, request.add_special_tokens,
                                        /*parse_special=*/true);
      } else if (request.echo) {
        prompt.text = engine.detokenize(prompt.tokens, /*special=*/true);
      }
    });
    if (prompt.tokens.empty()) throw invalid_request("prompt", "A prompt has no tokens.");
    engine::GenerateRequest generate = self->common_.generate;
    if (generate.prompt_logprobs) {
      const int64_t of_each = (1 + generate.sampling.logprobs) * int64_t{generate.n};
      prompt_logprobs += static_cast<int64_t>(prompt.tokens.size()) * of_each;
      if (prompt_logprobs > self->context_.max_prompt_logprobs) {
        throw invalid_request("logprobs", "'echo' with 'logprobs' asks for more than " +
                                              std::to_string(self->context_.max_prompt_logprobs) +
                                              " log probabilities: send fewer or shorter prompts.");
      }
    }
    generate.prompt = std::move(prompt.tokens);
    self->submit(std::move(generate), request.echo ? std::move(prompt.text) : "");
  }
  return self;
}

void Generation::submit(engine::GenerateRequest request, std::string echo) {
  Part part;
  part.usage.prompt_tokens = static_cast<int32_t>(request.prompt.size());
  part.echo = std::move(echo);
  part.choices.resize(static_cast<size_t>(request.n));
  auto sink = std::make_shared<QueueSink>(queue_, static_cast<int32_t>(parts_.size()));
  engine::SubmitResult result = with_api_errors(
      "", [&] { return context_.engine->submit(std::move(request), std::move(sink)); });
  if (auto* refusal = std::get_if<engine::Refusal>(&result)) {
    refusal->param = field_of(refusal->param);
    throw from_refusal(*refusal);
  }
  part.id = std::get<engine::RequestId>(result);
  parts_.push_back(std::move(part));
}

void Generation::cancel() {
  if (ended_) return;
  ended_ = true;
  queue_->close();
  for (const Part& part : parts_) {
    if (!part.done) context_.engine->cancel(part.id);
  }
}

Generation::State Generation::advance(std::string& frames) {
  if (error_) return State::kFailed;
  if (ended_) return State::kDone;
  events_.clear();
  queue_->take(events_);
  merge_backlog();
  try {
    for (Event& event : events_) {
      Part& part = parts_[static_cast<size_t>(event.prompt)];
      switch (event.kind) {
        case Event::Kind::kTokens:
          on_tokens(part, event.choice, std::move(event.delta), frames);
          break;
        case Event::Kind::kFinish:
          on_finish(part, event.choice, event.reason, event.message, frames);
          break;
        case Event::Kind::kDone:
          for (const Choice& choice : part.choices) {
            if (!choice.finish) throw std::logic_error("a request ended before all its choices");
          }
          part.usage = event.usage;
          part.done = true;
          break;
        case Event::Kind::kError:
          part.done = true;
          throw from_engine(event.error_kind, event.message);
      }
    }
  } catch (const engine::EngineError& error) {
    error_ = from_engine(error.kind(), error.what());
  } catch (const ApiError& error) {
    error_ = error;
  } catch (const std::exception& error) {
    error_ = from_engine(engine::ErrorKind::kInternal, error.what());
  }
  if (error_) {
    cancel();
    return State::kFailed;
  }
  const bool done =
      std::all_of(parts_.begin(), parts_.end(), [](const Part& part) { return part.done; });
  if (!done) return State::kRunning;
  ended_ = true;
  queue_->close();
  if (common_.stream && writer_ != nullptr) {
    writer_->end(chat_end(), frames);
  } else if (common_.stream) {
    if (common_.include_usage) frames += chunk_frame(head_, nullptr, usage_json(usage()));
    frames += kDoneFrame;
  }
  return State::kDone;
}

void Generation::merge_backlog() {
  if (!common_.stream || format_ == nullptr) return;
  constexpr size_t kBehind = 16;  // tokens of each choice
  if (events_.size() <= kBehind * parts_.size() * static_cast<size_t>(common_.generate.n)) return;
  std::vector<Event> merged;
  std::map<std::pair<int32_t, int32_t>, size_t> first;  // by prompt and choice
  for (Event& event : events_) {
    if (event.kind == Event::Kind::kTokens) {
      const auto [at, is_first] =
          first.emplace(std::pair(event.prompt, event.choice), merged.size());
      if (!is_first) {
        engine::TokensDelta& to = merged[at->second].delta;
        to.text += event.delta.text;
        std::move(event.delta.tokens.begin(), event.delta.tokens.end(),
                  std::back_inserter(to.tokens));
        std::move(event.delta.prompt.begin(), event.delta.prompt.end(),
                  std::back_inserter(to.prompt));
        to.usage = event.delta.usage;
        continue;
      }
    }
    merged.push_back(std::move(event));
  }
  events_ = std::move(merged);
}

void Generation::on_tokens(Part& part, int32_t index, engine::TokensDelta delta,
                           std::string& frames) {
  Choice& choice = part.choices[static_cast<size_t>(index)];
  part.usage = delta.usage;
  if (common_.logprobs) {
    std::move(delta.prompt.begin(), delta.prompt.end(), std::back_inserter(choice.tokens));
    std::move(delta.tokens.begin(), delta.tokens.end(), std::back_inserter(choice.tokens));
  }
  if (!common_.stream) {
    choice.text += delta.text;
    return;
  }
  const bool prompt_alone = !delta.prompt.empty() && delta.tokens.empty();
  if (prompt_alone) return;  // goes out with the first token

  if (api_ == Api::kCompletion) {
    std::string text = choice.begun ? "" : part.echo;
    text += delta.text;
    const bool first = !choice.begun;
    choice.begun = true;
    if (first || !text.empty()) {
      write_chunk(part, index, Json{{"text", std::move(text)}}, nullptr, frames);
    }
    return;
  }

  std::vector<engine::ChatDelta> deltas;
  if (format_ != nullptr) {
    choice.text += delta.text;
    if (!delta.text.empty()) deltas = read_message(choice, /*is_partial=*/true);
  } else if (!delta.text.empty()) {
    deltas.emplace_back().content = std::move(delta.text);
  }
  // The role comes with the first token even if that shows no text yet: a chunk means a token.
  if (deltas.empty() && !choice.begun) deltas.emplace_back();
  for (const engine::ChatDelta& step : deltas) write_delta(part, index, step, frames);
}

void Generation::write_delta(Part& part, int32_t index, const engine::ChatDelta& delta,
                             std::string& frames) {
  Choice& choice = part.choices[static_cast<size_t>(index)];
  if (writer_ == nullptr) {
    write_chunk(part, index, Json{{"delta", delta_json(choice, delta)}}, nullptr, frames);
    return;
  }
  choice.begun = true;
  engine::ChatDelta named = delta;
  if (delta.tool_call_index >= 0) {
    const auto call = static_cast<size_t>(delta.tool_call_index);
    named.tool_call.id = call_id(choice, call, delta.tool_call.id);
  }
  writer_->delta(named, usage(), frames);
}

void Generation::on_finish(Part& part, int32_t index, engine::FinishReason reason,
                           const std::string& stop_string, std::string& frames) {
  Choice& choice = part.choices[static_cast<size_t>(index)];
  if (reason == engine::FinishReason::kCancelled) {
    throw unavailable("request_cancelled", "The server ended this request before it was done.", 5);
  }
  if (reason == engine::FinishReason::kError) {
    throw from_engine(engine::ErrorKind::kInternal, "The engine failed on this request.");
  }
  choice.finish = reason;
  // The template has stop strings of its own; those are nobody's business.
  const std::vector<std::string>& asked = common_.generate.stop;
  if (std::find(asked.begin(), asked.end(), stop_string) != asked.end()) {
    choice.stop_string = stop_string;
  }

  std::vector<engine::ChatDelta> deltas;
  if (format_ != nullptr) {
    // An answer cut short by its length may end in the middle of a tool call.
    deltas = read_message(choice, reason == engine::FinishReason::kLength);
  } else if (api_ == Api::kChat && !common_.stream) {
    choice.message.content = choice.text;
  }
  if (!common_.stream) return;
  for (const engine::ChatDelta& step : deltas) write_delta(part, index, step, frames);
  if (writer_ != nullptr) return;  // ends when the usage is known
  Json last = api_ == Api::kChat ? Json{{"delta", Json::object()}}
                                 : Json{{"text", choice.begun ? "" : part.echo}};
  if (api_ == Api::kChat && !choice.begun) last["delta"] = delta_json(choice, {});
  choice.begun = true;
  write_chunk(part, index, last, finish_name(choice), frames);
}

std::vector<engine::ChatDelta> Generation::read_message(Choice& choice, bool is_partial) {
  engine::ChatMessage now = context_.engine->parse_message(format_, choice.text, is_partial);
  for (size_t i = 0; i < now.tool_calls.size(); ++i) {
    now.tool_calls[i].id = call_id(choice, i, now.tool_calls[i].id);
  }
  std::vector<engine::ChatDelta> deltas;
  if (common_.stream) deltas = context_.engine->diff_messages(choice.message, now);
  choice.message = std::move(now);
  return deltas;
}

const std::string& Generation::call_id(Choice& choice, size_t index,
                                       const std::string& from_engine) {
  // Most templates give calls no id; OpenAI's clients need one that stays the same.
  while (choice.call_ids.size() <= index) {
    choice.call_ids.push_back(from_engine.empty() ? random_id("call_") : from_engine);
  }
  return choice.call_ids[index];
}

Json Generation::delta_json(Choice& choice, const engine::ChatDelta& delta) {
  Json json = Json::object();
  const bool is_call = delta.tool_call_index >= 0;
  if (!choice.begun) {
    choice.begun = true;
    json["role"] = "assistant";
    json["content"] = is_call ? Json(nullptr) : Json(delta.content);
  } else if (!delta.content.empty()) {
    json["content"] = delta.content;
  }
  if (!delta.reasoning.empty()) json["reasoning_content"] = delta.reasoning;
  if (is_call) {
    Json call{{"index", delta.tool_call_index}};
    Json function = Json::object();
    if (!delta.tool_call.name.empty()) {
      call["id"] = call_id(choice, static_cast<size_t>(delta.tool_call_index), delta.tool_call.id);
      call["type"] = "function";
      function["name"] = delta.tool_call.name;
    }
    function["arguments"] = delta.tool_call.arguments;
    call["function"] = std::move(function);
    json["tool_calls"] = Json::array({std::move(call)});
  }
  return json;
}

void Generation::write_chunk(Part& part, int32_t index, const Json& payload,
                             const char* finish_reason, std::string& frames) {
  const auto part_index = static_cast<int32_t>(&part - parts_.data());
  Choice& choice = part.choices[static_cast<size_t>(index)];
  Json json;
  json["index"] = part_index * common_.generate.n + index;
  json.update(payload);
  json["logprobs"] = logprobs_of(choice);
  json["finish_reason"] = finish_reason != nullptr ? Json(finish_reason) : Json(nullptr);
  std::optional<Json> usage_field;
  if (common_.include_usage) {
    usage_field = common_.continuous_usage_stats ? usage_json(usage()) : Json(nullptr);
  }
  frames += chunk_frame(head_, json, usage_field);
}

Json Generation::logprobs_of(Choice& choice) {
  if (!common_.logprobs || (common_.stream && choice.tokens.empty())) return nullptr;
  Json json = api_ == Api::kChat
                  ? chat_logprobs(choice.tokens)
                  : completion_logprobs(choice.tokens, common_.generate.sampling.logprobs > 0,
                                        choice.text_offset);
  choice.tokens.clear();
  return json;
}

const char* Generation::finish_name(const Choice& choice) const {
  if (*choice.finish == engine::FinishReason::kLength) return "length";
  return choice.message.tool_calls.empty() ? "stop" : "tool_calls";
}

engine::Usage Generation::usage() const {
  engine::Usage sum;
  for (const Part& part : parts_) {
    sum.prompt_tokens += part.usage.prompt_tokens;
    sum.completion_tokens += part.usage.completion_tokens;
    sum.cached_tokens += part.usage.cached_tokens;
    sum.cache_write_tokens += part.usage.cache_write_tokens;
  }
  return sum;
}

ChatEnd Generation::chat_end() const {
  const Choice& choice = parts_.front().choices.front();
  const engine::Usage usage = this->usage();
  int32_t thought = 0;
  if (const std::string& text = choice.message.reasoning; !text.empty()) {
    const auto tokens = context_.engine->tokenize(text, false, false).size();
    thought = static_cast<int32_t>(std::min<size_t>(tokens, usage.completion_tokens));
  }
  return {choice.message, *choice.finish, choice.stop_string, usage, thought};
}

std::string Generation::error_frame() const {
  return writer_ != nullptr ? writer_->error_frame(*error_) : server::error_frame(error_->body());
}

std::string Generation::body() {
  if (writer_ != nullptr) return writer_->body(chat_end());
  Json choices = Json::array();
  for (Part& part : parts_) {
    for (Choice& choice : part.choices) {
      Json json;
      json["index"] = choices.size();
      if (api_ == Api::kChat) {
        json["message"] = message_json(choice.message);
      } else {
        json["text"] = part.echo + choice.text;
      }
      json["logprobs"] = logprobs_of(choice);
      json["finish_reason"] = finish_name(choice);
      choices.push_back(std::move(json));
    }
  }
  return response_body(head_, std::move(choices), usage());
}

}  // namespace relay::server
