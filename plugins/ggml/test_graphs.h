// Graphs with attention for tests: random inputs, a mask with sharing, and the answer in double.
#pragma once

#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml.h>

#include <cstdint>
#include <vector>

namespace relay::ggml::test {

struct AttentionCase {
  int64_t heads = 8;
  int64_t kv_heads = 2;
  int64_t k_dim = 64;
  int64_t v_dim = 64;
  int64_t slots = 200;
  int64_t rows = 5;
  int64_t streams = 1;
  ggml_type k_type = GGML_TYPE_F16;
  ggml_type v_type = GGML_TYPE_F16;
  bool mask = true;
  int64_t mask_heads = 1;
  bool shared_mask = false;    ///< one mask for all streams
  bool computed_mask = false;  ///< the graph casts it from f32
  bool sinks = false;
  float max_bias = 0.0f;
  float softcap = 0.0f;
};

/// Attention nodes and their inputs. Add them all, then fill.
class Graph {
 public:
  Graph();

  /// Adds an attention node; returns its index.
  size_t add(const AttentionCase& c);
  /// Adds one that reads the mask of node `other` (with whose shape it must agree).
  size_t add_with_mask_of(const AttentionCase& c, size_t other);

  /// Allocates on `backend` (once) and fills with random values and masks of shared prefixes.
  void fill(ggml_backend_t backend, unsigned seed);

  ggml_cgraph* cgraph() { return graph_; }
  ggml_context* context() { return context_.get(); }
  ggml_tensor* node(size_t i) { return nodes_[i].out; }
  ggml_tensor* mask(size_t i) { return nodes_[i].mask; }

  /// Normalised mean square error of node `i` against dense attention in double precision.
  double error(size_t i) const;

 private:
  struct Node {
    AttentionCase c;
    ggml_tensor *q, *k, *v;
    ggml_tensor* mask_source;  // the leaf that holds the mask's values; f16 or f32
    ggml_tensor* mask;
    ggml_tensor* sinks;
    ggml_tensor* out;
  };

  size_t add(const AttentionCase& c, ggml_tensor* source, ggml_tensor* mask);

  ggml_context_ptr context_;
  ggml_backend_buffer_ptr buffer_;
  ggml_cgraph* graph_;
  std::vector<Node> nodes_;
};

}  // namespace relay::ggml::test
