#include "synth/shapes.h"

#include <gtest/gtest.h>

#include <set>
#include <stdexcept>
#include <string>

#include "synth/tensors.h"
#include "synth/vocabulary.h"

namespace relay::synth {
namespace {

TEST(Shapes, AllAreValidAndNamedOnce) {
  std::set<std::string> names;
  for (const Shape& shape : shapes()) {
    EXPECT_NO_THROW(check_shape(shape)) << shape.name;
    EXPECT_TRUE(names.insert(shape.name).second) << shape.name;
    EXPECT_EQ(&find_shape(shape.name), &shape);
  }
  for (const char* name : {"tiny", "llama-3.2-1b", "llama-2-7b", "mistral-7b", "phi-2"}) {
    EXPECT_TRUE(names.contains(name)) << name;
  }
}

TEST(Shapes, AnUnknownNameIsAnsweredWithTheKnownOnes) {
  try {
    find_shape("llama-9b");
    FAIL() << "no exception";
  } catch (const std::invalid_argument& error) {
    const std::string message = error.what();
    EXPECT_NE(message.find("llama-9b"), std::string::npos) << message;
    for (const Shape& shape : shapes()) {
      EXPECT_NE(message.find(shape.name), std::string::npos) << message;
    }
  }
}

TEST(Shapes, WhatNoModelCanHaveIsRefused) {
  const Shape good = find_shape("tiny");
  for (const auto& spoil : {+[](Shape& s) { s.layers = 0; }, +[](Shape& s) { s.kv_heads = 3; },
                            +[](Shape& s) { s.head_dim = 31; }, +[](Shape& s) { s.rope_dim = 64; },
                            +[](Shape& s) { s.rope_dim = 16; }, +[](Shape& s) { s.ffn = 0; },
                            +[](Shape& s) { s.context = 0; }}) {
    Shape bad = good;
    spoil(bad);
    EXPECT_THROW(check_shape(bad), std::invalid_argument);
  }
}

int64_t parameters(const char* name, int64_t vocabulary_size) {
  Vocabulary vocabulary;
  vocabulary.speakable.assign(static_cast<size_t>(vocabulary_size), true);
  int64_t sum = 0;
  for (const TensorSpec& tensor : make_tensors(find_shape(name), vocabulary, GGML_TYPE_F16, 1)) {
    sum += tensor.elements();
  }
  return sum;
}

// The published parameter counts of the models that the shapes are named after.
TEST(Shapes, HaveTheParametersOfTheModelsTheyAreNamedAfter) {
  EXPECT_EQ(parameters("llama-2-7b", 32000), 6'738'415'616);
  EXPECT_EQ(parameters("mistral-7b", 32000), 7'241'732'096);
  EXPECT_EQ(parameters("phi-2", 51200), 2'779'683'840);
  EXPECT_EQ(parameters("gemma-2-2b", 256000), 2'614'341'888);
  // Llama 3.2 1B has 1,235,814,400; here come an output matrix and 32 rotation factors.
  EXPECT_EQ(parameters("llama-3.2-1b", 128256), 1'235'814'400 + 128256 * 2048 + 32);
}

}  // namespace
}  // namespace relay::synth
