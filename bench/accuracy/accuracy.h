// How far attention in ggml and in Relay is from dense attention in double precision, over the KV
// as it is stored: what is measured is the arithmetic, not the quantisation of the cache.
//
// One GGML_OP_FLASH_ATTN_EXT node as llama.cpp builds it: KV [slots][kv heads][dim], one stream, an
// f16 mask. Rows decode, each over the shared slots and one slot of its own, or are the last tokens
// of a prompt (causal).
#pragma once

#include <ggml-backend.h>
#include <ggml-cpp.h>
#include <ggml.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "flash_attention.h"
#include "measure/thread_pool.h"
#include "relay/reference.h"

namespace relay::bench {

/// What the values are like.
enum class Values : uint8_t {
  kRealistic,  ///< normal; logits of standard deviation 2
  kPeaked,     ///< one key for each query has nearly all of the weight
  kFlat,       ///< nearly equal weights; V of mean 1 and standard deviation 1
};

const char* to_string(Values values);

struct AccuracyCase {
  DType kv_type = DType::kF16;
  int32_t head_dim = 128;
  int32_t kv_heads = 2;
  int32_t group = 4;  ///< query heads of each KV head
  int64_t slots = 4096;
  int64_t rows = 1;
  bool causal = false;
  Values values = Values::kRealistic;
};

/// The operator in ggml's tensors, filled, and the ways of computing it. Outputs are
/// [rows][query heads][head_dim].
class AccuracyGraph {
 public:
  /// Throws Error where the shape makes no sense, std::runtime_error where ggml fails.
  AccuracyGraph(const AccuracyCase& c, int32_t threads);

  /// GGML_OP_FLASH_ATTN_EXT in ggml's CPU backend.
  std::vector<float> ggml_flash();
  /// mul_mat, soft_max_ext, mul_mat there, as llama.cpp builds them with flash attention off;
  /// nothing for q8_0, whose V ggml cannot transpose.
  std::optional<std::vector<float>> ggml_softmax();
  /// The node of ggml_flash(), served by Relay as in the module.
  std::vector<float> relay();

  /// The same operator in Relay's terms, for the oracle.
  const HeadShape& shape() const { return attention_.key.shape; }
  const AttentionInputs& inputs() const { return attention_.inputs; }
  int64_t rows() const { return attention_.key.mask.rows_per_stream; }
  int64_t slots() const { return attention_.key.mask.columns; }

 private:
  void fill(const AccuracyCase& c);
  std::vector<float> output(ggml_cgraph* graph) const;

  int32_t threads_;
  ggml_backend_ptr backend_;
  ggml_context_ptr context_;
  ggml_backend_buffer_ptr buffer_;
  ggml_tensor* q_;  ///< [rows][heads][dim], and so on: in the order of memory
  ggml_tensor* k_;
  ggml_tensor* v_;
  ggml_tensor* mask_;
  ggml_cgraph* flash_;
  ggml_cgraph* softmax_ = nullptr;
  ggml::FlashAttention attention_;
};

/// Of an output, relative to the root mean square of the exact one.
struct OutputError {
  double rms = 0;
  double max = 0;
};

/// The exact output of some rows.
struct ExactRows {
  std::vector<int64_t> rows;
  std::vector<double> out;  ///< [rows][query heads][head_dim]

  OutputError error_of(std::span<const float> output) const;
};

/// Every slot; what a row does not see its mask hides.
std::vector<AttendedSlot> all_slots(const AccuracyGraph& graph);
/// Exact output of at most `limit` rows, spread evenly.
ExactRows exact_rows(const AccuracyGraph& graph, int64_t limit, measure::ThreadPool& pool);

struct AccuracyResult {
  AccuracyCase problem;
  OutputError ggml_flash;
  std::optional<OutputError> ggml_softmax;
  OutputError relay;
};

AccuracyResult measure_accuracy(const AccuracyCase& c, measure::ThreadPool& pool);

struct AccuracyReport {
  std::string isa;
  int32_t threads = 0;
  std::vector<AccuracyResult> results;
};

std::string to_table(const AccuracyReport& report);
std::string to_json(const AccuracyReport& report);

}  // namespace relay::bench
