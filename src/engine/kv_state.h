// The KV of some positions as bytes, and llama.cpp's form of it (llama_state_seq_get_data).
//
// llama.cpp reads its own form back with assertions: bytes that are not what it wrote may end the
// process. So only keys and values are kept, in the order of positions; all that surrounds them is
// written here from what this context is known to be, and whatever they contain, llama.cpp copies
// them to cells and nothing else.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace relay::engine {

/// The tensors of one cache: keys of each layer, then values of each.
struct KvLayout {
  struct Rows {
    int32_t type = 0;        ///< ggml's number
    uint64_t row_bytes = 0;  ///< of one position
    bool operator==(const Rows&) const = default;
  };
  uint32_t layers = 0;
  std::vector<Rows> tensors;  ///< the first `layers` are keys

  size_t bytes_per_token() const;
  /// What tells caches apart whose bytes mean different things.
  std::string describe() const;
};

/// From the state of a sequence of one position. Throws std::runtime_error, saying why, for a form
/// that is not known here: more than one cache or stream, cells with more than a position,
/// transposed values.
KvLayout read_kv_layout(std::span<const uint8_t> state);

/// The keys and values of the positions [begin, begin + count) from the state of a sequence that
/// has these: for each tensor its rows. Throws std::runtime_error if it has others.
std::vector<uint8_t> take_kv(const KvLayout& layout, std::span<const uint8_t> state, int32_t begin,
                             int32_t count);

/// The state of a sequence that has the positions from `begin` on, with these keys and values:
/// bytes_per_token() for each.
std::vector<uint8_t> make_kv_state(const KvLayout& layout, int32_t begin,
                                   std::span<const uint8_t> kv);

}  // namespace relay::engine
