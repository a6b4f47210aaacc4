// In which order a row's partials are merged, and by whom: a binary tree over them, as in a
// knock-out tournament. Of a node's two halves, the second to be there is merged with the first at
// once, by its own thread. So merging is spread over time and threads, and whoever delivers the
// last of n partials merges log2(n) times, not n; what is merged with what never depends on timing.
#pragma once

#include <bit>
#include <cstdint>

namespace relay {

/// Goes from a leaf of a tree over `count` partials to its root: visit(left, right) for each node
/// on the way, by the first leaves of its halves, until it returns false. `right` is another one
/// for each node, so it may name it. A half without leaves makes no node. With `width`, a power of
/// two, it sets out from the node of so many leaves that begins with `leaf`.
template <typename Visit>
void climb(uint32_t leaf, uint32_t count, Visit visit, uint32_t width = 1) {
  for (; width < count; width *= 2) {
    const uint32_t left = leaf / (2 * width) * (2 * width);
    const uint32_t right = left + width;
    if (right >= count) continue;
    if (!visit(left, right)) return;
    leaf = left;
  }
}

/// The most nodes on a leaf's way.
inline uint32_t tree_height(uint32_t count) {
  return count > 1 ? static_cast<uint32_t>(std::bit_width(count - 1)) : 0;
}

// A node is kept for all KV heads together, a bit for each, in words of 64.

inline int32_t head_words(int32_t kv_heads) { return (kv_heads + 63) / 64; }

/// The bits of heads [begin, end) in a word.
inline uint64_t head_bits(int32_t begin, int32_t end, int32_t word) {
  const auto below = [word](int32_t head) {  // the word's heads that come before this one
    const int32_t n = head - 64 * word;
    return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
  };
  return below(end) & ~below(begin);
}

/// visit(word, bits) for each word that holds some of the heads [begin, end).
template <typename Visit>
void each_word(int32_t begin, int32_t end, Visit visit) {
  for (int32_t w = begin / 64; w < head_words(end); ++w) visit(w, head_bits(begin, end, w));
}

/// visit(head) for each head of a word's bits.
template <typename Visit>
void each_head(uint64_t bits, int32_t word, Visit visit) {
  for (; bits != 0; bits &= bits - 1) visit(64 * word + std::countr_zero(bits));
}

}  // namespace relay
