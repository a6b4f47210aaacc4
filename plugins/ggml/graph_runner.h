// Computes a graph with its attention served by Relay.
//
// Each GGML_OP_FLASH_ATTN_EXT that Relay serves is turned, in place and for the time of the
// computation, into a GGML_OP_CUSTOM with the same sources and the same result. The graph then runs
// in ggml's CPU backend as ever: Relay works on ggml's own threads, between ggml's own barriers,
// and everything else (matrix products, repacked weights, fusion, abort callbacks) is not touched.
#pragma once

#include <ggml-backend.h>
#include <ggml.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "flash_attention.h"
#include "graph_scan.h"
#include "plan_group.h"

namespace relay::ggml {

/// State of one backend; used by one thread at a time, as the backend itself.
class GraphRunner {
 public:
  using Compute = ggml_status (*)(ggml_backend_t, ggml_cgraph*);

  GraphRunner();
  ~GraphRunner();

  /// Computes `graph` on `backend` by its own `compute`. No exception leaves.
  ggml_status run(ggml_backend_t backend, ggml_cgraph* graph, Compute compute) noexcept;

  /// What the host told the backend.
  void set_threads(int threads) { threads_wanted_ = threads; }
  void set_reference(bool on) { reference_wanted_ = on; }

 private:
  struct Job;
  struct Slot {
    std::unique_ptr<PlanSlot> slot;
    size_t busy_until;  // the last node of the current graph that needs it
  };

  void prepare(const std::vector<AttentionNode>& nodes);
  void read(const AttentionNode& found);
  PlanGroup& group_of(const PlanKey& key, size_t node);
  void plan_groups();
  PlanSlot& slot_for(const PlanGroup& group);
  void swap_in(Job& job);
  void restore() noexcept;
  void forget_idle_slots();
  int32_t threads() const;
  static void run_job(ggml_tensor* dst, int ith, int nth, void* job) noexcept;

  const Sharing sharing_;
  GraphScan scan_;
  // Pools that keep their objects; the first `*_used_` belong to the current graph.
  std::vector<std::unique_ptr<Job>> jobs_;
  std::vector<std::unique_ptr<PlanGroup>> groups_;
  std::vector<Slot> slots_;
  size_t jobs_used_ = 0;
  size_t groups_used_ = 0;
  size_t slots_used_ = 0;
  int graphs_with_idle_slots_ = 0;

  int threads_wanted_ = 0;    // 0: the host never said
  int threads_seen_ = 0;      // what ggml ran the last attention node with, and ...
  int threads_seen_for_ = 0;  // ... what the host had wanted then
  bool reference_wanted_ = false;
};

}  // namespace relay::ggml
