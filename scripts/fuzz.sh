#!/usr/bin/env bash
# Builds every libFuzzer target and runs each, over its corpus and what earlier runs have found.
#   scripts/fuzz.sh [seconds of each]      (default: 600)
# Inputs that break a promise are left in build/fuzz/<target>-*; the run then fails.
set -uo pipefail
cd "$(dirname "$0")/.."

seconds="${1:-600}"
targets=(batch mask request kv_file kv_prefix constraint tokenizer)

cmake --preset release >/dev/null || exit 1
mkdir -p build/fuzz
if ! cmake --build --preset release --target "${targets[@]/#/fuzz_}"; then
  echo "fuzz: not built. The targets need clang with libFuzzer: scripts/setup.sh installs both" >&2
  exit 1
fi

# The core's kernels of single ISAs are not sanitized (fuzz/batch/CMakeLists.txt).
export RELAY_ISA=plain
run_target() {
  local target="$1"
  mkdir -p "build/fuzz/$target"
  build/release/bin/fuzz_"$target" -max_total_time="$seconds" -timeout=20 -rss_limit_mb=4096 \
    -artifact_prefix="build/fuzz/$target-" "build/fuzz/$target" "fuzz/corpus/$target" \
    >"build/fuzz/$target.log" 2>&1
}

status=0
pids=()
for target in "${targets[@]}"; do
  run_target "$target" &
  pids+=($!)
done
for i in "${!targets[@]}"; do
  log="build/fuzz/${targets[$i]}.log"
  if wait "${pids[$i]}"; then
    echo "fuzz: ${targets[$i]}: $(grep -E '^Done ' "$log")"
  else
    echo "fuzz: ${targets[$i]} FAILED:"
    tail -n 40 "$log"
    status=1
  fi
done
exit "$status"
