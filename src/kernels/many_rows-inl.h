// Many query rows: bound by arithmetic. The tile is unpacked once (K transposed, so that lanes are
// slots), then all rows go over it in register blocks.

/// All query rows of a tile over its operands.
template <typename Product>
inline void attend_operands(const Tile& t, const Operands<Product>& operands, float* s) {
#ifdef RELAY_HAS_AMX
  if constexpr (Product::kWeights == Weights::kBF16Pairs) {
    if (suits_amx(t)) return AmxAttention<Product::kWeights>(t, operands, s).run();
  }
#endif
  alignas(64) float alpha[kScoreRows];
  const int slot_vectors = (t.slots + kLanes - 1) / kLanes;
  const int value_vectors = (t.v_dim + kLanes - 1) / kLanes;
  const int key_depth = (t.qk_dim + Product::kDepth - 1) / Product::kDepth;
  const int value_depth = (t.slots + Product::kDepth - 1) / Product::kDepth;
  const auto panel_steps = [](int vectors, int depth) {
    return (vectors + kPanel - 1) / kPanel * ((depth + kStepDepth - 1) / kStepDepth);
  };
  const int steps =
      (panel_steps(slot_vectors, key_depth) + panel_steps(value_vectors, value_depth)) *
      ((t.rows + kBlockRows - 1) / kBlockRows);
  Prefetcher prefetch(t, steps);
  for (int first = 0; first < t.rows; first += kScoreRows) {
    const int rows = t.rows - first < kScoreRows ? t.rows - first : kScoreRows;
    const auto scores = [&](const auto& finish) {
      product_scores<Product>(
          rows, slot_vectors,
          static_cast<const typename Product::Element*>(t.q) + first * t.q_stride, t.q_stride,
          operands.keys, key_depth, s, finish, prefetch);
    };
    EarlyWeights<Product::kWeights> early(t, first, rows);
    Former former = Former::kKept;
    if (early.known()) scores([&](int column) { return early.take(column, s); });
    if (!early.known() || !early.commit()) {
      scores([&](int column) { return StoreRows{s + column, kTileSlots}; });
      softmax<Product::kWeights>(t, first, rows, s, alpha);
      former = Former::kScaled;
    }
    product_values<Product>(rows, value_vectors, s, operands, value_depth, t.o + first * t.o_stride,
                            t.o_stride, former, alpha, prefetch);
  }
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
  constexpr int kElements = 2 * kLanes;
  for (int first = 0; first < t.slots; first += kLanes) {
    for (int i = 0; i < t.qk_dim; i += kElements) {
      const auto which = first_bf16(t.qk_dim - i < kElements ? t.qk_dim - i : kElements);
      VecU v[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        v[j] = first + j < t.slots
                   ? load_bf16_pairs(t.k[first + j] + t.k_offset + 2 * int64_t{i}, which)
                   : VecU{};
      }
      transpose(v);
      for (int j = 0; j < kLanes; ++j) store_words(out + (i / 2 + j) * kTileSlots + first, v[j]);
    }
  }
}

/// As unpack_v, in pairs of slots.
inline void unpack_v_pairs(const Tile& t, uint32_t* out) {
  for (int slot = 0; slot < t.slots; slot += 2) {
    for (int i = 0; i < t.v_dim; i += kLanes) {
      const int n = t.v_dim - i < kLanes ? t.v_dim - i : kLanes;
      auto halves = [&](int which) {
        return load_bf16_halves(t.v[which] + t.v_offset + 2 * int64_t{i}, n);
      };
      const VecU low = halves(slot);
      const VecU high = slot + 1 < t.slots ? halves(slot + 1) : VecU{};
      store_words(out + unpacked_v_index(slot / 2, i), low | high << 16);
    }
  }
}

#endif  // RELAY_HAS_BF16_DOT

/// K and V of types that differ are both unpacked to f32: one product serves the whole tile.
inline QueryLayout many_layout([[maybe_unused]] DType k_type, [[maybe_unused]] DType v_type,
                               [[maybe_unused]] int qk_dim, [[maybe_unused]] int v_dim) {
#ifdef RELAY_HAS_BF16_DOT
  if (k_type == DType::kBF16 && v_type == DType::kBF16) return QueryLayout::kBF16Pairs;
#endif
#ifdef RELAY_HAS_AMX
  // f16 is the sum of two bf16 exactly, and q8_0 to 2^-16 of a number: three products on AMX take
  // less time than one in f32.
  const auto halves = [](DType type) { return type == DType::kF16 || type == DType::kQ8_0; };
  if (halves(k_type) && halves(v_type) && suits_amx(qk_dim, v_dim)) return QueryLayout::kBF16Halves;
#endif
  return QueryLayout::kF32;
}

/// A tile whose K and V lie unpacked in its scratch.
inline void attend_unpacked(const Tile& t, const Scratch& scratch) {
#ifdef RELAY_HAS_AMX
  if (many_layout(t.k_type, t.v_type, t.qk_dim, t.v_dim) == QueryLayout::kBF16Halves) {
    return attend_halves(t, scratch);
  }
#endif
  attend_operands<F32Product>(t, {scratch.keys, scratch.values, kPanelColumns, kPanelSize},
                              scratch.scores);
}

inline void attend_many(const Tile& t) {
  const Scratch scratch(t);
#ifdef RELAY_HAS_BF16_DOT
  if (many_layout(t.k_type, t.v_type, t.qk_dim, t.v_dim) == QueryLayout::kBF16Pairs) {
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
  attend_unpacked(t, scratch);
}
