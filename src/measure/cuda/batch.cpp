#include "measure/cuda/batch.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "measure/cuda/memory_kernels.h"
#include "measure/kv_buffer.h"

namespace relay::measure {
namespace {

DeviceBuffer random_buffer(DType type, int64_t vectors, int64_t dim, uint64_t seed,
                           const DeviceStream& stream) {
  DeviceBuffer buffer(vectors * row_bytes(type, dim));
  cuda_ok(launch_fill(buffer.data(), buffer.bytes(), random_bits(type), seed, stream.get()),
          "filling GPU memory");
  return buffer;
}

std::vector<float> values_of(const DeviceBuffer& buffer, DType type) {
  std::vector<uint16_t> bits(buffer.bytes() / sizeof(uint16_t));
  cuda_ok(cudaMemcpy(bits.data(), buffer.data(), buffer.bytes(), cudaMemcpyDeviceToHost),
          "copying from the GPU");
  std::vector<float> values(bits.size());
  std::transform(bits.begin(), bits.end(), values.begin(), [&](uint16_t b) {
    return type == DType::kBF16 ? __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{b}))
                                : __half2float(__half(__half_raw{b}));
  });
  return values;
}

}  // namespace

DType query_type(DType kv_type) { return kv_type == DType::kF8E4M3 ? DType::kBF16 : kv_type; }

cuda::PlanOptions plan_options(const OpProblem& p, Sharing sharing) {
  const BlockLayout layout(p);
  cuda::PlanOptions options;
  options.shape = p.shape;
  options.q_type = query_type(p.kv_type);
  options.kv_type = p.kv_type;
  options.max_requests = p.batch;
  options.max_rows = p.batch;
  options.max_blocks = static_cast<int32_t>(layout.columns);
  options.block_size = BlockLayout::kBlockSlots;
  options.cache_blocks = static_cast<int32_t>(layout.blocks);
  options.sharing = sharing;
  return options;
}

DeviceBatch::DeviceBatch(const OpProblem& p) : problem_(p), layout_(p) {
  std::vector<int32_t> starts(p.batch + 1);
  std::iota(starts.begin(), starts.end(), 0);
  const std::vector<int32_t> lengths(p.batch, static_cast<int32_t>(p.prefix + p.context));
  const std::vector<int32_t> table = layout_.table(p.batch);
  query_starts_ = DeviceBuffer(std::span(std::as_const(starts)));
  kv_lengths_ = DeviceBuffer(std::span(lengths));
  table_ = DeviceBuffer(std::span(table));
}

DeviceBatch::Plan DeviceBatch::make_plan(Sharing sharing, const DeviceStream& stream) const {
  const cuda::PlanOptions options = plan_options(problem_, sharing);
  Plan plan;
  plan.workspace = DeviceBuffer(cuda::workspace_bytes(options));
  plan.plan = cuda::make_plan(options, plan.workspace.data(), plan.workspace.bytes(), stream.get());
  return plan;
}

void DeviceBatch::plan(const Plan& plan, const DeviceStream& stream) const {
  cuda::Batch batch;
  batch.requests = problem_.batch;
  batch.query_starts = query_starts_.as<const int32_t>();
  batch.kv_lengths = kv_lengths_.as<const int32_t>();
  batch.table = table_.as<const int32_t>();
  batch.table_stride = layout_.columns;
  cuda::plan_batch(*plan.plan, batch, stream.get());
}

DeviceOperands::DeviceOperands(const OpProblem& p, const DeviceBatch& batch,
                               const DeviceStream& stream)
    : problem_(p) {
  const DType q_type = query_type(p.kv_type);
  const int64_t rows = int64_t{p.batch} * p.shape.q_heads;
  const int64_t tokens = batch.layout().blocks * BlockLayout::kBlockSlots;
  q_ = random_buffer(q_type, rows, p.shape.qk_dim, 1, stream);
  kv_ = random_buffer(p.kv_type, tokens * p.shape.kv_heads, p.shape.qk_dim + p.shape.v_dim, 2,
                      stream);
  out_on_ = DeviceBuffer(q_.bytes());
  out_off_ = DeviceBuffer(q_.bytes());
}

cuda::Inputs DeviceOperands::inputs(Sharing sharing) const {
  const HeadShape& shape = problem_.shape;
  cuda::Inputs in;
  in.q = q_.data();
  in.out = (sharing == Sharing::kOn ? out_on_ : out_off_).data();
  in.q_head_stride = in.out_head_stride = row_bytes(query_type(problem_.kv_type), shape.qk_dim);
  in.q_row_stride = in.out_row_stride = shape.q_heads * in.q_head_stride;
  // As vLLM has it: K and V of a token and head beside each other.
  const int64_t k_bytes = row_bytes(problem_.kv_type, shape.qk_dim);
  in.k_head_stride = in.v_head_stride = k_bytes + row_bytes(problem_.kv_type, shape.v_dim);
  in.k_slot_stride = in.v_slot_stride = shape.kv_heads * in.k_head_stride;
  in.k_block_stride = in.v_block_stride = BlockLayout::kBlockSlots * in.k_slot_stride;
  in.k = kv_.data();
  in.v = kv_.as<char>() + k_bytes;
  in.scale = 1.0f / std::sqrt(static_cast<float>(shape.qk_dim));
  return in;
}

double DeviceOperands::difference() const {
  const std::vector<float> on = values_of(out_on_, query_type(problem_.kv_type));
  const std::vector<float> off = values_of(out_off_, query_type(problem_.kv_type));
  double largest = 0, squares = 0;
  for (size_t i = 0; i < on.size(); ++i) {
    largest = std::max<double>(largest, std::fabs(on[i] - off[i]));
    squares += double{on[i]} * on[i];
  }
  return largest / std::sqrt(squares / static_cast<double>(on.size()));
}

}  // namespace relay::measure
