// Fields of ours that requests of other APIs may have, too; checked as those of a chat completion.
#pragma once

#include <array>

namespace relay::server {

inline constexpr std::array kExtensions = {"cache_salt", "ignore_eos",         "logit_bias",
                                           "min_p",      "repetition_penalty", "seed"};

}  // namespace relay::server
