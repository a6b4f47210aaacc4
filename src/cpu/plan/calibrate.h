// Measures a kernel set's costs on tiles that lie in the cache.
#pragma once

#include "cpu/kernels/kernels.h"
#include "cpu/plan/cost_model.h"

namespace relay {

/// Times the kernels on the calling thread: some milliseconds with vector instructions. The least
/// of several runs counts, so that interruptions do not.
KernelCosts measure_kernel_costs(const kernels::KernelSet& kernels, DType k_type, DType v_type);

}  // namespace relay
