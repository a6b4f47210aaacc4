// One chain of tokens being continued: a choice of a request, or a prompt being pinned.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "engine/model.h"
#include "engine/prefix_tree.h"
#include "engine/sampler.h"
#include "engine/text_stream.h"

namespace relay::engine {

struct Request;

struct Sequence {
  // what is asked
  uint64_t arrival = 0;  ///< order among all sequences; also its identity
  int32_t priority = 0;
  Request* request = nullptr;  ///< the core's business; the scheduler never looks at it
  int32_t choice = 0;
  Scope scope;
  int32_t prompt_length = 0;
  int32_t max_tokens = 0;      ///< generate at most so many
  bool generates = true;       ///< false: only the KV of its tokens is wanted (pinning)
  bool scores_prompt = false;  ///< the prompt's log probabilities are wanted, too
  std::unique_ptr<Sampler> sampler;
  TextStream text;

  // where it stands
  std::vector<Token> tokens;  ///< prompt and generated
  int32_t computed = 0;       ///< so many of them have their KV in the cache
  SeqId kv = -1;              ///< while it runs
  bool began = false;         ///< was admitted at least once
  int32_t cached = 0;         ///< prompt tokens found in the cache when it began
  int32_t uncached = 0;       ///< rows it had to compute when it was last admitted
  int32_t preemptions = 0;
  int32_t overtaken = 0;  ///< admissions of later ones while it waited
  int32_t scored = 0;     ///< scores_prompt: so many prompt tokens have theirs
  uint64_t leader = 0;    ///< arrival of the sequence whose prefill it waits for; 0: none
  std::chrono::steady_clock::time_point last_token_at{};

  int32_t length() const { return static_cast<int32_t>(tokens.size()); }
  int32_t generated() const { return length() - prompt_length; }
  /// Rows still to compute until its next token; 1 when it is decoding.
  int32_t pending() const { return length() - computed; }
  bool running() const { return kv >= 0; }
  std::span<const Token> all() const { return tokens; }
  /// Whether the row of the token at `position` says how likely a prompt token is that has no score
  /// yet.
  bool scores(int32_t position) const {
    return scores_prompt && position + 1 >= scored && position + 1 < prompt_length;
  }
  bool scoring() const { return scores_prompt && scored < prompt_length; }
  /// What may come from the cache: not the rows whose logits are needed, which is at least the last
  /// one. Pinning needs none.
  int32_t match_limit() const {
    if (!generates) return length();
    return scores_prompt ? std::max(scored - 1, 0) : length() - 1;
  }
};

/// Who is served first.
inline bool before(const Sequence& a, const Sequence& b) {
  return a.priority != b.priority ? a.priority < b.priority : a.arrival < b.arrival;
}

}  // namespace relay::engine
