// relay isa: which kernels this machine can run, of the CPU and of its GPUs.
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "cli/commands.h"
#include "cli/device.h"
#include "measure/cuda/gpu.h"
#include "measure/roofline.h"
#include "relay/attention.h"

namespace relay::cli {
namespace {

void print_cpu() {
  const std::string current = current_isa();
  for (const std::string& name : available_isas()) {
    std::printf("%c %s\n", name == current ? '*' : ' ', name.c_str());
  }
}

void print_gpus() {
  const std::vector<measure::Gpu> gpus = measure::find_gpus();
  for (size_t i = 0; i < gpus.size(); ++i) {
    std::fputs(to_text(gpus[i], static_cast<int>(i)).c_str(), stdout);
  }
}

void run(const std::string& device) {
  if (device == "cpu") return print_cpu();
  if (device == "cuda") return print_gpus();
  std::printf("CPU: %s\n", measure::cpu_model().c_str());
  print_cpu();
  try {
    print_gpus();
  } catch (const Error& error) {
    std::printf("GPU: none: %s\n", error.what());
  }
}

}  // namespace

void add_isa(CLI::App& app) {
  auto device = std::make_shared<std::string>();
  CLI::App* isa = app.add_subcommand(
      "isa", "Prints the kernels that this machine can run: the CPU's, best first; the GPUs'");
  add_device(*isa, *device, "Only those of: cpu (names alone), cuda");
  isa->footer(
      "* marks the one in use. RELAY_ISA=<name> chooses another, RELAY_CUDA_PATH=<name> on a GPU.");
  isa->callback([device] { run(*device); });
}

}  // namespace relay::cli
