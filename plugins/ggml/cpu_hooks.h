// How Relay gets to see graphs: every backend that ggml's CPU device creates stays what it is, a
// CPU backend with its own context, threads and thread pool, but computes its graphs through a
// GraphRunner.
//
// Why not a device of its own that is scheduled beside the CPU, as BLAS is? That works too, but
// llama.cpp then (a) finds attention on another device than the layer's and switches flash
// attention off (`-fa auto`, the default): Relay would be loaded and see nothing; (b) gives its
// thread pool
// (--poll, --prio, --cpu-mask) to the CPU backend alone; (c) gives up pipeline parallelism and the
// offload of large batches beside a GPU.
//
// What is touched are function pointers in ggml_backend_device, ggml_backend_reg and ggml_backend:
// the interface whose version find_cpu_device() has checked.
#pragma once

#include <ggml-backend.h>

namespace relay::ggml {

/// Hooks `cpu`; once. Call from the module's initialisation only.
void install_hooks(ggml_backend_dev_t cpu);

/// Undoes that, for living backends too.
void remove_hooks();

/// Creates a hooked CPU backend under another device and name (for the device "RELAY").
ggml_backend_t create_backend(ggml_backend_dev_t device, const char* (*get_name)(ggml_backend_t),
                              const char* params);

/// The CPU registry's functions, those included that tell a hooked backend what the host wants.
void* get_proc_address(const char* name);

}  // namespace relay::ggml
