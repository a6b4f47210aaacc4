#include "relay/types.h"

#include <gtest/gtest.h>

namespace relay {
namespace {

// Addresses written out by hand: everything else, the tests' own tensors too, asks at().
TEST(Address, OfAVectorInBlocks) {
  const uint8_t memory[4096] = {};
  const KvPlane plane = {.type = DType::kF16,
                         .data = memory,
                         .block_stride = 1000,
                         .slot_stride = 20,
                         .head_stride = 300,
                         .unpack = nullptr};
  EXPECT_EQ(plane.at(16, 0, 0) - memory, 0);
  EXPECT_EQ(plane.at(16, 15, 0) - memory, 15 * 20);
  EXPECT_EQ(plane.at(16, 16, 0) - memory, 1000);
  EXPECT_EQ(plane.at(16, 53, 2) - memory, 3 * 1000 + 5 * 20 + 2 * 300);
  EXPECT_EQ(plane.at(INT64_MAX, 53, 2) - memory, 53 * 20 + 2 * 300);
}

TEST(Address, OfARow) {
  char memory[4096];
  const MutableRows rows = {.type = DType::kF32,
                            .data = memory,
                            .row_stride = 100,
                            .head_stride = 8,
                            .rows_per_block = 3,
                            .block_stride = 1000};
  EXPECT_EQ(static_cast<char*>(rows.at(2, 1)) - memory, 2 * 100 + 8);
  EXPECT_EQ(static_cast<char*>(rows.at(7, 4)) - memory, 2 * 1000 + 100 + 4 * 8);
  const ConstRows one_block = {.data = memory, .row_stride = 100, .head_stride = 8};
  EXPECT_EQ(static_cast<const char*>(one_block.at(7, 4)) - memory, 7 * 100 + 4 * 8);
}

TEST(CacheSizes, SayWhatIsWrong) {
  KvCache cache;
  EXPECT_EQ(fault_of(cache), nullptr);
  cache.slots = 100;
  EXPECT_EQ(fault_of(cache), nullptr);
  cache.slots = -1;
  EXPECT_NE(fault_of(cache), nullptr);
  cache.slots = 128;
  cache.block_size = 0;
  EXPECT_NE(fault_of(cache), nullptr);
  cache.layout = KvLayout::kTiles;
  cache.block_size = 64;
  EXPECT_EQ(fault_of(cache), nullptr);
  cache.slots = 100;  // a tile would be cut short
  EXPECT_NE(fault_of(cache), nullptr);
  cache.slots = 128;
  cache.block_size = 16;
  EXPECT_NE(fault_of(cache), nullptr);
}

}  // namespace
}  // namespace relay
