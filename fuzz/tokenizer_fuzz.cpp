// Fuzzing of tokenising with the real vocabularies of the pinned llama.cpp. The first byte picks
// one with its own pre-tokeniser, or GPT-2's with any that llama.cpp names; the second says how
// often the rest, a text, is repeated.
//
// Whatever the text, it becomes tokens, no fewer than were foreseen, or is refused for its length.
#include <llama-cpp.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <list>
#include <memory>
#include <regex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/utf8.h"
#include "engine/engine.h"
#include "engine/token_bound.h"
#include "engine/tokenizer.h"
#include "require.h"

namespace {

using namespace relay::engine;

constexpr size_t kMaxBytes = 8 * 1024;  // some pre-tokenisers take half a second for more
constexpr int64_t kMaxTokens = 32'768;
constexpr size_t kMaxLoaded = 24;

const std::string kSource = RELAY_FUZZ_LLAMA_CPP;

/// A vocabulary's file and the pre-tokeniser to use; empty: its own.
using Choice = std::pair<std::string, std::string>;

std::vector<Choice> choices() {
  std::set<Choice> all;
  for (const auto& entry : std::filesystem::directory_iterator(kSource + "/models")) {
    if (entry.path().extension() == ".gguf") all.emplace(entry.path().string(), "");
  }
  std::ifstream file(kSource + "/src/llama-vocab.cpp");
  const std::string source{std::istreambuf_iterator<char>(file), {}};
  const std::regex name("tokenizer_pre == *\"([^\"]+)\"");
  for (std::sregex_iterator it(source.begin(), source.end(), name), end; it != end; ++it) {
    all.emplace(kSource + "/models/ggml-vocab-gpt-2.gguf", (*it)[1]);
  }
  require(all.size() > 60 && all.size() <= 256, "the first byte picks any of them");
  return {all.begin(), all.end()};
}

struct Loaded {
  Choice choice;
  llama_model_ptr model;
  std::unique_ptr<Tokenizer> tokenizer;  // null: encoders and others that serve no chats
  std::unique_ptr<TokenBound> bound;
};

void load(Loaded& loaded) {
  llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  llama_model_params params = llama_model_default_params();
  params.vocab_only = true;
  llama_model_kv_override overrides[2] = {};
  const auto& [file, pre] = loaded.choice;
  if (!pre.empty()) {
    overrides[0].tag = LLAMA_KV_OVERRIDE_TYPE_STR;
    std::strcpy(overrides[0].key, "tokenizer.ggml.pre");
    std::strncpy(overrides[0].val_str, pre.c_str(), sizeof(overrides[0].val_str) - 1);
    params.kv_overrides = overrides;
  }
  loaded.model.reset(llama_model_load_from_file(file.c_str(), params));
  if (!loaded.model) return;  // a pre-tokeniser that wants a vocabulary of another form
  const llama_vocab* vocab = llama_model_get_vocab(loaded.model.get());
  const auto type = llama_vocab_type(vocab);
  if (type != LLAMA_VOCAB_TYPE_SPM && type != LLAMA_VOCAB_TYPE_BPE) return;
  char own[128] = "";
  llama_model_meta_val_str(loaded.model.get(), "tokenizer.ggml.pre", own, sizeof(own));
  loaded.tokenizer = std::make_unique<Tokenizer>(vocab, pre.empty() ? own : pre);
  loaded.bound = std::make_unique<TokenBound>(loaded.tokenizer->texts());
}

const Loaded& pick(uint8_t which) {
  static const std::vector<Choice> all = choices();
  static std::list<Loaded> loaded;  // the last used first
  const Choice& choice = all[which % all.size()];
  const auto it = std::find_if(loaded.begin(), loaded.end(),
                               [&](const Loaded& one) { return one.choice == choice; });
  if (it != loaded.end()) {
    loaded.splice(loaded.begin(), loaded, it);
    return loaded.front();
  }
  if (loaded.size() >= kMaxLoaded) loaded.pop_back();
  loaded.emplace_front();
  loaded.front().choice = choice;
  load(loaded.front());
  return loaded.front();
}

}  // namespace

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t most) __attribute__((weak));

/// Loading a vocabulary takes longer than a hundred texts, so most changes leave it as it is.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed) {
  if (size < 2 || most < 3) return LLVMFuzzerMutate(data, size, most);
  if (seed % 64 == 0) data[0] = static_cast<uint8_t>(seed / 64);
  return 1 + LLVMFuzzerMutate(data + 1, size - 1, most - 1);
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 3) return 0;
  const std::string piece(reinterpret_cast<const char*>(data) + 2, size - 2);
  if (!relay::is_valid_utf8(piece)) return 0;  // as what arrives in JSON is
  const size_t times = std::min(1 + size_t{data[1]}, 1 + kMaxBytes / piece.size());
  std::string text;
  for (size_t i = 0; i < times; ++i) text += piece;
  const Loaded& picked = pick(data[0]);
  if (!picked.tokenizer) return 0;
  try {
    const auto tokens = picked.tokenizer->tokenize(text, false, (data[1] & 1) != 0, kMaxTokens);
    require(picked.bound->at_least(text, INT64_MAX) <= static_cast<int64_t>(tokens.size()),
            "no fewer tokens than were foreseen");
  } catch (const EngineError& error) {
    require(error.kind() == ErrorKind::kContextLengthExceeded, "a text is refused for its length");
  }
  return 0;
}
