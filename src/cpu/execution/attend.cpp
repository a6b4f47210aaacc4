// Runs a plan: each thread takes items until none is left. Partial results of a row are merged in a
// tree (cpu/plan/merge_tree.h) by whoever delivers the second half of a node, so threads never wait
// for each other, and the output does not depend on timing.
#include <algorithm>
#include <cstring>
#include <limits>

#include "cpu/execution/workspace.h"
#include "cpu/kernels/kernels.h"
#include "cpu/plan/merge_tree.h"
#include "cpu/plan/plan.h"
#include "relay/attention.h"
#include "relay/state.h"

namespace relay {
namespace {

using kernels::kLog2e;
using kernels::padded_dim;
using kernels::QueryLayout;
using kernels::Tile;

constexpr float kInf = std::numeric_limits<float>::infinity();

constexpr uint64_t kSoon = uint64_t{1} << 32;  ///< one thread in the high half of State::next_item

/// One thread's work on one operator.
class Runner {
 public:
  Runner(const Plan& plan, const AttentionInputs& in, Workspace::State& ws, int32_t thread)
      : plan_(plan),
        in_(in),
        ws_(ws),
        kernels_(kernels::active()),
        shape_(plan.options.shape),
        o_stride_(padded_dim(shape_.v_dim)) {
    float* scratch = ws.threads[thread].data();
    q_ = scratch + ws.layout.q;
    o_ = scratch + ws.layout.o;
    max_ = scratch + ws.layout.max;
    sum_ = scratch + ws.layout.sum;
    bias_ = scratch + ws.layout.bias;
    unpacked_ = scratch + ws.layout.unpacked;
    tile_.scratch = scratch + ws.layout.kernel;
    tile_.k_type = in.kv.k.type == DType::kCustom ? DType::kF32 : in.kv.k.type;
    tile_.v_type = in.kv.v.type == DType::kCustom ? DType::kF32 : in.kv.v.type;
    tile_.qk_dim = shape_.qk_dim;
    tile_.v_dim = shape_.v_dim;
    tile_.o_stride = o_stride_;
    const bool capped = in.softcap != 0.0f;
    tile_.scale = capped ? in.scale / in.softcap : in.scale * kLog2e;
    tile_.softcap = capped ? in.softcap * kLog2e : 0.0f;
  }

  /// Takes the next of all items for this thread; false if none is left.
  bool take(uint32_t& item) {
    const uint64_t one = announced_ ? 1 - kSoon : 1;
    announced_ = false;
    item = static_cast<uint32_t>(ws_.next_item.fetch_add(one, std::memory_order_relaxed));
    return item < plan_.items.size();
  }

  void run(const WorkItem& item) {
    if (item.segment == WorkItem::kNoSegment) {
      for (uint32_t i = item.row_begin; i < item.row_end; ++i) {
        std::fill_n(o_, o_stride_, 0.0f);
        for (int32_t h = 0; h < shape_.q_heads; ++h) finish(plan_.row_index[i], h, {}, o_);
      }
      return;
    }
    start(item);
    attend_chunk(item);
    deliver(item);
  }

 private:
  int64_t query_rows(const WorkItem& item) const { return int64_t{item.rows()} * shape_.group(); }

  /// Packs the item's queries, [head][row][group], and clears its states.
  void start(const WorkItem& item) {
    layout_ = item.few
                  ? kernels_.few_layout(tile_.k_type, tile_.v_type)
                  : kernels_.many_layout(tile_.k_type, tile_.v_type, shape_.qk_dim, shape_.v_dim);
    q_stride_ = kernels::query_words(layout_, shape_.qk_dim);
    float* q = q_;
    for (int32_t h = item.head_begin; h < item.head_end; ++h) {
      for (uint32_t i = item.row_begin; i < item.row_end; ++i) {
        for (int32_t g = 0; g < shape_.group(); ++g) {
          kernels_.pack_query(in_.q.type, in_.q.at(plan_.row_index[i], h * shape_.group() + g),
                              shape_.qk_dim, layout_, q);
          q += q_stride_;
        }
      }
    }
    const int64_t states = query_rows(item) * (item.head_end - item.head_begin);
    std::fill_n(o_, states * o_stride_, 0.0f);
    std::fill_n(max_, states, -kInf);
    std::fill_n(sum_, states, 0.0f);
  }

  /// Where the slots of a tile lie.
  struct SlotTable {
    int slots = 0;
    const uint8_t* k[kTileSlots];
    const uint8_t* v[kTileSlots];
    int64_t columns[kTileSlots];
  };

  /// Walks along a chunk's spans.
  struct Cursor {
    uint32_t span;
    int64_t offset;
    int64_t left;
  };

  /// Goes over the chunk tile by tile, and over the item's heads within a tile.
  void attend_chunk(const WorkItem& item) {
    const Segment& segment = plan_.forest.segments[item.segment];
    Cursor cursor{item.span, item.span_offset, item.slots};
    now_ = &tables_[0];
    next_ = &tables_[1];
    next_of_ = &item;
    locate_tile(cursor, *now_);
    while (now_->slots > 0) {
      locate_tile(cursor, *next_);
      const bool last = next_->slots == 0;
      if (last) look_ahead();
      attend_tile(item, segment);
      if (last) break;
      std::swap(now_, next_);
    }
  }

  /// Makes next_ the first tile of the item that this thread will probably take after this one, to
  /// prefetch it. It does not take the item yet: another thread may be idle first. Threads that
  /// work on items of one size end them at the same time: those that have looked ahead before this
  /// one will take the items before its own.
  void look_ahead() {
    const uint64_t next = ws_.next_item.fetch_add(kSoon, std::memory_order_relaxed);
    announced_ = true;
    const uint64_t i = (next % kSoon) + next / kSoon;
    if (i >= plan_.items.size() || plan_.items[i].segment == WorkItem::kNoSegment) return;
    const WorkItem& item = plan_.items[i];
    Cursor first{item.span, item.span_offset, item.slots};
    locate_tile(first, *next_);
    next_of_ = &item;
  }

  void locate_tile(Cursor& at, SlotTable& table) {
    table.slots = static_cast<int>(std::min<int64_t>(at.left, kTileSlots));
    at.left -= table.slots;
    for (int n = 0; n < table.slots;) {
      const Span& s = plan_.forest.spans[at.span];
      const int count = static_cast<int>(std::min<int64_t>(table.slots - n, s.count - at.offset));
      locate(s.slot + at.offset, s.column + at.offset, count, n, table);
      n += count;
      at.offset += count;
      if (at.offset == s.count) {
        ++at.span;
        at.offset = 0;
      }
    }
  }

  /// Fills entries [n, n + count) of a slot table.
  void locate(int64_t slot, int64_t column, int count, int n, SlotTable& table) const {
    const KvCache& kv = in_.kv;
    const bool rows = kv.layout == KvLayout::kRows;
    for (int i = 0; i < count;) {
      // Within a block, slot follows slot: one division for all of them.
      const int64_t left = kv.block_size - (slot + i) % kv.block_size;
      const auto here = static_cast<int>(std::min<int64_t>(count - i, left));
      const uint8_t* k = kv.k.at(kv.block_size, slot + i, 0);
      const uint8_t* v = kv.v.at(kv.block_size, slot + i, 0);
      for (int j = 0; j < here; ++j, ++i) {
        if (rows || n + i == 0) {  // of a tile in kTiles only the beginning counts
          table.k[n + i] = k + j * kv.k.slot_stride;
          table.v[n + i] = v + j * kv.v.slot_stride;
        }
        table.columns[n + i] = column + i;
      }
    }
  }

  void attend_tile(const WorkItem& item, const Segment& segment) {
    tile_.slots = now_->slots;
    // Rows [first, last) of the item may see something of this tile.
    int64_t first = 0;
    int64_t last = item.rows();
    bool partly_hidden = segment.visibility == Visibility::kBias;
    if (segment.visibility == Visibility::kPositions) {
      partly_hidden = trim_rows(item, first, last);
      if (first == last) return;
    }
    const bool alibi = in_.slopes != nullptr && in_.bias.data == nullptr;
    const int64_t m = (last - first) * shape_.group();
    const bool per_head =
        partly_hidden && segment.visibility == Visibility::kBias && in_.bias.head_stride != 0;
    if (partly_hidden || alibi) {
      if (!per_head) fill_bias(item, segment, first, last, alibi);
      tile_.bias = bias_;
    } else {
      tile_.bias = nullptr;
    }
    tile_.rows = static_cast<int>(m);
    tile_.group = per_head ? 1 : shape_.group();
    tile_.q_stride = q_stride_;
    tile_.k = now_->k;
    tile_.v = now_->v;
    for (int32_t h = item.head_begin; h < item.head_end; ++h) {
      const int64_t state = (h - item.head_begin) * query_rows(item) + first * shape_.group();
      tile_.q = q_ + state * q_stride_;
      tile_.o = o_ + state * o_stride_;
      tile_.max = max_ + state;
      tile_.sum = sum_ + state;
      tile_.k_offset = h * in_.kv.k.head_stride;
      tile_.v_offset = h * in_.kv.v.head_stride;
      choose_prefetch(item, h);
      if (per_head) {
        fill_head_bias(item, first, last, h);
        bias_scale_[0] = kLog2e;
      } else {
        for (int32_t g = 0; g < shape_.group(); ++g) {
          bias_scale_[g] =
              kLog2e * (in_.slopes != nullptr ? in_.slopes[h * shape_.group() + g] : 1.0f);
        }
      }
      tile_.bias_scale = bias_scale_;
      unpack(in_.kv.k, shape_.qk_dim, now_->k, h, unpacked_k_, unpacked_, tile_.k, tile_.k_offset);
      float* v_room =
          unpacked_ +
          (in_.kv.k.type == DType::kCustom ? int64_t{kTileSlots} * padded_dim(shape_.qk_dim) : 0);
      unpack(in_.kv.v, shape_.v_dim, now_->v, h, unpacked_v_, v_room, tile_.v, tile_.v_offset);
      if (in_.kv.layout == KvLayout::kTiles) {
        kernels_.attend_tiled(tile_);
      } else if (item.few) {
        kernels_.attend_few(tile_);
      } else {
        kernels_.attend_many(tile_);
      }
    }
  }

  /// What the kernel prefetches while it works on head h. Where a slot's heads lie side by side: a
  /// share of the next tile's slots, all heads at once, since long runs are read fastest.
  /// Elsewhere: the vectors of the next head.
  void choose_prefetch(const WorkItem& item, int32_t h) {
    const KvPlane& k = in_.kv.k;
    const KvPlane& v = in_.kv.v;
    tile_.next_slots = 0;
    if (k.type == DType::kCustom || v.type == DType::kCustom) return;  // sizes unknown
    const auto k_bytes = static_cast<int>(row_bytes(k.type, shape_.qk_dim));
    const auto v_bytes = static_cast<int>(row_bytes(v.type, shape_.v_dim));
    const bool tiles = in_.kv.layout == KvLayout::kTiles;
    const SlotTable* table = next_;
    int32_t head = next_of_->head_begin;
    int first = 0;
    int last = next_->slots;
    int width = 1;
    if (!tiles && k.head_stride == k_bytes && v.head_stride == v_bytes) {
      const int32_t heads = item.head_end - item.head_begin;
      width = next_of_->head_end - next_of_->head_begin;
      first = next_->slots * (h - item.head_begin) / heads;
      last = next_->slots * (h - item.head_begin + 1) / heads;
    } else if (h + 1 < item.head_end) {
      table = now_;
      head = h + 1;
      last = now_->slots;
    }
    if (tiles) {  // one run of bytes
      width = last;
      last = last > 0 ? 1 : 0;
    }
    tile_.next_slots = last - first;
    tile_.next_k = table->k + first;
    tile_.next_v = table->v + first;
    tile_.next_k_offset = head * k.head_stride;
    tile_.next_v_offset = head * v.head_stride;
    tile_.next_k_bytes = k_bytes * width;
    tile_.next_v_bytes = v_bytes * width;
  }

  /// Expands one head's vectors of a kCustom plane to f32; other types stay as they are.
  void unpack(const KvPlane& plane, int dim, const uint8_t* const* rows, int32_t head,
              const uint8_t** table, float* room, const uint8_t* const*& tile_rows,
              int64_t& tile_offset) {
    if (plane.type != DType::kCustom) return;
    for (int i = 0; i < tile_.slots; ++i) {
      float* out = room + int64_t{i} * padded_dim(dim);
      plane.unpack(rows[i] + head * plane.head_stride, out, dim);
      table[i] = reinterpret_cast<const uint8_t*>(out);
    }
    tile_rows = table;
    tile_offset = 0;
  }

  bool visible(int64_t position, int64_t column) const {
    return column <= position && (in_.window == 0 || column > position - in_.window);
  }

  /// Narrows [first, last) to the rows that see a column of the tile; true if any of them misses
  /// one. A tile's columns ascend.
  bool trim_rows(const WorkItem& item, int64_t& first, int64_t& last) const {
    const int64_t low = now_->columns[0];
    const int64_t high = now_->columns[tile_.slots - 1];
    const auto position = [&](int64_t i) {
      return plan_.forest.positions[plan_.row_index[item.row_begin + i]];
    };
    const auto sees = [&](int64_t p) {
      return p >= low && (in_.window == 0 || p - in_.window < high);
    };
    while (first < last && !sees(position(first))) ++first;
    while (last > first && !sees(position(last - 1))) --last;
    for (int64_t i = first; i < last; ++i) {
      if (!visible(position(i), low) || !visible(position(i), high)) return true;
    }
    return false;
  }

  /// Bias rows of [first, last), shared by the heads of a group (scaled by the slopes later).
  void fill_bias(const WorkItem& item, const Segment& segment, int64_t first, int64_t last,
                 bool alibi) {
    for (int64_t i = first; i < last; ++i) {
      const uint32_t row = plan_.row_index[item.row_begin + i];
      float* out = bias_ + (i - first) * kTileSlots;
      if (segment.visibility == Visibility::kBias) {
        read_bias(row, 0, out);
        if (alibi) add_distance(row, out);
        continue;
      }
      std::fill_n(out, tile_.slots, 0.0f);
      if (alibi) add_distance(row, out);
      if (segment.visibility == Visibility::kPositions) {
        for (int s = 0; s < tile_.slots; ++s) {
          if (!visible(plan_.forest.positions[row], now_->columns[s])) out[s] = -kInf;
        }
      }
    }
  }

  /// Bias rows of every (row, head of the group), scaled.
  void fill_head_bias(const WorkItem& item, int64_t first, int64_t last, int32_t kv_head) {
    float* out = bias_;
    for (int64_t i = first; i < last; ++i) {
      for (int32_t g = 0; g < shape_.group(); ++g, out += kTileSlots) {
        const int32_t head = kv_head * shape_.group() + g;
        read_bias(plan_.row_index[item.row_begin + i], head, out);
        if (in_.slopes == nullptr) continue;
        for (int s = 0; s < tile_.slots; ++s) {
          if (out[s] != -kInf) out[s] *= in_.slopes[head];
        }
      }
    }
  }

  void add_distance(uint32_t row, float* out) const {
    for (int s = 0; s < tile_.slots; ++s) {
      out[s] += static_cast<float>(now_->columns[s] - plan_.forest.positions[row]);
    }
  }

  /// The tile's columns of one bias row; runs of neighbouring columns at a time.
  void read_bias(uint32_t row, int32_t head, float* out) const {
    const void* bias = in_.bias.at(row, head);
    for (int s = 0; s < tile_.slots;) {
      int end = s + 1;
      while (end < tile_.slots && now_->columns[end] == now_->columns[end - 1] + 1) ++end;
      if (in_.bias.type == DType::kF16) {
        kernels_.expand_f16(static_cast<const uint16_t*>(bias) + now_->columns[s], out + s,
                            end - s);
      } else {
        std::memcpy(out + s, static_cast<const float*>(bias) + now_->columns[s],
                    static_cast<size_t>(end - s) * sizeof(float));
      }
      s = end;
    }
  }

  /// Hands each state on: straight out, or to the tree of its row.
  void deliver(const WorkItem& item) {
    const int32_t group = shape_.group();
    for (uint32_t i = 0; i < item.rows(); ++i) {
      const uint32_t row = plan_.row_index[item.row_begin + i];
      const uint32_t partial = plan_.partial_of(item, i);
      if (partial == Plan::kDirect) {
        for (int32_t h = item.head_begin; h < item.head_end; ++h) {
          const int64_t first = state_of(item, i, h);
          for (int64_t s = first; s < first + group; ++s) {
            const auto head = static_cast<int32_t>(h * group + s - first);
            finish(row, head, {max_[s], sum_[s]}, o_ + s * o_stride_);
          }
        }
        continue;
      }
      each_word(item.head_begin, item.head_end, [&](int32_t word, uint64_t heads) {
        merge_upwards(item, i, partial - plan_.partial_begin[row], word, heads);
      });
    }
  }

  /// Where this thread has the states of an item's row i and a KV head.
  int64_t state_of(const WorkItem& item, uint32_t i, int32_t kv_head) const {
    return (int64_t{kv_head - item.head_begin} * item.rows() + i) * shape_.group();
  }

  /// Takes the states of an item's row i, leaf `leaf` of the row's tree, towards its root: each of
  /// these KV heads of a word as far as the other halves are there. A node's result lies where the
  /// first leaf of its left half did.
  void merge_upwards(const WorkItem& item, uint32_t i, uint32_t leaf, int32_t word,
                     uint64_t heads) {
    const uint32_t row = plan_.row_index[item.row_begin + i];
    const uint32_t first = plan_.partial_begin[row];
    bool stored = false;
    climb(leaf, plan_.partials_of(row), [&](uint32_t left, uint32_t right) {
      std::atomic<uint64_t>& half_there =
          ws_.half_there[int64_t{first + right} * head_words(shape_.kv_heads) + word];
      uint64_t here = 0;  // heads that are not stored, since their left halves are there
      if (!stored) {
        if (leaf == right) here = heads & half_there.load(std::memory_order_acquire);
        each_head(heads & ~here, word,
                  [&](int32_t h) { store(state_of(item, i, h), first + leaf, h); });
        stored = true;
      }
      // acq_rel: who comes second sees what the first has stored. And it clears the bit again.
      heads &= half_there.fetch_xor(heads, std::memory_order_acq_rel);
      each_head(heads, word, [&](int32_t h) {
        const uint64_t further = heads & ~head_bits(0, h + 1, word);
        if (further != 0) {
          const int32_t next = 64 * word + std::countr_zero(further);
          prefetch_partial(first + left, next);
          prefetch_partial(first + right, next);
        }
        const bool own = (here >> (h % 64) & 1) != 0;
        const int64_t from = own ? state_of(item, i, h) : partial_of(first + right, h);
        const float* o = own ? o_ : ws_.partial_o.data();
        for (int64_t s = from, into = partial_of(first + left, h); s < from + shape_.group();
             ++s, ++into) {
          merge_into(into, own ? SoftmaxState{max_[s], sum_[s]} : ws_.partial_states[s],
                     o + s * o_stride_);
        }
      });
      return heads != 0;
    });
    each_head(heads, word, [&](int32_t h) {  // these have reached the root
      const int64_t p = partial_of(first, h);
      for (int32_t g = 0; g < shape_.group(); ++g) {
        finish(row, h * shape_.group() + g, ws_.partial_states[p + g],
               ws_.partial_o.data() + (p + g) * o_stride_);
      }
    });
  }

  /// Where the workspace has the states of a partial and a KV head.
  int64_t partial_of(uint32_t partial, int32_t kv_head) const {
    return int64_t{partial} * shape_.q_heads + int64_t{kv_head} * shape_.group();
  }

  /// Copies a KV head's states from this thread's to a partial.
  void store(int64_t state, uint32_t partial, int32_t kv_head) {
    const int64_t p = partial_of(partial, kv_head);
    for (int32_t g = 0; g < shape_.group(); ++g) {
      ws_.partial_states[p + g] = {max_[state + g], sum_[state + g]};
    }
    std::memcpy(ws_.partial_o.data() + p * o_stride_, o_ + state * o_stride_,
                static_cast<size_t>(shape_.group() * o_stride_) * sizeof(float));
  }

  /// Another core has probably written this partial, so each cache line has to come from there.
  void prefetch_partial(uint32_t partial, int32_t kv_head) const {
    const int64_t p = partial_of(partial, kv_head);
    __builtin_prefetch(&ws_.partial_states[p]);
    const float* vectors = ws_.partial_o.data() + p * o_stride_;
    for (int64_t i = 0; i < shape_.group() * o_stride_; i += 16) __builtin_prefetch(vectors + i);
  }

  /// Merges a state into that of a partial.
  void merge_into(int64_t p, const SoftmaxState& part, const float* o) {
    const MergeWeights w = merge(ws_.partial_states[p], part);
    if (w.part == 0.0f) return;
    kernels_.scale_add(ws_.partial_o.data() + p * o_stride_, w.into, o, w.part, shape_.v_dim);
  }

  /// Adds the sink, normalises and writes one output vector.
  void finish(uint32_t row, int32_t head, SoftmaxState s, const float* o) {
    float factor = 1.0f;
    if (in_.sinks != nullptr) {
      const MergeWeights w = merge(s, {in_.sinks[head] * kLog2e, 1.0f});
      factor = w.into;
    }
    factor = s.empty() ? 0.0f : factor / s.sum;
    kernels_.store_output(in_.out.type, o, factor, shape_.v_dim, in_.out.at(row, head));
    if (in_.lse != nullptr) in_.lse[int64_t{row} * shape_.q_heads + head] = s.log_sum_exp();
  }

  const Plan& plan_;
  const AttentionInputs& in_;
  Workspace::State& ws_;
  const kernels::KernelSet& kernels_;
  const HeadShape shape_;
  const int64_t o_stride_;
  int64_t q_stride_ = 0;
  QueryLayout layout_ = QueryLayout::kF32;
  float* q_;
  float* o_;
  float* max_;
  float* sum_;
  float* bias_;
  float* unpacked_;
  Tile tile_;
  SlotTable tables_[2];
  SlotTable* now_ = nullptr;
  SlotTable* next_ = nullptr;
  const WorkItem* next_of_ = nullptr;  ///< whose tile next_ is
  bool announced_ = false;             ///< counted in the high half of State::next_item
  const uint8_t* unpacked_k_[kTileSlots];
  const uint8_t* unpacked_v_[kTileSlots];
  float bias_scale_[kMaxGroup];
};

}  // namespace

void attend(const Plan& plan, const AttentionInputs& inputs, Workspace& workspace, int32_t thread) {
  Workspace::State& ws = workspace.state();
  if (ws.fitted_to != plan.serial) {
    throw Error(
        "attend: the workspace was fitted to another plan, or before this one was planned "
        "again: call fit() after each planning");
  }
  if (thread < 0 || thread >= plan.options.threads) throw Error("attend: no such thread");
  Runner runner(plan, inputs, ws, thread);
  for (uint32_t i = 0; runner.take(i);) runner.run(plan.items[i]);
  if (ws.finished_threads.fetch_add(1, std::memory_order_acq_rel) + 1 ==
      static_cast<uint32_t>(plan.options.threads)) {
    ws.finished_threads.store(0, std::memory_order_relaxed);
    ws.next_item.store(0, std::memory_order_relaxed);
  }
}

}  // namespace relay
