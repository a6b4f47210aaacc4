// Few query rows: decoding one request. Bound by the read of K and V.
//
// K and V are converted in registers as they stream by and nothing of them is kept. S = Q K^T runs
// along qk_dim; each register of partial sums belongs to one (row, slot) pair, and one reduction
// turns kLanes of them into kLanes scores. O += P V broadcasts a weight to a vector of columns.

/// R query rows, vector by vector: out[qk_dim / kLanes][R][kLanes]. All are then near one pointer.
template <int R>
inline void interleave_queries(const Tile& t, const float* q, float* out) {
  for (int i = 0; i < t.qk_dim; i += kLanes) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) store(out + i * R + r * kLanes, load(q + r * t.q_stride + i));
  }
}

/// Scores of R rows (interleaved) against the tile: s[R][kTileSlots].
template <typename E, int R>
inline void score_few(const Tile& t, const float* q, Prefetcher& prefetch, float* s) {
  constexpr int kSlots = kLanes / R;  // slots at once: kLanes accumulators
  const int full = t.qk_dim / kLanes * kLanes;
  for (int first = 0; first < t.slots; first += kSlots) {
    const uint8_t* k[kSlots];
    for (int p = 0; p < kSlots; ++p) {
      const int slot = first + p < t.slots ? first + p : t.slots - 1;  // surplus is masked later
      k[p] = t.k[slot] + t.k_offset;
    }
    prefetch.step();
    Vec acc[kLanes];
    auto accumulate = [&](int i, bool begin, auto load_k) RELAY_INLINE_LAMBDA {
      Vec query[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) query[r] = load(q + i * R + r * kLanes);
#pragma GCC unroll 16
      for (int p = 0; p < kSlots; ++p) {
        const Vec key = load_k(k[p]);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          Vec& a = acc[r * kSlots + p];
          a = begin ? key * query[r] : fma(key, query[r], a);
        }
      }
    };
    if (full > 0) {
      accumulate(0, true, [](const uint8_t* row) { return E::load(row, 0); });
      for (int i = kLanes; i < full; i += kLanes) {
        accumulate(i, false, [i](const uint8_t* row) { return E::load(row, i); });
      }
    }
    if (full < t.qk_dim) {
      const int n = t.qk_dim - full;
      accumulate(full, full == 0, [full, n](const uint8_t* row) { return E::tail(row, full, n); });
    }
    const Vec scores = reduce_each<kLanes>(acc, Add{});
    alignas(64) float out[kLanes];
    store(out, scores);
    for (int r = 0; r < R; ++r) {
      std::memcpy(s + r * kTileSlots + first, out + r * kSlots, kSlots * sizeof(float));
    }
  }
}

/// Slots between two requests for what comes next: rarely enough to keep its state out of the way.
inline constexpr int kSlotsPerStep = 8;

/// o[R][columns] = o * alpha + p[R][slots] V for C vectors of columns from `column` on; kTail: only
/// the first `tail` columns exist.
template <typename E, int R, int C, bool kTail = false>
inline void value_panel(const Tile& t, const float* p, const float* alpha, Prefetcher& prefetch,
                        int column, float* o, [[maybe_unused]] int tail = 0) {
  const int64_t base = t.v_offset + int64_t{column} * E::kBytes;
  const int start = E::kBytes == 0 ? column : 0;
  Vec acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      acc[r][c] = load(o + r * t.o_stride + c * kLanes) * splat(alpha[r]);
    }
  }
  for (int first = 0; first < t.slots; first += kSlotsPerStep) {
    prefetch.step();
    const int end = first + kSlotsPerStep < t.slots ? first + kSlotsPerStep : t.slots;
    const uint8_t* const* rows = t.v;
    for (int slot = first; slot < end; ++slot) {
      const uint8_t* row = rows[slot] + base;
      Vec value[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) {
        value[c] = kTail ? E::tail(row, start, tail) : E::load(row, start + c * kLanes);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec weight = splat(p[r * kTileSlots + slot]);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) acc[r][c] = fma(value[c], weight, acc[r][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(o + r * t.o_stride + c * kLanes, acc[r][c]);
  }
}

/// The whole panels of R rows from `column` on, C vectors wide and then narrower; returns the first
/// column that is left.
template <typename E, int R, int C>
inline int value_panels(const Tile& t, const float* p, const float* alpha, Prefetcher& prefetch,
                        float* o, int column) {
  for (; column + C * kLanes <= t.v_dim; column += C * kLanes) {
    value_panel<E, R, C>(t, p, alpha, prefetch, column, o + column);
  }
  if constexpr (C > 1) return value_panels<E, R, C / 2>(t, p, alpha, prefetch, o, column);
  return column;
}

template <int R>
inline void few_block(const Tile& t, int first, Prefetcher& prefetch) {
  constexpr int kValueRows = R < 4 ? R : 4;
  constexpr int kColumns = kFewAccumulators / kValueRows > 8 ? 8 : kFewAccumulators / kValueRows;
  alignas(64) float s[R * kTileSlots];
  float alpha[R];
  interleave_queries<R>(t, static_cast<const float*>(t.q) + first * t.q_stride, t.scratch);
  with_elements(t.k_type, [&](auto e) { score_few<decltype(e), R>(t, t.scratch, prefetch, s); });
  softmax<Weights::kF32, (R < kLanes ? R : kLanes)>(t, first, R, s, alpha);
  with_elements(t.v_type, [&](auto e) {
    using E = decltype(e);
    for (int r = 0; r < R; r += kValueRows) {
      float* o = t.o + (first + r) * t.o_stride;
      const float* p = s + r * kTileSlots;
      const int column = value_panels<E, kValueRows, kColumns>(t, p, alpha + r, prefetch, o, 0);
      if (column < t.v_dim) {
        value_panel<E, kValueRows, 1, true>(t, p, alpha + r, prefetch, column, o + column,
                                            t.v_dim - column);
      }
    }
  });
}

inline void attend_few(const Tile& t) {
  // The values' steps alone suffice for all; the keys' steps come before, so it ends early.
  Prefetcher prefetch(t, (t.slots + kSlotsPerStep - 1) / kSlotsPerStep);
  int first = 0;
  if constexpr (kFewBlock == 8) {
    for (; first + 8 <= t.rows; first += 8) few_block<8>(t, first, prefetch);
  }
  for (; first + 4 <= t.rows; first += 4) few_block<4>(t, first, prefetch);
  if (first + 2 <= t.rows) {
    few_block<2>(t, first, prefetch);
    first += 2;
  }
  if (first < t.rows) few_block<1>(t, first, prefetch);
}
