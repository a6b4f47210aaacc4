// A model for tests: its next token is a hash of every token in the cells that the row attends, so
// a cell that is missing, foreign or at the wrong position changes the output. A row that attends a
// cell of another adapter is an error.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/model.h"

namespace relay::engine {

class FakeModel : public Model, public Vocabulary {
 public:
  explicit FakeModel(int32_t cells, int32_t max_sequences = kMaxSequences, int32_t vocab = 61)
      : cells_(static_cast<size_t>(cells)), max_sequences_(max_sequences), vocab_(vocab) {}

  /// What follows these tokens.
  static Token next(const std::vector<Token>& tokens, int32_t vocab = 61, int32_t adapter = 0) {
    uint64_t h = 1469598103934665603u + static_cast<uint64_t>(adapter);
    for (const Token t : tokens) h = (h ^ static_cast<uint64_t>(t + 1)) * 1099511628211u;
    return static_cast<Token>((h >> 17) % static_cast<uint64_t>(vocab));
  }
  /// The greedy completion of a prompt, up to `count` tokens, ending before end_token.
  std::vector<Token> completion(std::vector<Token> tokens, int32_t count,
                                int32_t adapter = 0) const {
    std::vector<Token> result;
    for (int32_t i = 0; i < count; ++i) {
      const Token t = next(tokens, vocab_, adapter);
      if (t == end_token) break;
      result.push_back(t);
      tokens.push_back(t);
    }
    return result;
  }

  int32_t cells() const override { return static_cast<int32_t>(cells_.size()); }
  int32_t max_sequences() const override { return max_sequences_; }
  int32_t max_logits() const override { return max_sequences_ + 8; }
  int32_t vocab_size() const override { return vocab_; }

  DecodeStatus decode(const Batch& batch) override {
    const DecodeStatus forced = on_decode ? on_decode(batch) : DecodeStatus::kOk;
    if (forced == DecodeStatus::kNoCells || batch.size() > cells() - used()) {
      return DecodeStatus::kNoCells;
    }
    if (std::count(batch.wants_logits.begin(), batch.wants_logits.end(), 1) > max_logits()) {
      throw std::logic_error("fake model: too many rows want logits");
    }
    size_t at = 0;
    logits_.assign(static_cast<size_t>(batch.size()), {});
    for (size_t i = 0; i < static_cast<size_t>(batch.size()); ++i) {
      // Whoever fails has stored some rows.
      if (forced == DecodeStatus::kFailed && i >= batch.token.size() / 2) return forced;
      while (cells_[at].members.any()) ++at;
      Cell& cell = cells_[at];
      cell.position = batch.position[i];
      cell.token = batch.token[i];
      cell.adapter = batch.adapter;
      cell.members.set(static_cast<size_t>(batch.seq[i]));
      const std::vector<Token> seen = tokens_of(batch.seq[i]);
      if (static_cast<int32_t>(seen.size()) != batch.position[i] + 1) {
        throw std::logic_error("fake model: a row at position " +
                               std::to_string(batch.position[i]) + " sees " +
                               std::to_string(seen.size()) + " cells");
      }
      for (const Cell& other : cells_) {
        if (other.members.test(static_cast<size_t>(batch.seq[i])) &&
            other.adapter != batch.adapter) {
          throw std::logic_error("fake model: a row sees a cell of another adapter");
        }
      }
      if (!batch.wants_logits[i]) continue;
      logits_[i].assign(static_cast<size_t>(vocab_), 0.0f);
      logits_[i][static_cast<size_t>(next(seen, vocab_, batch.adapter))] = 5.0f;
    }
    rows_computed += batch.size();
    ++steps;
    return DecodeStatus::kOk;
  }
  std::span<const float> logits(int32_t row) override {
    return logits_.at(static_cast<size_t>(row));
  }

  void share(SeqId from, SeqId to, int32_t begin, int32_t end) override {
    for (Cell& cell : cells_) {
      if (cell.members.test(static_cast<size_t>(from)) && cell.position >= begin &&
          cell.position < end) {
        cell.members.set(static_cast<size_t>(to));
      }
    }
  }
  void remove(SeqId seq, int32_t begin, int32_t end) override {
    for (Cell& cell : cells_) {
      if (cell.position >= begin && cell.position < end) {
        cell.members.reset(static_cast<size_t>(seq));
      }
    }
  }

  std::vector<uint8_t> save(SeqId seq, int32_t begin, int32_t end, SeqId unused) override {
    if (!tokens_of(unused).empty()) throw std::logic_error("fake model: an id in use");
    const std::vector<Token> tokens = tokens_of(seq);
    std::vector<uint8_t> kv;
    for (int32_t i = begin; i < end; ++i) {
      const Cell* cell = nullptr;
      for (const Cell& c : cells_) {
        if (c.members.test(static_cast<size_t>(seq)) && c.position == i) cell = &c;
      }
      const auto value = static_cast<uint32_t>(tokens.at(static_cast<size_t>(i))) |
                         static_cast<uint32_t>(cell->adapter) << 24;
      for (int shift = 0; shift < 32; shift += 8)
        kv.push_back(static_cast<uint8_t>(value >> shift));
    }
    return kv;
  }
  bool restore(SeqId seq, int32_t begin, std::span<const uint8_t> kv, SeqId unused) override {
    if (!tokens_of(unused).empty()) throw std::logic_error("fake model: an id in use");
    const size_t count = kv.size() / kBytesPerToken;
    if (static_cast<int32_t>(count) > cells() - used()) return false;
    size_t at = 0;
    for (size_t i = 0; i < count; ++i) {
      while (cells_[at].members.any()) ++at;
      uint32_t value = 0;
      for (size_t b = kBytesPerToken; b-- > 0;) value = value << 8 | kv[kBytesPerToken * i + b];
      cells_[at].position = begin + static_cast<int32_t>(i);
      cells_[at].token = static_cast<Token>(value & 0xffffff);
      cells_[at].adapter = static_cast<int32_t>(value >> 24);
      cells_[at].members.set(static_cast<size_t>(seq));
    }
    return true;
  }
  static constexpr size_t kBytesPerToken = 4;  ///< of what is saved

  std::string piece(Token token, bool) const override {
    return std::string(1, static_cast<char>('A' + token % 58));
  }
  bool is_end(Token token) const override { return token == end_token; }

  int32_t used() const {
    int32_t count = 0;
    for (const Cell& cell : cells_) count += cell.members.any() ? 1 : 0;
    return count;
  }
  /// Tokens of a sequence by position; throws unless each position 0, 1, ... is there once.
  std::vector<Token> tokens_of(SeqId seq) const {
    std::vector<Token> tokens;
    std::vector<bool> there;
    for (const Cell& cell : cells_) {
      if (!cell.members.test(static_cast<size_t>(seq))) continue;
      const auto p = static_cast<size_t>(cell.position);
      if (tokens.size() <= p) {
        tokens.resize(p + 1);
        there.resize(p + 1, false);
      }
      if (there[p]) throw std::logic_error("fake model: a position twice");
      there[p] = true;
      tokens[p] = cell.token;
    }
    for (const bool t : there) {
      if (!t) throw std::logic_error("fake model: a position is missing");
    }
    return tokens;
  }

  Token end_token = -1;
  int64_t rows_computed = 0;
  int64_t steps = 0;
  std::function<DecodeStatus(const Batch&)> on_decode;  ///< other than kOk: decode returns it

 private:
  struct Cell {
    int32_t position = 0;
    Token token = 0;
    int32_t adapter = 0;
    SeqSet members;
  };
  std::vector<Cell> cells_;
  int32_t max_sequences_;
  int32_t vocab_;
  std::vector<std::vector<float>> logits_;
};

}  // namespace relay::engine
