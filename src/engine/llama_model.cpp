#include "engine/llama_model.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>

#include "base/unix_time.h"
#include "build-info.h"
#include "common.h"
#include "engine/backend.h"
#include "engine/kv_prefix.h"
#include "engine/lora_file.h"
#include "engine/sha256.h"
#include "llama.h"

namespace relay::engine {

namespace fs = std::filesystem;

namespace {

ggml_type cache_type(const std::string& name) {
  static const std::map<std::string, ggml_type> kTypes = {
      {"f32", GGML_TYPE_F32},   {"f16", GGML_TYPE_F16},   {"bf16", GGML_TYPE_BF16},
      {"q8_0", GGML_TYPE_Q8_0}, {"q5_1", GGML_TYPE_Q5_1}, {"q5_0", GGML_TYPE_Q5_0},
      {"q4_1", GGML_TYPE_Q4_1}, {"q4_0", GGML_TYPE_Q4_0}};
  const auto it = kTypes.find(name);
  if (it == kTypes.end()) {
    throw EngineError(ErrorKind::kInvalidRequest,
                      "Unknown KV cache type '" + name +
                          "'; one of f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0.");
  }
  return it->second;
}

void check(const EngineOptions& o) {
  const auto require = [](bool ok, const std::string& message) {
    if (!ok) throw EngineError(ErrorKind::kInvalidRequest, message);
  };
  require(o.parallel >= 1 && o.parallel <= kMaxSequences,
          "parallel must be 1 to " + std::to_string(kMaxSequences) + ".");
  require(o.batch_tokens >= o.parallel, "batch_tokens must be at least parallel.");
  require(o.ubatch_tokens >= 1 && o.ubatch_tokens <= o.batch_tokens,
          "ubatch_tokens must be 1 to batch_tokens.");
  require(o.kv_cells >= 0 && o.max_context >= 0, "kv_cells and max_context must not be negative.");
  require(o.max_queue >= 0, "max_queue must not be negative.");
  require(o.pin_budget >= 0 && o.pin_budget <= 1, "pin_budget must be 0 to 1.");
  require(o.step_seconds >= 0, "step_seconds must not be negative.");
  require(o.decode_stretch == 0 || o.decode_stretch > 1,
          "decode_stretch must be above 1, or 0 for no such limit.");
  require(o.threads >= 0, "threads must not be negative.");
}

// Size and samples of a file. To read all of it would take as long as computing the prompts that
// are kept.
void append_contents(const std::string& path, std::string& text) {
  constexpr uint64_t kSample = 64 << 10;
  constexpr uint64_t kSamples = 64;
  std::error_code error;
  const uint64_t size = fs::file_size(path, error);
  std::ifstream file(path, std::ios::binary);
  if (error || !file) {
    throw EngineError(ErrorKind::kModel, path + " cannot be read.");
  }
  text += std::to_string(size) + '\n';
  const uint64_t last = size > kSample ? size - kSample : 0;
  std::string sample(kSample, '\0');
  for (uint64_t i = 0; i < kSamples && i * kSample < size; ++i) {
    file.seekg(static_cast<std::streamoff>(std::max(i * kSample, last * i / (kSamples - 1))));
    file.read(sample.data(), static_cast<std::streamsize>(kSample));
    text.append(sample, 0, static_cast<size_t>(file.gcount()));
    file.clear();
  }
}

// The same, and when it was last changed.
void append_identity(const std::string& path, std::string& text) {
  append_contents(path, text);
  text += std::to_string(fs::last_write_time(path).time_since_epoch().count()) + '\n';
}

}  // namespace

// The arrays llama_batch points into.
struct LlamaModel::BatchBuffers {
  std::vector<int32_t> n_seq_id;
  std::vector<std::array<llama_seq_id, 2>> ids;
  std::vector<llama_seq_id*> seq_id;
  std::vector<int8_t> logits;
  std::vector<llama_token> token;
  std::vector<llama_pos> position;
};

std::unique_ptr<LlamaModel> LlamaModel::load(const EngineOptions& options, bool relay_active,
                                             const ProgressFn& progress) {
  check(options);
  std::unique_ptr<LlamaModel> m(new LlamaModel());
  m->buffers_ = std::make_unique<BatchBuffers>();
  m->open(options, progress);
  m->load_adapters(options.adapters);  // before the context, which makes room for their work
  m->create_context(options, relay_active);
  if (progress) progress(1.0, "warming up");
  m->self_check();
  m->try_adapters();
  if (!options.kv_prefix.empty()) m->load_kv_prefix(options.kv_prefix);
  std::array<char, 64> pre{};
  llama_model_meta_val_str(m->model_, "tokenizer.ggml.pre", pre.data(), pre.size());
  m->tokenizer_ = std::make_unique<Tokenizer>(m->vocab_, pre.data());
  return m;
}

LlamaModel::~LlamaModel() {
  if (context_ != nullptr) llama_free(context_);
  if (model_ != nullptr) llama_model_free(model_);
}

void LlamaModel::open(const EngineOptions& options, const ProgressFn& progress) {
  const std::string& path = options.model_path;
  if (!fs::exists(path)) {
    throw EngineError(ErrorKind::kModel, "The model file " + path + " does not exist.");
  }
  llama_model_params params = llama_model_default_params();
  params.load_mode = options.mmap ? LLAMA_LOAD_MODE_AUTO : LLAMA_LOAD_MODE_NONE;
  if (progress) {
    params.progress_callback = [](float fraction, void* data) {
      (*static_cast<const ProgressFn*>(data))(fraction, "loading model");
      return true;
    };
    params.progress_callback_user_data = const_cast<ProgressFn*>(&progress);
  }
  take_llama_errors();
  model_ = llama_model_load_from_file(path.c_str(), params);
  if (model_ == nullptr) {
    throw EngineError(ErrorKind::kModel,
                      "llama.cpp could not load " + path + ".\n" + take_llama_errors());
  }
  vocab_ = llama_model_get_vocab(model_);
  const auto refuse = [&](const char* what) {
    throw EngineError(ErrorKind::kModel, path + " is " + what +
                                             ". Relay serves decoder models with attention in all "
                                             "layers, whose KV cache can be shared by prefix.");
  };
  if (llama_model_has_encoder(model_)) refuse("a model with an encoder");
  if (!llama_model_has_decoder(model_)) refuse("a model without a decoder");
  if (llama_model_is_recurrent(model_)) refuse("a recurrent model");
  if (llama_model_is_hybrid(model_)) refuse("a hybrid model with recurrent layers");
  if (llama_model_is_diffusion(model_)) refuse("a diffusion model");
  if (llama_vocab_type(vocab_) == LLAMA_VOCAB_TYPE_NONE) refuse("a model without a tokenizer");

  info_.path = path;
  info_.name = options.model_alias.empty() ? fs::path(path).stem().string() : options.model_alias;
  info_.created = unix_now();
  info_.size_bytes = static_cast<int64_t>(llama_model_size(model_));
  info_.parameters = static_cast<int64_t>(llama_model_n_params(model_));
  info_.train_context = llama_model_n_ctx_train(model_);
  info_.vocab_size = llama_vocab_n_tokens(vocab_);
  info_.parallel = options.parallel;
  std::array<char, 256> text{};
  llama_model_desc(model_, text.data(), text.size());
  info_.description = text.data();
}

void LlamaModel::load_adapters(const std::vector<Adapter>& adapters) {
  info_.adapters = adapters;
  for (const Adapter& adapter : adapters) {
    const auto refuse = [&](const std::string& why) {
      throw EngineError(ErrorKind::kModel, "The LoRA adapter " + adapter.path +
                                               " cannot be used with " + info_.path + ": " + why);
    };
    if (!fs::exists(adapter.path)) refuse("it does not exist.");
    take_llama_errors();
    try {
      check_lora_file(adapter.path, files());
    } catch (const std::runtime_error& e) {
      refuse(std::string(e.what()) + ".\n" + take_llama_errors());
    }
    adapters_.push_back(llama_adapter_lora_init(model_, adapter.path.c_str()));
    if (adapters_.back() == nullptr) refuse("llama.cpp says:\n" + take_llama_errors());
  }
}

void LlamaModel::create_context(const EngineOptions& options, bool relay_active) {
  const bool window = llama_model_n_swa(model_) > 0;
  // Some ids beside those that run, for cached and pinned prefixes. Not simply all 256: llama.cpp
  // keeps a row of logits for each.
  const int32_t most = window ? kMaxSequences / 2 : kMaxSequences;
  max_sequences_ = std::min(most, options.parallel + std::max(32, options.parallel));
  if (window && options.parallel >= max_sequences_) {
    throw EngineError(ErrorKind::kInvalidRequest,
                      "This model has sliding-window layers: parallel must be below " +
                          std::to_string(most) + ".");
  }
  shadow_ = window ? max_sequences_ : 0;
  const int32_t ids = window ? 2 * max_sequences_ : max_sequences_;
  constexpr int32_t kScored = 64;  // rows of scored prompts, whatever else runs
  max_logits_ = ids + kScored;

  llama_context_params params = llama_context_default_params();
  const int32_t cells = options.kv_cells > 0 ? options.kv_cells : info_.train_context;
  const int32_t rows = std::min(options.batch_tokens, cells);
  params.n_ctx = static_cast<uint32_t>(cells);
  params.n_batch = static_cast<uint32_t>(rows);
  params.n_ubatch = static_cast<uint32_t>(std::min(options.ubatch_tokens, rows));
  params.n_seq_max = static_cast<uint32_t>(ids);
  params.n_outputs_max = static_cast<uint32_t>(max_logits_);
  params.kv_unified = true;
  params.swa_full = true;  // else a prefix is there only as far back as the window
  params.flash_attn_type =
      relay_active ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_AUTO;
  params.type_k = cache_type(options.cache_type_k);
  params.type_v = cache_type(options.cache_type_v);
  const int32_t threads = options.threads > 0 ? options.threads : common_cpu_get_num_math();
  params.n_threads = params.n_threads_batch = threads;
  params.no_perf = true;
  take_llama_errors();
  context_ = llama_init_from_model(model_, params);
  if (context_ == nullptr) {
    throw EngineError(ErrorKind::kModel, "llama.cpp could not create a context with " +
                                             std::to_string(cells) + " KV cells.\n" +
                                             take_llama_errors());
  }
  max_rows_ = static_cast<int32_t>(llama_n_batch(context_));
  // llama.cpp rounds up to whole blocks; those cells are there to be used.
  info_.kv_cells = static_cast<int32_t>(llama_n_ctx(context_));
  const int32_t natural = std::min(info_.train_context, info_.kv_cells);
  info_.context_length =
      options.max_context > 0 ? std::min(options.max_context, info_.kv_cells) : natural;
}

void LlamaModel::self_check() {
  // Two tokens, the first shared with a second sequence, then given up by the first sequence: the
  // second must still have it. This is all the engine asks of a KV cache, and a kind of memory that
  // cannot do it shows here.
  const auto fail = [&](const std::string& what) {
    throw EngineError(ErrorKind::kModel, info_.path + ": " + what + ".\n" + take_llama_errors());
  };
  llama_memory_t memory = llama_get_memory(context_);
  if (memory == nullptr) fail("this model keeps no KV cache");
  Token token = llama_vocab_bos(vocab_);
  if (token < 0 || token >= info_.vocab_size) token = 0;
  const auto compute = [&](int32_t position) {
    Batch batch;
    batch.add(token, position, 0, true);
    if (decode(batch) != DecodeStatus::kOk) fail("llama.cpp failed to compute a token");
    return llama_state_get_size(context_);
  };
  const size_t one = compute(0);
  learn_kv_layout();
  const size_t two = compute(1);
  share(0, 1, 0, 1);
  const size_t shared = llama_state_get_size(context_);
  const size_t ids = shadow_ > 0 ? 2 : 1;  // of llama.cpp's for one of ours
  state_per_owner_ = (shared - two) / ids;
  state_per_cell_ = two - one - ids * state_per_owner_;
  state_fixed_ = one - state_per_cell_ - ids * state_per_owner_;
  remove(0, 0, 2);
  if (state_per_owner_ == 0 || llama_memory_seq_pos_max(memory, 0) != -1 ||
      llama_memory_seq_pos_min(memory, 1) != 0 || llama_memory_seq_pos_max(memory, 1) != 0 ||
      count_cells() != 1) {
    fail("the KV cache of this model cannot be shared by position");
  }
  llama_memory_clear(memory, false);
  // Beside K and V, a cell's state is its position and its number of owners, in each of the caches
  // (two with a sliding window), and for 2D positions twelve bytes more.
  const size_t caches = state_per_owner_ / sizeof(llama_seq_id);
  const llama_rope_type rope = llama_model_rope_type(model_);
  const bool positions_2d = rope == LLAMA_ROPE_TYPE_MROPE || rope == LLAMA_ROPE_TYPE_IMROPE;
  info_.kv_bytes_per_token =
      static_cast<int64_t>(state_per_cell_ - caches * (positions_2d ? 20 : 8));
}

void LlamaModel::try_adapters() {
  // Better now than with the first request: what does not fit ends the process.
  Batch batch;
  batch.add(0, 0, 0, true);
  for (size_t i = 1; i <= adapters_.size(); ++i) {
    batch.adapter = static_cast<int32_t>(i);
    const DecodeStatus status = decode(batch);
    llama_memory_clear(llama_get_memory(context_), false);
    const std::string& path = info_.adapters[i - 1].path;
    if (status != DecodeStatus::kOk) {
      throw EngineError(ErrorKind::kModel, "llama.cpp failed to compute a token with " + path +
                                               ".\n" + take_llama_errors());
    }
    const std::span<const float> row = logits(0);
    if (!std::all_of(row.begin(), row.end(), [](float x) { return std::isfinite(x); })) {
      throw EngineError(ErrorKind::kModel, "What the LoRA adapter " + path +
                                               " makes the model compute is not finite.");
    }
  }
  use_adapter(0);
}

void LlamaModel::learn_kv_layout() {
  if (shadow_ > 0) {
    no_kv_layout_ = "it has sliding-window layers, of which llama.cpp saves the window alone";
    return;
  }
  try {
    kv_layout_ = read_kv_layout(sequence_state(0));
  } catch (const std::runtime_error& e) {
    no_kv_layout_ = e.what();
  }
}

std::vector<uint8_t> LlamaModel::sequence_state(SeqId seq) {
  std::vector<uint8_t> state(llama_state_seq_get_size(context_, seq));
  state.resize(llama_state_seq_get_data(context_, state.data(), state.size(), seq));
  return state;
}

const KvLayout& LlamaModel::kv_layout() const {
  if (!kv_layout_) {
    throw EngineError(ErrorKind::kModel,
                      "The KV of " + info_.path + " cannot be saved: " + no_kv_layout_ + ".");
  }
  return *kv_layout_;
}

std::vector<std::string> LlamaModel::files() const {
  std::array<char, 16> text{};
  llama_model_meta_val_str(model_, "split.count", text.data(), text.size());
  int count = 1;  // where the file does not say
  std::from_chars(text.data(), text.data() + std::strlen(text.data()), count);
  std::array<char, 4096> prefix{};
  std::array<char, 4096> part{};
  if (count <= 1 ||
      llama_split_prefix(prefix.data(), prefix.size(), info_.path.c_str(), 0, count) <= 0) {
    return {info_.path};
  }
  std::vector<std::string> paths;
  for (int i = 0; i < count; ++i) {
    llama_split_path(part.data(), part.size(), prefix.data(), i, count);
    paths.emplace_back(part.data());
  }
  return paths;
}

std::string LlamaModel::kv_key(int32_t adapter) const {
  std::string text =
      std::string(llama_commit()) + '\n' + kv_layout().describe() + '\n' + info_.description + '\n';
  for (const std::string& path : files()) append_identity(path, text);
  if (adapter > 0) {
    text += "adapter\n";
    append_identity(info_.adapters[static_cast<size_t>(adapter) - 1].path, text);
  }
  return sha256_hex(text);
}

void LlamaModel::identify(const EngineOptions& options) {
  std::string text = std::string(llama_commit()) + '\n' + options.cache_type_k + '\n' +
                     options.cache_type_v + '\n' + options.template_kwargs_json + '\n';
  for (const std::string& path : files()) append_contents(path, text);
  for (const std::string& path : {options.kv_prefix, options.chat_template_file}) {
    if (!path.empty()) append_contents(path, text);
    text += '\n';
  }
  info_.identities = {sha256_hex(text)};
  for (const Adapter& adapter : info_.adapters) {
    text = info_.identities.front();
    append_contents(adapter.path, text);
    info_.identities.push_back(sha256_hex(text));
  }
}

std::vector<uint8_t> LlamaModel::save(SeqId seq, int32_t begin, int32_t end, SeqId unused) {
  share(seq, unused, begin, end);
  const std::vector<uint8_t> state = sequence_state(unused);
  remove(unused, begin, end);
  return take_kv(kv_layout(), state, begin, end - begin);
}

bool LlamaModel::restore(SeqId seq, int32_t begin, std::span<const uint8_t> kv, SeqId unused) {
  const std::vector<uint8_t> state = make_kv_state(kv_layout(), begin, kv);
  if (llama_state_seq_set_data(context_, state.data(), state.size(), unused) == 0) return false;
  const auto end = begin + static_cast<int32_t>(kv.size() / kv_layout().bytes_per_token());
  share(unused, seq, begin, end);
  remove(unused, begin, end);
  return true;
}

void LlamaModel::load_kv_prefix(const std::string& path) {
  const auto require = [](bool ok, const std::string& what) {
    if (!ok) throw std::runtime_error(what);
  };
  try {
    require(shadow_ == 0, "this model has sliding windows, out of which first positions fall");
    require(kv_layout_.has_value(), no_kv_layout_);
    std::array<char, 64> text{};
    llama_model_meta_val_str(model_, "general.architecture", text.data(), text.size());
    const std::string architecture = text.data();
    const bool halves = llama_model_rope_type(model_) == LLAMA_ROPE_TYPE_NEOX;
    require(halves || architecture == "llama",
            "how models of kind " + architecture +
                " order the elements of keys is not known; it is of llama and of those that rotate "
                "halves");
    const KvPrefix prefix = read_kv_prefix(path);
    const int32_t heads = llama_model_n_head_kv(model_);
    require(prefix.kv_heads == heads, "it has " + std::to_string(prefix.kv_heads) +
                                          " KV heads, and the model " + std::to_string(heads));
    const int32_t room = std::min(info_.train_context, info_.kv_cells) - prefix.positions;
    require(room > 0, "its " + std::to_string(prefix.positions) + " positions fill the context");

    const auto order = halves ? KeyOrder::kHalves : KeyOrder::kNeighbours;
    const std::vector<uint8_t> state =
        make_kv_state(*kv_layout_, 0, kv_bytes(prefix, *kv_layout_, order));
    require(llama_state_seq_set_data(context_, state.data(), state.size(), 0) != 0,
            "llama.cpp refused it: " + take_llama_errors());
    for (SeqId seq = 1; seq < max_sequences_; ++seq) share(0, seq, 0, prefix.positions);
    prefix_ = prefix.positions;
    info_.kv_prefix = prefix_;
    info_.kv_cells -= prefix_;
    info_.context_length = std::min(info_.context_length, room);
    // What is saved begins at position 0, which is the prefix's.
    kv_layout_.reset();
    no_kv_layout_ = "it has a learned prefix";
  } catch (const std::runtime_error& e) {
    throw EngineError(ErrorKind::kModel,
                      "The KV prefix " + path + " cannot be used: " + e.what() + ".");
  }
}

int32_t LlamaModel::count_cells() const {
  llama_memory_t memory = llama_get_memory(context_);
  size_t owners = 0;
  for (int32_t s = 0; s < static_cast<int32_t>(llama_n_seq_max(context_)); ++s) {
    const llama_pos last = llama_memory_seq_pos_max(memory, s);
    if (last >= 0) owners += static_cast<size_t>(last - llama_memory_seq_pos_min(memory, s) + 1);
  }
  if (owners == 0) return 0;
  const size_t bytes = llama_state_get_size(context_) - state_fixed_ - owners * state_per_owner_;
  if (bytes % state_per_cell_ != 0) {
    throw EngineError(ErrorKind::kInternal, "The size of llama.cpp's state is not understood.");
  }
  return static_cast<int32_t>(bytes / state_per_cell_) - prefix_;
}

void LlamaModel::use_adapter(int32_t adapter) {
  if (adapter == adapter_) return;
  float scale = 1.0f;  // times the file's own
  llama_adapter_lora* chosen = adapter > 0 ? adapters_[static_cast<size_t>(adapter) - 1] : nullptr;
  llama_set_adapters_lora(context_, &chosen, adapter > 0 ? 1 : 0, &scale);
  adapter_ = adapter;
}

DecodeStatus LlamaModel::decode(const Batch& batch) {
  use_adapter(batch.adapter);
  BatchBuffers& b = *buffers_;
  const auto rows = static_cast<size_t>(batch.size());
  b.n_seq_id.assign(rows, shadow_ > 0 ? 2 : 1);
  b.ids.resize(rows);
  b.seq_id.resize(rows);
  b.token.assign(batch.token.begin(), batch.token.end());
  b.position.resize(rows);
  b.logits.assign(batch.wants_logits.begin(), batch.wants_logits.end());
  for (size_t i = 0; i < rows; ++i) {
    b.position[i] = prefix_ + batch.position[i];
    b.ids[i] = {batch.seq[i], batch.seq[i] + shadow_};
    b.seq_id[i] = b.ids[i].data();
  }
  llama_batch whole{};
  whole.n_tokens = batch.size();
  whole.token = b.token.data();
  whole.pos = b.position.data();
  whole.n_seq_id = b.n_seq_id.data();
  whole.seq_id = b.seq_id.data();
  whole.logits = b.logits.data();
  const int32_t status = llama_decode(context_, whole);
  if (status == 0) return DecodeStatus::kOk;
  return status == 1 ? DecodeStatus::kNoCells : DecodeStatus::kFailed;
}

std::span<const float> LlamaModel::logits(int32_t row) {
  const float* data = llama_get_logits_ith(context_, row);
  if (data == nullptr) return {};
  return {data, static_cast<size_t>(info_.vocab_size)};
}

void LlamaModel::share(SeqId from, SeqId to, int32_t begin, int32_t end) {
  llama_memory_t memory = llama_get_memory(context_);
  begin += prefix_;
  end += prefix_;
  llama_memory_seq_cp(memory, from, to, begin, end);
  if (shadow_ > 0) llama_memory_seq_cp(memory, from, to + shadow_, begin, end);
}

void LlamaModel::remove(SeqId seq, int32_t begin, int32_t end) {
  llama_memory_t memory = llama_get_memory(context_);
  begin += prefix_;
  end = end == kToTheEnd ? -1 : end + prefix_;
  llama_memory_seq_rm(memory, seq, begin, end);
  if (shadow_ > 0) llama_memory_seq_rm(memory, seq + shadow_, begin, end);
}

std::string LlamaModel::piece(Token token, bool special) const {
  return common_token_to_piece(vocab_, token, special);
}

bool LlamaModel::is_end(Token token) const { return llama_vocab_is_eog(vocab_, token); }

std::vector<Token> LlamaModel::tokenize(const std::string& text, bool add_special,
                                        bool parse_special) const {
  return tokenizer_->tokenize(text, add_special, parse_special, info_.context_length);
}

std::string LlamaModel::detokenize(const std::vector<Token>& tokens, bool special) const {
  for (const Token t : tokens) {
    if (t < 0 || t >= info_.vocab_size) {
      throw EngineError(ErrorKind::kInvalidRequest, "Token " + std::to_string(t) +
                                                        " is not in the vocabulary of " +
                                                        std::to_string(info_.vocab_size) + ".");
    }
  }
  return common_detokenize(vocab_, tokens, special);
}

std::vector<Token> LlamaModel::excluded_tokens(bool ends) const {
  int32_t count = 0;
  const llama_token* suppressed = llama_vocab_get_suppress_tokens(vocab_, &count);
  std::vector<Token> tokens(suppressed, suppressed + count);
  for (Token t = 0; ends && t < info_.vocab_size; ++t) {
    if (llama_vocab_is_eog(vocab_, t)) tokens.push_back(t);
  }
  return tokens;
}

}  // namespace relay::engine
