// A prefix on disk: its tokens and their KV, with a digest of each piece. What comes from a file is
// untrusted: nothing is allocated, skipped or handed on that was not checked before.
//
//   "RELAYKV2", then as text of 64 hex digits: the key (which model, in which form), the salt and
//   the one that it is within (or zeros); tokens and tokens of a piece (u32), bytes of KV for a
//   token (u64); the tokens (i32 each); a SHA-256 of each piece, as text; a SHA-256 of all this;
//   then the pieces
//
// in the byte order of the machine. A digest finds damage, not malice: whoever can write as this
// user can write a digest, too. What he can do is in kv_state.h.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <stdexcept>
#include <string>
#include <vector>

#include "engine/engine.h"

namespace relay::engine {

/// what(): for people, e.g. "is cut short".
struct KvFileError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct KvFileHeader {
  std::string key;   ///< 64 hex digits
  std::string salt;  ///< 64 hex digits; empty: for all
  /// The salt whose KV those of `salt` may share, too: 64 hex digits; empty: none.
  std::string within;
  std::vector<Token> tokens;
  uint32_t piece_tokens = 1;
  uint64_t token_bytes = 0;
  std::vector<std::string> digests;  ///< of the pieces

  uint32_t pieces() const;
  /// Tokens of a piece; of the last one perhaps fewer.
  uint32_t tokens_of(uint32_t piece) const;
  /// Where a piece begins in the file; of the one behind the last: the file's size.
  uint64_t offset_of(uint32_t piece) const;
};

/// Digests must be complete.
std::string encode_kv_header(const KvFileHeader& header);

/// Bytes of a file; false: they are not all there.
struct KvFileSource {
  uint64_t size = 0;
  std::function<bool(uint64_t offset, std::span<uint8_t>)> read;
};

/// What the reader knows beforehand.
struct KvFileExpected {
  std::string key;
  uint64_t token_bytes = 0;
  uint32_t most_tokens = 0;
  Token vocabulary = 0;  ///< tokens are 0 to this - 1
};

/// Throws KvFileError.
KvFileHeader read_kv_header(const KvFileSource& source, const KvFileExpected& expected);
/// Throws KvFileError.
std::vector<uint8_t> read_kv_piece(const KvFileSource& source, const KvFileHeader& header,
                                   uint32_t piece);

}  // namespace relay::engine
