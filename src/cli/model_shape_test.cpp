#include "cli/model_shape.h"

#include <gguf.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <stdexcept>
#include <vector>

namespace relay::cli {
namespace {

class ModelShapes : public ::testing::Test {
 protected:
  void SetUp() override {
    path_ = std::filesystem::temp_directory_path() /
            ("relay-shape-" + std::to_string(::getpid()) + ".gguf");
    file_ = gguf_init_empty();
    gguf_set_val_str(file_, "general.architecture", "llama");
    gguf_set_val_u32(file_, "llama.block_count", 16);
    gguf_set_val_u32(file_, "llama.embedding_length", 2048);
    gguf_set_val_u32(file_, "llama.attention.head_count", 32);
  }
  void TearDown() override {
    gguf_free(file_);
    std::filesystem::remove(path_);
  }
  ModelShape read() {
    EXPECT_TRUE(gguf_write_to_file(file_, path_.c_str(), true));
    return read_model_shape(path_);
  }

  std::filesystem::path path_;
  gguf_context* file_ = nullptr;
};

TEST_F(ModelShapes, ReadsHeadsAndSizes) {
  gguf_set_val_str(file_, "general.name", "Some 1B");
  gguf_set_val_u32(file_, "llama.attention.head_count_kv", 8);
  const ModelShape shape = read();
  EXPECT_EQ(shape.name, "Some 1B");
  EXPECT_EQ(shape.layers, 16);
  EXPECT_EQ(shape.heads, 32);
  EXPECT_EQ(shape.kv_heads, 8);
  EXPECT_EQ(shape.k_dim, 64) << "the width over the heads";
  EXPECT_EQ(shape.v_dim, 64);
}

TEST_F(ModelShapes, ReadsHeadSizesOfTheirOwn) {
  gguf_set_val_u32(file_, "llama.attention.key_length", 192);
  gguf_set_val_u32(file_, "llama.attention.value_length", 128);
  const ModelShape shape = read();
  EXPECT_EQ(shape.name, "llama");
  EXPECT_EQ(shape.kv_heads, 32) << "as many as query heads";
  EXPECT_EQ(shape.k_dim, 192);
  EXPECT_EQ(shape.v_dim, 128);
}

TEST_F(ModelShapes, CountsTheLayersWithAttention) {
  const std::vector<int32_t> kv_heads = {0, 4, 0, 4};
  gguf_set_arr_data(file_, "llama.attention.head_count_kv", GGUF_TYPE_INT32, kv_heads.data(),
                    kv_heads.size());
  const ModelShape shape = read();
  EXPECT_EQ(shape.layers, 2);
  EXPECT_EQ(shape.kv_heads, 4);
}

TEST_F(ModelShapes, SaysWhatIsMissing) {
  gguf_remove_key(file_, "llama.attention.head_count");
  EXPECT_THROW(read(), std::runtime_error);
  EXPECT_THROW(read_model_shape("/nonexistent.gguf"), std::runtime_error);
  std::ofstream(path_) << "not a model";
  EXPECT_THROW(read_model_shape(path_), std::runtime_error);
}

}  // namespace
}  // namespace relay::cli
