#include "server/metrics.h"

#include <prometheus/histogram.h>
#include <prometheus/metric_family.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <utility>
#include <vector>

#include "base/unix_time.h"

namespace relay::server {

namespace {

using prometheus::ClientMetric;
using prometheus::MetricFamily;
using prometheus::MetricType;
using Labels = std::vector<ClientMetric::Label>;

// vLLM's bucket bounds in seconds, so that its dashboards fit.
const prometheus::Histogram::BucketBoundaries kFirstTokenBounds = {
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1,  0.25,  0.5,   0.75,
    1.0,   2.5,   5.0,  7.5,  10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0};
const prometheus::Histogram::BucketBoundaries kInterTokenBounds = {
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2,  0.3,  0.4, 0.5,
    0.75, 1.0,   2.5,  5.0,   7.5, 10.0, 20.0, 40.0, 80.0};
const prometheus::Histogram::BucketBoundaries kRequestBounds = {
    0.3,  0.5,  0.8,  1.0,  1.5,   2.0,   2.5,   5.0,   10.0,   15.0,  20.0,
    30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0};

class FamilyWriter {
 public:
  explicit FamilyWriter(Labels labels) : labels_(std::move(labels)) {}

  void gauge(const std::string& name, const std::string& help, double value, Labels extra = {}) {
    ClientMetric metric;
    metric.gauge.value = value;
    add(name, help, MetricType::Gauge, std::move(metric), std::move(extra));
  }
  void counter(const std::string& name, const std::string& help, double value, Labels extra = {}) {
    ClientMetric metric;
    metric.counter.value = value;
    add(name, help, MetricType::Counter, std::move(metric), std::move(extra));
  }
  std::vector<MetricFamily> take() { return std::move(families_); }

 private:
  void add(const std::string& name, const std::string& help, MetricType type, ClientMetric metric,
           Labels extra) {
    metric.label = labels_;
    for (ClientMetric::Label& label : extra) metric.label.push_back(std::move(label));
    if (families_.empty() || families_.back().name != name) {
      families_.push_back(MetricFamily{name, help, type, {}});
    }
    families_.back().metric.push_back(std::move(metric));
  }

  Labels labels_;
  std::vector<MetricFamily> families_;
};

/// As gateways read it that send requests where their adapter is loaded: of several they take the
/// line with the latest time.
void write_adapters(FamilyWriter& out, const engine::ModelInfo& info,
                    const engine::EngineStats& stats) {
  const auto names = [&](const std::vector<int32_t>& adapters) {
    std::string text;
    for (const int32_t adapter : adapters) {
      text += (text.empty() ? "" : ",") + info.adapters.at(static_cast<size_t>(adapter) - 1).name;
    }
    return text;
  };
  out.gauge("vllm:lora_requests_info", "Adapters of the requests, as of this time.",
            static_cast<double>(unix_now()),
            {{"max_lora", std::to_string(info.adapters.size())},
             {"running_lora_adapters", names(stats.running_adapters)},
             {"waiting_lora_adapters", names(stats.waiting_adapters)}});
}

void write_gauges(FamilyWriter& out, const engine::ModelInfo& info,
                  const engine::EngineStats& stats) {
  out.gauge("vllm:num_requests_running", "Sequences being computed.", stats.running);
  out.gauge("vllm:num_requests_waiting", "Sequences in the queue.", stats.waiting);
  out.gauge("vllm:kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.",
            stats.kv_cells_total > 0
                ? static_cast<double>(stats.kv_cells_used) / stats.kv_cells_total
                : 0);
  // Gateways multiply the two labels; cells are handed out one by one, and 16 keeps their hash
  // chains as short as with vLLM's default.
  constexpr int kBlock = 16;
  out.gauge("vllm:cache_config_info", "Size of the KV cache.", 1,
            {{"block_size", std::to_string(kBlock)},
             {"num_gpu_blocks", std::to_string(info.kv_cells / kBlock)},
             {"enable_prefix_caching", info.prefix_caching ? "True" : "False"}});
  out.gauge("relay:pinned_tokens", "Tokens of pinned prompts.", stats.pinned_tokens);
  out.gauge("relay:cached_tokens", "Tokens of unpinned prefixes kept for later requests.",
            stats.kv_cells_cached);
  out.gauge("relay:kv_bytes_used", "Bytes of KV held.", static_cast<double>(stats.kv_bytes_used));
  if (!info.adapters.empty()) write_adapters(out, info, stats);
  out.gauge("relay:active", "1 if attention runs through Relay.", info.relay_active ? 1 : 0);
}

void write_counters(FamilyWriter& out, const engine::EngineStats& stats) {
  const auto count = [&](const char* name, const char* help, int64_t value, Labels extra = {}) {
    out.counter(name, help, static_cast<double>(value), std::move(extra));
  };
  count("vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.",
        stats.prefix_queries);
  count("vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.",
        stats.prefix_hits);
  count("vllm:prompt_tokens_total", "Prompt tokens of the requests begun.", stats.prompt_tokens);
  count("vllm:generation_tokens_total", "Tokens generated.", stats.generation_tokens);
  count("vllm:num_preemptions_total", "Sequences set back to the queue to free KV.",
        stats.preemptions);
  const char* finished = "vllm:request_success_total";
  const char* finished_help = "Choices ended, by reason.";
  count(finished, finished_help, stats.finished_stop, {{"finished_reason", "stop"}});
  count(finished, finished_help, stats.finished_length, {{"finished_reason", "length"}});
  count(finished, finished_help, stats.finished_cancelled, {{"finished_reason", "abort"}});
  count(finished, finished_help, stats.finished_error, {{"finished_reason", "error"}});
  count("relay:requests_refused_total", "Requests refused by the engine.", stats.refused);
  count("relay:evicted_tokens_total", "Tokens of cached prefixes dropped to make room.",
        stats.evicted_tokens);
  count("relay:computed_prompt_tokens_total", "Prompt tokens computed.",
        stats.computed_prompt_tokens);
  count("relay:steps_total", "Steps of the engine.", stats.steps);
  out.counter("relay:compute_seconds_total", "Time spent in the model.", stats.seconds_computing);
  out.counter("relay:sampling_seconds_total", "Time spent choosing tokens.",
              stats.seconds_sampling);
}

void write_sharing(FamilyWriter& out, const engine::ModelInfo& info,
                   const engine::EngineStats& stats) {
  out.gauge("relay:shared_group_size", "Rows of the largest group sharing a prefix in this step.",
            stats.shared_group_size);
  out.gauge("relay:shared_prefix_tokens", "Length of that group's prefix.",
            stats.shared_prefix_tokens);
  out.gauge("relay:kv_bytes_unshared", "Bytes the running sequences would hold without sharing.",
            static_cast<double>(stats.kv_bytes_unshared));
  const auto count = [&](const char* name, const char* help, int64_t tokens, Labels extra = {}) {
    const int64_t bytes = tokens * info.kv_bytes_per_token;
    out.counter(name, help, static_cast<double>(bytes), std::move(extra));
  };
  const char* read = "relay:kv_bytes_read_total";
  const char* read_help = "KV bytes attention read: for a whole group at once, or one sequence.";
  count(read, read_help, stats.kv_tokens_read_shared, {{"kind", "shared"}});
  count(read, read_help, stats.kv_tokens_read_private, {{"kind", "private"}});
  count("relay:kv_bytes_saved_total", "KV bytes that reading per sequence would have added.",
        stats.kv_tokens_saved);
}

}  // namespace

struct Metrics::State {
  explicit State(const std::string& model_name)
      : labels{{"model_name", model_name}, {"engine", "0"}},
        first_token(histogram("vllm:time_to_first_token_seconds",
                              "From arrival to the first token.", kFirstTokenBounds)),
        inter_token(histogram("vllm:inter_token_latency_seconds",
                              "Between two tokens of one sequence.", kInterTokenBounds)),
        total(histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.",
                        kRequestBounds)),
        queue(
            histogram("vllm:request_queue_time_seconds", "Waiting in the queue.", kRequestBounds)),
        prefill(histogram("vllm:request_prefill_time_seconds", "Computing the prompt.",
                          kRequestBounds)),
        decode(histogram("vllm:request_decode_time_seconds", "From the first token to the last.",
                         kRequestBounds)) {}

  prometheus::Histogram& histogram(const std::string& name, const std::string& help,
                                   const prometheus::Histogram::BucketBoundaries& bounds) {
    return prometheus::BuildHistogram().Name(name).Help(help).Register(registry).Add(
        {{"model_name", labels[0].value}, {"engine", labels[1].value}}, bounds);
  }

  Labels labels;
  prometheus::Registry registry;
  prometheus::Histogram& first_token;
  prometheus::Histogram& inter_token;
  prometheus::Histogram& total;
  prometheus::Histogram& queue;
  prometheus::Histogram& prefill;
  prometheus::Histogram& decode;
};

Metrics::Metrics(const std::string& model_name) : state_(std::make_unique<State>(model_name)) {}
Metrics::~Metrics() = default;

void Metrics::on_first_token(double seconds_since_submit) {
  state_->first_token.Observe(seconds_since_submit);
}

void Metrics::on_inter_token(double seconds) { state_->inter_token.Observe(seconds); }

void Metrics::on_request_end(engine::FinishReason reason, const engine::Usage& /*usage*/,
                             const engine::RequestTimings& timings) {
  // A request that was given up says nothing about how long requests take.
  if (reason == engine::FinishReason::kCancelled || reason == engine::FinishReason::kError) return;
  state_->total.Observe(timings.total);
  state_->queue.Observe(timings.queue);
  state_->prefill.Observe(timings.prefill);
  state_->decode.Observe(timings.decode);
}

std::string Metrics::render(const engine::Engine* engine, bool sharing) const {
  std::vector<MetricFamily> families = state_->registry.Collect();
  if (engine != nullptr) {
    FamilyWriter out(state_->labels);
    const engine::EngineStats stats = engine->stats();
    write_gauges(out, engine->info(), stats);
    write_counters(out, stats);
    if (sharing) write_sharing(out, engine->info(), stats);
    for (MetricFamily& family : out.take()) families.push_back(std::move(family));
  }
  return prometheus::TextSerializer().Serialize(families);
}

}  // namespace relay::server
