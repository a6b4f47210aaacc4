#include "server/chat_writer.h"

namespace relay::server {

void ChatWriter::delta(const engine::ChatDelta& delta, const engine::Usage& usage,
                       std::string& frames) {
  if (!begun_) frames += begin(usage);
  begun_ = true;
  const auto add = [&](Block::Kind kind, int32_t call, const std::string& piece) {
    if (blocks_.empty() || blocks_.back().kind != kind || call_ != call) {
      if (!blocks_.empty()) frames += close(blocks_.back(), /*cut=*/false);
      Block block;
      block.kind = kind;
      if (call >= 0) {
        block.id = delta.tool_call.id;
        block.name = delta.tool_call.name;
      }
      blocks_.push_back(std::move(block));
      call_ = call;
      frames += open(blocks_.back());
    }
    if (piece.empty()) return;
    blocks_.back().text += piece;
    frames += append(blocks_.back(), piece);
  };
  if (!delta.reasoning.empty()) add(Block::Kind::kThought, -1, delta.reasoning);
  if (!delta.content.empty()) add(Block::Kind::kText, -1, delta.content);
  if (delta.tool_call_index >= 0) {
    add(Block::Kind::kCall, delta.tool_call_index, delta.tool_call.arguments);
  }
}

void ChatWriter::end(const ChatEnd& end, std::string& frames) {
  if (!begun_) frames += begin(end.usage);
  begun_ = true;
  if (!blocks_.empty()) frames += close(blocks_.back(), end.cut());
  frames += finish(end);
}

std::string ChatWriter::body(const ChatEnd& end) {
  const engine::ChatMessage& message = end.message;
  if (!message.reasoning.empty()) {
    blocks_.push_back({Block::Kind::kThought, message.reasoning, "", ""});
  }
  if (!message.content.empty()) blocks_.push_back({Block::Kind::kText, message.content, "", ""});
  for (const engine::ToolCall& call : message.tool_calls) {
    blocks_.push_back({Block::Kind::kCall, call.arguments, call.id, call.name});
  }
  return dump(whole(end));
}

std::string event_frame(const Json& event) {
  return "event: " + event["type"].get<std::string>() + "\ndata: " + dump(event) + "\n\n";
}

}  // namespace relay::server
