// The session boundary of the engine: everything above it (HTTP server, command line, tests) speaks
// in prompts, tokens and text, and never sees a tensor, a KV cell or a type of llama.cpp.
//
// Threads. One thread of the engine owns the model context, the KV cells and the prefix tree. Every
// public function may be called from any other thread: it works on immutable data (tokenizer, chat
// template), reads a snapshot, or queues a message. Functions that wait for the engine thread
// (pin_prompt, unpin, drain, stop) say so and must not be called from a Sink or an Observer.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace relay::engine {

using Token = int32_t;
using RequestId = uint64_t;

/// Why something was refused or failed; the comment names the HTTP answer it is meant for.
enum class ErrorKind {
  kInvalidRequest,         ///< a parameter is out of range or of no use (400)
  kContextLengthExceeded,  ///< prompt + max_tokens beyond the context (400)
  kInvalidGrammar,         ///< a grammar or JSON schema that does not compile (400)
  kInvalidTemplate,        ///< the chat template cannot render these messages (400)
  kQueueFull,              ///< try again later (429)
  kShuttingDown,           ///< draining or stopped (503)
  kPinBudgetExceeded,      ///< pinned prompts would pass their share of the cache (409)
  kNotFound,               ///< no such pinned prompt (404)
  kModel,                  ///< the model cannot be loaded or is of a kind not supported
  kBackend,                ///< the Relay backend module cannot be loaded
  kInternal,               ///< the engine failed on a request (500)
};

/// The name OpenAI-style error bodies use as `code`, e.g. "context_length_exceeded".
const char* to_string(ErrorKind kind);

/// Thrown by load() and by the functions that say so. what() is meant for people.
class EngineError : public std::runtime_error {
 public:
  EngineError(ErrorKind kind, const std::string& what, std::string param = {})
      : std::runtime_error(what), kind_(kind), param_(std::move(param)) {}
  ErrorKind kind() const { return kind_; }
  /// The field to blame, by its name here ("json_schema", "tools[0].function.parameters"); may be
  /// empty.
  const std::string& param() const { return param_; }

 private:
  ErrorKind kind_;
  std::string param_;
};

/// A LoRA adapter. Requests choose one by its place in a list: adapter i is the i-th, counted from
/// 1, and adapter 0 is the base model.
struct Adapter {
  std::string name;  ///< its public name
  std::string path;  ///< a GGUF file
};

struct EngineOptions {
  std::string model_path;          ///< a GGUF file
  std::string model_alias;         ///< the model's public name; empty: the file's stem
  std::vector<Adapter> adapters;   ///< loaded beside the model
  std::string kv_prefix;           ///< a file of learned KV (kv_prefix.h) before every sequence
  std::string chat_template_file;  ///< a Jinja template to use instead of the model's; empty: none
  std::string template_kwargs_json;  ///< object: what every chat template is given, unless the chat
                                     ///< itself says otherwise; empty: nothing
  int32_t kv_cells = 0;              ///< token positions the KV cache holds; 0: the model's context
  int32_t max_context = 0;           ///< tokens of one request; 0: min(model's context, kv_cells)
  int32_t batch_tokens = 2048;       ///< most rows (decode + prefill) of one step
  int32_t ubatch_tokens = 512;       ///< most rows computed at once
  int32_t parallel = 64;             ///< most sequences that run at once (1 to 256)
  int32_t threads = 0;               ///< 0: the physical cores
  std::string cache_type_k = "f16";  ///< f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0
  std::string cache_type_v = "f16";
  bool relay = true;             ///< attention by the Relay backend module; false: llama.cpp's own
  std::string relay_module;      ///< path of libggml-relay.so; empty: beside the program or ../lib
  int32_t max_queue = 256;       ///< sequences that may wait; more are refused with kQueueFull
  double pin_budget = 0.2;       ///< share of kv_cells that pinned prompts may hold (0 to 1)
  bool prefix_caching = true;    ///< false: nothing is shared or kept (the ablation)
  bool mmap = true;              ///< map the model file instead of reading it
  std::string prompt_cache_dir;  ///< folder where pinned and often shared prefixes outlive the
                                 ///< process; empty: none
  uint64_t prompt_cache_bytes = uint64_t{8} << 30;  ///< of all files there; the oldest go first
  /// Told what goes wrong beside the requests, for people, from any thread; empty: standard error.
  std::function<void(const std::string&)> notice;
  double step_seconds = 1.0;  ///< a step with prompts takes about so long at most; 0: whole batches
  /// While requests decode, as much of a long prompt goes into a step as makes it so many times as
  /// long as without (step_pacer.h says what short ones may). 0: each step may take step_seconds.
  double decode_stretch = 1.75;
};

/// Called with a share done (0 to 1) and what is being done ("loading model", "warming up", …),
/// from the thread that called load() or pin_prompt(), or one that it waits for.
using ProgressFn = std::function<void(double fraction, const std::string& what)>;

/// What was loaded; constant for the engine's life.
struct ModelInfo {
  std::string name;               ///< the alias
  std::string path;               ///< the GGUF file
  std::vector<Adapter> adapters;  ///< as in EngineOptions
  /// By adapter: 64 hex digits that differ where the same request may be answered otherwise, for
  /// its weights, KV types, learned prefix, template or llama.cpp are others; not with the names.
  std::vector<std::string> identities;
  std::string description;     ///< architecture, size and weight type, as llama.cpp prints it
  std::string chat_template;   ///< the template in use (Jinja source)
  int64_t created = 0;         ///< Unix seconds of the load
  int64_t size_bytes = 0;      ///< of all weights
  int64_t parameters = 0;      ///< number of weights
  int32_t context_length = 0;  ///< most tokens of one request, prompt and completion together
  int32_t train_context = 0;   ///< the context the model was trained for
  int32_t vocab_size = 0;
  int32_t kv_cells = 0;            ///< token positions of the KV cache
  int32_t kv_prefix = 0;           ///< positions of the learned prefix beside them
  int64_t kv_bytes_per_token = 0;  ///< KV bytes of one position over all layers
  int32_t parallel = 0;            ///< most sequences that run at once
  int32_t max_queue = 0;           ///< most that wait, as in EngineOptions
  bool prefix_caching = true;      ///< as in EngineOptions
  bool relay_active = false;       ///< attention runs through Relay
  std::string backend;             ///< a line for people: which devices and modules are in use
};

/// How the completion must look beyond its tokens' probabilities: the grammar a chat template asks
/// for (tool calls), and how to read the finished text back. Made by render_chat(); opaque.
struct OutputFormat;
using OutputFormatPtr = std::shared_ptr<const OutputFormat>;

/// A chat in OpenAI's form. JSON travels as text so that this header needs no JSON library.
struct ChatRequest {
  std::string messages_json;         ///< array of messages
  std::string tools_json;            ///< array of tools; empty: none
  std::string tool_choice = "auto";  ///< auto, none, required
  bool parallel_tool_calls = true;   ///< more than one tool call in one answer allowed
  std::string json_schema;           ///< the answer must match it; empty: free text
  std::string grammar;               ///< GBNF; not together with json_schema or tools
  std::string template_kwargs_json;  ///< object: chat_template_kwargs; empty: none
  std::string reasoning_effort;      ///< handed to the template as `reasoning_effort`; may be empty
  bool add_generation_prompt = true;    ///< end with the header of the assistant's turn
  bool continue_final_message = false;  ///< the last message (assistant's) is to be continued
};

struct ChatPrompt {
  std::string text;
  std::vector<Token> tokens;
  std::vector<std::string> stop;  ///< stop strings the template asks for; add to the request's
  OutputFormatPtr format;         ///< hand to GenerateRequest::format and to parse_message()
};

struct ToolCall {
  std::string id;
  std::string name;
  std::string arguments;  ///< JSON text
  bool operator==(const ToolCall&) const = default;
};

struct ChatMessage {
  std::string content;
  std::string reasoning;  ///< OpenAI's reasoning_content
  std::vector<ToolCall> tool_calls;
  bool operator==(const ChatMessage&) const = default;
};

/// What changed between two readings of a growing text (streaming). At most one member is set, or
/// tool_call_index >= 0 with what is new of that call: id and name come once, arguments in pieces.
struct ChatDelta {
  std::string content;
  std::string reasoning;
  int32_t tool_call_index = -1;
  ToolCall tool_call;
};

struct SamplingParams {
  float temperature = 1.0f;  ///< 0: greedy, the most probable token each time
  float top_p = 1.0f;
  int32_t top_k = 0;  ///< 0 or less: all
  float min_p = 0.0f;
  float presence_penalty = 0.0f;    ///< -2 to 2
  float frequency_penalty = 0.0f;   ///< -2 to 2
  float repetition_penalty = 1.0f;  ///< > 0; 1: none
  std::optional<uint32_t> seed;     ///< none: a random one. Choice i uses seed + i.
  std::vector<std::pair<Token, float>> logit_bias;
  bool ignore_eos = false;
  int32_t logprobs =
      -1;  ///< -1: none; 0: of the token taken; k: and of the k most probable (<= 20)
};

struct GenerateRequest {
  std::vector<Token> prompt;  ///< at least one token
  int32_t max_tokens = -1;    ///< of each choice; -1: as many as the context has room for; 0: the
                              ///< prompt alone is computed
  SamplingParams sampling;
  std::vector<std::string> stop;  ///< generation ends before any of these; none may be empty
  std::string grammar;            ///< GBNF; empty: none
  std::string json_schema;        ///< JSON schema text; empty: none. Not together with grammar.
  OutputFormatPtr format;         ///< of render_chat(); its grammar yields to the two above
  /// The prompt's own log probabilities, too; needs sampling.logprobs >= 0. Then nothing of the
  /// prompt is taken from the cache: their logits are nowhere but in its computation.
  bool prompt_logprobs = false;
  int32_t n = 1;           ///< choices; they share the prompt
  int32_t adapter = 0;     ///< to be computed with; see Adapter. KV is shared within one alone
  std::string cache_salt;  ///< only requests with equal salts share KV (pinned: all)
  std::string pin_salt;    ///< what is pinned for this salt may be shared, too; empty: none is
  int32_t priority = 0;    ///< lower is served earlier; equal ones in order of arrival
};

struct TokenLogprob {
  Token token = -1;
  std::string bytes;     ///< the token's text; may be part of a UTF-8 character
  float logprob = 0.0f;  ///< natural log, of the model's own distribution at temperature 1; NaN
                         ///< for a prompt's first token, which follows nothing
};

struct GeneratedToken {
  TokenLogprob self;              ///< logprob is 0 unless SamplingParams::logprobs >= 0
  std::vector<TokenLogprob> top;  ///< most probable first
};

/// Tokens of a whole request. cached + written <= prompt; completion over all choices.
struct Usage {
  int32_t prompt_tokens = 0;
  int32_t completion_tokens = 0;
  int32_t cached_tokens = 0;       ///< of the prompt, taken from the cache
  int32_t cache_write_tokens = 0;  ///< of the prompt, computed and left in the cache
};

/// One step's output of one choice.
struct TokensDelta {
  std::string text;  ///< valid UTF-8; may lag behind the tokens (a partial character, the possible
                     ///< start of a stop string) and then be empty. Never contains a stop string.
  std::vector<GeneratedToken> tokens;  ///< end-of-text tokens are counted, but listed only where
                                       ///< GenerateRequest::prompt_logprobs asks for every row
  std::vector<GeneratedToken> prompt;  ///< with prompt_logprobs, before `tokens`: the prompt's, in
                                       ///< order and in pieces as they are computed
  Usage usage;                         ///< of the request so far
};

enum class FinishReason { kStop, kLength, kCancelled, kError };
/// "stop", "length", "abort", "error".
const char* to_string(FinishReason reason);

/// Seconds. queue + prefill + decode = total of the request.
struct RequestTimings {
  double queue = 0;                ///< from submit to the first row computed
  double prefill = 0;              ///< from there to the first token
  double decode = 0;               ///< from the first token to the last
  double time_to_first_token = 0;  ///< from submit
  double total = 0;
};

/// Receives the output of one request. Called from the engine thread, between two steps of *every*
/// running request: it must return at once (hand the data to another thread's queue), must not
/// throw, and must not call functions of Engine other than cancel(). Order: any number of
/// on_tokens, one on_choice_finish per choice, then exactly one on_done; or at any time exactly one
/// on_error. Nothing follows on_done or on_error, and the engine lets go of the sink.
class Sink {
 public:
  virtual ~Sink() = default;
  virtual void on_tokens(int32_t choice, TokensDelta delta) = 0;
  /// stop_string: the one that ended it; empty for an end-of-text token or another reason.
  virtual void on_choice_finish(int32_t choice, FinishReason reason,
                                const std::string& stop_string) = 0;
  virtual void on_done(const Usage& usage, const RequestTimings& timings) = 0;
  virtual void on_error(ErrorKind kind, const std::string& message) = 0;
};

/// Receives durations as they are known, for histograms. From the engine thread; same rules.
class Observer {
 public:
  virtual ~Observer() = default;
  virtual void on_first_token(double /*seconds_since_submit*/) {}
  virtual void on_inter_token(double /*seconds*/) {}
  virtual void on_request_end(FinishReason /*reason*/, const Usage&, const RequestTimings&) {}
};

struct Refusal {
  ErrorKind kind = ErrorKind::kInvalidRequest;
  std::string message;
  std::string param;                ///< as EngineError::param()
  int32_t retry_after_seconds = 0;  ///< set for kQueueFull: when a place is likely
};

using SubmitResult = std::variant<RequestId, Refusal>;

struct PinRequest {
  std::string name;
  std::vector<Token> tokens;  ///< of render_chat_prefix() or tokenize()
  std::string cache_salt;     ///< empty: all requests may share it; else those whose cache_salt or
                              ///< pin_salt this is
  int64_t ttl_seconds = 0;    ///< 0: until unpinned
  int32_t adapter = 0;        ///< as in GenerateRequest
};

struct PinnedPrompt {
  std::string id;  ///< "cp_" + 24 hex digits
  std::string name;
  std::string sha256;  ///< of the tokens as little-endian int32, hex
  int32_t tokens = 0;
  int64_t bytes = 0;       ///< KV bytes of these tokens
  int64_t created = 0;     ///< Unix seconds
  int64_t expires_at = 0;  ///< Unix seconds; 0: never
  int32_t adapter = 0;     ///< as in GenerateRequest
  std::string cache_salt;
};

/// A snapshot. Gauges are as of the last step; counters only grow.
struct EngineStats {
  // gauges
  int32_t running = 0;  ///< sequences that hold KV cells of their own
  int32_t waiting = 0;  ///< sequences in the queue
  int32_t kv_cells_total = 0;
  int32_t kv_cells_used = 0;         ///< private + cached + pinned; equals what llama.cpp holds
  int32_t kv_cells_cached = 0;       ///< of these: held by the prefix tree and not pinned
  int32_t pinned_tokens = 0;         ///< of these: pinned
  int64_t kv_bytes_used = 0;         ///< kv_cells_used in bytes
  int64_t kv_bytes_unshared = 0;     ///< what the running sequences would hold without sharing
  int32_t shared_group_size = 0;     ///< decode rows of the largest group that shares a prefix
  int32_t shared_prefix_tokens = 0;  ///< length of that prefix
  double request_seconds = 0;        ///< from admission to the end, lately; 0: none has ended yet
  std::vector<int32_t> running_adapters;  ///< those of running sequences, each once; not the base
  std::vector<int32_t> waiting_adapters;  ///< the same of waiting ones
  // counters
  int64_t steps = 0;
  int64_t prefix_queries = 0;          ///< prompt tokens looked up
  int64_t prefix_hits = 0;             ///< prompt tokens found
  int64_t prompt_tokens = 0;           ///< of the requests that began
  int64_t computed_prompt_tokens = 0;  ///< prefill rows computed (recomputation included)
  int64_t generation_tokens = 0;
  int64_t finished_stop = 0;  ///< choices, as the three below
  int64_t finished_length = 0;
  int64_t finished_cancelled = 0;
  int64_t finished_error = 0;
  int64_t preemptions = 0;
  int64_t evicted_tokens = 0;   ///< of cached prefixes, to make room
  int64_t restored_tokens = 0;  ///< of prefixes, from the prompt cache at start-up
  int64_t refused = 0;
  int64_t kv_tokens_read_shared = 0;   ///< KV positions read for shared prefixes, once per group
  int64_t kv_tokens_read_private = 0;  ///< KV positions read for one sequence alone
  int64_t kv_tokens_saved = 0;  ///< positions a read per row would have added; x kv_bytes_per_token
  double seconds_computing = 0;  ///< spent in the model
  double seconds_sampling = 0;
  double seconds_restoring = 0;
};

/// A run of tokens in the prefix tree whose KV exists once; parents come before their children.
struct PrefixNode {
  int32_t parent = -1;  ///< index; -1: begins prompts
  int32_t tokens = 0;
  int32_t running = 0;  ///< sequences that share it now
  bool pinned = false;
  int64_t hits = 0;     ///< sequences that found it in the cache so far
  int32_t adapter = 0;  ///< as in GenerateRequest
};

class Engine {
 public:
  /// Loads the backend modules and the model, allocates the KV cache, warms up and starts the
  /// engine thread. Waits until it is ready. Throws EngineError (kModel, kBackend,
  /// kInvalidRequest).
  static std::unique_ptr<Engine> load(const EngineOptions& options,
                                      const ProgressFn& progress = {});

  /// stop() with what is in flight cancelled.
  virtual ~Engine() = default;

  virtual const ModelInfo& info() const = 0;

  /// add_special: put the model's begin-of-text token in front, as its vocabulary asks.
  /// parse_special: read control tokens written out ("<|im_start|>") as such.
  virtual std::vector<Token> tokenize(const std::string& text, bool add_special,
                                      bool parse_special) const = 0;
  /// special: write control tokens out. Throws EngineError (kInvalidRequest) for an id that is no
  /// token of the vocabulary.
  virtual std::string detokenize(const std::vector<Token>& tokens, bool special) const = 0;

  /// Throws EngineError (kInvalidRequest, kInvalidTemplate, kInvalidGrammar).
  virtual ChatPrompt render_chat(const ChatRequest& chat) const = 0;
  /// The tokens with which every chat that begins with these messages and tools begins: what to
  /// pin for a system prompt. Same errors.
  virtual std::vector<Token> render_chat_prefix(const ChatRequest& chat) const = 0;
  /// Reads generated text back as a message. is_partial: more text will come; incomplete tool calls
  /// are then returned as far as they go. Throws EngineError (kInternal) if a finished text does
  /// not parse.
  virtual ChatMessage parse_message(const OutputFormatPtr& format, const std::string& text,
                                    bool is_partial) const = 0;
  /// The steps from one reading of a growing text to the next.
  virtual std::vector<ChatDelta> diff_messages(const ChatMessage& before,
                                               const ChatMessage& after) const = 0;

  /// Checks and queues a request. The sink is called only if an id is returned. Grammars are
  /// compiled here, on the caller's thread.
  virtual SubmitResult submit(GenerateRequest request, std::shared_ptr<Sink> sink) = 0;
  /// What submit() would say (kQueueFull) to a request of one choice that comes after `ahead`
  /// others, and counted as if it had; nothing if there is room. To be asked before a prompt is
  /// rendered and tokenised for nothing.
  virtual std::optional<Refusal> refuse_if_full(int32_t ahead) = 0;
  /// The request ends within one step with FinishReason::kCancelled for its open choices, then
  /// on_done. Unknown or finished ids are ignored. Callable from anywhere.
  virtual void cancel(RequestId id) = 0;

  /// Computes the tokens' KV and keeps it until unpinned. Waits for the engine thread; progress is
  /// called on the caller's thread. A prompt pinned before is returned as it is, with name and ttl
  /// renewed. Throws EngineError (kPinBudgetExceeded, kInvalidRequest, kShuttingDown, kInternal).
  virtual PinnedPrompt pin_prompt(const PinRequest& request, const ProgressFn& progress = {}) = 0;
  virtual std::vector<PinnedPrompt> pinned_prompts() const = 0;
  /// ttl_seconds counts from now; 0: until unpinned. Throws EngineError (kNotFound).
  virtual PinnedPrompt set_pin_ttl(const std::string& id, int64_t ttl_seconds) = 0;
  /// Its KV stays as an ordinary cached prefix. Throws EngineError (kNotFound).
  virtual void unpin(const std::string& id) = 0;

  virtual EngineStats stats() const = 0;
  /// The prefix tree as of now. Waits for the engine thread. Throws EngineError (kShuttingDown).
  virtual std::vector<PrefixNode> prefix_nodes() const = 0;
  /// nullptr takes it away. Set it before the first submit, or while nothing runs.
  virtual void set_observer(std::shared_ptr<Observer> observer) = 0;

  /// Refuses new requests from now on (kShuttingDown) and waits until those accepted are done or
  /// the time is over. Returns whether all are done.
  virtual bool drain(std::chrono::milliseconds timeout) = 0;
  /// Cancels what is in flight, then ends the engine thread. Idempotent.
  virtual void stop() = 0;
};

}  // namespace relay::engine
