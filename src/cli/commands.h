// The subcommands of `relay`: one file each, <name>.cpp. serve, batch and synth are there in a
// program with llama.cpp (RELAY_BUILD_LLAMA).
//
// add_<name> registers the subcommand's options and its callback on `app`. A callback that fails
// throws: any std::exception prints "relay: error: <what>" and exits with 1,
// CLI::RuntimeError(code) exits with that code and prints nothing.
#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>

namespace relay::cli {

/// Checks of counts. (CLI11's own name a bound of 300 digits in their message.)
inline const CLI::Range kPositive{1, INT32_MAX};
inline const CLI::Range kNotNegative{0, INT32_MAX};

void add_serve(CLI::App& app);     ///< relay serve: the OpenAI-compatible server
void add_batch(CLI::App& app);     ///< relay batch: files in OpenAI's batch format
void add_synth(CLI::App& app);     ///< relay synth: GGUF models with random weights
void add_bench_op(CLI::App& app);  ///< relay bench op: `app` is the subcommand "bench"
/// relay bench trace: what a trace shares, on paper; `app` is "bench"
void add_bench_trace(CLI::App& app);
void add_explain(CLI::App& app);  ///< relay explain: what sharing a prompt saves here
void add_isa(CLI::App& app);      ///< relay isa: the kernels of this CPU and GPU

}  // namespace relay::cli
