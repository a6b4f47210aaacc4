#!/usr/bin/env bash
# The benches of `make bench`: kernels, the operator, then llama.cpp with and without the module.
# Results lie in build/bench. The machine should have nothing else to do.
# usage: scripts/bench.sh        RELAY_BENCH_MODEL=m.gguf: a model of your own, else one of the 1B
# class is written once (0.8 GB); RELAY_BENCH_ROUNDS=3: rounds of llama.cpp
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# = 0 ] || { sed -n '2,6s/^# //p' scripts/bench.sh >&2; exit 2; }
relay=build/release/bin/relay
[ -x "$relay" ] || { echo "bench: no $relay; run make build" >&2; exit 1; }
mkdir -p build/bench

model="${RELAY_BENCH_MODEL:-build/bench/llama-3.2-1b-ffn5632-q4_0.gguf}"
if [ ! -f "$model" ]; then
  [ -z "${RELAY_BENCH_MODEL:-}" ] || { echo "bench: RELAY_BENCH_MODEL=$model is no file" >&2; exit 1; }
  echo "=== bench: writing $model"
  "$relay" synth llama-3.2-1b "$model" --ffn 5632 --type q4_0
fi

echo "=== bench: one tile's kernels in the cache (build/bench/kernels.json)"
build/release/bin/relay-kernel-bench --benchmark_out=build/bench/kernels.json

echo "=== bench: the operator (build/bench/op.json)"
"$relay" bench op --heads 32 --kv-heads 8 --head-dim 64 --prefix 0,4096,16384 --context 128 \
  --batch 1,8,32 --kv-type f16,bf16,q8_0 --json | tee build/bench/op.json

echo "=== bench: llama.cpp with and without the module (build/bench/llama_cpp.csv)"
.venv/bin/python bench/llama_cpp.py --model "$model" --rounds "${RELAY_BENCH_ROUNDS:-3}"
