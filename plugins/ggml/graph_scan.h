// Finds the attention nodes of a graph, and which of them may share a plan.
//
// Nodes that read the same mask share its plan only while nothing writes to it in between, and a
// plan can be made before the graph runs only if nothing writes to the mask first. Memory decides,
// not the tensors' names: ggml's allocator gives the memory of a dead tensor to the next one.
#pragma once

#include <ggml.h>

#include <cstddef>
#include <vector>

namespace relay::ggml {

struct AttentionNode {
  ggml_tensor* node = nullptr;
  int mask_version = 0;         ///< nodes before this one that write to its mask's memory
  bool mask_rewritten = false;  ///< the graph lists the node more than once, with different masks
};

class GraphScan {
 public:
  /// Lists the GGML_OP_FLASH_ATTN_EXT nodes of `graph` in the order in which they first run.
  const std::vector<AttentionNode>& scan(ggml_cgraph* graph);

 private:
  struct MaskRange {
    const char* begin;
    const char* end;
    int version;
  };

  int& version_of(const ggml_tensor& mask);
  AttentionNode* find(const ggml_tensor* node);

  std::vector<AttentionNode> found_;
  std::vector<MaskRange> masks_;
};

}  // namespace relay::ggml
