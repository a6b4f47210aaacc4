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

/// Where N slots of K begin, from `first` on; surplus ones (which are masked later) as the last.
template <int N>
RELAY_INLINE void key_rows(const Tile& t, int first, const uint8_t* (&rows)[N]) {
#pragma GCC unroll 16
  for (int p = 0; p < N; ++p) {
    rows[p] = t.k[first + p < t.slots ? first + p : t.slots - 1] + t.k_offset;
  }
}

/// Reduces acc[R][kLanes / R], the sums of rows and slots, to s[R][kTileSlots] from `first` on.
template <int R>
RELAY_INLINE void reduce_scores(Vec (&acc)[kLanes], int first, float* s) {
  constexpr int kSlots = kLanes / R;
  alignas(64) float out[kLanes];
  store(out, reduce_each<kLanes>(acc, Add{}));
  for (int r = 0; r < R; ++r) {
    std::memcpy(s + r * kTileSlots + first, out + r * kSlots, kSlots * sizeof(float));
  }
}

/// Scores of R rows (interleaved) against the tile: s[R][kTileSlots].
template <typename E, int R>
inline void score_few(const Tile& t, const float* q, Prefetcher& prefetch, float* s) {
  constexpr int kSlots = kLanes / R;  // slots at once: kLanes accumulators
  const int full = t.qk_dim / kLanes * kLanes;
  for (int first = 0; first < t.slots; first += kSlots) {
    const uint8_t* k[kSlots];
    key_rows(t, first, k);
    Vec acc[kLanes];
    auto accumulate = [&](int i, bool begin, auto load_k) RELAY_INLINE_LAMBDA {
      prefetch.step();
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
    reduce_scores<R>(acc, first, s);
  }
}

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
  for (int slot = 0; slot < t.slots; ++slot) {
    prefetch.step();
    const uint8_t* row = t.v[slot] + base;
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

/// How a block of R rows goes over V: query rows and vectors of columns at once.
template <int R>
struct ValueBlock {
  static constexpr int kRows = R < 4 ? R : 4;
  static constexpr int kColumns = kFewAccumulators / kRows > 8 ? 8 : kFewAccumulators / kRows;
};

/// Times that a block of R rows calls Prefetcher::step().
template <int R>
inline int few_steps(const Tile& t) {
  constexpr int kSlots = kLanes / R;
  constexpr int kWidth = ValueBlock<R>::kColumns * kLanes;
  const int panels = (t.v_dim + kWidth - 1) / kWidth * (R / ValueBlock<R>::kRows);
  return (t.slots + kSlots - 1) / kSlots * ((t.qk_dim + kLanes - 1) / kLanes) + panels * t.slots;
}

template <int R>
inline void few_block(const Tile& t, int first, Prefetcher& prefetch) {
  constexpr int kValueRows = ValueBlock<R>::kRows;
  constexpr int kColumns = ValueBlock<R>::kColumns;
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

/// Calls f<R>(first) for the blocks of rows that a tile is cut into.
template <typename F>
inline void for_each_few_block(int rows, F f) {
  int first = 0;
  if constexpr (kFewBlock == 8) {
    for (; first + 8 <= rows; first += 8) f.template operator()<8>(first);
  }
  for (; first + 4 <= rows; first += 4) f.template operator()<4>(first);
  if (first + 2 <= rows) {
    f.template operator()<2>(first);
    first += 2;
  }
  if (first < rows) f.template operator()<1>(first);
}

inline void attend_few_f32(const Tile& t) {
  int steps = 0;
  for_each_few_block(t.rows, [&]<int R>(int) { steps += few_steps<R>(t); });
  Prefetcher prefetch(t, steps);
  for_each_few_block(t.rows, [&]<int R>(int first) { few_block<R>(t, first, prefetch); });
}
