// Prometheus metrics. Gateways and dashboards know vLLM's names, so those are used where the thing
// is the same; Relay's own begin with "relay:".
#pragma once

#include <memory>
#include <string>

#include "engine/engine.h"

namespace relay::server {

/// The histograms are fed by the engine thread; the rest is read from EngineStats at each scrape.
class Metrics : public engine::Observer {
 public:
  explicit Metrics(const std::string& model_name);
  ~Metrics() override;

  void on_first_token(double seconds_since_submit) override;
  void on_inter_token(double seconds) override;
  void on_request_end(engine::FinishReason reason, const engine::Usage& usage,
                      const engine::RequestTimings& timings) override;

  /// The text exposition format. `engine` may be null: loading. `sharing`: with what tells how many
  /// requests share a prefix, which is nobody's business who might learn by it what others ask.
  std::string render(const engine::Engine* engine, bool sharing) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace relay::server
