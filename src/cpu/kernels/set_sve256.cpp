// Kernel set: SVE of 256 bits with BF16 dot products. Compiled with the flags of that instruction
// set and for that length alone, so nothing of the standard library that the linker could share
// with other files may be instantiated here.
#include <arm_sve.h>

#include <cstdint>
#include <cstring>

#include "cpu/kernels/kernels.h"

namespace relay::kernels {
namespace {

#define RELAY_HAS_BF16_DOT 1
#include "cpu/kernels/simd_sve256.h"
#include "cpu/kernels/tile-inl.h"

}  // namespace

extern const KernelSet kKernels_sve256;
const KernelSet kKernels_sve256 = make_kernel_set("sve256");

}  // namespace relay::kernels
