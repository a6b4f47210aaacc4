// The program `relay`: picks the subcommand, turns exceptions into messages and exit codes.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>

#include "cli/commands.h"

int main(int argc, char** argv) {
  CLI::App app{"Relay: attention over shared prompts, stored once, read once per batch, exact"};
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
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);  // also --help and --version, with exit code 0
  } catch (const std::exception& error) {
    std::fprintf(stderr, "relay: error: %s\n", error.what());
    return 1;
  }
  return 0;
}
