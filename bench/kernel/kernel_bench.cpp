// One tile's kernels on KV that lies in the cache, on one thread: what arithmetic alone costs.
//
//   relay-kernel-bench --benchmark_filter=bf16 --benchmark_repetitions=5
//
// slot: seconds per KV slot of one head. flops: 4 * rows * slots * head size, a second.
// RELAY_ISA chooses the kernel set. Compare with `peak`, measured by the same program.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

#include "base/aligned_buffer.h"
#include "cpu/kernels/kernels.h"
#include "measure/kv_buffer.h"
#include "measure/roofline.h"
#include "relay/attention.h"
#include "relay/types.h"

namespace {

using namespace relay;
using kernels::KernelSet;
using kernels::QueryLayout;
using kernels::Tile;

constexpr int kTiles = 4;  // more than a first-level cache holds, as KV arrives in the second

enum class Path { kRows, kTiles };

void attend(benchmark::State& state, DType type, Path path) {
  const KernelSet& set = kernels::active();
  const auto dim = static_cast<int>(state.range(0));
  const auto rows = static_cast<int>(state.range(1));
  const bool few = path == Path::kRows && rows <= set.few_rows;
  const QueryLayout layout =
      few ? set.few_layout(type, type) : set.many_layout(type, type, dim, dim);
  const int64_t slots = int64_t{kTiles} * kTileSlots;
  const int64_t vector_bytes = row_bytes(type, dim);
  measure::KvBuffer k, v;
  k.resize(slots * vector_bytes);
  v.resize(slots * vector_bytes);
  measure::fill_random(type, k, 1);
  measure::fill_random(type, v, 2);
  std::vector<const uint8_t*> k_rows(slots), v_rows(slots);
  for (int64_t s = 0; s < slots; ++s) {
    k_rows[s] = k.data() + s * vector_bytes;
    v_rows[s] = v.data() + s * vector_bytes;
  }
  const int stride = kernels::query_words(layout, dim);
  AlignedBuffer<float> q, o, max, sum, scratch;
  q.reserve(int64_t{rows} * stride);
  o.reserve(int64_t{rows} * kernels::padded_dim(dim));
  max.reserve(rows);
  sum.reserve(rows);
  scratch.reserve(kernels::scratch_floats(dim, dim));
  std::mt19937 random(2);
  std::normal_distribution<float> normal;
  std::vector<float> vector(dim);
  for (int r = 0; r < rows; ++r) {
    for (float& x : vector) x = normal(random);
    set.pack_query(DType::kF32, vector.data(), dim, layout, q.data() + r * stride);
    max.data()[r] = -INFINITY;
    sum.data()[r] = 0;
  }
  std::fill_n(o.data(), int64_t{rows} * kernels::padded_dim(dim), 0.0f);

  Tile tile;
  tile.slots = kTileSlots;
  tile.k_type = tile.v_type = type;
  tile.qk_dim = tile.v_dim = dim;
  tile.rows = rows;
  tile.q = q.data();
  tile.q_stride = stride;
  tile.o = o.data();
  tile.o_stride = kernels::padded_dim(dim);
  tile.max = max.data();
  tile.sum = sum.data();
  tile.scale = kernels::kLog2e / std::sqrt(static_cast<float>(dim));
  tile.scratch = scratch.data();
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
  measure::ThreadPool pool(1);
  measure::Roofline roofline;
  while (state.KeepRunning()) roofline = measure::measure_arithmetic(pool);
  state.counters["f32"] = roofline.f32_flops;
  state.counters["bf16"] = roofline.bf16_flops;
}

void f32(benchmark::State& state) { attend(state, DType::kF32, Path::kRows); }
void f16(benchmark::State& state) { attend(state, DType::kF16, Path::kRows); }
void q8_0(benchmark::State& state) { attend(state, DType::kQ8_0, Path::kRows); }
void bf16(benchmark::State& state) { attend(state, DType::kBF16, Path::kRows); }
void bf16_tiles(benchmark::State& state) { attend(state, DType::kBF16, Path::kTiles); }

void heads_and_rows(benchmark::internal::Benchmark* kernel) {
  kernel->ArgNames({"d", "rows"})->ArgsProduct({{64, 128}, {1, 4, 8, 16, 32, 128}});
}

BENCHMARK(peak)->Iterations(1);
BENCHMARK(f32)->Apply(heads_and_rows);
BENCHMARK(f16)->Apply(heads_and_rows);
BENCHMARK(q8_0)->Apply(heads_and_rows);
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
