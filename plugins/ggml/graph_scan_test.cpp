#include "graph_scan.h"

#include <gtest/gtest.h>

#include "test_graphs.h"

namespace relay::ggml {
namespace {

// Memory without a backend: tensors only need addresses here.
class GraphScanTest : public testing::Test {
 protected:
  GraphScanTest()
      : context_(ggml_init({.mem_size = 1 << 20, .mem_buffer = nullptr, .no_alloc = false})) {
    graph_ = ggml_new_graph(context_.get());
  }

  ggml_tensor* new_mask(ggml_type type = GGML_TYPE_F16) {
    return ggml_new_tensor_2d(context_.get(), type, 8, 2);
  }

  ggml_tensor* attend(ggml_tensor* mask) {
    ggml_context* ctx = context_.get();
    ggml_tensor* q = ggml_new_tensor_3d(ctx, GGML_TYPE_F32, 4, 2, 1);
    ggml_tensor* k = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, 4, 8, 1);
    ggml_tensor* v = ggml_new_tensor_3d(ctx, GGML_TYPE_F16, 4, 8, 1);
    ggml_tensor* out = ggml_flash_attn_ext(ctx, q, k, v, mask, 1.0f, 0.0f, 0.0f);
    ggml_build_forward_expand(graph_, out);
    return out;
  }

  ggml_context_ptr context_;
  ggml_cgraph* graph_;
  GraphScan scan_;
};

TEST_F(GraphScanTest, GraphWithoutAttention) {
  ggml_tensor* a = new_mask();
  ggml_build_forward_expand(graph_, ggml_add(context_.get(), a, a));
  EXPECT_TRUE(scan_.scan(graph_).empty());
}

TEST_F(GraphScanTest, InputMaskIsReadyForAllNodes) {
  ggml_tensor* mask = new_mask();
  ggml_tensor* first = attend(mask);
  ggml_tensor* second = attend(mask);
  attend(nullptr);
  const auto& found = scan_.scan(graph_);
  ASSERT_EQ(found.size(), 3u);
  EXPECT_EQ(found[0].node, first);
  EXPECT_EQ(found[1].node, second);
  for (const AttentionNode& n : found) {
    EXPECT_EQ(n.mask_version, 0);
    EXPECT_FALSE(n.mask_rewritten);
  }
}

TEST_F(GraphScanTest, ComputedMaskIsNotReady) {
  ggml_tensor* mask = ggml_cast(context_.get(), new_mask(GGML_TYPE_F32), GGML_TYPE_F16);
  attend(mask);
  attend(mask);
  const auto& found = scan_.scan(graph_);
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(found[0].mask_version, 1);
  EXPECT_EQ(found[1].mask_version, 1);
}

TEST_F(GraphScanTest, WritingThroughAViewMakesAnotherMask) {
  ggml_tensor* mask = new_mask();
  attend(mask);
  ggml_tensor* row = ggml_view_1d(context_.get(), mask, 8, mask->nb[1]);
  ggml_tensor* other = ggml_new_tensor_1d(context_.get(), GGML_TYPE_F16, 8);
  ggml_build_forward_expand(graph_, ggml_cpy(context_.get(), other, row));
  attend(mask);
  const auto& found = scan_.scan(graph_);
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(found[0].mask_version, 0);
  EXPECT_EQ(found[1].mask_version, 1);
}

TEST_F(GraphScanTest, MemoryOfADeadTensorReusedForTheMask) {
  // As ggml's allocator does: the mask's memory first holds something else.
  ggml_tensor* mask = ggml_cast(context_.get(), new_mask(GGML_TYPE_F32), GGML_TYPE_F16);
  ggml_tensor* early = ggml_add(context_.get(), new_mask(), new_mask());
  early->data = mask->data;
  ggml_build_forward_expand(graph_, early);
  attend(mask);
  EXPECT_EQ(scan_.scan(graph_)[0].mask_version, 2);
}

TEST_F(GraphScanTest, NodeListedTwice) {
  ggml_tensor* mask = new_mask();
  ggml_tensor* node = attend(mask);
  ggml_graph_add_node(graph_, node);
  ASSERT_EQ(scan_.scan(graph_).size(), 1u);
  EXPECT_FALSE(scan_.scan(graph_)[0].mask_rewritten);

  ggml_tensor* other = new_mask();
  ggml_build_forward_expand(graph_, ggml_cpy(context_.get(), other, mask));
  ggml_graph_add_node(graph_, node);
  ASSERT_EQ(scan_.scan(graph_).size(), 1u);
  EXPECT_TRUE(scan_.scan(graph_)[0].mask_rewritten);
}

}  // namespace
}  // namespace relay::ggml
