// The C interface over the C++ one; no exception leaves it.
#include <cstddef>
#include <memory>
#include <string>

#include "c_abi.h"
#include "relay/attention.h"
#include "relay/kv_cache.h"
#include "relay/relay.h"

#ifndef RELAY_VERSION
#error "RELAY_VERSION is set by the build"
#endif

struct relay_plan {
  relay::Forest forest;
  relay::PlanPtr plan;
  int64_t block_size = 1;
  int64_t window = 0;
  relay::KvLayout layout = relay::KvLayout::kRows;
};

struct relay_workspace {
  relay::Workspace workspace;
};

template <>
constexpr size_t relay::c_abi::kFirstSize<relay_inputs> = offsetof(relay_inputs, cache_slots);
template <>
constexpr size_t relay::c_abi::kFirstSize<relay_kv_write> = offsetof(relay_kv_write, cache_slots);

namespace {

using relay::c_abi::known_part;
using relay::c_abi::require;

thread_local std::string last_error;

template <typename F>
relay_status guarded(F f) {
  return relay::c_abi::guarded(last_error, f);
}

relay::DType dtype(relay_dtype type) {
  switch (type) {
    case RELAY_F32:
      return relay::DType::kF32;
    case RELAY_F16:
      return relay::DType::kF16;
    case RELAY_BF16:
      return relay::DType::kBF16;
    case RELAY_Q8_0:
      return relay::DType::kQ8_0;
  }
  throw relay::Error("unknown relay_dtype");
}

relay::KvLayout layout(relay_layout value) {
  require(value == RELAY_ROWS || value == RELAY_TILES, "unknown relay_layout");
  return value == RELAY_TILES ? relay::KvLayout::kTiles : relay::KvLayout::kRows;
}

relay::KvPlane plane(const relay_kv& kv, relay::DType type) {
  return {type, kv.data, kv.block_stride, kv.slot_stride, kv.head_stride};
}

const relay::Plan& plan_of(const relay_plan* plan) {
  require(plan != nullptr, "the plan is null");
  return *plan->plan;
}

relay::AttentionInputs convert(const relay_plan* plan, const relay_inputs* inputs) {
  const relay::PlanOptions& options = relay::options_of(plan_of(plan));
  const relay_inputs in = known_part(inputs, "relay_inputs");
  relay::AttentionInputs out;
  out.q = {dtype(in.q_type), in.q, in.q_row_stride, in.q_head_stride};
  out.out = {dtype(in.out_type), in.out, in.out_row_stride, in.out_head_stride};
  out.kv.k = plane(in.k, options.k_type);
  out.kv.v = plane(in.v, options.v_type);
  out.kv.block_size = plan->block_size;
  out.kv.layout = plan->layout;
  out.kv.slots = in.cache_slots;
  out.scale = in.scale;
  out.softcap = in.softcap;
  out.window = plan->window;
  out.slopes = in.slopes;
  out.sinks = in.sinks;
  out.lse = in.lse;
  return out;
}

}  // namespace

extern "C" {

const char* relay_version(void) { return RELAY_VERSION; }
const char* relay_last_error(void) { return last_error.c_str(); }
const char* relay_isa(void) {
  thread_local std::string name;
  return guarded([] { name = relay::current_isa(); }) == RELAY_OK ? name.c_str() : "";
}

relay_status relay_plan_batch(relay_plan** plan, const relay_batch* given_batch,
                              const relay_plan_options* given_options) {
  return guarded([&] {
    require(plan != nullptr, "plan is null");
    const relay_batch batch = known_part(given_batch, "relay_batch");
    const relay_plan_options options = known_part(given_options, "relay_plan_options");
    require(batch.requests >= 0 && batch.row_offsets != nullptr, "row_offsets is null");
    require(batch.requests == 0 || batch.kv_lengths != nullptr, "kv_lengths is null");
    relay::BlockTables tables;
    const auto requests = static_cast<size_t>(batch.requests);
    tables.requests = batch.requests;
    tables.row_offsets = {batch.row_offsets, requests + 1};
    tables.kv_lengths = {batch.kv_lengths, requests};
    tables.table = batch.table;
    tables.table_stride = batch.table_stride;
    tables.block_size = batch.block_size;
    require(batch.causal == 0 || batch.causal == 1, "relay_batch.causal must be 0 or 1");
    require(batch.causal == 1 || batch.window == 0,
            "a sliding window needs relay_batch.causal = 1");
    tables.window = batch.window;
    tables.causal = batch.causal == 1;
    const relay::KvLayout kv_layout = layout(options.layout);
    if (kv_layout == relay::KvLayout::kTiles) tables.align = relay::kTileSlots;
    relay::PlanOptions plan_options;
    plan_options.shape = {options.q_heads, options.kv_heads, options.qk_dim, options.v_dim};
    plan_options.k_type = dtype(options.k_type);
    plan_options.v_type = dtype(options.v_type);
    plan_options.layout = kv_layout;
    plan_options.threads = options.threads;

    std::unique_ptr<relay_plan> made;
    relay_plan* target = *plan;
    if (target == nullptr) {
      made = std::make_unique<relay_plan>();
      target = made.get();
    }
    relay::build_from_block_tables(
        tables, relay::c_abi::sharing(options.sharing, "relay_plan_options"), target->forest);
    if (target->plan == nullptr) {
      target->plan = relay::make_plan(target->forest, plan_options);
    } else {
      relay::remake_plan(*target->plan, target->forest, plan_options);
    }
    target->block_size = batch.block_size;
    target->window = batch.window;
    target->layout = kv_layout;
    if (made != nullptr) *plan = made.release();
  });
}

void relay_plan_free(relay_plan* plan) { delete plan; }

relay_status relay_plan_slots(const relay_plan* plan, int64_t* read, int64_t* attended) {
  return guarded([&] {
    require(read != nullptr && attended != nullptr, "read or attended is null");
    const relay::PlanSummary summary = relay::summarize(plan_of(plan));
    *read = summary.kv_slots_read;
    *attended = summary.kv_slots_attended;
  });
}

relay_status relay_plan_threads(const relay_plan* plan, int32_t* threads) {
  return guarded([&] {
    require(threads != nullptr, "threads is null");
    *threads = relay::options_of(plan_of(plan)).threads;
  });
}

relay_status relay_workspace_create(relay_workspace** workspace) {
  return guarded([&] {
    require(workspace != nullptr, "workspace is null");
    *workspace = new relay_workspace;
  });
}

relay_status relay_workspace_fit(relay_workspace* workspace, const relay_plan* plan) {
  return guarded([&] {
    require(workspace != nullptr, "the workspace is null");
    workspace->workspace.fit(plan_of(plan));
  });
}

void relay_workspace_free(relay_workspace* workspace) { delete workspace; }

relay_status relay_check(const relay_plan* plan, const relay_inputs* inputs) {
  return guarded([&] {
    const relay::AttentionInputs in = convert(plan, inputs);
    relay::validate(*plan->plan, in);
  });
}

relay_status relay_attend(const relay_plan* plan, const relay_inputs* inputs,
                          relay_workspace* workspace, int32_t thread) {
  return guarded([&] {
    const relay::AttentionInputs in = convert(plan, inputs);
    require(workspace != nullptr, "the workspace is null");
    relay::attend(*plan->plan, in, workspace->workspace, thread);
  });
}

relay_status relay_write_kv(const relay_kv_write* given, int32_t head_begin, int32_t head_end) {
  return guarded([&] {
    const relay_kv_write write = known_part(given, "relay_kv_write");
    require(write.tokens >= 0 && (write.tokens == 0 || write.slots != nullptr), "slots is null");
    require(0 <= head_begin && head_begin <= head_end && head_end <= write.kv_heads,
            "no such heads");
    relay::KvCache cache;
    cache.k = plane(write.k_cache, dtype(write.k_type));
    cache.v = plane(write.v_cache, dtype(write.v_type));
    cache.block_size = write.block_size;
    cache.layout = layout(write.layout);
    cache.slots = write.cache_slots;
    const relay::HeadShape shape = {write.kv_heads, write.kv_heads, write.k_dim, write.v_dim};
    relay::write_kv(cache, shape, {cache.k.type, write.k, write.k_row_stride, write.k_head_stride},
                    {cache.v.type, write.v, write.v_row_stride, write.v_head_stride},
                    {write.slots, static_cast<size_t>(write.tokens)}, head_begin, head_end);
  });
}

}  // extern "C"
