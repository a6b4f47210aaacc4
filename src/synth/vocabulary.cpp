#include "synth/vocabulary.h"

#include <ggml.h>
#include <gguf.h>

#include <array>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <system_error>

namespace relay::synth {
namespace {

namespace fs = std::filesystem;

constexpr char kTokens[] = "tokenizer.ggml.tokens";
constexpr char kTypes[] = "tokenizer.ggml.token_type";
constexpr char kScores[] = "tokenizer.ggml.scores";
constexpr char kTemplate[] = "tokenizer.chat_template";

// Token types of GGUF, as llama.h numbers them.
constexpr int32_t kNormal = 1;
constexpr int32_t kUnused = 5;

// The prompt formats of models for which llama.cpp has no template file.
constexpr char kLlama2Template[] =
    R"({%- set system = '' -%}
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = '<<SYS>>\n' + messages[0]['content'] | trim + '\n<</SYS>>\n\n' -%}
  {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {{- bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + message['content'] | trim + ' ' + eos_token -}}
  {%- endif -%}
{%- endfor -%})";
constexpr char kPhi2Template[] =
    R"({%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {{- message['content'] | trim + '\n' -}}
  {%- elif message['role'] == 'user' -%}
    {{- 'Instruct: ' + message['content'] | trim + '\n' -}}
  {%- else -%}
    {{- 'Output: ' + message['content'] | trim + '\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Output:' -}}{%- endif -%})";

struct NamedText {
  std::string_view name;
  std::string_view text;
};
constexpr std::array<NamedText, 2> kBuiltInTemplates = {
    {{"llama-2", kLlama2Template}, {"phi-2", kPhi2Template}}};

// Vocabularies that carry no template of their own, or one without a system message.
constexpr std::array<NamedText, 4> kTemplateOf = {
    {{"llama-bpe", "meta-llama-Llama-3.2-3B-Instruct"},
     {"phi-3", "microsoft-Phi-3.5-mini-instruct"},
     {"llama-spm", "llama-2"},
     {"gpt-2", "phi-2"}}};

std::string read_text(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(file), {}};
  if (!file) {
    throw std::runtime_error("cannot read " + path.string());
  }
  return text;
}

// Looks for `file` in the model folders; throws with all places looked at.
fs::path find_in_folders(const std::string& what, const std::string& file) {
  std::string looked;
  for (const fs::path& folder : model_folders()) {
    const fs::path path = folder / file;
    std::error_code ignored;
    if (fs::exists(path, ignored)) {
      return path;
    }
    looked += "\n  " + path.string();
  }
  throw std::runtime_error(what + " was not found; looked for:" + looked +
                           "\nName the file itself instead.");
}

bool is_file(const std::string& name) {
  std::error_code ignored;
  return fs::is_regular_file(name, ignored);
}

// Leaves only the tokenizer's keys.
void keep_tokenizer_keys(gguf_context* keys) {
  std::vector<std::string> others;
  for (int64_t i = 0; i < gguf_get_n_kv(keys); ++i) {
    const std::string key = gguf_get_key(keys, i);
    if (!key.starts_with("tokenizer.")) {
      others.push_back(key);
    }
  }
  for (const std::string& key : others) {
    gguf_remove_key(keys, key.c_str());
  }
}

std::vector<int32_t> token_types(const gguf_context* keys, size_t count) {
  const int64_t id = gguf_find_key(keys, kTypes);
  if (id < 0) {
    return std::vector<int32_t>(count, kNormal);
  }
  if (gguf_get_arr_type(keys, id) != GGUF_TYPE_INT32 || gguf_get_arr_n(keys, id) != count) {
    throw std::runtime_error(std::string(kTypes) + " does not fit " + kTokens);
  }
  const auto* types = static_cast<const int32_t*>(gguf_get_arr_data(keys, id));
  return {types, types + count};
}

// Appends unused tokens until there are `size`.
void pad_tokens(gguf_context* keys, size_t count, size_t size) {
  const int64_t id = gguf_find_key(keys, kTokens);
  std::vector<std::string> tokens;
  tokens.reserve(size);
  for (size_t i = 0; i < count; ++i) {
    tokens.emplace_back(gguf_get_arr_str(keys, id, i));
  }
  std::vector<int32_t> types = token_types(keys, count);
  for (size_t i = count; i < size; ++i) {
    tokens.push_back("[PAD" + std::to_string(i) + "]");
    types.push_back(kUnused);
  }
  const int64_t scores_id = gguf_find_key(keys, kScores);
  if (scores_id >= 0) {
    const auto* data = static_cast<const float*>(gguf_get_arr_data(keys, scores_id));
    std::vector<float> scores(data, data + count);
    scores.resize(size, -1000.0f);
    gguf_set_arr_data(keys, kScores, GGUF_TYPE_FLOAT32, scores.data(), size);
  }
  std::vector<const char*> pointers;
  pointers.reserve(size);
  for (const std::string& token : tokens) {
    pointers.push_back(token.c_str());
  }
  gguf_set_arr_str(keys, kTokens, pointers.data(), size);
  gguf_set_arr_data(keys, kTypes, GGUF_TYPE_INT32, types.data(), size);
}

// Ordinary text: no control, byte or unused tokens, and none that has a special meaning.
std::vector<bool> find_speakable(const gguf_context* keys, size_t count) {
  const std::vector<int32_t> types = token_types(keys, count);
  std::vector<bool> speakable(count);
  for (size_t i = 0; i < count; ++i) {
    speakable[i] = types[i] == kNormal;
  }
  for (int64_t i = 0; i < gguf_get_n_kv(keys); ++i) {
    const std::string_view key = gguf_get_key(keys, i);
    if (key.ends_with("_token_id") && gguf_get_kv_type(keys, i) == GGUF_TYPE_UINT32) {
      const uint32_t token = gguf_get_val_u32(keys, i);
      if (token < count) {
        speakable[token] = false;
      }
    }
  }
  return speakable;
}

void set_template(Vocabulary& vocabulary, const std::string& name) {
  for (const NamedText& built_in : kBuiltInTemplates) {
    if (built_in.name == name) {
      vocabulary.chat_template = built_in.text;
      vocabulary.template_source = name + " (built in)";
      return;
    }
  }
  const fs::path path = is_file(name) ? fs::path(name)
                                      : find_in_folders("the chat template '" + name + "'",
                                                        "templates/" + name + ".jinja");
  vocabulary.chat_template = read_text(path);
  vocabulary.template_source = path.string();
}

}  // namespace

void GgufDeleter::operator()(gguf_context* context) const { gguf_free(context); }

std::vector<fs::path> model_folders() {
  std::vector<fs::path> folders;
  std::error_code error;
  const fs::path program = fs::read_symlink("/proc/self/exe", error);
  if (!error) {
    folders.push_back((program.parent_path() / RELAY_INSTALLED_MODELS).lexically_normal());
  }
  folders.emplace_back(RELAY_LLAMA_CPP_MODELS);
  return folders;
}

Vocabulary load_vocabulary(const std::string& name, const std::string& chat_template,
                           int64_t size) {
  Vocabulary vocabulary;
  const fs::path path = is_file(name) ? fs::path(name)
                                      : find_in_folders("the vocabulary '" + name + "'",
                                                        "ggml-vocab-" + name + ".gguf");
  vocabulary.source = path.string();
  vocabulary.keys.reset(
      gguf_init_from_file(path.c_str(), gguf_init_params{.no_alloc = true, .ctx = nullptr}));
  gguf_context* keys = vocabulary.keys.get();
  if (keys == nullptr) {
    throw std::runtime_error(path.string() + " is no GGUF file");
  }
  keep_tokenizer_keys(keys);
  const int64_t tokens = gguf_find_key(keys, kTokens);
  if (tokens < 0 || gguf_get_kv_type(keys, tokens) != GGUF_TYPE_ARRAY ||
      gguf_get_arr_type(keys, tokens) != GGUF_TYPE_STRING || gguf_get_arr_n(keys, tokens) == 0) {
    throw std::runtime_error(path.string() + " holds no vocabulary (" + kTokens + ")");
  }
  size_t count = gguf_get_arr_n(keys, tokens);
  if (size > 0 && static_cast<size_t>(size) > count) {
    pad_tokens(keys, count, static_cast<size_t>(size));
    count = static_cast<size_t>(size);
  }
  vocabulary.speakable = find_speakable(keys, count);

  if (!chat_template.empty()) {
    set_template(vocabulary, chat_template);
  } else {
    for (const NamedText& entry : kTemplateOf) {
      if (entry.name == name) {
        set_template(vocabulary, std::string(entry.text));
      }
    }
  }
  const int64_t own = gguf_find_key(keys, kTemplate);
  if (!vocabulary.chat_template.empty()) {
    gguf_set_val_str(keys, kTemplate, vocabulary.chat_template.c_str());
  } else if (own >= 0) {
    vocabulary.chat_template = gguf_get_val_str(keys, own);
    vocabulary.template_source = "the vocabulary's own";
  } else {
    vocabulary.template_source = "none";
  }
  return vocabulary;
}

}  // namespace relay::synth
