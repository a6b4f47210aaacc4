// Writes new tokens' K and V into a paged cache: 16 bytes a thread, one block a token.
#include "cuda/kernels/common.cuh"
#include "cuda/kernels/write_kv.h"
#include "cuda/launch.h"

namespace relay::cuda {
namespace {

constexpr int kThreads = 128;

/// 8 elements of T as e4m3, divided by a scale, saturating.
template <typename T>
__device__ uint2 to_bytes(uint4 from, float inverse) {
  const uint32_t words[4] = {from.x, from.y, from.z, from.w};
  uint32_t out[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float2 f = Pair<T>::unpack(words[i]);
    f.x *= inverse;
    f.y *= inverse;
    out[i / 2] |= static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(f, __NV_SATFINITE, __NV_E4M3))
                  << (16 * (i % 2));
  }
  return {out[0], out[1]};
}

template <typename T, bool kByteKv>
__global__ void write_tokens(KvWriteParams p) {
  let_next_start();
  wait_for_previous();
  const int64_t slot = p.slots[blockIdx.x];
  if (slot < 0 || slot >= int64_t{p.cache_blocks} * p.block_size) return;
  const int64_t block = slot / p.block_size;
  const int64_t within = slot % p.block_size;
  const int chunks = p.head_size / 8;
  for (int i = threadIdx.x; i < p.kv_heads * chunks; i += kThreads) {
    const int head = i / chunks;
    const int chunk = i % chunks;
    const auto move = [&](const char* from, const KvWriteParams::Plane& to, const float* scale) {
      char* at = to.data + block * to.block + within * to.slot + head * to.head;
      const uint4 value = *reinterpret_cast<const uint4*>(from);
      if constexpr (kByteKv) {
        const float inverse = scale != nullptr ? 1.0f / *scale : 1.0f;
        reinterpret_cast<uint2*>(at)[chunk] = to_bytes<T>(value, inverse);
      } else {
        reinterpret_cast<uint4*>(at)[chunk] = value;
      }
    };
    move(p.k + blockIdx.x * p.k_row + head * p.k_head + chunk * 16, p.k_cache, p.k_scale);
    move(p.v + blockIdx.x * p.v_row + head * p.v_head + chunk * 16, p.v_cache, p.v_scale);
  }
}

}  // namespace

cudaError_t launch_write_kv(const KvWriteParams& params, DType q_type, DType kv_type,
                            int32_t tokens, cudaStream_t stream) {
  const bool bytes = kv_type == DType::kF8E4M3;
  const auto go = [&](auto kernel) { return launch(kernel, tokens, kThreads, 0, stream, params); };
  if (q_type == DType::kBF16) {
    return bytes ? go(write_tokens<__nv_bfloat16, true>) : go(write_tokens<__nv_bfloat16, false>);
  }
  return bytes ? go(write_tokens<__half, true>) : go(write_tokens<__half, false>);
}

}  // namespace relay::cuda
