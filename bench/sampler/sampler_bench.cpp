// What choosing one token costs, by llama.cpp's chain of samplers and by RandomSampler, and how
// often both choose the same from the same seed. (Where they differ, llama.cpp's sum of the sorted
// probabilities, in floats, has drifted to a neighbour in rank.)
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "engine/random_sampler.h"
#include "llama.h"

namespace {

using relay::engine::RandomSampler;
using relay::engine::SamplingParams;
using relay::engine::Token;
using Clock = std::chrono::steady_clock;

class LlamaChain {
 public:
  LlamaChain(const SamplingParams& s, uint32_t seed, int32_t vocabulary) {
    llama_sampler_chain_params params = llama_sampler_chain_default_params();
    params.no_perf = true;
    chain_ = llama_sampler_chain_init(params);
    const bool penalties = s.frequency_penalty != 0.0f;
    for (llama_sampler* link :
         {llama_sampler_init_penalties(vocabulary, penalties ? vocabulary : 0, 1.0f,
                                       s.frequency_penalty, 0.0f),
          llama_sampler_init_temp_ext(s.temperature, 0.0f, 1.0f), llama_sampler_init_top_k(s.top_k),
          llama_sampler_init_top_p(s.top_p, 0), llama_sampler_init_min_p(s.min_p, 0),
          llama_sampler_init_dist(seed)}) {
      llama_sampler_chain_add(chain_, link);
    }
  }
  ~LlamaChain() { llama_sampler_free(chain_); }
  LlamaChain(const LlamaChain&) = delete;
  LlamaChain& operator=(const LlamaChain&) = delete;

  Token choose(const std::vector<float>& logits) {
    data_.resize(logits.size());
    for (size_t i = 0; i < logits.size(); ++i) data_[i] = {static_cast<Token>(i), logits[i], 0.0f};
    llama_token_data_array array = {data_.data(), data_.size(), -1, false};
    llama_sampler_apply(chain_, &array);
    return array.data[array.selected].id;
  }
  void accept(Token token) { llama_sampler_accept(chain_, token); }

 private:
  llama_sampler* chain_;
  std::vector<llama_token_data> data_;
};

double milliseconds_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

void compare(const char* name, const SamplingParams& params, float deviation, size_t vocabulary) {
  constexpr int kDraws = 60;
  constexpr uint32_t kSeed = 5;
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> logits(vocabulary);
  LlamaChain theirs(params, kSeed, static_cast<int32_t>(vocabulary));
  RandomSampler ours(params, kSeed, {}, {});
  double their_time = 0;
  double our_time = 0;
  int same = 0;
  for (int i = 0; i < kDraws; ++i) {
    for (float& l : logits) l = normal(random);
    Clock::time_point begin = Clock::now();
    const Token a = theirs.choose(logits);
    theirs.accept(a);
    their_time += milliseconds_since(begin);
    begin = Clock::now();
    const Token b = ours.choose(logits);
    ours.accept(b);
    our_time += milliseconds_since(begin);
    same += a == b ? 1 : 0;
  }
  std::printf("%-26s %9.1f %12.3f %10.3f %8.1f %7d/%d\n", name, static_cast<double>(deviation),
              their_time / kDraws, our_time / kDraws, their_time / our_time, same, kDraws);
}

}  // namespace

int main(int argc, char** argv) {
  const size_t vocabulary = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 128256;
  if (vocabulary < 2 || argc > 2) {
    std::fprintf(stderr, "usage: relay-sampler-bench [tokens of the vocabulary]\n");
    return 2;
  }
  SamplingParams plain;
  SamplingParams nucleus;
  nucleus.top_p = 0.9f;
  SamplingParams frequency = nucleus;
  frequency.frequency_penalty = 0.5f;
  SamplingParams cool;
  cool.temperature = 0.6f;
  cool.top_p = 0.95f;
  SamplingParams few = cool;
  few.top_k = 20;
  SamplingParams min_p;
  min_p.min_p = 0.05f;

  std::printf("normal logits of a vocabulary of %zu tokens; milliseconds a token\n", vocabulary);
  std::printf("%-26s %9s %12s %10s %8s %10s\n", "sampling", "deviation", "llama.cpp", "Relay",
              "ratio", "same token");
  for (const float deviation : {1.0f, 2.5f, 4.0f}) {
    compare("temperature 1", plain, deviation, vocabulary);
    compare("top_p 0.9", nucleus, deviation, vocabulary);
    compare("top_p 0.9, frequency 0.5", frequency, deviation, vocabulary);
    compare("temperature 0.6, top_p 0.95", cool, deviation, vocabulary);
    compare("... and top_k 20", few, deviation, vocabulary);
    compare("min_p 0.05", min_p, deviation, vocabulary);
  }
  return 0;
}
