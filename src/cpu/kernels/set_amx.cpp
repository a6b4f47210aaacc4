// Kernel set: AVX-512 with BF16 and VNNI, and AMX for products of bf16. Compiled with the flags of
// that instruction set, so nothing of the standard library that the linker could share with other
// files may be instantiated here.
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "cpu/kernels/kernels.h"

namespace relay::kernels {
namespace {

#define RELAY_HAS_BF16_DOT 1
#define RELAY_HAS_BYTE_DOT 1
#define RELAY_HAS_AMX 1
#include "cpu/kernels/simd_avx512.h"
#include "cpu/kernels/tile-inl.h"

}  // namespace

extern const KernelSet kKernels_amx;
const KernelSet kKernels_amx = make_kernel_set("amx");

}  // namespace relay::kernels
