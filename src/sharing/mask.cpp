// Additive mask -> forest. Columns that the same rows see, without bias, form one segment, wherever
// they lie: so the interleaved cells of many decoding sequences fall apart into one segment each,
// and the shared prompt stays whole. What falls into too small pieces (the staircase of a causal
// prompt, arbitrary masks) is gathered into tiles that consult the mask. In such a tile a hidden
// value is multiplied by 0, so NaN or infinity would show: where requests share like the branches
// of a tree, no tile holds cells that another request's rows do not see.
//
// Cost: one pass over the mask, 64 columns at a time where they are alike.
#include <algorithm>
#include <cstring>
#include <string>
#include <unordered_map>

#include "sharing/emit.h"

namespace relay {
namespace {

constexpr int kBlock = 64;  // columns that are looked at together

/// Work of attending a segment once more, in slots per row: rescaling, merging, the call itself.
constexpr int64_t kSegmentCost = 16;

uint64_t mix(uint64_t x) {  // splitmix64's finaliser
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

struct F16 {
  using Bits = uint16_t;
  static bool hides(Bits b) { return b == 0xfc00u; }
  static bool shows(Bits b) { return (b & 0x7fffu) == 0; }
};
struct F32 {
  using Bits = uint32_t;
  static bool hides(Bits b) { return b == 0xff800000u; }
  static bool shows(Bits b) { return (b & 0x7fffffffu) == 0; }
};

/// Columns with the same readers (the same signature: the sum of the readers' random numbers).
struct Group {
  uint64_t signature = 0;
  bool bias = false;
  int64_t columns = 0;
  int64_t representative = 0;
  std::vector<Span> spans;  // slot not yet set: column only
};

/// A set of rows, one bit each.
using RowSet = std::vector<uint64_t>;

int64_t count(const RowSet& set) {
  int64_t n = 0;
  for (uint64_t word : set) n += __builtin_popcountll(word);
  return n;
}

template <typename Type>
class MaskBuilder {
  using Bits = typename Type::Bits;

 public:
  MaskBuilder(const MaskBatch& batch, int32_t stream, Forest& forest)
      : batch_(batch), stream_(stream), forest_(forest) {}

  const Bits* row(int32_t r) const {
    return reinterpret_cast<const Bits*>(static_cast<const char*>(batch_.data) +
                                         stream_ * batch_.stream_stride + r * batch_.row_stride);
  }

  /// Emits the segments of the stream's rows [begin, end).
  void build(int32_t begin, int32_t end) {
    begin_ = begin;
    end_ = end;
    scan();
    group();
    emit();
  }

  /// Rows that belong to the request of row `begin`: as long as each sees all that the one before
  /// it sees, which is so along a causal sequence and never across two.
  int32_t request_end(int32_t begin) const {
    int32_t end = begin + 1;
    while (end < batch_.rows_per_stream && includes(end, end - 1)) ++end;
    return end;
  }

 private:
  bool includes(int32_t outer, int32_t inner) const {
    const Bits* a = row(outer);
    const Bits* b = row(inner);
    for (int64_t c = 0; c < batch_.columns; ++c) {
      if (Type::hides(a[c]) && !Type::hides(b[c])) return false;
    }
    return true;
  }

  /// Fills signature_ and bias_ for every column.
  void scan() {
    const int64_t blocks = (batch_.columns + kBlock - 1) / kBlock;
    alike_.assign(blocks, true);
    signature_.assign(blocks * kBlock, 0);  // an alike block keeps its signature in its first
    bias_.assign(blocks * kBlock, 0);
    for (int32_t r = begin_; r < end_; ++r) {
      const uint64_t number = mix(static_cast<uint64_t>(r) + 1);
      const Bits* bits = row(r);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first = b * kBlock;
        const int64_t n = std::min<int64_t>(kBlock, batch_.columns - first);
        const Bits* p = bits + first;
        uint64_t* signature = &signature_[first];
        const bool uniform =
            n == 1 || std::memcmp(p, p + 1, static_cast<size_t>(n - 1) * sizeof(Bits)) == 0;
        if (uniform && Type::hides(p[0])) continue;
        if (uniform && Type::shows(p[0])) {
          const int64_t columns = alike_[b] ? 1 : n;
          for (int64_t c = 0; c < columns; ++c) signature[c] += number;
          continue;
        }
        if (alike_[b]) {
          alike_[b] = false;
          std::fill_n(signature, n, signature[0]);
        }
        for (int64_t c = 0; c < n; ++c) {
          if (!Type::hides(p[c])) {
            signature[c] += number;
            if (!Type::shows(p[c])) bias_[first + c] = 1;
          }
        }
      }
    }
  }

  /// Appends columns [first, first + n), all with this signature, to their group.
  void add(uint64_t signature, bool bias, int64_t first, int64_t n) {
    if (signature == 0 || n == 0) return;
    const uint64_t key = signature ^ (bias ? 0x5555555555555555u : 0);
    if (last_ == SIZE_MAX || key != last_key_) {
      const auto [entry, fresh] = index_.try_emplace(key, group_count_);
      if (fresh) {
        if (group_count_ == groups_.size()) groups_.emplace_back();
        Group& g = groups_[group_count_++];
        g.signature = signature;
        g.bias = bias;
        g.columns = 0;
        g.representative = first;
        g.spans.clear();
      }
      last_ = entry->second;
      last_key_ = key;
    }
    Group& g = groups_[last_];
    g.columns += n;
    if (!g.spans.empty() && g.spans.back().column + g.spans.back().count == first) {
      g.spans.back().count += n;
    } else {
      g.spans.push_back({0, first, n});
    }
  }

  /// Fills groups_[0, group_count_), in the order of their first columns.
  void group() {
    index_.clear();
    group_count_ = 0;
    last_ = SIZE_MAX;
    for (int64_t b = 0; b < static_cast<int64_t>(alike_.size()); ++b) {
      const int64_t first = b * kBlock;
      const int64_t n = std::min<int64_t>(kBlock, batch_.columns - first);
      if (alike_[b]) {
        add(signature_[first], false, first, n);
      } else {
        for (int64_t c = first; c < first + n; ++c) add(signature_[c], bias_[c] != 0, c, 1);
      }
    }
  }

  size_t row_words() const { return static_cast<size_t>(end_ - begin_ + 63) / 64; }

  void readers(const Group& g, RowSet& set) const {
    set.assign(row_words(), 0);
    for (int32_t r = begin_; r < end_; ++r) {
      if (!Type::hides(row(r)[g.representative])) {
        set[(r - begin_) / 64] |= uint64_t{1} << ((r - begin_) % 64);
      }
    }
  }

  /// Fills sets_, each group's readers, and last_rows_, the last of each request: what such a row
  /// adds to the cache, no other row sees.
  void find_readers() {
    if (sets_.size() < group_count_) sets_.resize(group_count_);
    last_rows_.assign(row_words(), 0);
    for (size_t i = 0; i < group_count_; ++i) {
      readers(groups_[i], sets_[i]);
      if (count(sets_[i]) > 1) continue;
      for (size_t w = 0; w < last_rows_.size(); ++w) last_rows_[w] |= sets_[i][w];
    }
  }

  /// Whether a tile with columns of either readers would show a request what only others see,
  /// though they lie as in a tree: the one within the other, which then are all of both.
  bool mixes_requests(const RowSet& a, const RowSet& b, const RowSet& all) const {
    if (all != a && all != b) return false;
    for (size_t w = 0; w < all.size(); ++w) {
      if (((a[w] ^ b[w]) & last_rows_[w]) != 0) return true;
    }
    return false;
  }

  /// Groups become segments; small ones that read much alike are gathered (see the file's head).
  void emit() {
    find_readers();
    cluster_.clear();
    for (size_t i = 0; i < group_count_; ++i) {
      const RowSet& set = sets_[i];
      if (groups_[i].columns >= kBlock) {
        rows_ = set;
        emit_segment({&i, 1}, groups_[i].bias ? Visibility::kBias : Visibility::kAll);
        continue;
      }
      if (!cluster_.empty()) {
        union_.resize(set.size());
        for (size_t w = 0; w < set.size(); ++w) union_[w] = set[w] | cluster_rows_[w];
        const int64_t columns = cluster_columns_ + groups_[i].columns;
        const int64_t together = count(union_) * (columns + kSegmentCost);
        const int64_t apart = count(cluster_rows_) * (cluster_columns_ + kSegmentCost) +
                              count(set) * (groups_[i].columns + kSegmentCost);
        if (columns <= kBlock && together <= apart && !mixes_requests(set, cluster_rows_, union_)) {
          cluster_.push_back(i);
          cluster_rows_.swap(union_);
          cluster_columns_ = columns;
          continue;
        }
        emit_cluster();
      }
      cluster_.assign(1, i);
      cluster_rows_ = set;
      cluster_columns_ = groups_[i].columns;
    }
    emit_cluster();
  }

  void emit_cluster() {
    if (cluster_.empty()) return;
    const bool plain = cluster_.size() == 1 && !groups_[cluster_[0]].bias;
    rows_.swap(cluster_rows_);
    emit_segment(cluster_, plain ? Visibility::kAll : Visibility::kBias);
    cluster_.clear();
  }

  /// One segment of the groups' columns for the rows in rows_.
  void emit_segment(std::span<const size_t> groups, Visibility visibility) {
    const int64_t slot0 = stream_ * batch_.slots_per_block;
    const auto row0 = static_cast<uint32_t>(stream_ * batch_.rows_per_stream + begin_);
    spans_.clear();
    for (size_t g : groups) {
      for (const Span& s : groups_[g].spans) {
        spans_.push_back({slot0 + s.column, s.column, s.count});
      }
    }
    row_list_.clear();
    for (size_t w = 0; w < rows_.size(); ++w) {
      for (uint64_t word = rows_[w]; word != 0; word &= word - 1) {
        row_list_.push_back(row0 + static_cast<uint32_t>(w * 64 + __builtin_ctzll(word)));
      }
    }
    append_segment(forest_, spans_, row_list_, visibility);
  }

  const MaskBatch& batch_;
  const int32_t stream_;
  Forest& forest_;
  int32_t begin_ = 0;
  int32_t end_ = 0;

  std::vector<char> alike_;
  std::vector<uint64_t> signature_;
  std::vector<char> bias_;
  std::unordered_map<uint64_t, size_t> index_;
  std::vector<Group> groups_;
  size_t group_count_ = 0;
  size_t last_ = SIZE_MAX;
  uint64_t last_key_ = 0;
  std::vector<RowSet> sets_;  ///< of the groups
  RowSet last_rows_, union_, rows_, cluster_rows_;
  std::vector<size_t> cluster_;
  int64_t cluster_columns_ = 0;
  std::vector<Span> spans_;
  std::vector<uint32_t> row_list_;
};

template <typename Type>
void build_stream(const MaskBatch& batch, int32_t stream, Sharing sharing, Forest& forest) {
  MaskBuilder<Type> builder(batch, stream, forest);
  if (sharing == Sharing::kOn) {
    builder.build(0, batch.rows_per_stream);
    return;
  }
  for (int32_t begin = 0; begin < batch.rows_per_stream;) {
    const int32_t end = builder.request_end(begin);
    builder.build(begin, end);
    begin = end;
  }
}

/// No mask: every row of a stream sees every column of it.
void build_unmasked(const MaskBatch& batch, int32_t stream, Sharing sharing, Forest& forest) {
  const Span span{stream * batch.slots_per_block, 0, batch.columns};
  std::vector<uint32_t> rows;
  for (int32_t r = 0; r < batch.rows_per_stream; ++r) {
    rows.push_back(static_cast<uint32_t>(stream * batch.rows_per_stream + r));
  }
  if (sharing == Sharing::kOn) {
    append_segment(forest, {&span, 1}, rows, Visibility::kAll);
  } else {
    for (const uint32_t& row : rows)
      append_segment(forest, {&span, 1}, {&row, 1}, Visibility::kAll);
  }
}

}  // namespace

void build_from_mask(const MaskBatch& batch, Sharing sharing, Forest& forest) {
  const auto fail = [](const std::string& what) { throw Error("mask: " + what); };
  if (batch.type != DType::kF16 && batch.type != DType::kF32) fail("type must be f16 or f32");
  if (batch.rows_per_stream < 0 || batch.streams < 0 || batch.columns < 0) fail("negative size");
  if (batch.streams > 1 && batch.slots_per_block < batch.columns) {
    fail("slots_per_block must hold a stream's columns");
  }
  if (int64_t{batch.rows_per_stream} * batch.streams > INT32_MAX) fail("too many rows");
  forest.clear();
  forest.rows = batch.rows_per_stream * batch.streams;
  for (int32_t s = 0; s < batch.streams; ++s) {
    if (batch.data == nullptr) {
      build_unmasked(batch, s, sharing, forest);
    } else if (batch.type == DType::kF16) {
      build_stream<F16>(batch, s, sharing, forest);
    } else {
      build_stream<F32>(batch, s, sharing, forest);
    }
  }
}

}  // namespace relay
