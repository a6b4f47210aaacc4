// The C interface over the C++ one; no exception leaves it.
#include <exception>
#include <memory>
#include <string>

#include "relay/attention.h"
#include "relay/relay.h"

#ifndef RELAY_VERSION
#error "RELAY_VERSION is set by the build"
#endif

struct relay_plan {
  relay::Forest forest;
  relay::PlanPtr plan;
  int64_t block_size = 1;
  int64_t window = 0;
};

struct relay_workspace {
  relay::Workspace workspace;
};

namespace {

thread_local std::string last_error;

template <typename F>
relay_status guarded(F f) {
  try {
    f();
    return RELAY_OK;
  } catch (const relay::Error& e) {
    last_error = e.what();
    return RELAY_INVALID;
  } catch (const std::exception& e) {
    last_error = e.what();
    return RELAY_INTERNAL;
  }
}

void require(bool condition, const char* what) {
  if (!condition) throw relay::Error(what);
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

relay::Sharing sharing(int32_t value) {
  require(value >= -1 && value <= 1, "relay_plan_options.sharing must be 1, 0 or -1");
  if (value < 0) return relay::sharing_from_env();
  return value == 1 ? relay::Sharing::kOn : relay::Sharing::kOff;
}

relay::KvPlane plane(const relay_kv& kv, relay::DType type) {
  return {type, kv.data, kv.block_stride, kv.slot_stride, kv.head_stride};
}

relay::AttentionInputs convert(const relay_plan& plan, const relay_inputs& in,
                               const relay::PlanOptions& options) {
  relay::AttentionInputs out;
  out.q = {dtype(in.q_type), in.q, in.q_row_stride, in.q_head_stride};
  out.out = {dtype(in.out_type), in.out, in.out_row_stride, in.out_head_stride};
  out.kv.k = plane(in.k, options.k_type);
  out.kv.v = plane(in.v, options.v_type);
  out.kv.block_size = plan.block_size;
  out.scale = in.scale;
  out.softcap = in.softcap;
  out.window = plan.window;
  out.slopes = in.slopes;
  out.sinks = in.sinks;
  out.lse = in.lse;
  return out;
}

void require_inputs(const relay_plan* plan, const relay_inputs* inputs) {
  require(plan != nullptr && plan->plan != nullptr && inputs != nullptr, "null argument");
  require(inputs->size == sizeof(relay_inputs), "relay_inputs.size is not its sizeof");
}

}  // namespace

extern "C" {

const char* relay_version(void) { return RELAY_VERSION; }
const char* relay_last_error(void) { return last_error.c_str(); }
const char* relay_isa(void) {
  thread_local std::string name;
  return guarded([] { name = relay::current_isa(); }) == RELAY_OK ? name.c_str() : "";
}

relay_status relay_plan_batch(relay_plan** plan, const relay_batch* batch,
                              const relay_plan_options* options) {
  return guarded([&] {
    require(plan != nullptr && batch != nullptr && options != nullptr, "null argument");
    require(batch->size == sizeof(relay_batch), "relay_batch.size is not its sizeof");
    require(options->size == sizeof(relay_plan_options),
            "relay_plan_options.size is not its sizeof");
    require(batch->requests >= 0 && batch->row_offsets != nullptr, "row_offsets is null");
    require(batch->requests == 0 || batch->kv_lengths != nullptr, "kv_lengths is null");
    relay::BlockTables tables;
    const auto requests = static_cast<size_t>(batch->requests);
    tables.requests = batch->requests;
    tables.row_offsets = {batch->row_offsets, requests + 1};
    tables.kv_lengths = {batch->kv_lengths, requests};
    tables.table = batch->table;
    tables.table_stride = batch->table_stride;
    tables.block_size = batch->block_size;
    require(batch->causal == 0 || batch->causal == 1, "relay_batch.causal must be 0 or 1");
    require(batch->causal == 1 || batch->window == 0,
            "a sliding window needs relay_batch.causal = 1");
    tables.window = batch->window;
    tables.causal = batch->causal == 1;
    relay::PlanOptions plan_options;
    plan_options.shape = {options->q_heads, options->kv_heads, options->qk_dim, options->v_dim};
    plan_options.k_type = dtype(options->k_type);
    plan_options.v_type = dtype(options->v_type);
    plan_options.threads = options->threads;

    std::unique_ptr<relay_plan> made;
    relay_plan* target = *plan;
    if (target == nullptr) {
      made = std::make_unique<relay_plan>();
      target = made.get();
    }
    relay::build_from_block_tables(tables, sharing(options->sharing), target->forest);
    if (target->plan == nullptr) {
      target->plan = relay::make_plan(target->forest, plan_options);
    } else {
      relay::remake_plan(*target->plan, target->forest, plan_options);
    }
    target->block_size = batch->block_size;
    target->window = batch->window;
    if (made != nullptr) *plan = made.release();
  });
}

void relay_plan_free(relay_plan* plan) { delete plan; }

relay_status relay_plan_slots(const relay_plan* plan, int64_t* read, int64_t* attended) {
  return guarded([&] {
    require(plan != nullptr && plan->plan != nullptr && read != nullptr && attended != nullptr,
            "null argument");
    const relay::PlanSummary summary = relay::summarize(*plan->plan);
    *read = summary.kv_slots_read;
    *attended = summary.kv_slots_attended;
  });
}

relay_status relay_workspace_create(relay_workspace** workspace) {
  return guarded([&] {
    require(workspace != nullptr, "null argument");
    *workspace = new relay_workspace;
  });
}

relay_status relay_workspace_fit(relay_workspace* workspace, const relay_plan* plan) {
  return guarded([&] {
    require(workspace != nullptr && plan != nullptr && plan->plan != nullptr, "null argument");
    workspace->workspace.fit(*plan->plan);
  });
}

void relay_workspace_free(relay_workspace* workspace) { delete workspace; }

relay_status relay_check(const relay_plan* plan, const relay_inputs* inputs) {
  return guarded([&] {
    require_inputs(plan, inputs);
    relay::validate(*plan->plan, convert(*plan, *inputs, relay::options_of(*plan->plan)));
  });
}

relay_status relay_attend(const relay_plan* plan, const relay_inputs* inputs,
                          relay_workspace* workspace, int32_t thread) {
  return guarded([&] {
    require_inputs(plan, inputs);
    require(workspace != nullptr, "null argument");
    relay::attend(*plan->plan, convert(*plan, *inputs, relay::options_of(*plan->plan)),
                  workspace->workspace, thread);
  });
}

}  // extern "C"
