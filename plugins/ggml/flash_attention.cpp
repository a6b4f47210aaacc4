#include "flash_attention.h"

#include <cmath>
#include <cstdio>
#include <cstring>

namespace relay::ggml {
namespace {

// Parameters of the node, in ggml's order.
struct OpParams {
  float scale;
  float max_bias;
  float softcap;
};

OpParams op_params(const ggml_tensor& node) {
  OpParams params;
  static_assert(sizeof(params) <= sizeof(node.op_params));
  std::memcpy(&params, node.op_params, sizeof(params));
  return params;
}

int64_t bytes(size_t stride) { return static_cast<int64_t>(stride); }

bool elements_contiguous(const ggml_tensor& t) { return t.nb[0] == ggml_type_size(t.type); }

// K or V: the types that the kernels read themselves, and ggml's own expansion for all others.
bool read_plane(const ggml_tensor& t, KvPlane& plane) {
  switch (t.type) {
    case GGML_TYPE_F32:
      plane.type = DType::kF32;
      break;
    case GGML_TYPE_F16:
      plane.type = DType::kF16;
      break;
    case GGML_TYPE_BF16:
      plane.type = DType::kBF16;
      break;
    case GGML_TYPE_Q8_0:
      plane.type = DType::kQ8_0;
      break;
    default:
      plane.type = DType::kCustom;
      plane.unpack = ggml_get_type_traits(t.type)->to_float;
      if (plane.unpack == nullptr) return false;
  }
  plane.data = t.data;
  plane.slot_stride = bytes(t.nb[1]);
  plane.head_stride = bytes(t.nb[2]);
  plane.block_stride = bytes(t.nb[3]);
  return true;
}

}  // namespace

const char* to_string(Verdict verdict) {
  switch (verdict) {
    case Verdict::kServed:
      return "served";
    case Verdict::kReferenceWanted:
      return "reference_wanted";
    case Verdict::kEmpty:
      return "empty";
    case Verdict::kQueryType:
      return "query_type";
    case Verdict::kResultLayout:
      return "result_layout";
    case Verdict::kKvType:
      return "kv_type";
    case Verdict::kKvHeads:
      return "kv_heads";
    case Verdict::kKvStreams:
      return "kv_streams";
    case Verdict::kElementStride:
      return "element_stride";
    case Verdict::kMaskType:
      return "mask_type";
    case Verdict::kMaskPerHead:
      return "mask_per_head";
    case Verdict::kMaskShape:
      return "mask_shape";
    case Verdict::kSinks:
      return "sinks";
    case Verdict::kSoftcap:
      return "softcap";
    case Verdict::kMaskRewritten:
      return "mask_rewritten";
    case Verdict::kRefused:
      return "refused";
    case Verdict::kCount:
      break;
  }
  return "?";
}

bool PlanKey::operator==(const PlanKey& other) const {
  return mask.data == other.mask.data && mask_version == other.mask_version &&
         mask.row_stride == other.mask.row_stride &&
         mask.stream_stride == other.mask.stream_stride &&
         mask.rows_per_stream == other.mask.rows_per_stream && mask.streams == other.mask.streams &&
         mask.columns == other.mask.columns && mask.slots_per_block == other.mask.slots_per_block &&
         shape == other.shape && k_type == other.k_type && v_type == other.v_type;
}

Verdict read_flash_attention(const ggml_tensor& node, FlashAttention& out) {
  const ggml_tensor& q = *node.src[0];
  const ggml_tensor& k = *node.src[1];
  const ggml_tensor& v = *node.src[2];
  const ggml_tensor* mask = node.src[3];
  const ggml_tensor* sinks = node.src[4];
  const int64_t rows = q.ne[1];
  const int64_t streams = q.ne[3];
  const int64_t slots = k.ne[1];
  const OpParams params = op_params(node);

  if (ggml_is_empty(&node) || ggml_is_empty(&q) || ggml_is_empty(&k) || ggml_is_empty(&v)) {
    return Verdict::kEmpty;
  }
  if (q.type != GGML_TYPE_F32) return Verdict::kQueryType;
  if (node.type != GGML_TYPE_F32 || !ggml_is_contiguous(&node)) return Verdict::kResultLayout;
  if (k.ne[2] != v.ne[2] || q.ne[2] % k.ne[2] != 0) return Verdict::kKvHeads;
  if (k.ne[3] != streams || v.ne[3] != streams) return Verdict::kKvStreams;
  if (!elements_contiguous(q) || !elements_contiguous(k) || !elements_contiguous(v)) {
    return Verdict::kElementStride;
  }
  if (params.softcap < 0.0f) return Verdict::kSoftcap;

  FlashAttention fa;
  fa.key.shape = {.q_heads = static_cast<int32_t>(q.ne[2]),
                  .kv_heads = static_cast<int32_t>(k.ne[2]),
                  .qk_dim = static_cast<int32_t>(k.ne[0]),
                  .v_dim = static_cast<int32_t>(v.ne[0])};

  KvCache& kv = fa.inputs.kv;
  if (!read_plane(k, kv.k) || !read_plane(v, kv.v)) return Verdict::kKvType;
  if (streams > 1) kv.block_size = slots;
  fa.key.k_type = kv.k.type;
  fa.key.v_type = kv.v.type;

  MaskBatch& batch = fa.key.mask;
  batch.rows_per_stream = static_cast<int32_t>(rows);
  batch.streams = static_cast<int32_t>(streams);
  batch.columns = slots;
  batch.slots_per_block = slots;
  if (mask != nullptr) {
    if (mask->type != GGML_TYPE_F16) return Verdict::kMaskType;
    if (mask->ne[2] != 1) return Verdict::kMaskPerHead;
    if (!elements_contiguous(*mask)) return Verdict::kElementStride;
    if (mask->ne[0] < slots || mask->ne[1] < rows || (mask->ne[3] != 1 && mask->ne[3] != streams)) {
      return Verdict::kMaskShape;
    }
    batch.type = DType::kF16;
    batch.data = mask->data;
    batch.row_stride = bytes(mask->nb[1]);
    batch.stream_stride = mask->ne[3] == 1 ? 0 : bytes(mask->nb[3]);
    fa.inputs.bias = {.type = DType::kF16,
                      .data = mask->data,
                      .row_stride = batch.row_stride,
                      .head_stride = 0,
                      .rows_per_block = rows,
                      .block_stride = batch.stream_stride};
  }

  if (sinks != nullptr) {
    if (sinks->type != GGML_TYPE_F32 || sinks->ne[0] < q.ne[2] || !elements_contiguous(*sinks)) {
      return Verdict::kSinks;
    }
    fa.inputs.sinks = static_cast<const float*>(sinks->data);
  }

  fa.inputs.q = {.type = DType::kF32,
                 .data = q.data,
                 .row_stride = bytes(q.nb[1]),
                 .head_stride = bytes(q.nb[2]),
                 .rows_per_block = rows,
                 .block_stride = bytes(q.nb[3])};
  fa.inputs.out = {.type = DType::kF32,
                   .data = node.data,
                   .row_stride = bytes(node.nb[2]),
                   .head_stride = bytes(node.nb[1]),
                   .rows_per_block = rows,
                   .block_stride = bytes(node.nb[3])};
  fa.inputs.scale = params.scale;
  fa.inputs.softcap = params.softcap;
  fa.max_bias = params.max_bias;
  out = fa;
  return Verdict::kServed;
}

void alibi_slopes(float max_bias, int32_t heads, std::vector<float>& slopes) {
  // A geometric series for the largest power of two of heads; the rest interleaves a second one.
  const int32_t series = 1 << static_cast<int32_t>(std::floor(std::log2(heads)));
  const float first = std::pow(2.0f, -max_bias / static_cast<float>(series));
  const float second = std::pow(2.0f, -max_bias / 2.0f / static_cast<float>(series));
  slopes.resize(static_cast<size_t>(heads));
  for (int32_t h = 0; h < heads; ++h) {
    slopes[static_cast<size_t>(h)] =
        h < series ? std::pow(first, static_cast<float>(h + 1))
                   : std::pow(second, static_cast<float>(2 * (h - series) + 1));
  }
}

std::string describe(const ggml_tensor& node) {
  const ggml_tensor& q = *node.src[0];
  const ggml_tensor& k = *node.src[1];
  const ggml_tensor& v = *node.src[2];
  const OpParams params = op_params(node);
  char text[256];
  std::snprintf(text, sizeof(text),
                "heads %lld/%lld, dims %lld/%lld, k %s, v %s, streams %lld%s%s%s%s",
                static_cast<long long>(q.ne[2]), static_cast<long long>(k.ne[2]),
                static_cast<long long>(k.ne[0]), static_cast<long long>(v.ne[0]),
                ggml_type_name(k.type), ggml_type_name(v.type), static_cast<long long>(q.ne[3]),
                node.src[3] != nullptr ? ", mask" : "", node.src[4] != nullptr ? ", sinks" : "",
                params.max_bias > 0.0f ? ", alibi" : "", params.softcap != 0.0f ? ", softcap" : "");
  return text;
}

}  // namespace relay::ggml
