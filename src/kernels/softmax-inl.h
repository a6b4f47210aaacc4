// The online softmax (Milakov and Gimelshein, 2018) between the two products of a tile.
//
// A row of 64 scores costs 64 exponentials and two reductions over lanes. Rows are taken kLanes at
// a time so that the reductions of all of them, and the factors by which their earlier results
// shrink, are a few whole-vector operations rather than a dependent chain per row.

/// How the weights are wanted: f32, or rounded to bf16, two by two in the first half of each row.
enum class Weights : uint8_t { kF32, kBF16Pairs };

inline constexpr int kScoreVectors = kTileSlots / kLanes;

/// The first N (a power of two up to kLanes) lanes at p.
template <int N>
RELAY_INLINE Vec load_first(const float* p) {
  if constexpr (N == kLanes) return load(p);
  float x[kLanes] = {};
  std::memcpy(x, p, N * sizeof(float));
  return load(x);
}
template <int N>
RELAY_INLINE void store_first(float* p, Vec v) {
  if constexpr (N == kLanes) return store(p, v);
  float x[kLanes];
  store(x, v);
  std::memcpy(p, x, N * sizeof(float));
}

/// Turns raw scores of one row into logits in place: scale, soft cap, bias, and -inf beyond the
/// tile's slots. `q` is the row's number in the tile.
inline void finish_logits(const Tile& t, int q, float* row) {
  const int vectors = (t.slots + kLanes - 1) / kLanes;
  const Vec scale = splat(t.scale);
  for (int j = 0; j < vectors; ++j) {
    Vec x = load(row + j * kLanes) * scale;
    if (t.softcap != 0.0f) x = tanh(x) * splat(t.softcap);
    if (t.bias != nullptr) {
      const Vec b = load(t.bias + static_cast<int64_t>(q / t.group) * kTileSlots + j * kLanes);
      const Vec slope = splat(t.bias_scale[q % t.group]);
      // By comparison, not by arithmetic: a slope of 0 must not turn -inf into NaN.
      x = select_below(b, splat(-3.4e38f), splat(-kInf), fma(b, slope, x));
    }
    store(row + j * kLanes, x);
  }
  if (t.slots % kLanes != 0) {
    Vec iota;
    for (int i = 0; i < kLanes; ++i) iota[i] = static_cast<float>(i);
    float* last = row + (vectors - 1) * kLanes;
    const Vec end = splat(static_cast<float>(t.slots % kLanes));
    store(last, select_below(iota, end, load(last), splat(-kInf)));
  }
}

/// Rows [first, first + N) of the tile, whose scores are s[N][kTileSlots]; N a power of two up to
/// kLanes. A whole tile without bias needs no pass of its own for the logits.
template <int N, Weights kWeights>
inline void softmax_block(const Tile& t, int first, float* s, float* alpha) {
  const bool plain =
      t.slots == kTileSlots && t.bias == nullptr && t.softcap == 0.0f && t.scale > 0.0f;
  const int vectors = (t.slots + kLanes - 1) / kLanes;
  if (!plain) {
    for (int r = 0; r < N; ++r) finish_logits(t, first + r, s + r * kTileSlots);
  }
  const Vec scale = splat(plain ? t.scale : 1.0f);

  Vec each[N];
  for (int r = 0; r < N; ++r) {
    const float* row = s + r * kTileSlots;
    Vec top = load(row);
    if (vectors == kScoreVectors) {
#pragma GCC unroll 16
      for (int j = 1; j < kScoreVectors; ++j) top = max(top, load(row + j * kLanes));
    } else {
      for (int j = 1; j < vectors; ++j) top = max(top, load(row + j * kLanes));
    }
    each[r] = top;
  }
  const Vec old_max = load_first<N>(t.max + first);
  const Vec new_max = max(old_max, reduce_each<N>(each, Max{}) * scale);
  // Where nothing is visible so far, any finite number keeps NaN away: all weights become 0.
  const Vec bound = select_below(new_max, splat(-3.4e38f), splat(0.0f), new_max);
  const Vec shrink = exp2(old_max - bound);
  store_first<N>(t.max + first, new_max);
  store_first<N>(alpha, shrink);
  alignas(64) float bounds[kLanes];
  store(bounds, bound);

  for (int r = 0; r < N; ++r) {
    float* row = s + r * kTileSlots;
    const Vec minus_bound = splat(-bounds[r]);
    Vec total = splat(0.0f);
    auto weight = [&](int j) {
      const Vec p = exp2 < kWeights ==
                    Weights::kBF16Pairs > (fma(load(row + j * kLanes), scale, minus_bound));
      total += p;
      return p;
    };
    auto weigh = [&](int count) {
      if constexpr (kWeights == Weights::kF32) {
#pragma GCC unroll 16
        for (int j = 0; j < count; ++j) store(row + j * kLanes, weight(j));
      } else {
#ifdef RELAY_HAS_BF16_DOT
#pragma GCC unroll 16
        for (int j = 0; j < count; j += 2) {
          const Vec low = weight(j);
          const Vec high = j + 1 < count ? weight(j + 1) : splat(0.0f);
          store_bf16_pairs(row + j * kLanes / 2, low, high);
        }
#endif
      }
    };
    if (vectors == kScoreVectors) {
      weigh(kScoreVectors);
    } else {
      weigh(vectors);
    }
    each[r] = total;
  }
  const Vec sum = load_first<N>(t.sum + first);
  store_first<N>(t.sum + first, fma(sum, shrink, reduce_each<N>(each, Add{})));
}

/// Scores s[rows][kTileSlots] of the tile's rows from `first` on become weights 2^(x - max), in
/// place; alpha[row] is the factor by which the row's earlier o shrinks.
template <Weights kWeights, int N = kLanes>
inline void softmax(const Tile& t, int first, int rows, float* s, float* alpha) {
  int done = 0;
  for (; done + N <= rows; done += N) {
    softmax_block<N, kWeights>(t, first + done, s + done * kTileSlots, alpha + done);
  }
  if constexpr (N > 1) {
    if (done < rows) {
      softmax<kWeights, N / 2>(t, first + done, rows - done, s + done * kTileSlots, alpha + done);
    }
  }
}
