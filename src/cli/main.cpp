// The program `relay`: picks the subcommand, turns exceptions into messages and exit codes.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "cli/commands.h"

namespace {

/// llama.cpp's short names of two and three letters, which CLI11 would read as -n p. Rewritten for
/// `relay serve` alone: elsewhere they mean nothing.
std::vector<std::string> arguments(int argc, char** argv) {
  const std::map<std::string, std::string> long_names = {{"-np", "--parallel"},
                                                         {"-ub", "--ubatch-size"},
                                                         {"-ctk", "--cache-type-k"},
                                                         {"-ctv", "--cache-type-v"}};
  std::vector<std::string> result(argv + 1, argv + argc);
  if (result.empty() || result.front() != "serve") return result;
  for (std::string& argument : result) {
    const auto found = long_names.find(argument);
    if (found != long_names.end()) argument = found->second;
  }
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Relay: attention over shared prompts, stored once, read once per batch, exact",
               "relay"};
  app.set_version_flag("--version", "relay " RELAY_VERSION);
  app.require_subcommand(1);
  app.failure_message([](const CLI::App* failed, const CLI::Error& error) {
    return "relay: error: " + std::string(error.what()) + "\nSee: " + failed->get_display_name() +
           " --help\n";
  });

  try {
#ifdef RELAY_CLI_SERVE
    relay::cli::add_serve(app);
#endif
#ifdef RELAY_CLI_SYNTH
    relay::cli::add_synth(app);
#endif
#ifdef RELAY_CLI_BENCH_OP
    CLI::App* bench = app.add_subcommand("bench", "Measures parts of Relay on this machine");
    bench->require_subcommand(1);
    relay::cli::add_bench_op(*bench);
#endif
#ifdef RELAY_CLI_ISA
    relay::cli::add_isa(app);
#endif
    std::vector<std::string> args = arguments(argc, argv);
    std::reverse(args.begin(), args.end());  // as CLI11 wants them
    app.parse(std::move(args));
  } catch (const CLI::ParseError& error) {
    return app.exit(error);  // also --help and --version, with exit code 0
  } catch (const std::exception& error) {
    std::fprintf(stderr, "relay: error: %s\n", error.what());
    return 1;
  }
  return 0;
}
