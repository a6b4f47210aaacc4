// A vocabulary in the order of falling probability, without sorting it: only the neighbourhood of
// the places that are asked for is sorted. Sampling needs two such places (where the nucleus ends,
// and the token drawn), and sorting 128k tokens for them takes longer than many a model's step.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "engine/model.h"

namespace relay::engine {

/// The weight of a token is e^((its logit - the largest) / temperature), so that of the first is 1.
/// Equal logits stand in the order of their ids; NaN counts as minus infinity. A "mass" is a sum of
/// weights. Made to be used again: assign() allocates nothing the second time.
class Ranking {
 public:
  /// `top`: the largest logit, finite. The logits must live as long as the questions below. Tokens
  /// whose logit is below `least` are left out.
  void assign(std::span<const float> logits, float top, float temperature,
              float least = -std::numeric_limits<float>::infinity());

  /// Of all tokens.
  double mass() const { return mass_; }
  /// Of the first `count` tokens.
  double mass_of(size_t count);
  /// Of the shortest beginning that has at least this mass.
  double mass_through(double mass) { return find(mass).running; }
  /// Of the tokens whose weight is at least `weight` (0 to 1).
  double mass_down_to(float weight);
  /// The token at which the running mass reaches `mass`.
  Token at(double mass) { return find(mass).token; }

 private:
  struct Place {
    Token token = -1;
    double running = 0.0;  ///< mass up to and with it
  };
  Place find(double mass);
  /// Makes opened_ the tokens of one bin, in order, without those of no weight.
  void open(size_t which);

  // Bins are equal steps of logit, the likeliest tokens in the first.
  static constexpr size_t kBins = 4096;
  static int32_t bin_of(float capped_depth);

  // The tokens taken in, in the order of their ids, are numbered from 0: these are their indices.
  Token token(size_t index) const { return all_ ? static_cast<Token>(index) : tokens_[index]; }
  float logit(size_t index) const { return logits_[static_cast<size_t>(token(index))]; }

  std::span<const float> logits_;
  std::vector<Token> tokens_;  // unless all_
  bool all_ = true;
  float top_ = 0.0f;
  float temperature_ = 1.0f;
  double mass_ = 0.0;
  std::vector<float> weight_;     // by index
  std::vector<int32_t> bin_;      // by index
  std::vector<double> masses_;    // by bin
  std::vector<uint32_t> counts_;  // by bin; only for mass_of()
  std::vector<uint32_t> opened_;  // indices
};

}  // namespace relay::engine
