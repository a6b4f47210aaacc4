// The C interface over the C++ one of the GPU; no exception leaves it. Whatever can be refused
// without a GPU is refused before one is asked for.
#include <cstddef>
#include <cstring>
#include <string>

#include "c_abi.h"
#include "relay/cuda.h"
#include "relay/relay_cuda.h"

struct relay_cuda_plan {
  relay::cuda::PlanPtr plan;
};

template <>
constexpr size_t relay::c_abi::kFirstSize<relay_cuda_inputs> = offsetof(relay_cuda_inputs, q_scale);

namespace {

namespace cuda = relay::cuda;
using relay::c_abi::known_part;
using relay::c_abi::known_size;
using relay::c_abi::require;

thread_local std::string last_error;

template <typename F>
relay_status guarded(F f) {
  return relay::c_abi::guarded(last_error, f);
}

relay::DType dtype(int32_t type, const char* name) {
  switch (type) {
    case RELAY_F16:
      return relay::DType::kF16;
    case RELAY_BF16:
      return relay::DType::kBF16;
    case RELAY_CUDA_F8_E4M3:
      return relay::DType::kF8E4M3;
    default:
      throw relay::Error(std::string("relay_cuda_plan_options.") + name + " is " +
                         std::to_string(type) +
                         ": neither RELAY_BF16, RELAY_F16 nor RELAY_CUDA_F8_E4M3");
  }
}

bool flag(int32_t value, const char* name) {
  if (value != 0 && value != 1) {
    throw relay::Error(std::string("relay_cuda_plan_options.") + name + " must be 0 or 1");
  }
  return value == 1;
}

cuda::Path path(int32_t value) {
  switch (value) {
    case RELAY_CUDA_PATH_AUTO:
      return cuda::Path::kAuto;
    case RELAY_CUDA_PATH_MMA:
      return cuda::Path::kMma;
    case RELAY_CUDA_PATH_WGMMA:
      return cuda::Path::kWgmma;
    default:
      throw relay::Error("relay_cuda_plan_options.path is no RELAY_CUDA_PATH_...");
  }
}

void require_zero(int32_t reserved, const char* name) {
  if (reserved != 0) throw relay::Error(std::string(name) + ".reserved must be 0");
}

cuda::PlanOptions convert(const relay_cuda_plan_options* given) {
  const relay_cuda_plan_options in = known_part(given, "relay_cuda_plan_options");
  cuda::PlanOptions out;
  out.shape = {in.q_heads, in.kv_heads, in.head_dim, in.head_dim};
  out.q_type = dtype(in.q_type, "q_type");
  require(out.q_type != relay::DType::kF8E4M3,
          "relay_cuda_plan_options.q_type must be RELAY_BF16 or RELAY_F16");
  out.kv_type = dtype(in.kv_type, "kv_type");
  out.max_requests = in.max_requests;
  out.max_rows = in.max_rows;
  out.max_blocks = in.max_blocks;
  out.block_size = in.block_size;
  out.cache_blocks = in.cache_blocks;
  out.causal = flag(in.causal, "causal");
  out.window = in.window;
  out.sharing = relay::c_abi::sharing(in.sharing, "relay_cuda_plan_options");
  out.check = flag(in.check, "check");
  out.path = path(in.path);
  out.min_shared_slots = in.min_shared_slots;
  return out;
}

cuda::Batch convert(const relay_cuda_batch* given) {
  const relay_cuda_batch in = known_part(given, "relay_cuda_batch");
  return {.requests = in.requests,
          .rows = in.rows,
          .query_starts = in.query_starts,
          .kv_lengths = in.kv_lengths,
          .table = in.table,
          .table_stride = in.table_stride};
}

cuda::Inputs convert(const relay_cuda_inputs* given) {
  const relay_cuda_inputs in = known_part(given, "relay_cuda_inputs");
  cuda::Inputs out;
  out.q = in.q;
  out.q_row_stride = in.q_row_stride;
  out.q_head_stride = in.q_head_stride;
  out.out = in.out;
  out.out_row_stride = in.out_row_stride;
  out.out_head_stride = in.out_head_stride;
  out.k = in.k.data;
  out.k_block_stride = in.k.block_stride;
  out.k_slot_stride = in.k.slot_stride;
  out.k_head_stride = in.k.head_stride;
  out.v = in.v.data;
  out.v_block_stride = in.v.block_stride;
  out.v_slot_stride = in.v.slot_stride;
  out.v_head_stride = in.v.head_stride;
  out.scale = in.scale;
  out.softcap = in.softcap;
  out.slopes = in.slopes;
  out.sinks = in.sinks;
  out.k_scale = in.k_scale;
  out.v_scale = in.v_scale;
  out.lse = in.lse;
  out.q_scale = in.q_scale;
  return out;
}

cuda::KvWrite convert(const relay_cuda_kv_write* given) {
  const relay_cuda_kv_write in = known_part(given, "relay_cuda_kv_write");
  require_zero(in.reserved, "relay_cuda_kv_write");
  return {.k = in.k,
          .v = in.v,
          .k_row_stride = in.k_row_stride,
          .k_head_stride = in.k_head_stride,
          .v_row_stride = in.v_row_stride,
          .v_head_stride = in.v_head_stride,
          .tokens = in.tokens,
          .slots = in.slots};
}

const cuda::Plan& plan_of(const relay_cuda_plan* plan) {
  require(plan != nullptr, "the plan is null");
  return *plan->plan;
}

}  // namespace

extern "C" {

const char* relay_cuda_last_error(void) { return last_error.c_str(); }

const char* relay_cuda_device_name(void) {
  thread_local std::string name;
  return guarded([] { name = cuda::device_name(); }) == RELAY_OK ? name.c_str() : "";
}

relay_status relay_cuda_workspace_bytes(const relay_cuda_plan_options* options, size_t* bytes) {
  return guarded([&] {
    require(bytes != nullptr, "bytes is null");
    *bytes = cuda::workspace_bytes(convert(options));
  });
}

relay_status relay_cuda_plan_create(relay_cuda_plan** plan, const relay_cuda_plan_options* options,
                                    void* workspace, size_t bytes, void* stream) {
  return guarded([&] {
    require(plan != nullptr, "plan is null");
    const cuda::PlanOptions converted = convert(options);
    require(workspace != nullptr, "the workspace is null");
    *plan = new relay_cuda_plan{cuda::make_plan(converted, workspace, bytes, stream)};
  });
}

void relay_cuda_plan_free(relay_cuda_plan* plan) { delete plan; }

const char* relay_cuda_path(const relay_cuda_plan* plan) {
  const char* name = "";
  guarded([&] { name = cuda::path_of(plan_of(plan)); });
  return name;
}

relay_status relay_cuda_plan_batch(const relay_cuda_plan* plan, const relay_cuda_batch* batch,
                                   void* stream) {
  return guarded([&] { cuda::plan_batch(plan_of(plan), convert(batch), stream); });
}

relay_status relay_cuda_attend(const relay_cuda_plan* plan, const relay_cuda_inputs* inputs,
                               void* stream) {
  return guarded([&] {
    const cuda::Inputs converted = convert(inputs);
    cuda::attend(plan_of(plan), converted, stream);
  });
}

relay_status relay_cuda_write_kv(const relay_cuda_plan* plan, const relay_cuda_kv_write* write,
                                 const relay_cuda_inputs* cache, void* stream) {
  return guarded([&] { cuda::write_kv(plan_of(plan), convert(write), convert(cache), stream); });
}

relay_status relay_cuda_summarize(const relay_cuda_plan* plan, relay_cuda_summary* summary,
                                  void* stream) {
  return guarded([&] {
    const cuda::Plan& of = plan_of(plan);
    const size_t known = known_size(summary, "relay_cuda_summary");
    const cuda::PlanSummary from = cuda::summarize(of, stream);
    relay_cuda_summary to{};
    // Fields of a newer version than this one stay as they are.
    to.size = summary->size;
    to.segments = from.segments;
    to.shared_segments = from.shared_segments;
    to.workers = from.workers;
    to.kv_slots_read = from.kv_slots_read;
    to.kv_slots_attended = from.kv_slots_attended;
    to.partial_rows = from.partial_rows;
    to.partial_capacity = from.partial_capacity;
    to.flops = from.flops;
    std::memcpy(summary, &to, known);
  });
}

relay_status relay_cuda_check_batch(const relay_cuda_plan* plan, void* stream) {
  return guarded([&] { cuda::check_batch(plan_of(plan), stream); });
}

}  // extern "C"
