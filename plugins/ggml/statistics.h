// What the module did in this process: counts for the log, for tests and for docs.
#pragma once

#include <ggml.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <set>
#include <string>

#include "flash_attention.h"
#include "never_destroyed.h"

namespace relay::ggml {

using Clock = std::chrono::steady_clock;

/// Counters of the whole process; every method may be called from any thread.
class Statistics {
 public:
  /// One node of one computed graph. With RELAY_VERBOSE=1 each kind of node is named once.
  void count_node(const ggml_tensor& node, Verdict verdict);
  /// What the core said about a node that it refused; printed once for each text.
  void refused(const ggml_tensor& node, const char* message);

  void count_graph(Clock::duration total);
  /// Time spent finding the sharing of one mask and planning for it.
  void count_planning(Clock::duration spent);

  bool verbose() const { return verbose_; }
  int64_t nodes(Verdict verdict) const { return nodes_[static_cast<size_t>(verdict)]; }
  int64_t plans() const { return plans_; }

  /// The summary of RELAY_VERBOSE=1 and the file of RELAY_STATS_FILE; called once, at the end.
  void report();

  static Statistics& instance();

 private:
  friend class NeverDestroyed<Statistics>;  // a host may free its backends very late

  Statistics();
  std::string json() const;
  /// True the first time that `text` is seen; bounded.
  bool first_time(const std::string& text);

  bool verbose_ = false;
  std::array<std::atomic<int64_t>, static_cast<size_t>(Verdict::kCount)> nodes_{};
  std::atomic<int64_t> graphs_{0};
  std::atomic<int64_t> plans_{0};
  std::atomic<int64_t> graph_ns_{0};
  std::atomic<int64_t> planning_ns_{0};
  std::mutex mutex_;  // guards `seen_`
  std::set<std::string> seen_;
};

}  // namespace relay::ggml
