#include "flash_attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "test_graphs.h"

namespace relay::ggml {
namespace {

using test::AttentionCase;
using test::Graph;

Verdict verdict_of(const AttentionCase& c) {
  Graph graph;
  FlashAttention out;
  return read_flash_attention(*graph.node(graph.add(c)), out);
}

TEST(FlashAttention, ServesEveryTypeThatGgmlCanExpand) {
  for (int t = 0; t < GGML_TYPE_COUNT; ++t) {
    const ggml_type type = static_cast<ggml_type>(t);
    const ggml_type_traits* traits = ggml_get_type_traits(type);
    if (traits->type_size == 0 || traits->blck_size == 0) continue;  // a retired number
    const bool readable = type == GGML_TYPE_F32 || traits->to_float != nullptr;
    EXPECT_EQ(verdict_of({.k_dim = 256, .v_dim = 256, .k_type = type, .v_type = type}),
              readable ? Verdict::kServed : Verdict::kKvType)
        << ggml_type_name(type);
  }
}

TEST(FlashAttention, ReadsShapesStridesAndParameters) {
  Graph graph;
  FlashAttention fa;
  ggml_tensor* node = graph.node(graph.add({.heads = 12,
                                            .kv_heads = 4,
                                            .k_dim = 96,
                                            .v_dim = 64,
                                            .slots = 50,
                                            .rows = 7,
                                            .streams = 3,
                                            .k_type = GGML_TYPE_Q8_0,
                                            .v_type = GGML_TYPE_Q4_0,
                                            .softcap = 30.0f}));
  ASSERT_EQ(read_flash_attention(*node, fa), Verdict::kServed);
  EXPECT_EQ(fa.key.shape, (HeadShape{12, 4, 96, 64}));
  EXPECT_EQ(fa.key.k_type, DType::kQ8_0);
  EXPECT_EQ(fa.key.v_type, DType::kCustom);
  EXPECT_NE(fa.inputs.kv.v.unpack, nullptr);
  EXPECT_EQ(fa.key.mask.rows_per_stream, 7);
  EXPECT_EQ(fa.key.mask.streams, 3);
  EXPECT_EQ(fa.key.mask.columns, 50);
  EXPECT_EQ(fa.key.mask.row_stride, 100);
  EXPECT_EQ(fa.key.mask.stream_stride, 700);
  EXPECT_EQ(fa.inputs.kv.block_size, 50);
  EXPECT_EQ(fa.inputs.kv.k.slot_stride, 3 * 34);
  EXPECT_EQ(fa.inputs.kv.k.head_stride, 50 * 3 * 34);
  EXPECT_EQ(fa.inputs.q.row_stride, 96 * 4);
  EXPECT_EQ(fa.inputs.q.head_stride, 7 * 96 * 4);
  EXPECT_EQ(fa.inputs.q.rows_per_block, 7);
  EXPECT_EQ(fa.inputs.out.head_stride, 64 * 4);
  EXPECT_EQ(fa.inputs.out.row_stride, 12 * 64 * 4);
  EXPECT_EQ(fa.inputs.softcap, 30.0f);
}

TEST(FlashAttention, HandsOnWhatItDoesNotKnow) {
  EXPECT_EQ(verdict_of({}), Verdict::kServed);
  EXPECT_EQ(verdict_of({.mask = false}), Verdict::kServed);
  EXPECT_EQ(verdict_of({.streams = 2, .shared_mask = true}), Verdict::kServed);
  EXPECT_EQ(verdict_of({.mask_heads = 8}), Verdict::kMaskPerHead);
  EXPECT_EQ(verdict_of({.slots = 0}), Verdict::kEmpty);
  EXPECT_EQ(verdict_of({.rows = 0}), Verdict::kEmpty);
  EXPECT_EQ(verdict_of({.softcap = -1.0f}), Verdict::kSoftcap);

  const auto altered = [](auto&& alter) {
    Graph graph;
    ggml_tensor* node = graph.node(graph.add({.streams = 4, .sinks = true}));
    alter(*node);
    FlashAttention out;
    return read_flash_attention(*node, out);
  };
  EXPECT_EQ(altered([](ggml_tensor& n) { n.src[0]->type = GGML_TYPE_F16; }), Verdict::kQueryType);
  EXPECT_EQ(altered([](ggml_tensor& n) { n.nb[1] += 64; }), Verdict::kResultLayout);
  EXPECT_EQ(altered([](ggml_tensor& n) { n.src[2]->ne[2] = 1; }), Verdict::kKvHeads);
  EXPECT_EQ(altered([](ggml_tensor& n) { n.src[1]->ne[3] = 2; }), Verdict::kKvStreams);
  EXPECT_EQ(altered([](ggml_tensor& n) { n.src[2]->nb[0] = 128; }), Verdict::kElementStride);
  EXPECT_EQ(altered([](ggml_tensor& n) { n.src[3]->type = GGML_TYPE_F32; }), Verdict::kMaskType);
  EXPECT_EQ(altered([](ggml_tensor& n) { n.src[3]->ne[3] = 2; }), Verdict::kMaskShape);
  EXPECT_EQ(altered([](ggml_tensor& n) { n.src[4]->type = GGML_TYPE_F16; }), Verdict::kSinks);
}

TEST(FlashAttention, KeysDifferInWhateverAPlanDependsOn) {
  Graph graph;
  const AttentionCase c{.streams = 2};
  const size_t first = graph.add(c);
  const size_t second = graph.add_with_mask_of(c, first);
  AttentionCase quantised = c;
  quantised.k_type = GGML_TYPE_Q8_0;
  const size_t third = graph.add_with_mask_of(quantised, first);
  FlashAttention a, b;
  ASSERT_EQ(read_flash_attention(*graph.node(first), a), Verdict::kServed);
  ASSERT_EQ(read_flash_attention(*graph.node(second), b), Verdict::kServed);
  EXPECT_EQ(a.key, b.key);
  b.key.mask_version = 1;
  EXPECT_FALSE(a.key == b.key);
  ASSERT_EQ(read_flash_attention(*graph.node(third), b), Verdict::kServed);
  EXPECT_FALSE(a.key == b.key);
}

TEST(FlashAttention, SlopesAreAlibis) {
  std::vector<float> slopes;
  alibi_slopes(8.0f, 8, slopes);
  for (size_t h = 0; h < 8; ++h) EXPECT_FLOAT_EQ(slopes[h], std::pow(2.0f, -float(h + 1)));
  alibi_slopes(8.0f, 12, slopes);  // 8 of one series, then 4 of the other
  ASSERT_EQ(slopes.size(), 12u);
  EXPECT_FLOAT_EQ(slopes[8], std::pow(2.0f, -0.5f));
  EXPECT_FLOAT_EQ(slopes[11], std::pow(2.0f, -3.5f));
}

}  // namespace
}  // namespace relay::ggml
