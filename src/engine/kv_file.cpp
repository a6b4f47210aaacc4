#include "engine/kv_file.h"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "engine/sha256.h"

namespace relay::engine {

namespace {

constexpr std::string_view kMagic = "RELAYKV2";
constexpr size_t kDigest = 64;
constexpr size_t kFixed = 8 + 3 * kDigest + 4 + 4 + 8;
constexpr uint64_t kMostPieceBytes = uint64_t{1} << 30;
const std::string kNoSalt(kDigest, '0');

void require(bool holds, const char* what) {
  if (!holds) throw KvFileError(what);
}

bool is_digest(std::string_view text) {
  return text.size() == kDigest && std::all_of(text.begin(), text.end(), [](char c) {
           return (c >= '0' && c <= '9') || (c >= 'a' && c <= 'f');
         });
}

template <typename T>
void put(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof(T));
}

template <typename T>
T get(const std::string& in, size_t at) {
  T value;
  std::memcpy(&value, in.data() + at, sizeof(T));
  return value;
}

std::string read_text(const KvFileSource& source, uint64_t offset, size_t count) {
  std::string text(count, '\0');
  require(source.read(offset, {reinterpret_cast<uint8_t*>(text.data()), count}), "is cut short");
  return text;
}

}  // namespace

uint32_t KvFileHeader::pieces() const {
  return static_cast<uint32_t>((tokens.size() + piece_tokens - 1) / piece_tokens);
}

uint32_t KvFileHeader::tokens_of(uint32_t piece) const {
  const auto left = static_cast<uint32_t>(tokens.size()) - piece * piece_tokens;
  return std::min(piece_tokens, left);
}

uint64_t KvFileHeader::offset_of(uint32_t piece) const {
  const uint64_t before = std::min<uint64_t>(uint64_t{piece} * piece_tokens, tokens.size());
  return kFixed + 4 * tokens.size() + kDigest * (uint64_t{pieces()} + 1) + before * token_bytes;
}

std::string encode_kv_header(const KvFileHeader& header) {
  std::string out(kMagic);
  out += header.key;
  for (const std::string& salt : {header.salt, header.within}) {
    out += salt.empty() ? kNoSalt : salt;
  }
  put(out, static_cast<uint32_t>(header.tokens.size()));
  put(out, header.piece_tokens);
  put(out, header.token_bytes);
  for (const Token token : header.tokens) put(out, token);
  for (const std::string& digest : header.digests) out += digest;
  out += sha256_hex(out);
  if (out.size() != header.offset_of(0)) throw std::logic_error("kv file: header incomplete");
  return out;
}

KvFileHeader read_kv_header(const KvFileSource& source, const KvFileExpected& expected) {
  require(source.size >= kFixed, "is cut short");
  std::string text = read_text(source, 0, kFixed);
  require(text.starts_with(kMagic), "is of another kind");
  KvFileHeader header;
  size_t at = kMagic.size();
  header.key = text.substr(at, kDigest);
  header.salt = text.substr(at + kDigest, kDigest);
  header.within = text.substr(at + 2 * kDigest, kDigest);
  at += 3 * kDigest;
  const auto tokens = get<uint32_t>(text, at);
  header.piece_tokens = get<uint32_t>(text, at + 4);
  header.token_bytes = get<uint64_t>(text, at + 8);
  require(header.key == expected.key, "is of another model, KV type or version");
  for (std::string* salt : {&header.salt, &header.within}) {
    require(is_digest(*salt), "has a broken header");
    if (*salt == kNoSalt) salt->clear();
  }
  require(header.within.empty() || !header.salt.empty(), "has a broken header");
  require(tokens >= 1 && tokens <= expected.most_tokens, "has more tokens than the cache, or none");
  require(header.token_bytes == expected.token_bytes, "has KV of another size");
  require(header.piece_tokens >= 1 && header.piece_tokens <= tokens &&
              header.piece_tokens <= kMostPieceBytes / std::max<uint64_t>(1, header.token_bytes),
          "has a broken header");
  header.tokens.resize(tokens);
  const uint64_t head = header.offset_of(0);
  require(source.size == header.offset_of(header.pieces()), "is cut short, or too long");
  text += read_text(source, kFixed, head - kFixed);
  const std::string_view all = text;
  require(sha256_hex(all.substr(0, head - kDigest)) == all.substr(head - kDigest),
          "is damaged: its checksum differs");
  at = kFixed;
  for (Token& token : header.tokens) {
    token = get<Token>(text, at);
    require(token >= 0 && token < expected.vocabulary, "has tokens that the vocabulary lacks");
    at += 4;
  }
  for (uint32_t i = 0; i < header.pieces(); ++i) {
    header.digests.push_back(text.substr(at, kDigest));
    at += kDigest;
  }
  return header;
}

std::vector<uint8_t> read_kv_piece(const KvFileSource& source, const KvFileHeader& header,
                                   uint32_t piece) {
  std::vector<uint8_t> bytes(header.tokens_of(piece) * header.token_bytes);
  require(source.read(header.offset_of(piece), bytes), "is cut short");
  require(sha256_hex(bytes) == header.digests[piece], "is damaged: a checksum differs");
  return bytes;
}

}  // namespace relay::engine
