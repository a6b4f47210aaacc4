// Hostile texts against every pre-tokeniser of the pinned llama.cpp, and its matcher of grammars
// against ours, with real vocabularies.
#include "engine/tokenizer.h"

#include <gtest/gtest.h>
#include <llama-cpp.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <regex>
#include <set>

#include "engine/engine.h"

namespace relay::engine {
namespace {

const std::string kModels = std::string(RELAY_TEST_LLAMA_CPP) + "/models/";

llama_model_ptr load_vocabulary(const std::string& file, const std::string& pre) {
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  llama_model_params params = llama_model_default_params();
  params.vocab_only = true;
  llama_model_kv_override overrides[2] = {};
  if (!pre.empty()) {
    overrides[0].tag = LLAMA_KV_OVERRIDE_TYPE_STR;
    std::strcpy(overrides[0].key, "tokenizer.ggml.pre");
    std::strncpy(overrides[0].val_str, pre.c_str(), sizeof(overrides[0].val_str) - 1);
    params.kv_overrides = overrides;
  }
  return llama_model_ptr(llama_model_load_from_file(file.c_str(), params));
}

/// As many as the source of llama.cpp names.
std::set<std::string> pre_tokenizers() {
  std::ifstream file(std::string(RELAY_TEST_LLAMA_CPP) + "/src/llama-vocab.cpp");
  const std::string source{std::istreambuf_iterator<char>(file), {}};
  const std::regex name("tokenizer_pre == *\"([^\"]+)\"");
  std::set<std::string> names;
  for (std::sregex_iterator it(source.begin(), source.end(), name), end; it != end; ++it) {
    names.insert((*it)[1]);
  }
  return names;
}

std::string repeat(const std::string& text, size_t bytes) {
  std::string result;
  while (result.size() < bytes) result += text;
  return result;
}

/// 200 or 400, and soon.
void survives(const Tokenizer& tokenizer, const std::string& text, const std::string& what) {
  const auto begin = std::chrono::steady_clock::now();
  try {
    tokenizer.tokenize(text, false, true, 32768);
  } catch (const EngineError& e) {
    EXPECT_EQ(e.kind(), ErrorKind::kContextLengthExceeded) << what;
  }
  EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(20)) << what;
}

constexpr const char* kLetters[] = {"A", "aA", ".", "1", " ", "\n", "字", "😀", "́", " a"};

TEST(Tokenizer, LongRunsEndNoProcess) {
  const std::set<std::string> names = pre_tokenizers();
  ASSERT_GT(names.size(), 50u);
  bool some_recurse = false;
  for (const std::string& pre : names) {
    if (pre == "whitespace") continue;  // wants a vocabulary of another form
    const llama_model_ptr model = load_vocabulary(kModels + "ggml-vocab-gpt-2.gguf", pre);
    ASSERT_TRUE(model) << pre;
    const Tokenizer tokenizer(llama_model_get_vocab(model.get()), pre);
    some_recurse = some_recurse || tokenizer.stack_per_byte() > 0;
    for (const char* letter : kLetters) {
      survives(tokenizer, repeat(letter, 30'000) + "字", pre + ", " + letter);
    }
  }
  EXPECT_TRUE(some_recurse) << "then nothing was tested";
}

TEST(Tokenizer, VeryLongRunsEndNoProcess) {
  for (const std::string pre :
       {"gpt-4o", "llama4", "tekken", "deepseek-llm", "superbpe", "kimi-k2", "llama3"}) {
    const llama_model_ptr model = load_vocabulary(kModels + "ggml-vocab-gpt-2.gguf", pre);
    ASSERT_TRUE(model) << pre;
    const Tokenizer tokenizer(llama_model_get_vocab(model.get()), pre);
    for (const char* letter : {"A", "字", " ", "1", "."}) {
      for (const size_t bytes : {size_t{400'000}, size_t{16'000'000}}) {
        survives(tokenizer, repeat(letter, bytes) + "字", pre + ", " + letter);
      }
    }
  }
}

std::vector<std::filesystem::path> vocabularies() {
  std::vector<std::filesystem::path> files;
  for (const auto& entry : std::filesystem::directory_iterator(kModels)) {
    if (entry.path().extension() == ".gguf") files.push_back(entry.path());
  }
  return files;
}

TEST(Tokenizer, BoundsHoldForRealVocabularies) {
  int tested = 0;
  for (const auto& file : vocabularies()) {
    const llama_model_ptr model = load_vocabulary(file, "");
    if (!model) continue;
    const auto type = llama_vocab_type(llama_model_get_vocab(model.get()));
    if (type != LLAMA_VOCAB_TYPE_SPM && type != LLAMA_VOCAB_TYPE_BPE) continue;  // encoders
    SCOPED_TRACE(file);
    const llama_vocab* vocab = llama_model_get_vocab(model.get());
    const Tokenizer tokenizer(vocab, "");
    const TokenBound bound(tokenizer.texts());
    std::mt19937 random(1);
    for (int i = 0; i < 50; ++i) {
      std::string text;
      while (text.size() < 200) {
        const char* pieces[] = {"the ", "    ", "\n\n",    "字", "😀",
                                "aaaa", "123",  "<|end|>", "é",  ". "};
        text += pieces[random() % std::size(pieces)];
      }
      const auto tokens = tokenizer.tokenize(text, false, true, 100'000);
      EXPECT_LE(bound.at_least(text, 100'000), static_cast<int64_t>(tokens.size())) << text;
    }
    // Far too long, and known so at once.
    const auto begin = std::chrono::steady_clock::now();
    EXPECT_THROW(tokenizer.tokenize(repeat("😀", 1'600'000), false, true, 4096), EngineError);
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(1));
    ++tested;
  }
  EXPECT_GE(tested, 10);
}

/// What llama.cpp's grammar sampler allows after these tokens.
std::vector<bool> allowed_by_llama(llama_sampler* grammar, int32_t vocab_size) {
  std::vector<llama_token_data> data;
  for (Token t = 0; t < vocab_size; ++t) data.push_back({t, 0.0f, 0.0f});
  llama_token_data_array candidates = {data.data(), data.size(), -1, false};
  llama_sampler_apply(grammar, &candidates);
  std::vector<bool> allowed(static_cast<size_t>(vocab_size));
  for (const llama_token_data& one : data) {
    allowed[static_cast<size_t>(one.id)] = std::isfinite(one.logit);
  }
  return allowed;
}

/// Bytes that are no UTF-8 wherever they stand. llama.cpp lets some through.
bool is_broken(const std::string& text) {
  return std::any_of(text.begin(), text.end(), [](char c) {
    const auto byte = static_cast<unsigned char>(c);
    return byte == 0xC0 || byte == 0xC1 || byte > 0xF4;
  });
}

TEST(Tokenizer, GrammarsAllowWhatLlamaCppAllows) {
  const char* kGrammars[] = {
      "root ::= \"yes\" | \"no\"", "root ::= [^\\n]* \"\\n\" [0-9]{2,3}",
      "root ::= item (\", \" item)*\nitem ::= [a-zà-ü]+ | \"字\" | \"\\\"\" [^\"]* \"\\\"\"",
      R"(root ::= value
value ::= object | array | string | number | "true" | "null"
object ::= "{" ws (string ":" ws value ("," ws string ":" ws value)*)? ws "}"
array ::= "[" ws (value ("," ws value)*)? ws "]"
string ::= "\"" ([^"\\\x7F\x00-\x1F] | [\\] (["\\bfnrt] | "u" [0-9a-fA-F]{4}))* "\""
number ::= "-"? ([0-9] | [1-9] [0-9]{0,15}) ("." [0-9]+)?
ws ::= | " " | "\n" [ \t]{0,20})"};
  std::mt19937 random(7);
  for (const char* name : {"phi-3", "gpt-2", "qwen2"}) {
    const llama_model_ptr model = load_vocabulary(kModels + "ggml-vocab-" + name + ".gguf", "");
    ASSERT_TRUE(model);
    const llama_vocab* vocab = llama_model_get_vocab(model.get());
    const int32_t size = llama_vocab_n_tokens(vocab);
    const Tokenizer tokenizer(vocab, "");
    for (const char* grammar : kGrammars) {
      SCOPED_TRACE(std::string(name) + ": " + grammar);
      const llama_sampler_ptr theirs(llama_sampler_init_grammar(vocab, grammar, "root"));
      ASSERT_TRUE(theirs);
      GrammarMatcher ours(Grammar::compile(grammar, tokenizer.texts()), tokenizer.texts());
      auto at = ours.start();
      for (int step = 0; step < 12; ++step) {
        const std::vector<bool> expected = allowed_by_llama(theirs.get(), size);
        const std::vector<uint64_t>& mask = ours.allowed(at);
        std::vector<Token> may;
        for (Token t = 0; t < size; ++t) {
          const bool allowed = (mask[static_cast<size_t>(t) / 64] >> (t % 64) & 1) != 0;
          if (is_broken(tokenizer.texts().text(t))) continue;
          ASSERT_EQ(allowed, expected[static_cast<size_t>(t)])
              << step << ": " << t << " '" << tokenizer.texts().text(t) << "'";
          if (allowed && !llama_vocab_is_eog(vocab, t)) may.push_back(t);
        }
        if (may.empty()) break;
        const Token next = may[random() % may.size()];
        at = ours.advance(at, next);
        ASSERT_GE(at.state, 0);
        llama_sampler_accept(theirs.get(), next);
      }
    }
  }
}

}  // namespace
}  // namespace relay::engine
