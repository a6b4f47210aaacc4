// Kernel set: AArch64 NEON. Compiled with the flags of that instruction set, so nothing of the
// standard library that the linker could share with other files may be instantiated here.
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "cpu/kernels/kernels.h"

namespace relay::kernels {
namespace {

#include "cpu/kernels/simd_neon.h"
#include "cpu/kernels/tile-inl.h"

}  // namespace

extern const KernelSet kKernels_neon;
const KernelSet kKernels_neon = make_kernel_set("neon");

}  // namespace relay::kernels
