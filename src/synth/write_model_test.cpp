#include "synth/write_model.h"

#include <ggml.h>
#include <gguf.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "synth/tensors.h"
#include "synth/vocabulary.h"

namespace relay::synth {
namespace {

namespace fs = std::filesystem;

class WriteModel : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::temp_directory_path() / "relay-synth-XXXXXX").string();
    ASSERT_NE(::mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
  }
  void TearDown() override { fs::remove_all(folder_); }

  Request request(const char* shape = "tiny", const char* type = "q4_0") const {
    Request result;
    result.shape = find_shape(shape);
    result.output = folder_ / (std::string(shape) + ".gguf");
    result.type = type;
    return result;
  }

  std::vector<std::string> files() const {
    std::vector<std::string> names;
    for (const auto& entry : fs::directory_iterator(folder_)) {
      names.push_back(entry.path().filename());
    }
    return names;
  }

  static std::string contents(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }

  fs::path folder_;
};

// EXPECT_THROW that also looks at the message.
template <typename Error, typename Function>
void expect_error(Function function, const std::string& part) {
  try {
    function();
    FAIL() << "no exception with '" << part << "'";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find(part), std::string::npos) << error.what();
  }
}

TEST_F(WriteModel, SameSeedSameBytesWhateverTheThreads) {
  for (const char* type : {"f32", "bf16", "q8_0", "q4_0"}) {
    Request one = request("tiny", type);
    one.output = folder_ / "one.gguf";
    one.threads = 1;
    one.force = true;
    Request five = one;
    five.output = folder_ / "five.gguf";
    five.threads = 5;
    Request other = one;
    other.output = folder_ / "other.gguf";
    other.seed = 2;
    const Result result = write_model(one);
    write_model(five);
    write_model(other);
    const std::string bytes = contents(one.output);
    EXPECT_EQ(bytes.size(), result.bytes);
    EXPECT_TRUE(bytes == contents(five.output)) << type;
    EXPECT_FALSE(bytes == contents(other.output)) << type;
  }
}

TEST_F(WriteModel, AnExistingFileIsLeftAloneUnlessForced) {
  Request wanted = request();
  std::ofstream(wanted.output) << "precious";
  expect_error<std::invalid_argument>([&] { write_model(wanted); }, "--force");
  EXPECT_EQ(contents(wanted.output), "precious");
  wanted.force = true;
  write_model(wanted);
  EXPECT_EQ(contents(wanted.output).substr(0, 4), "GGUF");
  EXPECT_EQ(files().size(), 1u);
}

TEST_F(WriteModel, AFileThatAppearsMeanwhileIsLeftAlone) {
  Request wanted = request();
  wanted.progress = [&](uint64_t, uint64_t) { std::ofstream(wanted.output) << "precious"; };
  expect_error<std::runtime_error>([&] { write_model(wanted); }, "has appeared");
  EXPECT_EQ(contents(wanted.output), "precious");
  EXPECT_EQ(files().size(), 1u);
}

TEST_F(WriteModel, SpaceIsCheckedBeforeWriting) {
  Request wanted = request();
  const uint64_t bytes = measure_model(wanted).bytes;
  fs::path asked;
  wanted.free_space = [&](const fs::path& folder) {
    asked = folder;
    return bytes - 1;
  };
  expect_error<std::runtime_error>([&] { write_model(wanted); }, "free");
  EXPECT_EQ(asked, folder_);
  EXPECT_TRUE(files().empty());
  wanted.free_space = [&](const fs::path&) { return bytes; };
  EXPECT_EQ(write_model(wanted).bytes, bytes);
  EXPECT_EQ(fs::file_size(wanted.output), bytes);
}

TEST_F(WriteModel, InterruptedItLeavesNothing) {
  std::atomic<bool> cancel = false;
  Request wanted = request("tiny", "f32");
  wanted.cancel = &cancel;
  bool temporary_seen = false;
  wanted.progress = [&](uint64_t done, uint64_t total) {
    temporary_seen = files().size() == 1;
    cancel = done > total / 3;
  };
  EXPECT_THROW(write_model(wanted), Cancelled);
  EXPECT_TRUE(temporary_seen);
  EXPECT_TRUE(files().empty());
}

TEST_F(WriteModel, ProgressGrowsToTheFileSize) {
  uint64_t last = 0;
  Request wanted = request("tiny", "f16");
  wanted.progress = [&](uint64_t done, uint64_t total) {
    EXPECT_GE(done, last);
    EXPECT_LE(done, total);
    last = done;
  };
  EXPECT_EQ(write_model(wanted).bytes, last);
}

TEST_F(WriteModel, BadRequestsSayWhatIsWrong) {
  Request wanted = request();
  wanted.type = "q3";
  expect_error<std::invalid_argument>([&] { write_model(wanted); }, "q4_0");
  wanted = request("tiny", "q4_k");
  expect_error<std::invalid_argument>([&] { write_model(wanted); }, "no multiple of 256");
  wanted = request();
  wanted.output = folder_;
  expect_error<std::invalid_argument>([&] { write_model(wanted); }, "is a folder");
  wanted.output = folder_ / "missing" / "model.gguf";
  expect_error<std::invalid_argument>([&] { write_model(wanted); }, "there is no folder");
  wanted = request();
  wanted.vocabulary = "klingon";
  expect_error<std::runtime_error>([&] { write_model(wanted); }, "ggml-vocab-klingon.gguf");
  const fs::path text = folder_ / "text";
  std::ofstream(text) << "no model at all";
  wanted.vocabulary = text;
  expect_error<std::runtime_error>([&] { write_model(wanted); }, "no GGUF file");
  wanted = request();
  wanted.chat_template = "none-such";
  expect_error<std::runtime_error>([&] { write_model(wanted); }, "none-such.jinja");
  fs::remove(text);
  EXPECT_TRUE(files().empty());
}

TEST_F(WriteModel, AnotherVocabularyCanBeAskedForByNameOrFromAModel) {
  Request wanted = request();
  wanted.vocabulary = "qwen2";
  EXPECT_EQ(write_model(wanted).vocabulary_size, 151936);
  Request from_model = request("tiny-gemma2");
  from_model.vocabulary = wanted.output;
  const Result result = write_model(from_model);
  EXPECT_EQ(result.vocabulary_size, 151936);
  EXPECT_EQ(result.template_source, "the vocabulary's own");
}

TEST(Vocabulary, PaddingIsUnusedAndUnspeakable) {
  const Vocabulary plain = load_vocabulary("gpt-2", "", 0);
  const Vocabulary padded = load_vocabulary("gpt-2", "", 51200);
  ASSERT_EQ(plain.size(), 50257);
  ASSERT_EQ(padded.size(), 51200);
  EXPECT_TRUE(padded.speakable[0]);
  EXPECT_FALSE(padded.speakable[50256]);  // <|endoftext|>
  EXPECT_FALSE(padded.speakable[51199]);
  const int64_t tokens = gguf_find_key(padded.keys.get(), "tokenizer.ggml.tokens");
  EXPECT_STREQ(gguf_get_arr_str(padded.keys.get(), tokens, 0), "!");
  EXPECT_STREQ(gguf_get_arr_str(padded.keys.get(), tokens, 51199), "[PAD51199]");
}

// Reads a file back as llama.cpp would and compares it with what was specified.
class ReadBack : public WriteModel, public ::testing::WithParamInterface<const char*> {};

TEST_P(ReadBack, LoadsAndHoldsWhatWasSpecified) {
  const Request wanted = request(GetParam(), "q8_0");
  write_model(wanted);

  ggml_context* data = nullptr;
  const GgufPtr file(gguf_init_from_file(wanted.output.c_str(), {.no_alloc = false, .ctx = &data}));
  ASSERT_NE(file, nullptr);
  const std::unique_ptr<ggml_context, void (*)(ggml_context*)> owner(data, ggml_free);

  const Vocabulary vocabulary = load_vocabulary(wanted.shape.vocabulary, "", 0);
  const int64_t arch = gguf_find_key(file.get(), "general.architecture");
  ASSERT_GE(arch, 0);
  EXPECT_EQ(gguf_get_val_str(file.get(), arch), architecture_name(wanted.shape.architecture));
  const int64_t tokens = gguf_find_key(file.get(), "tokenizer.ggml.tokens");
  ASSERT_GE(tokens, 0);
  ASSERT_EQ(gguf_get_arr_n(file.get(), tokens), static_cast<size_t>(vocabulary.size()));
  const int64_t original = gguf_find_key(vocabulary.keys.get(), "tokenizer.ggml.tokens");
  for (size_t i = 0; i < static_cast<size_t>(vocabulary.size()); ++i) {
    ASSERT_STREQ(gguf_get_arr_str(file.get(), tokens, i),
                 gguf_get_arr_str(vocabulary.keys.get(), original, i));
  }
  EXPECT_GE(gguf_find_key(file.get(), "tokenizer.chat_template"), 0);

  const std::vector<TensorSpec> specs =
      make_tensors(wanted.shape, vocabulary, GGML_TYPE_Q8_0, wanted.seed);
  ASSERT_EQ(gguf_get_n_tensors(file.get()), static_cast<int64_t>(specs.size()));
  for (const TensorSpec& spec : specs) {
    const ggml_tensor* tensor = ggml_get_tensor(data, spec.name.c_str());
    ASSERT_NE(tensor, nullptr) << spec.name;
    ASSERT_EQ(tensor->ne[0], spec.columns) << spec.name;
    ASSERT_EQ(tensor->ne[1], spec.rows) << spec.name;
    const auto count = static_cast<size_t>(spec.elements());
    std::vector<float> expected(count);
    fill_rows(spec, wanted.seed, 0, spec.rows, expected.data());
    std::vector<float> values(count);
    if (tensor->type == GGML_TYPE_F32) {
      const auto* stored = static_cast<const float*>(tensor->data);
      values.assign(stored, stored + count);
    } else {
      ggml_get_type_traits(tensor->type)
          ->to_float(tensor->data, values.data(), static_cast<int64_t>(count));
    }
    double error = 0;
    double norm = 0;
    for (size_t i = 0; i < count; ++i) {
      ASSERT_TRUE(std::isfinite(values[i])) << spec.name << " " << i;
      error += std::pow(values[i] - expected[i], 2);
      norm += std::pow(expected[i], 2);
    }
    EXPECT_GT(norm, 0) << spec.name;
    // A block of q8_0 has steps of its largest element / 127, so a rounding error of deviation
    // (3 deviations / 127) / sqrt(12): 0.7 %.
    EXPECT_LE(std::sqrt(error / norm), tensor->type == GGML_TYPE_F32 ? 0.0 : 0.01) << spec.name;
  }
}

INSTANTIATE_TEST_SUITE_P(Tiny, ReadBack, ::testing::Values("tiny", "tiny-phi2", "tiny-gemma2"),
                         [](const auto& info) {
                           std::string name = info.param;
                           std::erase(name, '-');
                           return name;
                         });

}  // namespace
}  // namespace relay::synth
