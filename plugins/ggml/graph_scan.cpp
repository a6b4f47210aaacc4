#include "graph_scan.h"

namespace relay::ggml {
namespace {

// Operations that only describe memory.
bool writes_nothing(const ggml_tensor& node) {
  switch (node.op) {
    case GGML_OP_NONE:
    case GGML_OP_RESHAPE:
    case GGML_OP_VIEW:
    case GGML_OP_PERMUTE:
    case GGML_OP_TRANSPOSE:
      return true;
    default:
      return false;
  }
}

}  // namespace

int& GraphScan::version_of(const ggml_tensor& mask) {
  const char* begin = static_cast<const char*>(mask.data);
  const char* end = begin + ggml_nbytes(&mask);
  for (MaskRange& known : masks_) {
    if (known.begin == begin && known.end == end) return known.version;
  }
  masks_.push_back({begin, end, 0});
  return masks_.back().version;
}

AttentionNode* GraphScan::find(const ggml_tensor* node) {
  for (AttentionNode& known : found_) {
    if (known.node == node) return &known;
  }
  return nullptr;
}

const std::vector<AttentionNode>& GraphScan::scan(ggml_cgraph* graph) {
  found_.clear();
  masks_.clear();
  const int count = ggml_graph_n_nodes(graph);
  ggml_tensor** const nodes = ggml_graph_nodes(graph);
  int end = 0;  // one past the last attention node
  for (int i = 0; i < count; ++i) {
    if (nodes[i]->op != GGML_OP_FLASH_ATTN_EXT) continue;
    if (nodes[i]->src[3] != nullptr) version_of(*nodes[i]->src[3]);
    end = i + 1;
  }

  for (int i = 0; i < end; ++i) {
    ggml_tensor* const node = nodes[i];
    if (node->op == GGML_OP_FLASH_ATTN_EXT) {
      const int version = node->src[3] != nullptr ? version_of(*node->src[3]) : 0;
      AttentionNode* const earlier = find(node);
      if (earlier == nullptr) {
        found_.push_back({node, version, false});
      } else if (earlier->mask_version != version) {
        earlier->mask_rewritten = true;
      }
    }
    if (masks_.empty() || node->data == nullptr || writes_nothing(*node)) continue;
    const char* const begin = static_cast<const char*>(node->data);
    for (MaskRange& mask : masks_) {
      if (begin < mask.end && begin + ggml_nbytes(node) > mask.begin) ++mask.version;
    }
  }
  return found_;
}

}  // namespace relay::ggml
