// Register-blocked matrix products: kBlockRows query rows by kPanel vectors of columns at a time.

/// How a product's operands lie: one f32, or (below) a pair of bf16, per element.
struct F32Product {
  using Element = float;
  static constexpr Weights kWeights = Weights::kF32;
  static constexpr int kDepth = 1;  ///< elements of the summed dimension in one Element
  static Vec load(const float* p) { return load_f32(reinterpret_cast<const uint8_t*>(p)); }
  static Vec multiply_add(float a, Vec b, Vec c) { return fma(splat(a), b, c); }
};

#ifdef RELAY_HAS_BF16_DOT
/// Pairs of bf16, multiplied and added two by two in f32 (vdpbf16ps, bfdot): twice the f32 rate.
struct BF16Product {
  using Element = uint32_t;
  static constexpr Weights kWeights = Weights::kBF16Pairs;
  static constexpr int kDepth = 2;
  static VecU load(const uint32_t* p) { return load_words(p); }
  static Vec multiply_add(uint32_t a, VecU b, Vec c) { return dot_pairs(c, a, b); }
};
#endif

/// Whether a product is added to what its result holds: c = ab, c = alpha c + ab, c = c + ab.
enum class Accumulate : uint8_t { kNo, kScaled, kYes };

/// Where a product's sums start: from 0, from c * alpha (by row) or from c.
struct Start {
  Accumulate accumulate;
  const float* c;
  int64_t stride;
  const float* alpha;
};

/// Elements of depth for which a register block calls Prefetcher::step() once.
inline constexpr int kStepDepth = 8;

/// acc[MR][NV] = start + a[MR][depth] b[depth][NV vectors], whose rows then go to
/// finish(row, acc[row]). `row` is the block's first.
template <typename Product, int MR, int NV, typename Finish>
RELAY_NOINLINE void product_block(const typename Product::Element* a, int64_t a_stride,
                                  const typename Product::Element* b, int64_t b_stride, int depth,
                                  int row, const Start& start, const Finish& finish,
                                  Prefetcher& prefetch) {
  using B = decltype(Product::load(b));
  Vec acc[MR][NV];
  auto begin = [&](auto value) RELAY_INLINE_LAMBDA {
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] = value(i, j);
    }
  };
  const float* c = start.c + row * start.stride;
  switch (start.accumulate) {
    case Accumulate::kNo:
      begin([](int, int) { return splat(0.0f); });
      break;
    case Accumulate::kScaled:
      begin([&](int i, int j) {
        return load(c + i * start.stride + j * kLanes) * splat(start.alpha[row + i]);
      });
      break;
    case Accumulate::kYes:
      begin([&](int i, int j) { return load(c + i * start.stride + j * kLanes); });
      break;
  }
  a += row * a_stride;
  for (int k = 0; k < depth; ++k) {
    if (k % kStepDepth == 0) prefetch.step();
    B column[NV];
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) column[j] = Product::load(b + k * b_stride + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const typename Product::Element x = a[i * a_stride + k];
#pragma GCC unroll 8
      for (int j = 0; j < NV; ++j) acc[i][j] = Product::multiply_add(x, column[j], acc[i][j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i) finish(row + i, acc[i]);
}

/// Stores a product's rows.
struct StoreRows {
  float* c;
  int64_t stride;
  template <int NV>
  RELAY_INLINE void operator()(int row, const Vec (&acc)[NV]) const {
#pragma GCC unroll 8
    for (int j = 0; j < NV; ++j) store(c + row * stride + j * kLanes, acc[j]);
  }
};

/// Calls f<MR>(row) for the register blocks that rows are cut into.
template <typename F>
inline void for_each_row_block(int rows, F f) {
  for (int row = 0; row < rows;) {
    auto block = [&]<int MR>() {
      f.template operator()<MR>(row);
      row += MR;
    };
    // Two even blocks beat a full one and a thin one.
    const int left = rows - row;
    if (left >= kBlockRows && (left >= 9 || left == kBlockRows)) {
      block.template operator()<kBlockRows>();
    } else if (left >= 4) {
      block.template operator()<4>();
    } else if (left == 3) {
      block.template operator()<3>();
    } else if (left == 2) {
      block.template operator()<2>();
    } else {
      block.template operator()<1>();
    }
  }
}

template <typename Product, int NV, typename Finish>
inline void product_rows(int rows, const typename Product::Element* a, int64_t a_stride,
                         const typename Product::Element* b, int64_t b_stride, int depth,
                         const Start& start, const Finish& finish, Prefetcher& prefetch) {
  for_each_row_block(rows, [&]<int MR>(int row) {
    product_block<Product, MR, NV>(a, a_stride, b, b_stride, depth, row, start, finish, prefetch);
  });
}

/// One panel of a product: rows of start + a b, `vectors` (at most kPanel) wide, go to finish.
template <typename Product, typename Finish>
inline void product_panel(int rows, int vectors, const typename Product::Element* a,
                          int64_t a_stride, const typename Product::Element* b, int64_t b_stride,
                          int depth, const Start& start, const Finish& finish,
                          Prefetcher& prefetch) {
  auto rows_of = [&]<int NV>() {
    product_rows<Product, NV>(rows, a, a_stride, b, b_stride, depth, start, finish, prefetch);
  };
  switch (vectors) {
    case 1:
      rows_of.template operator()<1>();
      break;
    case 2:
      rows_of.template operator()<2>();
      break;
    case 3:
      rows_of.template operator()<(kPanel < 3 ? kPanel : 3)>();
      break;
    default:
      rows_of.template operator()<kPanel>();
      break;
  }
}

/// A tile's K and V as the products read them. Keys are [qk_dim / kDepth][kTileSlots]. Element
/// column i (a multiple of kLanes) of value row t lies at values[i / kPanelColumns * panel_stride +
/// t * row_stride + i % kPanelColumns].
template <typename Product>
struct Operands {
  const typename Product::Element* keys;
  const typename Product::Element* values;
  int64_t row_stride;
  int64_t panel_stride;
};

inline constexpr int kPanelColumns = kPanel * kLanes;

/// Elements from one panel of an unpacked V to the next.
inline constexpr int kPanelSize = kTileSlots * kPanelColumns;

/// Where column i (a multiple of kLanes) of slot (or pair of slots) t lies in an unpacked V: panels
/// of kPanelColumns columns, so that a panel's rows are adjacent.
inline int64_t unpacked_v_index(int t, int i) {
  return int64_t{i / kPanelColumns} * kPanelSize + t * kPanelColumns + i % kPanelColumns;
}

/// How a tile's scratch is used (scratch_floats): unpacked K, unpacked V, scores.
struct Scratch {
  explicit Scratch(const Tile& t)
      : keys(t.scratch),
        values(keys + padded_dim(t.qk_dim) * kTileSlots),
        scores(values + packed_v_floats(t.v_dim)) {}
  float* keys;
  float* values;
  float* scores;
};

/// Rows of the keys that stay in the first-level cache while all query rows go over them.
inline constexpr int kDepthBlock = 64;

/// s[rows][kTileSlots] = q k; the finished rows of the panel at column j go to finish(j).
template <typename Product, typename Finish>
inline void product_scores(int rows, int slot_vectors, const typename Product::Element* q,
                           int64_t q_stride, const typename Product::Element* k, int depth,
                           float* s, const Finish& finish, Prefetcher& prefetch) {
  for (int i = 0; i < depth; i += kDepthBlock) {
    const int here = depth - i < kDepthBlock ? depth - i : kDepthBlock;
    for (int j = 0; j < slot_vectors * kLanes; j += kPanelColumns) {
      const Start start{i == 0 ? Accumulate::kNo : Accumulate::kYes, s + j, kTileSlots, nullptr};
      auto panel = [&](const auto& rows_to) {
        product_panel<Product>(rows, slot_vectors - j / kLanes, q + i, q_stride,
                               k + i * kTileSlots + j, kTileSlots, here, start, rows_to, prefetch);
      };
      if (i + here == depth) {
        panel(finish(j));
      } else {
        panel(StoreRows{s + j, kTileSlots});
      }
    }
  }
}

/// o[rows] += p v, where p is [rows][kTileSlots] and depth counts Elements.
template <typename Product>
inline void product_values(int rows, int value_vectors, const float* p,
                           const Operands<Product>& operands, int depth, float* o, int64_t o_stride,
                           Accumulate accumulate, const float* alpha, Prefetcher& prefetch) {
  for (int j = 0; j < value_vectors; j += kPanel) {
    float* column = o + j * kLanes;
    product_panel<Product>(
        rows, value_vectors - j, reinterpret_cast<const typename Product::Element*>(p), kTileSlots,
        operands.values + j / kPanel * operands.panel_stride, operands.row_stride, depth,
        Start{accumulate, column, o_stride, alpha}, StoreRows{column, o_stride}, prefetch);
  }
}
