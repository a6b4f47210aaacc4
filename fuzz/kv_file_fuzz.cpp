// Fuzzing of a stored prefix (engine/kv_file.h), as a prompt cache reads it. The first byte
// chooses: odd, and the header gets the checksum that it needs to be read on.
//
// Whatever the file, it is read or refused with an exception, never past its end; and KV that was
// read goes into llama.cpp's form and comes back as it was.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "engine/kv_file.h"
#include "engine/kv_state.h"
#include "engine/sha256.h"
#include "require.h"

namespace {

using namespace relay::engine;

const KvLayout kLayout = {.layers = 1, .tensors = {{1, 4}, {8, 8}}};
const KvFileExpected kExpected = {
    .key = std::string(64, 'a'), .token_bytes = 12, .most_tokens = 64, .vocabulary = 100};

void mend_checksum(std::string& file) {
  KvFileHeader header;
  constexpr size_t kCounts = 8 + 3 * 64;
  uint32_t tokens = 0;
  if (file.size() < kCounts + 16) return;
  std::memcpy(&tokens, file.data() + kCounts, 4);
  std::memcpy(&header.piece_tokens, file.data() + kCounts + 4, 4);
  if (tokens > 4096 || header.piece_tokens == 0) return;
  header.tokens.resize(tokens);
  const uint64_t head = header.offset_of(0);
  if (head > file.size()) return;
  const auto* bytes = reinterpret_cast<const uint8_t*>(file.data());
  file.replace(head - 64, 64, sha256_hex({bytes, head - 64}));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  std::string file(reinterpret_cast<const char*>(data) + 1, size - 1);
  if ((data[0] & 1) != 0) mend_checksum(file);
  const KvFileSource source{file.size(), [&](uint64_t offset, std::span<uint8_t> to) {
                              require(to.size() <= 1 << 20, "what is read is bounded");
                              if (offset > file.size() || to.size() > file.size() - offset) {
                                return false;
                              }
                              std::memcpy(to.data(), file.data() + offset, to.size());
                              return true;
                            }};
  try {
    const KvFileHeader header = read_kv_header(source, kExpected);
    require(!header.tokens.empty() && header.tokens.size() <= kExpected.most_tokens, "tokens fit");
    int32_t begin = 0;
    for (uint32_t i = 0; i < header.pieces(); ++i) {
      const std::vector<uint8_t> kv = read_kv_piece(source, header, i);
      const auto count = static_cast<int32_t>(header.tokens_of(i));
      require(kv.size() == static_cast<size_t>(count) * kLayout.bytes_per_token(), "a whole piece");
      const std::vector<uint8_t> state = make_kv_state(kLayout, begin, kv);
      require(take_kv(kLayout, state, begin, count) == kv, "KV comes back as it was");
      begin += count;
    }
    require(begin == static_cast<int32_t>(header.tokens.size()), "a piece for each token");
    require(encode_kv_header(header) == file.substr(0, header.offset_of(0)), "the header is whole");
  } catch (const KvFileError&) {
  }
  return 0;
}
