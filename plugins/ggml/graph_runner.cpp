#include "graph_runner.h"

#include <cstdio>
#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <string>
#include <utility>

#include "statistics.h"

namespace relay::ggml {
namespace {

// Slots beyond what graphs use are given back after so many graphs.
constexpr int kGraphsUntilForgotten = 256;

using OpParams = char[sizeof(ggml_tensor::op_params)];

// The parameters of a custom operation that calls `function(…, userdata)` on all threads. Their
// layout is ggml's secret, so ggml makes them.
void custom_op_params(ggml_custom_op_t function, void* userdata, OpParams& params) {
  ggml_context* const context =
      ggml_init({.mem_size = ggml_tensor_overhead(), .mem_buffer = nullptr, .no_alloc = true});
  if (context == nullptr) throw std::bad_alloc();
  const ggml_tensor* const node = ggml_custom_4d(context, GGML_TYPE_F32, 1, 1, 1, 1, nullptr, 0,
                                                 function, GGML_N_TASKS_MAX, userdata);
  std::memcpy(params, node->op_params, sizeof(params));
  ggml_free(context);
}

}  // namespace

// One attention node of the current graph.
struct GraphRunner::Job {
  GraphRunner* runner = nullptr;
  ggml_tensor* node = nullptr;
  Verdict verdict = Verdict::kServed;
  FlashAttention attention;
  PlanGroup* group = nullptr;
  std::vector<float> slopes;
  bool swapped = false;
  OpParams own_params;     // of the node, while it is swapped
  OpParams custom_params;  // that lead to this job; made once
};

GraphRunner::GraphRunner() : sharing_(sharing_from_env()) {}
GraphRunner::~GraphRunner() = default;

ggml_status GraphRunner::run(ggml_backend_t backend, ggml_cgraph* graph, Compute compute) noexcept {
  const Clock::time_point start = Clock::now();
  jobs_used_ = groups_used_ = slots_used_ = 0;
  bool attention = false;
  try {
    const std::vector<AttentionNode>& nodes = scan_.scan(graph);
    attention = !nodes.empty();
    if (attention) prepare(nodes);
  } catch (const std::exception& error) {  // out of memory
    restore();
    std::fprintf(stderr, "relay: this graph is left to ggml: %s\n", error.what());
  }
  const ggml_status status = compute(backend, graph);
  restore();
  if (attention) Statistics::instance().count_graph(Clock::now() - start);
  return status;
}

void GraphRunner::prepare(const std::vector<AttentionNode>& nodes) {
  for (const AttentionNode& found : nodes) read(found);
  plan_groups();
  for (size_t i = 0; i < jobs_used_; ++i) {
    Job& job = *jobs_[i];
    Statistics::instance().count_node(*job.node, job.verdict);
    if (job.verdict == Verdict::kServed) swap_in(job);
  }
  forget_idle_slots();
}

// Makes the node's job, and puts it into its group.
void GraphRunner::read(const AttentionNode& found) {
  if (jobs_used_ == jobs_.size()) {
    auto job = std::make_unique<Job>();
    job->runner = this;
    custom_op_params(&GraphRunner::run_job, job.get(), job->custom_params);
    jobs_.push_back(std::move(job));
  }
  const size_t index = jobs_used_++;
  Job& job = *jobs_[index];
  job.node = found.node;
  job.swapped = false;
  job.group = nullptr;
  job.verdict = reference_wanted_      ? Verdict::kReferenceWanted
                : found.mask_rewritten ? Verdict::kMaskRewritten
                                       : read_flash_attention(*found.node, job.attention);
  if (job.verdict != Verdict::kServed) return;
  job.attention.key.mask_version = found.mask_version;
  if (job.attention.max_bias > 0.0f) {
    alibi_slopes(job.attention.max_bias, job.attention.key.shape.q_heads, job.slopes);
    job.attention.inputs.slopes = job.slopes.data();
  }
  job.group = &group_of(job.attention.key, index);
}

PlanGroup& GraphRunner::group_of(const PlanKey& key, size_t node) {
  for (size_t i = 0; i < groups_used_; ++i) {
    if (groups_[i]->key() == key) {
      groups_[i]->extend_to(node);
      return *groups_[i];
    }
  }
  if (groups_used_ == groups_.size()) groups_.push_back(std::make_unique<PlanGroup>());
  PlanGroup& group = *groups_[groups_used_++];
  group.reset(key, node);
  return group;
}

void GraphRunner::plan_groups() {
  for (size_t i = 0; i < groups_used_; ++i) {
    PlanGroup& group = *groups_[i];
    std::string refusal;  // of the whole group
    try {
      group.plan(slot_for(group), sharing_, threads());
    } catch (const Error& error) {
      refusal = error.what();
    }
    for (size_t n = group.first(); n <= group.last(); ++n) {
      Job& job = *jobs_[n];
      if (job.group != &group) continue;
      try {
        if (!refusal.empty()) throw Error(refusal);
        group.slot().check(job.attention.inputs);
      } catch (const Error& error) {
        job.verdict = Verdict::kRefused;
        Statistics::instance().refused(*job.node, error.what());
      }
    }
  }
}

// Every plan has a slot of its own while the graph runs. Only plans for computed masks, of which
// there may be one for each layer, are made one after another and take turns.
PlanSlot& GraphRunner::slot_for(const PlanGroup& group) {
  constexpr size_t kWholeGraph = std::numeric_limits<size_t>::max();
  const size_t busy_until = group.mask_is_computed() ? group.last() : kWholeGraph;
  if (group.mask_is_computed()) {
    for (size_t i = 0; i < slots_used_; ++i) {
      if (slots_[i].busy_until < group.first()) {
        slots_[i].busy_until = busy_until;
        return *slots_[i].slot;
      }
    }
  }
  if (slots_used_ == slots_.size()) slots_.push_back({std::make_unique<PlanSlot>(), 0});
  slots_[slots_used_].busy_until = busy_until;
  return *slots_[slots_used_++].slot;
}

void GraphRunner::swap_in(Job& job) {
  std::memcpy(job.own_params, job.node->op_params, sizeof(job.own_params));
  std::memcpy(job.node->op_params, job.custom_params, sizeof(job.custom_params));
  job.node->op = GGML_OP_CUSTOM;
  job.swapped = true;
}

void GraphRunner::restore() noexcept {
  for (size_t i = 0; i < jobs_used_; ++i) {
    Job& job = *jobs_[i];
    if (!job.swapped) continue;
    job.node->op = GGML_OP_FLASH_ATTN_EXT;
    std::memcpy(job.node->op_params, job.own_params, sizeof(job.own_params));
    job.swapped = false;
  }
}

void GraphRunner::forget_idle_slots() {
  graphs_with_idle_slots_ = slots_used_ < slots_.size() ? graphs_with_idle_slots_ + 1 : 0;
  if (graphs_with_idle_slots_ < kGraphsUntilForgotten) return;
  slots_.resize(slots_used_);
  graphs_with_idle_slots_ = 0;
}

// The number of threads to plan for. A wrong guess costs balance in one graph, not correctness.
int32_t GraphRunner::threads() const {
  if (threads_seen_ > 0 && threads_seen_for_ == threads_wanted_) return threads_seen_;
  return threads_wanted_ > 0 ? threads_wanted_ : GGML_DEFAULT_N_THREADS;
}

void GraphRunner::run_job(ggml_tensor* /*dst*/, int ith, int nth, void* userdata) noexcept {
  const Job& job = *static_cast<const Job*>(userdata);
  try {
    job.group->attend(job.attention.inputs, ith, nth);
  } catch (const std::exception& error) {
    // Only a computed mask can lead here, and only for want of memory; ggml's own operations abort
    // in that case too, and there is no way back from inside a running graph.
    GGML_ABORT("relay: %s", error.what());
  }
  if (ith == 0) {
    job.runner->threads_seen_ = nth;
    job.runner->threads_seen_for_ = job.runner->threads_wanted_;
  }
}

}  // namespace relay::ggml
