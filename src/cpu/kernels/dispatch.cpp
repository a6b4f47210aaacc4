// The one table of kernel sets, best first, and the choice among them.
#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#include <sys/prctl.h>
#endif

#include "cpu/kernels/kernels.h"
#include "relay/attention.h"

namespace relay {
namespace kernels {

#if defined(__x86_64__)
extern const KernelSet kKernels_amx;
extern const KernelSet kKernels_avx512bf16;
extern const KernelSet kKernels_avx512;
extern const KernelSet kKernels_avx2;
#elif defined(__aarch64__)
extern const KernelSet kKernels_sve256;
extern const KernelSet kKernels_neonbf16;
extern const KernelSet kKernels_neon;
#endif
extern const KernelSet kKernels_plain;

namespace {

struct Entry {
  const KernelSet* set;
  bool (*runs_here)();
};

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("f16c");
}
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512bf16() {
  return has_avx512() && __builtin_cpu_supports("avx512bf16") &&
         __builtin_cpu_supports("avx512vnni");
}
/// Linux grants a process the registers of AMX on demand, so this asks for them.
bool has_amx() {
#if defined(__linux__)
  unsigned eax = 0;
  unsigned ebx = 0;
  unsigned ecx = 0;
  unsigned edx = 0;
  if (!has_avx512bf16() || __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  constexpr unsigned kBf16 = 1u << 22;
  constexpr unsigned kTile = 1u << 24;
  if ((edx & kBf16) == 0 || (edx & kTile) == 0) return false;
  constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr int kTileData = 18;               // XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
#elif defined(__aarch64__)
// Bits of AT_HWCAP and AT_HWCAP2, which older headers lack (Linux, arch/arm64/include/uapi/asm).
bool has_neonbf16() {
#if defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#else
  return false;
#endif
}
/// The vector length is a thread's own, and its threads to come inherit it.
bool has_sve256() {
#if defined(__linux__)
  constexpr unsigned long kSve = 1ul << 22;
  constexpr unsigned long kSveBf16 = 1ul << 12;
  if ((getauxval(AT_HWCAP) & kSve) == 0 || (getauxval(AT_HWCAP2) & kSveBf16) == 0) return false;
  constexpr int kGetVectorLength = 51;  // PR_SVE_GET_VL
  constexpr int kLengthMask = 0xffff;   // PR_SVE_VL_LEN_MASK
  const int answer = prctl(kGetVectorLength);
  return answer >= 0 && (answer & kLengthMask) == 32;
#else
  return false;
#endif
}
#endif

constexpr Entry kSets[] = {
#if defined(__x86_64__)
    {&kKernels_amx, has_amx},
    {&kKernels_avx512bf16, has_avx512bf16},
    {&kKernels_avx512, has_avx512},
    {&kKernels_avx2, has_avx2},
#elif defined(__aarch64__)
    {&kKernels_sve256, has_sve256},
    {&kKernels_neonbf16, has_neonbf16},
    {&kKernels_neon, [] { return true; }},
#endif
    {&kKernels_plain, [] { return true; }},
};

/// The set called `name`; throws Error if there is none or it cannot run here.
const KernelSet& find(const std::string& name) {
  std::string known;
  for (const Entry& entry : kSets) {
    if (entry.runs_here()) {
      if (name == entry.set->name) return *entry.set;
      known += known.empty() ? "" : ", ";
      known += entry.set->name;
    }
  }
  throw Error("no kernel set '" + name + "' runs on this CPU; RELAY_ISA may be one of: " + known);
}

const KernelSet& choose() {
  const char* wish = std::getenv("RELAY_ISA");
  if (wish != nullptr && *wish != '\0') return find(wish);
  for (const Entry& entry : kSets) {
    if (entry.runs_here()) return *entry.set;
  }
  return kKernels_plain;
}

std::atomic<const KernelSet*>& selected() {
  static std::atomic<const KernelSet*> set{&choose()};
  return set;
}

}  // namespace

const KernelSet& active() { return *selected().load(std::memory_order_acquire); }

QueryLayout product_layout(const std::string& isa, DType k_type, DType v_type) {
  return find(isa).many_layout(k_type, v_type, 64, 64);
}

int64_t scratch_floats(int qk_dim, int v_dim) {
  return int64_t{kTileSlots} * (padded_dim(qk_dim) + kScoreRows) + packed_v_floats(v_dim);
}

}  // namespace kernels

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const kernels::Entry& entry : kernels::kSets) {
    if (entry.runs_here()) names.emplace_back(entry.set->name);
  }
  return names;
}

std::string current_isa() { return kernels::active().name; }

void select_isa(const std::string& name) { kernels::selected() = &kernels::find(name); }

}  // namespace relay
