// The online softmax (Milakov and Gimelshein, 2018) between the two products of a tile.
//
// A row of 64 scores costs 64 exponentials and two reductions over lanes. Rows are taken kLanes at
// a time so that the reductions of all of them, and the factors by which their earlier results
// shrink, are a few whole-vector operations rather than a dependent chain per row.

/// How the weights are wanted: f32, or rounded to bf16, two by two in the first half of each row,
/// or as QueryLayout::kBF16Halves.
enum class Weights : uint8_t { kF32, kBF16Pairs, kBF16Halves };

/// Whether they are rounded so far that a coarse exponential does.
template <Weights kWeights>
inline constexpr bool kCoarseExp = kWeights == Weights::kBF16Pairs;

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

/// Stores two vectors of a row's weights, for `column` of the tile and on; total + both, as they
/// were stored: what rounding makes of a weight, it makes of the sum as well.
template <Weights kWeights>
RELAY_INLINE Vec store_weights(float* row, int column, Vec first, Vec second, Vec total) {
#ifdef RELAY_HAS_BF16_DOT
  if constexpr (kWeights == Weights::kBF16Pairs) {
    const VecU pairs = bf16_pairs(first, second);
    store(row + column / 2, (Vec)pairs);
    return add_pairs(total, pairs);
  }
#endif
#ifdef RELAY_HAS_AMX
  if constexpr (kWeights == Weights::kBF16Halves) {
    store_halves(row + column, first, second);
    return total + first + second;
  }
#endif
  store(row + column, first);
  store(row + column + kLanes, second);
  return total + first + second;
}

/// Whether the tile's logits are its scores times the scale, and no more.
inline bool plain_logits(const Tile& t) {
  return t.slots == kTileSlots && t.bias == nullptr && t.softcap == 0.0f && t.scale > 0.0f;
}

/// Rows [first, first + N) of the tile, whose scores are s[N][kTileSlots]; N a power of two up to
/// kLanes. A tile of plain logits needs no pass of its own for them.
template <int N, Weights kWeights>
inline void softmax_block(const Tile& t, int first, float* s, float* alpha) {
  const bool plain = plain_logits(t);
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
      return exp2<kCoarseExp<kWeights>>(fma(load(row + j * kLanes), scale, minus_bound));
    };
    auto weigh = [&](int count) {
#pragma GCC unroll 16
      for (int j = 0; j < count; j += 2) {
        const Vec next = j + 1 < count ? weight(j + 1) : splat(0.0f);
        total = store_weights<kWeights>(row, j * kLanes, weight(j), next, total);
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

/// Weights of the tile's rows from `first` on, made of the scores while they are still in
/// registers: against the maxima of the slots *before* this tile. Any reference near the maximum
/// will do, and against one that is known nothing is searched and nothing earlier shrinks.
template <Weights kWeights>
class EarlyWeights {
 public:
  EarlyWeights(const Tile& t, int first, int rows)
      : scale_(splat(t.scale)), max_(t.max + first), sum_(t.sum + first), rows_(rows) {
    known_ = plain_logits(t) && max_[0] > -kInf && max_[rows - 1] > -kInf;
  }

  /// Whether there is a maximum to hold to.
  bool known() const { return known_; }

  /// Takes a product's rows of scores, from `column` of the tile on.
  struct Take {
    template <int NV>
    RELAY_INLINE void operator()(int row, const Vec (&scores)[NV]) const {
      if constexpr (NV == kPanel) {  // only whole tiles come here
        const Vec bound = splat(max[row]);
        Vec total = kOnePanel || column == 0 ? splat(0.0f) : load(totals + row * kLanes);
#pragma GCC unroll 8
        for (int j = 0; j < NV; j += 2) {
          total = store_weights<kWeights>(s + row * kTileSlots, column + j * kLanes,
                                          weight(scores[j], bound), weight(scores[j + 1], bound),
                                          total);
        }
        store(totals + row * kLanes, total);
      }
    }
    RELAY_INLINE Vec weight(Vec score, Vec bound) const {
      Vec x = score * scale - bound;
      if (!kPowersOverflow) x = min(x, splat(126.0f));  // large enough to be found out
      return exp2_finite<kCoarseExp<kWeights>>(x);
    }
    static constexpr bool kOnePanel = kPanel * kLanes == kTileSlots;
    Vec scale;
    const float* max;
    float* totals;
    float* s;
    int column;
  };
  /// The weights go to s[rows][kTileSlots].
  Take take(int column, float* s) { return {scale_, max_, totals_, s, column}; }

  /// Once all are taken, adds them to the rows' sums. False, with nothing added, if a maximum was
  /// too low (or something is not finite): the tile must go by its own.
  bool commit() {
    alignas(64) float sums[kScoreRows];
    Vec all[1] = {reduce(0, sums)};
    // In f32, 2^20 on top of what sums and values need is no loss.
    if (!(reduce_each<1>(all, Add{})[0] < 1048576.0f)) return false;
    for (int r = 0; r < rows_; ++r) sum_[r] += sums[r];
    return true;
  }

 private:
  /// sums[done, rows) from the lanes of the totals; returns all of them, over the lanes.
  template <int N = kLanes>
  Vec reduce(int done, float* sums) const {
    Vec all = splat(0.0f);
    for (; done + N <= rows_; done += N) {
      Vec each[N];
      for (int r = 0; r < N; ++r) each[r] = load(totals_ + (done + r) * kLanes);
      const Vec sum = reduce_each<N>(each, Add{});
      store_first<N>(sums + done, sum);
      all += sum;
    }
    if constexpr (N > 1) {
      if (done < rows_) all += reduce<N / 2>(done, sums);
    }
    return all;
  }

  Vec scale_;
  const float* max_;
  float* sum_;
  int rows_;
  bool known_;
  alignas(64) float totals_[kScoreRows * kLanes];
};
