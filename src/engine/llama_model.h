// libllama behind the Model interface: one model, one context with one unified KV cache.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "engine/engine.h"
#include "engine/kv_state.h"
#include "engine/model.h"
#include "engine/tokenizer.h"

struct llama_adapter_lora;
struct llama_context;
struct llama_model;
struct llama_vocab;

namespace relay::engine {

class LlamaModel : public Model, public Vocabulary {
 public:
  /// Backends must be loaded. Checks that this model's KV can be shared by position, which also
  /// warms it up. Throws EngineError (kModel, kInvalidRequest).
  static std::unique_ptr<LlamaModel> load(const EngineOptions& options, bool relay_active,
                                          const ProgressFn& progress);
  ~LlamaModel() override;
  LlamaModel(const LlamaModel&) = delete;
  LlamaModel& operator=(const LlamaModel&) = delete;

  int32_t cells() const override { return info_.kv_cells; }
  /// Most rows of one decode().
  int32_t max_rows() const { return max_rows_; }
  int32_t max_sequences() const override { return max_sequences_; }
  int32_t max_logits() const override { return max_logits_; }
  int32_t vocab_size() const override { return info_.vocab_size; }
  DecodeStatus decode(const Batch& batch) override;
  std::span<const float> logits(int32_t row) override;
  void share(SeqId from, SeqId to, int32_t begin, int32_t end) override;
  void remove(SeqId seq, int32_t begin, int32_t end) override;
  std::vector<uint8_t> save(SeqId seq, int32_t begin, int32_t end, SeqId unused) override;
  bool restore(SeqId seq, int32_t begin, std::span<const uint8_t> kv, SeqId unused) override;

  /// How KV is saved. Throws EngineError (kModel) if this model's cannot be.
  const KvLayout& kv_layout() const;
  /// 64 hex digits that differ where saved KV means something else: another model, adapter, KV type
  /// or version. Files are known by their size, their time of change and samples of their contents.
  std::string kv_key(int32_t adapter) const;
  /// Fills in ModelInfo::identities, from all files that the options name.
  void identify(const EngineOptions& options);

  std::string piece(Token token, bool special) const override;
  bool is_end(Token token) const override;

  /// Throws EngineError (kContextLengthExceeded) for a text that can have no fewer tokens than the
  /// context has room for, or is too long for this vocabulary's pre-tokeniser.
  std::vector<Token> tokenize(const std::string& text, bool add_special, bool parse_special) const;
  const TokenTexts& token_texts() const { return tokenizer_->texts(); }
  std::string detokenize(const std::vector<Token>& tokens, bool special) const;
  /// Tokens that a generation must not choose: those the model suppresses, and with `ends` those
  /// that end one.
  std::vector<Token> excluded_tokens(bool ends) const;

  /// Cells that llama.cpp itself holds, worked out from the size of its saved state. Slow; for
  /// tests of KvMemory's counts.
  int32_t count_cells() const;

  ModelInfo& info() { return info_; }
  const ModelInfo& info() const { return info_; }
  llama_model* model() const { return model_; }
  llama_context* context() const { return context_; }
  const llama_vocab* vocab() const { return vocab_; }

 private:
  LlamaModel() = default;
  void open(const EngineOptions& options, const ProgressFn& progress);
  void load_adapters(const std::vector<Adapter>& adapters);
  void create_context(const EngineOptions& options, bool relay_active);
  void self_check();
  void try_adapters();
  void use_adapter(int32_t adapter);
  void learn_kv_layout();
  std::vector<uint8_t> sequence_state(SeqId seq);
  std::vector<std::string> files() const;
  void load_kv_prefix(const std::string& path);

  ModelInfo info_;
  llama_model* model_ = nullptr;
  llama_context* context_ = nullptr;
  const llama_vocab* vocab_ = nullptr;
  std::vector<llama_adapter_lora*> adapters_;  // the model's
  int32_t adapter_ = 0;                        // the context computes with
  int32_t max_sequences_ = 0;
  int32_t max_logits_ = 0;
  int32_t max_rows_ = 0;
  // A sliding-window cache reuses cells that lie outside the window and belong to one sequence
  // only, and would so take apart prefixes that are kept. There, each sequence is two of
  // llama.cpp's, s and s + shadow_; 0: no window.
  int32_t shadow_ = 0;
  // A learned KV prefix belongs to every sequence for good, at the first positions; what the engine
  // calls position 0 comes after it.
  int32_t prefix_ = 0;
  // How the saved state grows (self_check finds out); it names the owners of every cell.
  std::optional<KvLayout> kv_layout_;
  std::string no_kv_layout_;    // why there is none
  size_t state_fixed_ = 0;      // bytes however many cells (at least one)
  size_t state_per_cell_ = 0;   // for each cell, without its owners
  size_t state_per_owner_ = 0;  // for each owner of a cell
  struct BatchBuffers;
  std::unique_ptr<BatchBuffers> buffers_;
  std::unique_ptr<Tokenizer> tokenizer_;
};

}  // namespace relay::engine
