// The program that loaded the module: its CPU device, and whether its ggml is one we understand.
#pragma once

#include <ggml-backend.h>

#include <string>

namespace relay::ggml {

/// GGML_BACKEND_API_VERSION of the headers that this module was compiled with.
int own_api_version();

/// The API version in the host's registry entry: its first field in every version.
int api_version_of(ggml_backend_reg_t registry);

/// What to print when the host speaks `host_version`; empty if that is our own.
std::string api_version_problem(int host_version);

/// The host's CPU device. Null, with the reason on stderr, if Relay cannot work in this host.
ggml_backend_dev_t find_cpu_device();

}  // namespace relay::ggml
