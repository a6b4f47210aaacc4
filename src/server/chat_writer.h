// How an API other than OpenAI's completions writes the answer to a chat: Anthropic's messages and
// OpenAI's responses both send it as blocks (a text, a thought, a tool call), one after the other.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "server/errors.h"
#include "server/json.h"
#include "server/openai_response.h"

namespace relay::server {

struct ChatEnd {
  const engine::ChatMessage& message;  ///< all of it, unless streaming
  engine::FinishReason reason;
  const std::string& stop_string;  ///< the client's that ended it; empty: none
  engine::Usage usage;
  int32_t reasoning_tokens = 0;  ///< of the completion's, as its text would have by itself

  bool cut() const { return reason == engine::FinishReason::kLength; }
};

class ChatWriter {
 public:
  virtual ~ChatWriter() = default;

  // Streaming. Frames are appended to `frames`.
  /// The first may be empty: a token came, but no text yet. A tool call always has its id.
  void delta(const engine::ChatDelta& delta, const engine::Usage& usage, std::string& frames);
  void end(const ChatEnd& end, std::string& frames);
  virtual std::string error_frame(const ApiError& error) = 0;

  /// Not streaming: the whole answer.
  std::string body(const ChatEnd& end);

 protected:
  struct Block {
    enum class Kind { kText, kThought, kCall };
    Kind kind = Kind::kText;
    std::string text;  ///< of a call: its arguments
    std::string id;    ///< of a call
    std::string name;  ///< of a call
  };

  virtual std::string begin(const engine::Usage& usage) = 0;
  // The block is the last of blocks().
  virtual std::string open(Block& block) = 0;
  virtual std::string append(const Block& block, const std::string& piece) = 0;
  /// cut: it had gone on, had there been room.
  virtual std::string close(const Block& block, bool cut) = 0;
  virtual std::string finish(const ChatEnd& end) = 0;
  /// Of all blocks, when there is nothing to stream.
  virtual Json whole(const ChatEnd& end) = 0;

  const std::vector<Block>& blocks() const { return blocks_; }
  std::vector<Block>& blocks() { return blocks_; }

 private:
  std::vector<Block> blocks_;
  bool begun_ = false;
  int32_t call_ = -1;  ///< index of the call that the last block is
};

/// `event: type\ndata: {"type": type, ...}\n\n`
std::string event_frame(const Json& event);

}  // namespace relay::server
