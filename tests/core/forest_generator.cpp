#include "core/forest_generator.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <sstream>

#include "core/numeric.h"
#include "core/test_env.h"

namespace relay::test {
namespace {

constexpr float kHidden = -std::numeric_limits<float>::infinity();

int64_t path_length(const ForestCase& c, int32_t node) {
  int64_t length = 0;
  for (; node >= 0; node = c.nodes[node].parent) {
    length += static_cast<int64_t>(c.nodes[node].slots.size());
  }
  return length;
}

int depth_of(const ForestCase& c, int32_t node) {
  int depth = 0;
  for (; node >= 0; node = c.nodes[node].parent) ++depth;
  return depth;
}

/// Lays the nodes' tokens into blocks: every node begins a block, blocks are dealt in an order that
/// is sequential, shuffled, or sequential in pieces, and some stay unused.
void place_tokens(ForestCase& c, Random& random) {
  int64_t needed = 0;
  for (const ForestCase::Node& node : c.nodes) {
    needed += (static_cast<int64_t>(node.slots.size()) + c.block_size - 1) / c.block_size;
  }
  c.blocks = needed + random.between(1, 2 + needed / 4);

  std::vector<int64_t> order(c.blocks);
  std::iota(order.begin(), order.end(), 0);
  switch (random.between(0, 2)) {
    case 0:
      break;
    case 1:
      random.shuffle(order);
      break;
    case 2: {  // pieces of up to 16 blocks change places
      std::vector<int64_t> starts;
      const int64_t piece = random.between(1, 16);
      for (int64_t b = 0; b < c.blocks; b += piece) starts.push_back(b);
      random.shuffle(starts);
      order.clear();
      for (int64_t start : starts) {
        for (int64_t b = start; b < std::min(start + piece, c.blocks); ++b) order.push_back(b);
      }
      break;
    }
  }

  size_t next = 0;
  for (ForestCase::Node& node : c.nodes) {
    for (size_t t = 0; t < node.slots.size(); ++t) {
      const int64_t offset = static_cast<int64_t>(t) % c.block_size;
      if (offset == 0) ++next;
      node.slots[t] = order[next - 1] * c.block_size + offset;
    }
  }
}

}  // namespace

int64_t ForestCase::position(int64_t row) const {
  const Request& request = requests[request_of_row[row]];
  if (request.node < 0) return 0;
  return request.kv_length - request.rows + row_in_request[row];
}

std::vector<int64_t> ForestCase::path(const Request& request) const {
  std::vector<int32_t> nodes_up;
  for (int32_t node = request.node; node >= 0; node = nodes[node].parent) nodes_up.push_back(node);
  std::vector<int64_t> slots;
  for (auto node = nodes_up.rbegin(); node != nodes_up.rend(); ++node) {
    slots.insert(slots.end(), nodes[*node].slots.begin(), nodes[*node].slots.end());
  }
  slots.resize(request.kv_length);
  return slots;
}

std::vector<AttendedSlot> ForestCase::attended(int64_t row) const {
  const std::vector<int64_t> slots = path(requests[request_of_row[row]]);
  const int64_t at = position(row);
  std::vector<AttendedSlot> result;
  for (int64_t column = 0; column < static_cast<int64_t>(slots.size()); ++column) {
    const bool future = causal && column > at;
    const bool left_behind = causal && window > 0 && column <= at - window;
    if (!future && !left_behind) result.push_back({.slot = slots[column], .column = column});
  }
  return result;
}

std::vector<bool> ForestCase::used_slots() const {
  std::vector<bool> used(slots());
  for (int64_t row = 0; row < rows(); ++row) {
    for (const AttendedSlot& attended_slot : attended(row)) used[attended_slot.slot] = true;
  }
  return used;
}

void ForestCase::index_rows() {
  request_of_row.clear();
  row_in_request.clear();
  for (size_t i = 0; i < requests.size(); ++i) {
    for (int32_t row = 0; row < requests[i].rows; ++row) {
      request_of_row.push_back(static_cast<int32_t>(i));
      row_in_request.push_back(row);
    }
  }
}

std::string ForestCase::describe() const {
  int depth = 0;
  int64_t stored = 0;
  for (size_t n = 0; n < nodes.size(); ++n) {
    depth = std::max(depth, depth_of(*this, static_cast<int32_t>(n)));
    stored += static_cast<int64_t>(nodes[n].slots.size());
  }
  std::ostringstream text;
  text << "forest seed " << seed << ": " << requests.size() << " requests, " << rows() << " rows, "
       << nodes.size() << " nodes of depth " << depth << ", " << stored << " tokens in " << blocks
       << " blocks of " << block_size << (causal ? ", causal" : "") << ", window " << window;
  return text.str();
}

ForestCase generate_forest(uint64_t seed, const ForestLimits& limits) {
  Random random(derive_seed(seed, 0xf0));
  ForestCase c;
  c.seed = seed;
  c.block_size = random.pick(limits.whole_tiles ? std::vector<int64_t>{64, 128, 192}
                                                : std::vector<int64_t>{1, 16, 64, 128});
  c.causal = random.chance(0.7);
  const bool idle_rows = !limits.tables_possible && random.chance(0.2);
  const bool whole_blocks = limits.tables_possible || random.chance(0.5);
  c.tables_possible = !idle_rows && (whole_blocks || c.block_size == 1);

  const int32_t depth = static_cast<int32_t>(random.between(1, limits.max_depth));
  const int64_t roots = random.chance(0.6) ? 1 : random.between(2, 4);
  const int32_t target_rows = static_cast<int32_t>(random.log_between(1, limits.max_rows));
  const int64_t max_prefix = random.log_between(1, limits.max_prefix);
  const int64_t max_context = random.log_between(1, limits.max_context);
  const double branching = random.uniform();
  const double prefill = random.chance(0.5) ? 0.0 : random.uniform() * 0.5;

  int64_t stored = 0;
  const auto add_node = [&](int32_t parent, int64_t tokens) {
    const int64_t room = std::max<int64_t>(0, limits.max_slots - stored);
    if (tokens > room) tokens = room / c.block_size * c.block_size;
    stored += tokens;
    c.nodes.push_back({.parent = parent, .slots = std::vector<int64_t>(tokens)});
    return static_cast<int32_t>(c.nodes.size()) - 1;
  };
  const auto shared_tokens = [&] {
    if (random.chance(0.1)) return int64_t{0};  // an empty prefix is a prefix
    const int64_t tokens = random.log_between(1, max_prefix);
    return whole_blocks ? (tokens + c.block_size - 1) / c.block_size * c.block_size : tokens;
  };

  std::vector<int32_t> inner;  // nodes that requests share
  for (int64_t i = 0; i < roots; ++i) inner.push_back(add_node(-1, shared_tokens()));

  int32_t rows = 0;
  int64_t attended = 0;
  while (rows < target_rows) {
    if (idle_rows && random.chance(0.15)) {
      c.requests.push_back({.node = -1, .kv_length = 0, .rows = 1});
      ++rows;
      continue;
    }
    // Walk down; sometimes open a new branch.
    int32_t node = inner[random.between(0, roots - 1)];
    for (int32_t level = 1; level < depth - 1; ++level) {
      std::vector<int32_t> children;
      for (int32_t n : inner) {
        if (c.nodes[n].parent == node) children.push_back(n);
      }
      if (children.empty() || random.chance(branching * 0.3)) {
        node = add_node(node, shared_tokens());
        inner.push_back(node);
      } else {
        node = random.pick(children);
      }
    }

    ForestCase::Request request;
    request.rows = 1;
    if (random.chance(prefill)) {
      request.rows =
          static_cast<int32_t>(random.between(1, std::clamp<int64_t>(target_rows - rows, 1, 96)));
    }
    const int64_t prefix = path_length(c, node);
    const bool stops_inside = c.causal && prefix >= request.rows && random.chance(0.15);
    if (stops_inside) {  // this one is still reading, or ends in, what others share
      request.node = node;
      request.kv_length = random.chance(0.3) ? prefix : random.between(request.rows, prefix);
    } else {
      int64_t own = depth > 1 || !random.chance(0.3) ? random.log_between(0, max_context) : 0;
      own = std::max(own, request.rows - prefix);
      const int64_t before = stored;
      request.node = own > 0 || depth > 1 ? add_node(node, own) : node;
      request.kv_length = path_length(c, request.node);
      if (request.kv_length < request.rows) {  // the cache is full
        c.nodes.pop_back();
        stored = before;
        if (!c.requests.empty()) break;
        request.rows = 1;
        request.node = add_node(node, 1);
        request.kv_length = path_length(c, request.node);
      }
    }

    const int64_t pairs = request.rows * request.kv_length;
    if (attended + pairs > limits.max_attended && !c.requests.empty()) break;
    attended += pairs;
    rows += request.rows;
    c.requests.push_back(request);
  }
  random.shuffle(c.requests);  // a batch does not come in tree order

  if (c.causal && random.chance(0.3)) {
    c.window = random.log_between(1, std::max<int64_t>(2, max_prefix + max_context));
  }
  place_tokens(c, random);
  c.index_rows();
  return c;
}

ForestCase shared_prefix_case(int64_t prefix, const std::vector<int64_t>& contexts) {
  ForestCase c;
  c.block_size = 1;
  c.causal = false;
  c.tables_possible = true;
  int64_t next = 0;
  const auto add_node = [&](int32_t parent, int64_t tokens) {
    ForestCase::Node node{.parent = parent, .slots = std::vector<int64_t>(tokens)};
    std::iota(node.slots.begin(), node.slots.end(), next);
    next += tokens;
    c.nodes.push_back(node);
    return static_cast<int32_t>(c.nodes.size()) - 1;
  };
  const int32_t root = add_node(-1, prefix);
  for (int64_t context : contexts) {
    const int32_t leaf = add_node(root, context);
    c.requests.push_back({.node = leaf, .kv_length = prefix + context, .rows = 1});
    if (prefix + context == 0) c.tables_possible = false;
  }
  c.blocks = next + 1;
  c.index_rows();
  return c;
}

void build_from_tables(const ForestCase& c, Sharing sharing, Forest& forest, int64_t align) {
  std::vector<int32_t> row_offsets = {0};
  std::vector<int64_t> kv_lengths;
  int64_t stride = 1;
  for (const ForestCase::Request& request : c.requests) {
    row_offsets.push_back(row_offsets.back() + request.rows);
    kv_lengths.push_back(request.kv_length);
    stride = std::max(stride, (request.kv_length + c.block_size - 1) / c.block_size + 3);
  }
  // Entries behind a request's last block are whatever was there before.
  std::vector<int32_t> table(c.requests.size() * stride, -1);
  for (size_t i = 0; i < c.requests.size(); ++i) {
    const std::vector<int64_t> slots = c.path(c.requests[i]);
    for (size_t t = 0; t < slots.size(); t += c.block_size) {
      table[i * stride + t / c.block_size] = static_cast<int32_t>(slots[t] / c.block_size);
    }
  }
  const BlockTables batch = {.requests = static_cast<int32_t>(c.requests.size()),
                             .row_offsets = row_offsets,
                             .kv_lengths = kv_lengths,
                             .table = table.data(),
                             .table_stride = stride,
                             .block_size = c.block_size,
                             .causal = c.causal,
                             .window = c.window,
                             .align = align};
  build_from_block_tables(batch, sharing, forest);
}

void build_from_tree(const ForestCase& c, Sharing sharing, uint64_t seed, Forest& forest) {
  Random random(derive_seed(seed, 0x7e));
  const double cut = random.chance(0.5) ? 0.0 : 0.1;  // spans need not be as long as they could be
  std::vector<TreeNode> nodes(c.nodes.size());
  for (size_t n = 0; n < c.nodes.size(); ++n) {
    nodes[n].parent = c.nodes[n].parent;
    int64_t column = nodes[n].parent < 0 ? 0 : path_length(c, nodes[n].parent);
    for (int64_t slot : c.nodes[n].slots) {
      std::vector<Span>& spans = nodes[n].spans;
      const bool follows = !spans.empty() && spans.back().slot + spans.back().count == slot;
      if (follows && !random.chance(cut)) {
        ++spans.back().count;
      } else {
        spans.push_back({.slot = slot, .column = column, .count = 1});
      }
      ++column;
    }
  }
  std::vector<int32_t> leaf_of_row;
  std::vector<int64_t> position_of_row;
  for (int64_t row = 0; row < c.rows(); ++row) {
    leaf_of_row.push_back(c.requests[c.request_of_row[row]].node);
    if (c.causal) position_of_row.push_back(c.position(row));
  }
  relay::build_from_tree({.nodes = nodes,
                          .leaf_of_row = leaf_of_row,
                          .position_of_row = position_of_row,
                          .window = c.window},
                         sharing, forest);
}

// --- Masks ---------------------------------------------------------------------------------------

float Mask::at(int64_t row, int64_t column) const {
  const unsigned char* vector =
      bytes.data() + row / rows_per_stream * stream_stride + row % rows_per_stream * row_stride;
  return static_cast<float>(decode_element(type, vector, column));
}

void Mask::set(int64_t row, int64_t column, float value) {
  const int64_t width = element_alignment(type);
  unsigned char* to = bytes.data() + row / rows_per_stream * stream_stride +
                      row % rows_per_stream * row_stride + column * width;
  encode(type, std::span<const float>(&value, 1), to);
}

MaskBatch Mask::batch() const {
  return {.type = type,
          .data = bytes.data(),
          .row_stride = row_stride,
          .stream_stride = stream_stride,
          .rows_per_stream = rows_per_stream,
          .streams = streams,
          .columns = columns,
          .slots_per_block = columns};
}

ConstRows Mask::bias() const {
  return {.type = type,
          .data = bytes.data(),
          .row_stride = row_stride,
          .head_stride = 0,
          .rows_per_block = rows_per_stream,
          .block_stride = stream_stride};
}

std::vector<AttendedSlot> Mask::attended(int64_t row) const {
  std::vector<AttendedSlot> result;
  const int64_t first_slot = row / rows_per_stream * columns;
  for (int64_t column = 0; column < columns; ++column) {
    if (at(row, column) != kHidden) result.push_back({first_slot + column, column});
  }
  return result;
}

Mask make_mask(DType type, int32_t rows_per_stream, int32_t streams, int64_t columns) {
  constexpr int64_t kPadding = 3;  // elements: rows begin at odd places
  Mask mask;
  mask.type = type;
  mask.rows_per_stream = rows_per_stream;
  mask.streams = streams;
  mask.columns = columns;
  mask.row_stride = (columns + kPadding) * element_alignment(type);
  mask.stream_stride = mask.row_stride * rows_per_stream + 5 * element_alignment(type);
  mask.bytes.assign(mask.stream_stride * streams, 0xff);  // NaN in f16 and f32
  for (int64_t row = 0; row < static_cast<int64_t>(streams) * rows_per_stream; ++row) {
    for (int64_t column = 0; column < columns; ++column) mask.set(row, column, kHidden);
  }
  return mask;
}

Mask mask_of(const ForestCase& c, DType type, MaskValues values, uint64_t seed) {
  Random random(derive_seed(seed, 0x3a));
  Mask mask = make_mask(type, c.rows(), 1, c.slots());
  for (int64_t row = 0; row < c.rows(); ++row) {
    for (const AttendedSlot& a : c.attended(row)) {
      float value = 0;
      if (values == MaskValues::kRandom) value = random.normal();
      if (values == MaskValues::kDistance) value = static_cast<float>(a.column - c.position(row));
      mask.set(row, a.slot, value);
    }
  }
  return mask;
}

Mask generate_mask(uint64_t seed, int32_t max_rows, int64_t max_columns) {
  Random random(derive_seed(seed, 0x3b));
  const int32_t streams = random.chance(0.5) ? 1 : static_cast<int32_t>(random.between(2, 4));
  const int32_t rows = static_cast<int32_t>(random.log_between(1, std::max(1, max_rows / streams)));
  const int64_t columns = random.log_between(1, max_columns);
  Mask mask = make_mask(random.chance(0.5) ? DType::kF16 : DType::kF32, rows, streams, columns);

  for (int32_t stream = 0; stream < streams; ++stream) {
    const int64_t pattern = random.between(0, 4);
    const bool biased = random.chance(0.4);
    const double density = random.uniform();
    const int64_t tile = random.pick(std::vector<int64_t>{1, 8, 32, 64, 100, 256});
    const int64_t band = random.log_between(1, columns);
    std::vector<bool> tiles_seen(columns / tile + 1);
    for (int32_t r = 0; r < rows; ++r) {
      const int64_t row = static_cast<int64_t>(stream) * rows + r;
      if (random.chance(0.05)) continue;  // this row attends nothing
      // Rows that follow each other often see the same tiles: then there is something to share.
      if (r == 0 || random.chance(0.2)) {
        for (size_t t = 0; t < tiles_seen.size(); ++t) tiles_seen[t] = random.chance(density);
      }
      const int64_t at = columns - rows + r;
      for (int64_t column = 0; column < columns; ++column) {
        bool visible = true;
        if (pattern == 0) visible = column <= at;
        if (pattern == 1) visible = column <= at && column > at - band;
        if (pattern == 2) visible = tiles_seen[column / tile];
        if (pattern == 3) visible = tiles_seen[column / tile] && !random.chance(0.1);
        if (pattern == 4) visible = random.chance(density);
        if (visible) mask.set(row, column, biased ? random.normal() : 0.0f);
      }
    }
  }
  return mask;
}

}  // namespace relay::test
