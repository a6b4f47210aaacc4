#include "measure/roofline.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "cpu/plan/cache_size.h"
#include "relay/attention.h"

namespace relay::measure {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// Runs `iterations` of a register-only loop; returns the flops done.
using FlopLoop = double (*)(int64_t iterations);

// Enough independent chains to cover latency times units, and no more than there are registers.
#if defined(__aarch64__)
constexpr int kChains = 16;  // 4 cycles times 4
#else
constexpr int kChains = 12;  // 4 or 5 cycles times 2
#endif

/// Keeps the compiler from merging or dropping the chains; costs nothing.
#define RELAY_KEEP(x, constraint) asm volatile("" : "+" constraint(x))

#if defined(__x86_64__)

__attribute__((target("avx512f"))) double fma_avx512(int64_t iterations) {
  __m512 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_ps(static_cast<float>(i));
  __m512 a = _mm512_set1_ps(0.5f), b = _mm512_set1_ps(1.0f);
  RELAY_KEEP(a, "v");
  RELAY_KEEP(b, "v");
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_fmadd_ps(acc[i], a, b);
  }
  for (int i = 0; i < kChains; ++i) RELAY_KEEP(acc[i], "v");
  return static_cast<double>(iterations) * kChains * 16 * 2;
}

__attribute__((target("avx2,fma"))) double fma_avx2(int64_t iterations) {
  __m256 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm256_set1_ps(static_cast<float>(i));
  __m256 a = _mm256_set1_ps(0.5f), b = _mm256_set1_ps(1.0f);
  RELAY_KEEP(a, "x");
  RELAY_KEEP(b, "x");
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = _mm256_fmadd_ps(acc[i], a, b);
  }
  for (int i = 0; i < kChains; ++i) RELAY_KEEP(acc[i], "x");
  return static_cast<double>(iterations) * kChains * 8 * 2;
}

__attribute__((target("avx512f,avx512bf16"))) double dot_avx512bf16(int64_t iterations) {
  __m512 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_set1_ps(static_cast<float>(i));
  __m512 ones = _mm512_castsi512_ps(_mm512_set1_epi16(0x3f80));
  RELAY_KEEP(ones, "v");
  const auto pairs = (__m512bh)ones;
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = _mm512_dpbf16_ps(acc[i], pairs, pairs);
  }
  for (int i = 0; i < kChains; ++i) RELAY_KEEP(acc[i], "v");
  return static_cast<double>(iterations) * kChains * 16 * 2 * 2;
}

/// AMX's tiles, all 16 rows of 64 bytes: palette 1, then from byte 16 on the bytes of a row, from
/// byte 48 on the rows. In memory, as the intrinsic hides from the compiler how much it reads.
alignas(64) constexpr uint8_t kAmxTiles[64] = {
    1,  0,  0,  0,  0,  0,  0,  0,  0,  0, 0,  0, 0,  0, 0,  0,  //
    64, 0,  64, 0,  64, 0,  64, 0,  64, 0, 64, 0, 64, 0, 64, 0,  //
    0,  0,  0,  0,  0,  0,  0,  0,  0,  0, 0,  0, 0,  0, 0,  0,  //
    16, 16, 16, 16, 16, 16, 16, 16, 0,  0, 0,  0, 0,  0, 0,  0};

/// Sums in AMX's tiles: 16 x 16 of 32 products each. Only after the process got their registers.
__attribute__((target("amx-tile,amx-bf16"))) double dot_amx(int64_t iterations) {
  _tile_loadconfig(kAmxTiles);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t n = 0; n < iterations; ++n) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return static_cast<double>(iterations) * 4 * 16 * 16 * 32 * 2;
}

#elif defined(__aarch64__)

__attribute__((target("arch=armv8.2-a+bf16"))) double dot_neonbf16(int64_t iterations) {
  float32x4_t acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = vdupq_n_f32(static_cast<float>(i));
  uint16x8_t ones = vdupq_n_u16(0x3f80);
  RELAY_KEEP(ones, "w");
  const bfloat16x8_t pairs = vreinterpretq_bf16_u16(ones);
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = vbfdotq_f32(acc[i], pairs, pairs);
  }
  for (int i = 0; i < kChains; ++i) RELAY_KEEP(acc[i], "w");
  return static_cast<double>(iterations) * kChains * 4 * 2 * 2;
}

#endif

/// Whatever the compiler makes of vectors of 4 f32 without further flags: SSE2, NEON.
double fma_portable(int64_t iterations) {
  typedef float Vec4 __attribute__((vector_size(16)));
  Vec4 acc[kChains];
  for (int i = 0; i < kChains; ++i) acc[i] = Vec4{} + static_cast<float>(i);
  volatile float half = 0.5f, one = 1.0f;
  const Vec4 a = Vec4{} + half, b = Vec4{} + one;
  for (int64_t n = 0; n < iterations; ++n) {
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = acc[i] * a + b;
  }
  volatile float sink = 0;
  for (int i = 0; i < kChains; ++i) sink = sink + acc[i][0];
  return static_cast<double>(iterations) * kChains * 4 * 2;
}

FlopLoop f32_loop() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return fma_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return fma_avx2;
#endif
  return fma_portable;
}

/// The loop of the best kernel set that multiplies bf16; asking for the sets asks the system for
/// AMX's registers, too.
FlopLoop bf16_loop() {
  for (const std::string& isa : available_isas()) {
#if defined(__x86_64__)
    if (isa == "amx") return dot_amx;
    if (isa == "avx512bf16") return dot_avx512bf16;
#elif defined(__aarch64__)
    // Serves SVE of 256 bits as well: such cores have twice as many units for NEON.
    if (isa == "neonbf16") return dot_neonbf16;
#endif
  }
  return nullptr;
}

/// Sums words of 64 bytes; several sums so that loads, not additions, set the pace.
uint64_t sum_words(const uint64_t* data, int64_t count) {
  typedef uint64_t Vec2 __attribute__((vector_size(16)));
  Vec2 sums[8] = {};
  const Vec2* from = reinterpret_cast<const Vec2*>(data);
  for (int64_t i = 0; i + 8 <= count / 2; i += 8) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sums[j] += from[i + j];
  }
  Vec2 total = {};
  for (const Vec2& sum : sums) total += sum;
  return total[0] + total[1];
}

double measure_flops(ThreadPool& pool, FlopLoop loop) {
  // Half a millisecond a round: on a busy machine some of them run undisturbed on all threads.
  constexpr int64_t kIterations = 150'000;
  double best = 0;
  for (int round = 0; round < 200; ++round) {
    std::atomic<int64_t> flops{0};
    const Clock::time_point start = Clock::now();
    pool.run([&](int32_t) { flops += static_cast<int64_t>(loop(kIterations)); });
    best = std::max(best, static_cast<double>(flops) / seconds_since(start));
  }
  return best;
}

double measure_read(ThreadPool& pool, int64_t bytes) {
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  const std::unique_ptr<void, Free> memory(std::aligned_alloc(4096, bytes));
  if (!memory) throw std::bad_alloc();
  auto* words = static_cast<uint64_t*>(memory.get());
  const int64_t slice = bytes / 8 / pool.size() / 16 * 16;
  // First touch by the thread that will read it: pages lie near it.
  pool.run([&](int32_t thread) {
    std::fill_n(words + thread * slice, slice, static_cast<uint64_t>(thread) + 1);
  });
  double best = 0;
  std::atomic<uint64_t> sink{0};
  for (int round = 0; round < 10; ++round) {
    const Clock::time_point start = Clock::now();
    pool.run([&](int32_t thread) { sink += sum_words(words + thread * slice, slice); });
    const double bytes_read = static_cast<double>(slice) * 8 * pool.size();
    best = std::max(best, bytes_read / seconds_since(start));
  }
  return best;
}

}  // namespace

std::string cpu_model() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) == 0) {
      const size_t colon = line.find(':');
      if (colon != std::string::npos && colon + 2 <= line.size()) return line.substr(colon + 2);
    }
  }
  return "unknown";
}

double load_average() {
  double load = -1;
  return getloadavg(&load, 1) == 1 ? load : -1;
}

Roofline measure_arithmetic(ThreadPool& pool) {
  Roofline roofline;
  roofline.threads = pool.size();
  roofline.f32_flops = measure_flops(pool, f32_loop());
  if (const FlopLoop loop = bf16_loop()) roofline.bf16_flops = measure_flops(pool, loop);
  return roofline;
}

Roofline measure_roofline(ThreadPool& pool) {
  Roofline roofline = measure_arithmetic(pool);
  roofline.cache_bytes = last_level_cache_bytes();
  // Eight times the cache: less than an eighth of it can still be there from the last round.
  roofline.buffer_bytes =
      std::clamp<int64_t>(8 * roofline.cache_bytes, int64_t{256} << 20, int64_t{2} << 30);
  roofline.read_bytes = measure_read(pool, roofline.buffer_bytes);
  return roofline;
}

}  // namespace relay::measure
