// relay isa: which kernel sets this CPU can run, and which one is in use.
#include <cstdio>

#include "cli/commands.h"
#include "relay/attention.h"

namespace relay::cli {

void add_isa(CLI::App& app) {
  CLI::App* isa = app.add_subcommand(
      "isa", "Prints the kernel sets this CPU can run, best first; * marks the one in use");
  isa->footer("RELAY_ISA=<name> chooses another.");
  isa->callback([] {
    const std::string current = current_isa();
    for (const std::string& name : available_isas()) {
      std::printf("%c %s\n", name == current ? '*' : ' ', name.c_str());
    }
  });
}

}  // namespace relay::cli
