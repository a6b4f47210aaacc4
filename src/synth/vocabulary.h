// Real vocabularies and chat templates, taken from GGUF files of llama.cpp or from any model.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

struct gguf_context;

namespace relay::synth {

struct GgufDeleter {
  void operator()(gguf_context* context) const;
};
using GgufPtr = std::unique_ptr<gguf_context, GgufDeleter>;

struct Vocabulary {
  std::string source;           ///< the file that it came from
  std::string chat_template;    ///< Jinja; empty: none
  std::string template_source;  ///< file, or "built in" or "the vocabulary's own"
  GgufPtr keys;                 ///< all tokenizer.* keys and nothing else
  std::vector<bool> speakable;  ///< per token: ordinary text, which a model may well say
  int64_t size() const { return static_cast<int64_t>(speakable.size()); }
};

/// Folders that may hold ggml-vocab-<name>.gguf and templates/<name>.jinja, best first: the folder
/// installed beside this program, then llama.cpp's source as of this build.
std::vector<std::filesystem::path> model_folders();

/// Loads a vocabulary.
/// @param vocabulary     a name ("llama-bpe") or a GGUF file (a vocabulary or a whole model)
/// @param chat_template  a Jinja file or the name of a template; empty: the one that belongs to the
///                       vocabulary, if any
/// @param size           pads with unused tokens up to this many; 0: no padding
/// Throws std::runtime_error naming the files looked for, or saying what the file lacks.
Vocabulary load_vocabulary(const std::string& vocabulary, const std::string& chat_template,
                           int64_t size);

}  // namespace relay::synth
