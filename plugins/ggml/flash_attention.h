// One GGML_OP_FLASH_ATTN_EXT node in Relay's terms, or the reason why Relay leaves it to ggml.
//
// ggml's layout: q [dim][rows][heads][streams] f32, k and v [dim][slots][kv heads][streams], mask
// [slots][rows][1][streams or 1] f16, result [v dim][heads][rows][streams] f32. A stream is a KV
// cache of its own (llama.cpp without kv_unified); Relay calls it a block.
#pragma once

#include <ggml.h>

#include <cstdint>
#include <string>
#include <vector>

#include "relay/attention.h"

namespace relay::ggml {

/// Who computes a node, and if it is ggml, why. Stable names: they are printed and tested.
enum class Verdict : uint8_t {
  kServed,
  kReferenceWanted,  ///< the host asked for ggml's reference implementation
  kEmpty,            ///< nothing to compute
  kQueryType,        ///< q is not f32
  kResultLayout,     ///< the result is not contiguous f32
  kKvType,           ///< ggml itself cannot expand K's or V's type
  kKvHeads,          ///< K and V have different numbers of heads, or do not divide q's
  kKvStreams,        ///< K and V have fewer streams than q
  kElementStride,    ///< the elements of a vector are not contiguous
  kMaskType,         ///< the mask is not f16
  kMaskPerHead,      ///< the mask differs between heads
  kMaskShape,        ///< the mask is broadcast in a way that Relay does not know
  kSinks,            ///< the sinks are not one f32 for each head
  kSoftcap,          ///< a negative soft cap
  kMaskRewritten,    ///< the graph runs the node twice, with another mask the second time
  kRefused,          ///< the core refused it; its message is in the log
  kCount,
};

const char* to_string(Verdict verdict);

/// What a plan is made from. Nodes of a graph that agree in this share one plan, so it holds no
/// pointer but the mask's and nothing that differs between layers.
struct PlanKey {
  MaskBatch mask;
  int mask_version = 0;  ///< counts the nodes of the graph that wrote to the mask before
  HeadShape shape;
  DType k_type = DType::kF16;
  DType v_type = DType::kF16;

  bool operator==(const PlanKey& other) const;
};

struct FlashAttention {
  PlanKey key;
  AttentionInputs inputs;  ///< `slopes` is left to the caller, who owns the memory
  float max_bias = 0.0f;   ///< ALiBi; 0: none
};

/// Reads a node of operation GGML_OP_FLASH_ATTN_EXT. Fills `out` only if it returns kServed.
Verdict read_flash_attention(const ggml_tensor& node, FlashAttention& out);

/// ALiBi's slope of each head, as ggml computes them. `max_bias` is positive.
void alibi_slopes(float max_bias, int32_t heads, std::vector<float>& slopes);

/// One line about shapes and types, for the log.
std::string describe(const ggml_tensor& node);

}  // namespace relay::ggml
