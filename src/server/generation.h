// One completion from parsed request to answer: submits the prompts to the engine, follows their
// events, and writes stream frames or the whole body. Knows nothing of sockets.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "server/chat_writer.h"
#include "server/errors.h"
#include "server/event_queue.h"
#include "server/openai_request.h"
#include "server/openai_response.h"

namespace relay::server {

/// Which KV a request shares with others: that of its caller's key and, within it, of the salt it
/// names.
std::string effective_salt(const std::string& caller, const std::string& client);
/// What a prompt pinned with a salt is held for: the requests that name it, whatever their key.
std::string pin_salt(const std::string& client);

/// What a generation needs to know of the server.
struct GenerationContext {
  std::shared_ptr<engine::Engine> engine;
  std::string model;    ///< the name to answer with
  int32_t adapter = 0;  ///< the engine's, that the model's name stands for
  std::string fingerprint;
  std::string caller_salt;  ///< isolates callers with different keys; may be empty
  size_t max_queued_bytes = 1 << 20;
  int64_t max_prompt_logprobs = 0;  ///< see RequestLimits
  std::function<void()> wake;       ///< see EventQueue
};

/// Not thread-safe: one connection owns it.
class Generation {
 public:
  enum class State { kRunning, kDone, kFailed };

  // Render, tokenise, compile grammars and submit: milliseconds of work for a long prompt, so not
  // for a thread that others wait for. Throw ApiError; nothing is left running then.
  static std::unique_ptr<Generation> start(ChatCompletionRequest request,
                                           GenerationContext context);
  /// A chat with one choice, answered in the words of another API.
  using MakeWriter = std::function<std::unique_ptr<ChatWriter>(const ResponseHead&)>;
  static std::unique_ptr<Generation> start(ChatCompletionRequest request, GenerationContext context,
                                           const MakeWriter& make);
  static std::unique_ptr<Generation> start(CompletionRequest request, GenerationContext context);

  /// Cancels what is still running.
  ~Generation();
  Generation(const Generation&) = delete;
  Generation& operator=(const Generation&) = delete;

  bool stream() const { return common_.stream; }

  /// Takes the events that have arrived. When streaming, appends their frames to `frames`, with the
  /// usage and [DONE] frames at the end; in state kFailed no error frame is written.
  State advance(std::string& frames);

  /// So far, of all choices.
  engine::Usage usage() const;

  /// The body of a whole answer; state kDone, not streaming.
  std::string body();
  /// Why; state kFailed.
  const ApiError& error() const { return *error_; }
  /// The same as the last frame of a stream.
  std::string error_frame() const;

  /// The reader fell too far behind.
  bool overflowed() const { return queue_->overflowed(); }

  /// Stops the engine's work within one step. No event is taken afterwards.
  void cancel();

 private:
  struct Choice {
    std::string text;                            ///< all of it, as far as it is needed
    std::vector<engine::GeneratedToken> tokens;  ///< for logprobs; streaming: not yet sent
    engine::ChatMessage message;                 ///< chat with a format: the last reading of `text`
    std::vector<std::string> call_ids;
    int64_t text_offset = 0;
    bool begun = false;  ///< the chunk with the role is out
    std::optional<engine::FinishReason> finish;
    std::string stop_string;  ///< that ended it, if one of the client's did
  };
  /// One prompt's request.
  struct Part {
    engine::RequestId id = 0;
    bool done = false;
    engine::Usage usage;  ///< so far
    std::string echo;
    std::vector<Choice> choices;
  };

  Generation(Api api, CommonRequest common, GenerationContext context);

  /// Runs `work` with the engine's errors turned into answers.
  template <typename Work>
  auto with_api_errors(const std::string& param, Work work);
  /// How the client calls the field that the engine calls so.
  std::string field_of(const std::string& engine_param) const;
  void submit(engine::GenerateRequest request, std::string echo);
  /// Of a reader that is far behind: all tokens of a choice become one event.
  void merge_backlog();
  void on_tokens(Part& part, int32_t index, engine::TokensDelta delta, std::string& frames);
  void on_finish(Part& part, int32_t index, engine::FinishReason reason,
                 const std::string& stop_string, std::string& frames);
  void write_delta(Part& part, int32_t index, const engine::ChatDelta& delta, std::string& frames);
  ChatEnd chat_end() const;
  /// Reads the choice's text as a message and returns what is new of it.
  std::vector<engine::ChatDelta> read_message(Choice& choice, bool is_partial);
  const std::string& call_id(Choice& choice, size_t index, const std::string& from_engine);
  Json delta_json(Choice& choice, const engine::ChatDelta& delta);
  void write_chunk(Part& part, int32_t index, const Json& payload, const char* finish_reason,
                   std::string& frames);
  Json logprobs_of(Choice& choice);
  const char* finish_name(const Choice& choice) const;

  const Api api_;
  CommonRequest common_;
  GenerationContext context_;
  ResponseHead head_;
  std::unique_ptr<ChatWriter> writer_;  ///< null: OpenAI's completions
  engine::OutputFormatPtr format_;
  std::shared_ptr<EventQueue> queue_;
  std::vector<Part> parts_;
  std::vector<Event> events_;
  std::optional<ApiError> error_;
  bool ended_ = false;  ///< nothing runs in the engine any more
};

}  // namespace relay::server
