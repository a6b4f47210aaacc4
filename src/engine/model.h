// What the scheduler needs of a model: rows in, logits out, and KV cells that sequences can share.
// An interface, so that everything above it is tested against a model of a few lines (fake_model.h)
// whose every output depends on every cell it attends.
#pragma once

#include <bitset>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "engine/engine.h"

namespace relay::engine {

/// Names one chain of KV cells, positions 0 to its length - 1; cells may belong to many sequences.
using SeqId = int32_t;
inline constexpr int32_t kMaxSequences = 256;  // llama.cpp's LLAMA_MAX_SEQ
using SeqSet = std::bitset<kMaxSequences>;

/// As the end of a range of positions: all there are.
inline constexpr int32_t kToTheEnd = INT32_MAX;

/// The rows of one step. Positions of a sequence are consecutive and continue its cells.
struct Batch {
  int32_t adapter = 0;  ///< of all rows: a model computes with one at a time; 0: without
  std::vector<Token> token;
  std::vector<int32_t> position;
  std::vector<SeqId> seq;
  std::vector<uint8_t> wants_logits;

  int32_t size() const { return static_cast<int32_t>(token.size()); }
  void clear() {
    token.clear();
    position.clear();
    seq.clear();
    wants_logits.clear();
  }
  void add(Token t, int32_t pos, SeqId s, bool logits) {
    token.push_back(t);
    position.push_back(pos);
    seq.push_back(s);
    wants_logits.push_back(logits ? 1 : 0);
  }
};

enum class DecodeStatus {
  kOk,
  kNoCells,  ///< not enough free cells; nothing has changed
  kFailed,   ///< some rows may have been stored; the sequences of the batch must be removed
};

class Model {
 public:
  virtual ~Model() = default;

  virtual int32_t cells() const = 0;          ///< KV positions in total
  virtual int32_t max_sequences() const = 0;  ///< SeqIds are 0 to this - 1; at most kMaxSequences
  virtual int32_t max_logits() const = 0;     ///< rows of a batch that may want theirs
  virtual int32_t vocab_size() const = 0;

  /// Computes the rows and stores their KV, one cell each.
  virtual DecodeStatus decode(const Batch& batch) = 0;
  /// Logits of row `row` of the last batch, which wanted them; valid until the next decode.
  virtual std::span<const float> logits(int32_t row) = 0;

  /// Cells of `from` at positions [begin, end) belong to `to` as well. Copies nothing.
  virtual void share(SeqId from, SeqId to, int32_t begin, int32_t end) = 0;
  /// Cells of `seq` at positions [begin, end) no longer belong to it; cells of nobody are free.
  virtual void remove(SeqId seq, int32_t begin, int32_t end) = 0;

  /// The KV of `seq` at positions [begin, end) as bytes, the same number for each position.
  /// `unused` is an id without cells, and is so again afterwards; here and below.
  virtual std::vector<uint8_t> save(SeqId seq, int32_t begin, int32_t end, SeqId unused) = 0;
  /// Free cells get this KV, of positions from `begin` on, and belong to `seq`. False: the model
  /// did not take it; nothing has changed.
  virtual bool restore(SeqId seq, int32_t begin, std::span<const uint8_t> kv, SeqId unused) = 0;
};

/// The part of a tokenizer that turns tokens into text.
class Vocabulary {
 public:
  virtual ~Vocabulary() = default;
  /// The bytes of a token; special: also those of control tokens, which are empty otherwise.
  virtual std::string piece(Token token, bool special) const = 0;
  virtual bool is_end(Token token) const = 0;  ///< ends a generation
};

}  // namespace relay::engine
