// Kernel set: AVX-512 with BF16 dot products and VNNI. Compiled with the flags of that instruction
// set, so nothing of the standard library that the linker could share with other files may be
// instantiated here.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/kernels/kernels.h"

namespace relay::kernels {
namespace {

#define RELAY_HAS_BF16_DOT 1
#define RELAY_HAS_BYTE_DOT 1
#include "cpu/kernels/simd_avx512.h"
#include "cpu/kernels/tile-inl.h"

}  // namespace

extern const KernelSet kKernels_avx512bf16;
const KernelSet kKernels_avx512bf16 = make_kernel_set("avx512bf16");

}  // namespace relay::kernels
