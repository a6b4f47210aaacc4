// What samples a request: greedy, at random, or under a grammar of llama.cpp's `common`.
#pragma once

#include <memory>
#include <vector>

#include "engine/engine.h"
#include "engine/llama_model.h"
#include "engine/sampler.h"

namespace relay::engine {

/// One sampler for each choice of the request. The grammar, from whichever of grammar, json_schema
/// and format has one, is compiled here. Throws EngineError (kInvalidGrammar, kInvalidRequest).
/// Callable from any thread; the samplers are then used by the engine thread alone.
std::vector<std::unique_ptr<Sampler>> make_samplers(const LlamaModel& model,
                                                    const GenerateRequest& request);

}  // namespace relay::engine
