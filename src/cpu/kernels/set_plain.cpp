// Kernel set: plain C++, for any CPU. Compiled with the flags of that instruction set, so nothing
// of the standard library that the linker could share with other files may be instantiated here.

#include <cstdint>
#include <cstring>

#include "cpu/kernels/kernels.h"

namespace relay::kernels {
namespace {

#include "cpu/kernels/simd_plain.h"
#include "cpu/kernels/tile-inl.h"

}  // namespace

extern const KernelSet kKernels_plain;
const KernelSet kKernels_plain = make_kernel_set("plain");

}  // namespace relay::kernels
