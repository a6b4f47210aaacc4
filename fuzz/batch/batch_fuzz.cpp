// Fuzzing of the C ABI from a batch's block tables to its output, and of writing tokens. Numbers
// may be anything; arrays are as long as the header says, and contexts of a size that can be
// computed.
//
// Whatever the input, a call succeeds or is RELAY_INVALID. What relay_check lets pass reads no slot
// that the cache does not have, and what it refuses lists one: the cache's memory ends with its
// last slot, for a sanitizer to see. Anything else aborts.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "reader.h"
#include "relay/relay.h"

using relay::fuzz::Reader;

namespace {

constexpr int32_t kDim = 16;
constexpr int64_t kVector = kDim * sizeof(float);
constexpr int64_t kTile = 64;
constexpr int64_t kMostSlots = 4096;  // of a cache, and of a context

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken promise: %s (last error: %s)\n", what, relay_last_error());
  std::abort();
}

struct Batch {
  std::vector<int32_t> row_offsets{0};
  std::vector<int64_t> kv_lengths;
  std::vector<int32_t> table;
  relay_batch c{};

  explicit Batch(Reader& in) {
    c.size = sizeof(c);
    c.requests = in.take<uint8_t>() % 6;
    c.table_stride = in.take<uint8_t>() % 16;
    c.block_size = in.number();
    c.window = in.number();
    c.causal = in.take<uint8_t>() % 3;
    for (int32_t r = 0; r < c.requests; ++r) {
      row_offsets.push_back(static_cast<int32_t>(row_offsets.back() + in.take<int8_t>() % 8));
      kv_lengths.push_back(in.number());
      for (int64_t d = 0; d < c.table_stride; ++d) {
        table.push_back(static_cast<int32_t>(in.number()));
      }
    }
    table.resize(table.size() + 1);  // never null
    c.row_offsets = row_offsets.data();
    c.kv_lengths = kv_lengths.data();
    c.table = table.data();
  }

  /// The tables hold what the lengths say, and it can be computed.
  bool sound() const {
    return std::all_of(kv_lengths.begin(), kv_lengths.end(), [&](int64_t length) {
      return length <= kMostSlots &&
             (c.requests > 1 || c.block_size < 1 || length / c.block_size < c.table_stride);
    });
  }
  int32_t rows() const { return row_offsets.back(); }

  /// One more than the highest slot of the tokens that rows attend, or of all.
  int64_t slots_end(bool attended_only) const {
    int64_t end = 0;
    for (int32_t r = 0; r < c.requests; ++r) {
      const int32_t rows = row_offsets[r + 1] - row_offsets[r];
      if (attended_only && rows == 0) continue;
      int64_t t = 0;
      if (attended_only && c.window > 0) {
        t = std::max<int64_t>(0, kv_lengths[r] - rows + 1 - c.window);
      }
      for (; t < kv_lengths[r]; ++t) {
        const int64_t block = table[r * c.table_stride + t / c.block_size];
        end = std::max(end, block * c.block_size + t % c.block_size + 1);
      }
    }
    return end;
  }
};

/// K and V of one head, all 1.
struct Cache {
  int64_t slots;
  std::vector<float> k, v;
  relay_kv k_plane, v_plane;

  Cache(int64_t count, int64_t block_size)
      : slots(count), k(static_cast<size_t>(count * kDim), 1.0f), v(k) {
    const int64_t block = std::clamp<int64_t>(block_size, 0, slots) * kVector;
    k_plane = {k.data(), block, kVector, 0};
    v_plane = {v.data(), block, kVector, 0};
  }
};

/// Plans, checks and, if nothing is wrong, attends.
void attend(const Batch& batch, const relay_plan_options& options, const Cache& cache,
            relay_plan*& plan, relay_workspace* workspace) {
  const relay_status planned = relay_plan_batch(&plan, &batch.c, &options);
  require(planned == RELAY_OK || planned == RELAY_INVALID, "planning is no bug of ours");
  if (planned != RELAY_OK) return;
  int64_t read = 0, attended = 0;
  require(relay_plan_slots(plan, &read, &attended) == RELAY_OK, "a plan knows its slots");
  require(read <= attended, "sharing reads no more");

  const auto rows = static_cast<size_t>(batch.rows());
  const int64_t row_stride = options.q_heads * kVector;
  const std::vector<float> q(std::max<size_t>(1, rows) * options.q_heads * kDim, 0.5f);
  std::vector<float> out(q.size());
  relay_inputs inputs{};
  inputs.size = sizeof(inputs);
  inputs.q_type = inputs.out_type = RELAY_F32;
  inputs.q = q.data();
  inputs.out = out.data();
  inputs.q_row_stride = inputs.out_row_stride = row_stride;
  inputs.q_head_stride = inputs.out_head_stride = kVector;
  inputs.k = cache.k_plane;
  inputs.v = cache.v_plane;
  inputs.scale = 0.25f;
  inputs.cache_slots = cache.slots;
  require(relay_attend(plan, &inputs, workspace, 0) == RELAY_INVALID, "not fitted to this plan");

  const relay_status checked = relay_check(plan, &inputs);
  const bool tiles_fit = options.layout == RELAY_ROWS || cache.slots % kTile == 0;
  if (checked != RELAY_OK) {
    require(checked == RELAY_INVALID, "checking is no bug of ours");
    require(!tiles_fit || batch.slots_end(false) > cache.slots, "only what is outside is refused");
    return;
  }
  require(tiles_fit && batch.slots_end(true) <= cache.slots, "what is outside is refused");
  require(relay_workspace_fit(workspace, plan) == RELAY_OK, "a workspace fits");
  for (int32_t thread = 0; thread < options.threads; ++thread) {
    require(relay_attend(plan, &inputs, workspace, thread) == RELAY_OK, "what was checked runs");
  }
  for (size_t i = 0; i < rows * options.q_heads * kDim; ++i) {  // a row attends itself at least
    require(std::fabs(out[i] - 1.0f) < 1e-4f, "a mean of ones is one");
  }
}

/// Tokens into any slots.
void write(Reader& in, const relay_plan_options& options, int64_t block_size, Cache& cache) {
  std::vector<int64_t> slots(in.take<uint8_t>() % 16);
  for (int64_t& slot : slots) slot = in.number();
  const std::vector<float> tokens((slots.size() + 1) * kDim, 2.0f);
  relay_kv_write call{};
  call.size = sizeof(call);
  call.kv_heads = 1;
  call.k_dim = call.v_dim = kDim;
  call.k_type = call.v_type = RELAY_F32;
  call.layout = options.layout;
  call.block_size = block_size;
  call.k_cache = cache.k_plane;
  call.v_cache = cache.v_plane;
  call.k = call.v = tokens.data();
  call.k_row_stride = call.v_row_stride = kVector;
  call.tokens = static_cast<int64_t>(slots.size());
  call.slots = slots.data();
  call.cache_slots = cache.slots;
  const relay_status status = relay_write_kv(&call, 0, 1);
  const bool sizes_fit = block_size >= 1 && (options.layout == RELAY_ROWS ||
                                             (block_size % kTile == 0 && cache.slots % kTile == 0));
  const bool inside =
      std::all_of(slots.begin(), slots.end(), [&](int64_t slot) { return slot < cache.slots; });
  require(status == (sizes_fit && inside ? RELAY_OK : RELAY_INVALID), "only what fits is written");
  const auto written = std::count(cache.k.begin(), cache.k.end(), 2.0f);
  require(status == RELAY_OK || written == 0, "what is refused writes nothing");
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Reader in(data, size);
  relay_plan_options options{};
  options.size = sizeof(options);
  options.q_heads = 2;
  options.kv_heads = 1;
  options.qk_dim = options.v_dim = kDim;
  options.k_type = options.v_type = RELAY_F32;
  options.threads = 1 + in.take<uint8_t>() % 3;
  options.sharing = in.take<uint8_t>() % 2;
  options.layout = in.take<uint8_t>() % 2 == 0 ? RELAY_ROWS : RELAY_TILES;
  const int64_t slots = 1 + in.take<uint16_t>() % kMostSlots;
  // Twice with one plan and workspace: the second plans in the memory of the first.
  relay_plan* plan = nullptr;
  relay_workspace* workspace = nullptr;
  require(relay_workspace_create(&workspace) == RELAY_OK, "a workspace can be made");
  for (int i = 0; i < 2; ++i) {
    const Batch batch(in);
    if (!batch.sound()) break;
    Cache cache(slots, batch.c.block_size);
    attend(batch, options, cache, plan, workspace);
    write(in, options, batch.c.block_size, cache);
  }
  relay_workspace_free(workspace);
  relay_plan_free(plan);
  return 0;
}
