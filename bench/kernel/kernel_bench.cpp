// One tile's kernels on KV that lies in the cache, on one thread: what arithmetic alone costs.
//
//   relay-kernel-bench --benchmark_filter=bf16 --benchmark_repetitions=5
//
// slot: seconds per KV slot of one head. flops: 4 * rows * slots * head size, a second.
// RELAY_ISA chooses the kernel set. Compare with `peak`, measured by the same program.
#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "bench/op/roofline.h"
#include "kernels/kernels.h"
#include "relay/attention.h"
#include "relay/types.h"

namespace {

using namespace relay;
using kernels::KernelSet;
using kernels::QueryLayout;
using kernels::Tile;

constexpr int kTiles = 4;  // more than a first-level cache holds, as KV arrives in the second

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float, Free>;

Floats allocate(int64_t floats) {
  const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
  return Floats(static_cast<float*>(std::aligned_alloc(64, bytes)));
}

/// f16 or bf16 numbers between 2^-3 and 2 of either sign.
void fill(DType type, std::vector<uint16_t>& numbers) {
  std::mt19937 random(1);
  for (uint16_t& x : numbers) {
    const auto bits = static_cast<uint16_t>(random());
    x = type == DType::kF16 ? (bits & 0x8fff) | 0x3000 : (bits & 0x81ff) | 0x3e00;
  }
}

enum class Path { kRows, kTiles };

void attend(benchmark::State& state, DType type, Path path) {
  const KernelSet& set = kernels::active();
  const auto dim = static_cast<int>(state.range(0));
  const auto rows = static_cast<int>(state.range(1));
  const bool few = path == Path::kRows && rows <= set.few_rows;
  const QueryLayout layout = few ? QueryLayout::kF32 : set.many_layout(type, type);
  const int64_t slots = int64_t{kTiles} * kTileSlots;
  std::vector<uint16_t> k(slots * dim), v(slots * dim);
  fill(type, k);
  fill(type, v);
  std::vector<const uint8_t*> k_rows(slots), v_rows(slots);
  for (int64_t s = 0; s < slots; ++s) {
    k_rows[s] = reinterpret_cast<const uint8_t*>(&k[s * dim]);
    v_rows[s] = reinterpret_cast<const uint8_t*>(&v[s * dim]);
  }
  const int stride = kernels::padded_dim(dim) / (layout == QueryLayout::kF32 ? 1 : 2);
  const Floats q = allocate(int64_t{rows} * stride);
  const Floats o = allocate(int64_t{rows} * kernels::padded_dim(dim));
  const Floats max = allocate(rows);
  const Floats sum = allocate(rows);
  const Floats scratch = allocate(kernels::scratch_floats(dim, dim));
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> vector(dim);
  for (int r = 0; r < rows; ++r) {
    for (float& x : vector) x = normal(random);
    set.pack_query(DType::kF32, vector.data(), dim, layout, q.get() + r * stride);
    max.get()[r] = -INFINITY;
    sum.get()[r] = 0;
  }
  std::fill_n(o.get(), int64_t{rows} * kernels::padded_dim(dim), 0.0f);

  Tile tile;
  tile.slots = kTileSlots;
  tile.k_type = tile.v_type = type;
  tile.qk_dim = tile.v_dim = dim;
  tile.rows = rows;
  tile.q = q.get();
  tile.q_stride = stride;
  tile.o = o.get();
  tile.o_stride = kernels::padded_dim(dim);
  tile.max = max.get();
  tile.sum = sum.get();
  tile.scale = kernels::kLog2e / std::sqrt(static_cast<float>(dim));
  tile.scratch = scratch.get();
  const auto kernel = path == Path::kTiles ? set.attend_tiled
                      : few                ? set.attend_few
                                           : set.attend_many;
  while (state.KeepRunning()) {
    for (int t = 0; t < kTiles; ++t) {
      tile.k = &k_rows[t * kTileSlots];
      tile.v = &v_rows[t * kTileSlots];
      kernel(tile);
    }
    benchmark::ClobberMemory();
  }
  const double done = static_cast<double>(state.iterations()) * static_cast<double>(slots);
  state.counters["slot"] =
      benchmark::Counter(done, benchmark::Counter::kIsRate | benchmark::Counter::kInvert);
  state.counters["flops"] = benchmark::Counter(done * 4 * rows * dim, benchmark::Counter::kIsRate);
}

/// The most that one thread does on registers.
void peak(benchmark::State& state) {
  bench::ThreadPool pool(1);
  bench::Roofline roofline;
  while (state.KeepRunning()) roofline = bench::measure_arithmetic(pool);
  state.counters["f32"] = roofline.f32_flops;
  state.counters["bf16"] = roofline.bf16_flops;
}

void f16(benchmark::State& state) { attend(state, DType::kF16, Path::kRows); }
void bf16(benchmark::State& state) { attend(state, DType::kBF16, Path::kRows); }
void bf16_tiles(benchmark::State& state) { attend(state, DType::kBF16, Path::kTiles); }

void heads_and_rows(benchmark::internal::Benchmark* kernel) {
  kernel->ArgNames({"d", "rows"})->ArgsProduct({{64, 128}, {1, 4, 8, 16, 32, 128}});
}

BENCHMARK(peak)->Iterations(1);
BENCHMARK(f16)->Apply(heads_and_rows);
BENCHMARK(bf16)->Apply(heads_and_rows);
BENCHMARK(bf16_tiles)->Apply(heads_and_rows);

}  // namespace

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::AddCustomContext("kernels", current_isa());
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
