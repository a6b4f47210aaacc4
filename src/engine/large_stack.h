// Where llama.cpp recurses as deep as what a client sent is long (its pre-tokenisers match with
// std::regex, its converters walk schemas): such work runs on a thread with a stack that is large
// enough for whatever passes the checks of size before it. An overrun cannot be caught, so there
// must be none.
#pragma once

#include <cstddef>
#include <functional>
#include <optional>
#include <type_traits>
#include <utility>

namespace relay::engine {

/// Of address space; memory is taken as far down as the stack is used, and given back.
inline constexpr size_t kLargeStackBytes = size_t{1} << 30;

/// Runs `work` on such a thread, waits for it, and passes its exception on. On such a thread
/// already it just runs. Returns the bytes of stack that were used (whole pages; 0 where it just
/// ran).
size_t run_on_large_stack(const std::function<void()>& work);

template <typename Work>
auto on_large_stack(Work&& work) {
  using Result = std::invoke_result_t<Work>;
  if constexpr (std::is_void_v<Result>) {
    run_on_large_stack(std::forward<Work>(work));
  } else {
    std::optional<Result> result;
    run_on_large_stack([&] { result.emplace(work()); });
    return std::move(*result);
  }
}

}  // namespace relay::engine
