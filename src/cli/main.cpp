// The program `relay`: picks the subcommand, turns exceptions into messages and exit codes.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <exception>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cli/commands.h"
#include "cli/help.h"

namespace {

/// llama.cpp's short names of two and three letters, which CLI11 would read as -n p. Rewritten for
/// serve and batch alone: elsewhere they mean nothing.
std::vector<std::string> arguments(int argc, char** argv) {
  const std::map<std::string, std::string> long_names = {{"-np", "--parallel"},
                                                         {"-ub", "--ubatch-size"},
                                                         {"-ctk", "--cache-type-k"},
                                                         {"-ctv", "--cache-type-v"}};
  std::vector<std::string> result(argv + 1, argv + argc);
  if (result.empty() || (result.front() != "serve" && result.front() != "batch")) return result;
  for (std::string& argument : result) {
    const auto found = long_names.find(argument);
    if (found != long_names.end()) argument = found->second;
  }
  return result;
}

/// "relay bench op", as far as the command line was understood.
std::string command_of(const CLI::App& app) {
  std::string command = app.get_name();
  for (const CLI::App* sub : app.get_subcommands()) command += " " + command_of(*sub);
  return command;
}

std::string explain(const CLI::App& app, const CLI::ParseError& error, const std::string& first) {
  // CLI11 says that one is missing, not that this is none.
  if (app.get_subcommands().empty() && first.rfind('-', 0) != 0) {
    return "there is no subcommand '" + first + "'";
  }
  return error.what();
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Relay: attention over shared prompts, stored once, read once per batch, exact",
               "relay"};
  app.set_version_flag("--version", "relay " RELAY_VERSION);
  app.formatter(std::make_shared<relay::cli::HelpFormatter>());
  app.require_subcommand(1);
  app.footer("relay SUBCOMMAND --help says more about each.");

  try {
#ifdef RELAY_CLI_WITH_LLAMA
    relay::cli::add_serve(app);
    relay::cli::add_batch(app);
    relay::cli::add_synth(app);
#endif
    CLI::App* bench = app.add_subcommand("bench", "Measures parts of Relay on this machine");
    bench->require_subcommand(1);
    bench->footer("relay bench SUBCOMMAND --help says more about each.");
    relay::cli::add_bench_op(*bench);
    relay::cli::add_bench_trace(*bench);
    relay::cli::add_explain(app);
    relay::cli::add_isa(app);
    std::vector<std::string> args = arguments(argc, argv);
    if (args.empty()) args.emplace_back("--help");
    std::reverse(args.begin(), args.end());  // as CLI11 wants them
    app.parse(std::move(args));
  } catch (const CLI::RuntimeError& error) {
    return error.get_exit_code();
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);  // --help and --version
    std::fprintf(stderr, "relay: error: %s\nSee: %s --help\n", explain(app, error, argv[1]).c_str(),
                 command_of(app).c_str());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "relay: error: %s\n", error.what());
    return 1;
  }
  return 0;
}
