// Kernel set: AVX2, FMA and F16C. Compiled with the flags of that instruction set, so nothing of
// the standard library that the linker could share with other files may be instantiated here.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/kernels/kernels.h"

namespace relay::kernels {
namespace {

#include "cpu/kernels/simd_avx2.h"
#include "cpu/kernels/tile-inl.h"

}  // namespace

extern const KernelSet kKernels_avx2;
const KernelSet kKernels_avx2 = make_kernel_set("avx2");

}  // namespace relay::kernels
