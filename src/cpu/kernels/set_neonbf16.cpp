// Kernel set: AArch64 NEON with BF16 dot products. Compiled with the flags of that instruction set,
// so nothing of the standard library that the linker could share with other files may be
// instantiated here.
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "cpu/kernels/kernels.h"

namespace relay::kernels {
namespace {

#define RELAY_HAS_BF16_DOT 1
#include "cpu/kernels/simd_neon.h"
#include "cpu/kernels/tile-inl.h"

}  // namespace

extern const KernelSet kKernels_neonbf16;
const KernelSet kKernels_neonbf16 = make_kernel_set("neonbf16");

}  // namespace relay::kernels
