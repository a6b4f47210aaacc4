// Many query rows: bound by arithmetic. The tile is unpacked once (K transposed, so that lanes are
// slots), then all rows go over it in register blocks.

/// Elements from one panel of an unpacked V to the next.
inline constexpr int kPanelSize = kTileSlots * kPanelColumns;

/// Where column i (a multiple of kLanes) of slot (or pair of slots) t lies in an unpacked V: panels
/// of kPanelColumns columns, so that a panel's rows are adjacent.
inline int64_t unpacked_v_index(int t, int i) {
  return int64_t{i / kPanelColumns} * kPanelSize + t * kPanelColumns + i % kPanelColumns;
}

/// K of the tile, transposed: out[qk_dim][kTileSlots], zero beyond the tile's slots.
template <typename E>
inline void unpack_k(const Tile& t, float* out) {
  for (int first = 0; first < t.slots; first += kLanes) {
    for (int i = 0; i < t.qk_dim; i += kLanes) {
      Vec v[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        v[j] = first + j < t.slots ? load_padded<E>(t.k[first + j] + t.k_offset, i, t.qk_dim)
                                   : splat(0.0f);
      }
      transpose(v);
      for (int j = 0; j < kLanes; ++j) store(out + (i + j) * kTileSlots + first, v[j]);
    }
  }
}

/// V of the tile in panels, zero beyond v_dim.
template <typename E>
inline void unpack_v(const Tile& t, float* out) {
  for (int slot = 0; slot < t.slots; ++slot) {
    const uint8_t* row = t.v[slot] + t.v_offset;
    for (int i = 0; i < t.v_dim; i += kLanes) {
      store(out + unpacked_v_index(slot, i), load_padded<E>(row, i, t.v_dim));
    }
  }
}

#ifdef RELAY_HAS_BF16_DOT

/// As unpack_k, in pairs along qk_dim: out[(qk_dim + 1) / 2][kTileSlots].
inline void unpack_k_pairs(const Tile& t, uint32_t* out) {
  for (int first = 0; first < t.slots; first += 16) {
    for (int i = 0; i < t.qk_dim; i += 32) {
      const int n = t.qk_dim - i < 32 ? t.qk_dim - i : 32;
      const __mmask32 mask = n == 32 ? ~0u : (1u << n) - 1u;
      VecI v[16];
      for (int j = 0; j < 16; ++j) {
        v[j] = first + j < t.slots
                   ? (VecI)_mm512_maskz_loadu_epi16(mask, t.k[first + j] + t.k_offset + 2 * i)
                   : VecI{};
      }
      transpose(v);
      for (int j = 0; j < 16; ++j) {
        _mm512_storeu_si512(out + (i / 2 + j) * kTileSlots + first, (__m512i)v[j]);
      }
    }
  }
}

/// As unpack_v, in pairs of slots.
inline void unpack_v_pairs(const Tile& t, uint32_t* out) {
  for (int slot = 0; slot < t.slots; slot += 2) {
    for (int i = 0; i < t.v_dim; i += 16) {
      const int n = t.v_dim - i < 16 ? t.v_dim - i : 16;
      auto widen = [&](int which) {
        return _mm512_cvtepu16_epi32(
            _mm256_maskz_loadu_epi16(first_lanes(n), t.v[which] + t.v_offset + 2 * int64_t{i}));
      };
      const __m512i low = widen(slot);
      const __m512i high = slot + 1 < t.slots ? widen(slot + 1) : _mm512_setzero_si512();
      _mm512_storeu_si512(out + unpacked_v_index(slot / 2, i),
                          _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

#endif  // RELAY_HAS_BF16_DOT

/// K and V of types that differ are both unpacked to f32: one product serves the whole tile.
inline QueryLayout many_layout([[maybe_unused]] DType k_type, [[maybe_unused]] DType v_type) {
#ifdef RELAY_HAS_BF16_DOT
  if (k_type == DType::kBF16 && v_type == DType::kBF16) return QueryLayout::kBF16Pairs;
#endif
  return QueryLayout::kF32;
}

inline void attend_many(const Tile& t) {
  const Scratch scratch(t);
#ifdef RELAY_HAS_BF16_DOT
  if (many_layout(t.k_type, t.v_type) == QueryLayout::kBF16Pairs) {
    auto* key_pairs = reinterpret_cast<uint32_t*>(scratch.keys);
    auto* value_pairs = reinterpret_cast<uint32_t*>(scratch.values);
    unpack_k_pairs(t, key_pairs);
    unpack_v_pairs(t, value_pairs);
    attend_operands<BF16Product>(t, {key_pairs, value_pairs, kPanelColumns, kPanelSize},
                                 scratch.scores);
    return;
  }
#endif
  with_elements(t.k_type, [&](auto e) { unpack_k<decltype(e)>(t, scratch.keys); });
  with_elements(t.v_type, [&](auto e) { unpack_v<decltype(e)>(t, scratch.values); });
  attend_operands<F32Product>(t, {scratch.keys, scratch.values, kPanelColumns, kPanelSize},
                              scratch.scores);
}
