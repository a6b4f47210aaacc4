// q8_0 by integers. O += P V: an element of V is a byte times its block's scale, so weights times
// scales become 16-bit integers, and sums of their products with the bytes are exact: they stay
// below 64 * 32767 * 127 < 2^31.

inline constexpr int kPairs = kTileSlots / 2;  ///< of a tile's slots

/// scales[dim / 32][kTileSlots] of vectors of q8_0; 0 from `slots` on to a whole vector.
inline void q8_scales(const uint8_t* const* rows, int64_t offset, int slots, int dim,
                      float* scales) {
  for (int block = 0; block < dim / kQ8Block; ++block, scales += kTileSlots) {
    uint16_t halves[kTileSlots];
    const int64_t at = offset + block * kQ8BlockBytes;
    int slot = 0;
    for (; slot < slots; ++slot) std::memcpy(&halves[slot], rows[slot] + at, sizeof(uint16_t));
    for (; slot % kLanes != 0; ++slot) halves[slot] = 0;
    for (int first = 0; first < slots; first += kLanes) {
      store(scales + first, load_f16(reinterpret_cast<const uint8_t*>(halves + first)));
    }
  }
}

struct Magnitude {
  RELAY_INLINE Vec operator()(Vec a, Vec b) const { return larger_magnitude(a, b); }
};

/// Weights s[rows][kTileSlots] times the scales[kTileSlots] of a block of V, as out[rows][kPairs]
/// of 16-bit integers: in units of units[row], and off by half of one at most. N: so many rows at
/// once.
template <int N = kLanes>
inline void q8_weights(const float* scales, int slots, const float* s, int rows, uint32_t* out,
                       float* units) {
  constexpr float kLargest = 32767.0f;
  const int vectors = (slots + kLanes - 1) / kLanes;
  int done = 0;
  for (; done + N <= rows; done += N, s += N * kTileSlots, out += N * kPairs) {
    const auto product = [&](int r, int j) {
      return load(s + r * kTileSlots + j * kLanes) * load(scales + j * kLanes);
    };
    Vec each[N];
    for (int r = 0; r < N; ++r) {
      Vec top = splat(0.0f);
      for (int j = 0; j < vectors; ++j) {
        top = larger_magnitude(top, product(r, j));
      }
      each[r] = top;
    }
    const Vec largest = reduce_each<N>(each, Magnitude{});
    store_first<N>(units + done, largest * splat(1.0f / kLargest));
    alignas(64) float inverse[kLanes];
    store(inverse, select_below(largest, splat(1e-30f), splat(0.0f), splat(kLargest) / largest));
    for (int r = 0; r < N; ++r) {
      for (int j = 0; j < vectors; ++j) {
        store_i16(out + r * kPairs + j * (kLanes / 2), product(r, j) * splat(inverse[r]));
      }
    }
  }
  if constexpr (N > 1) {
    if (done < rows) q8_weights<N / 2>(scales, slots, s, rows - done, out, units + done);
  }
}
