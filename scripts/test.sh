#!/usr/bin/env bash
# Everything CI checks, stage by stage; `make test` sets up and then calls this.
set -uo pipefail
cd "$(dirname "$0")/.."

stages=(format build cuda lint unit asan tsan fuzz aarch64 ggml-ops install e2e vllm)
declare -A about=(
  [format]="sources are in the pinned format, Python is lint-free"
  [build]="release build, warnings in our code are errors"
  [cuda]="the CUDA operator compiled, warnings are errors; its tests as far as there is a GPU"
  [lint]="clang-tidy over our sources; each fault of scripts/mutations.toml still finds its place"
  [unit]="unit tests, once for every ISA of this CPU"
  [asan]="tests of core, server, engine, ggml module and command line under ASan and UBSan"
  [tsan]="unit tests of what has threads, and of the command line, under TSan"
  [fuzz]="each libFuzzer target for a while, where there is clang"
  [aarch64]="the core's unit tests for 64-bit Arm, under qemu"
  [ggml-ops]="ggml's own suite for FLASH_ATTN_EXT through libggml-relay.so, and who served it"
  [install]="an installed prefix: relay runs, CMake and pkg-config consumers build"
  [e2e]="the driver of the evaluation; the server end to end, with the openai client"
  [vllm]="Relay in an unmodified vLLM: operator, models, two workers, random arrivals; PEFT's prefixes"
)

usage() {
  echo "usage: scripts/test.sh [--list] [stage...]      (default: all, in this order)"
  for stage in "${stages[@]}"; do printf '  %-9s %s\n' "$stage" "${about[$stage]}"; done
  echo "Logs are kept in build/test-logs/<stage>.log."
}

stage_format() { scripts/format.sh --check; }

stage_build() {
  cmake --preset release -DRELAY_WERROR=ON && cmake --build --preset release
}

stage_lint() { scripts/mutate.py --list >/dev/null && scripts/lint.sh; }

run_tests() {  # preset, stage, ctest arguments; GoogleTest leaves its counts in files for the table
  local preset="$1" stage="$2"
  shift 2
  GTEST_OUTPUT="xml:$PWD/build/test-logs/$stage/" \
    ctest --preset "$preset" -L unit --no-tests=error "$@"
}

# The core's tests, which this build has too, are the business of other stages. Programs that need a
# GPU are compiled; without one each skips by itself, and ctest lists it as skipped.
stage_cuda() {
  local status=0
  cmake --preset cuda -DRELAY_WERROR=ON && cmake --build --preset cuda --target relay-cuda-tests ||
    return 1
  run_tests cuda cuda -R '^cuda_' || status=1
  GTEST_OUTPUT="xml:$PWD/build/test-logs/cuda/" ctest --preset cuda -L gpu --no-tests=error || status=1
  if ! nvidia-smi -L 2>/dev/null | grep -q '^GPU'; then
    echo "cuda: this machine has no NVIDIA GPU: what has the label gpu was compiled, not run"
  fi
  return "$status"
}

# A green run says which kernels it has not seen. The second argument: all sets of the architecture.
report_isas() {  # sets that are run, sets that there are
  local isa lacking=""
  for isa in $2; do [[ " $1 " == *" $isa "* ]] || lacking+=" $isa"; done
  for isa in $1; do [[ " $2 " == *" $isa "* ]] || { echo "scripts/test.sh knows no kernel set $isa"; return 1; }; done
  echo "kernel sets: run:" $1
  echo "kernel sets: NOT run, this CPU lacks them:${lacking:- none}"
}

stage_unit() {
  local isas isa all status=0
  isas="$(build/release/bin/relay isa --device cpu | sed 's/^[* ]*//')" || return 1
  [ -n "$isas" ] || { echo "relay isa lists no ISA"; return 1; }
  case "$(uname -m)" in
    x86_64) all="amx avx512bf16 avx512 avx2 plain" ;;
    aarch64) all="sve256 neonbf16 neon plain" ;;
    *) all="plain" ;;
  esac
  report_isas "$(echo $isas)" "$all" || return 1
  for isa in $isas; do
    echo "--- the core, RELAY_ISA=$isa"
    RELAY_ISA="$isa" run_tests release unit -j2 -R '^core_' || status=1
  done
  echo "--- everything above the core"
  run_tests release unit -j2 -E '^core_' || status=1
  return "$status"
}

tests_under() {  # a preset, stage, ctest arguments
  # Two folders with the same sanitizers share the core's objects: their debug information may name
  # the other folder.
  local -x CCACHE_NOHASHDIR=1
  cmake --preset "$1" -DRELAY_WERROR=ON && cmake --build --preset "$1" && run_tests "$@"
}
command_line_of() {  # a preset: isa, bench, explain, synth, batch and serve
  RELAY_BIN="$PWD/build/$1/bin/relay" .venv/bin/python -m pytest -q \
    tests/e2e/test_commands.py tests/e2e/test_batch.py -k "not killed"
}
stage_asan() {
  local -x ASAN_OPTIONS=detect_leaks=1:strict_string_checks=1 UBSAN_OPTIONS=print_stacktrace=1
  local status=0
  # Fewer random cases than elsewhere: they differ in numbers, not in what is read and written.
  RELAY_TEST_SCALE=0.15 tests_under asan asan -j2 || status=1
  # Left out: what computes for a minute with other models and sizes, but reads and writes alike.
  GTEST_FILTER='-Tiny/Shapes.*/tinyphi2:Tiny/Shapes.Concurrent*/tinygemma2:LlamaModel.KvOf64*:Tokenizer.LongRuns*' \
    tests_under asan-above asan -j2 || status=1
  ASAN_OPTIONS+=:exitcode=99 command_line_of asan-above || status=1
  return "$status"
}
# Left out: tests without threads, and the property test, which takes a quarter of an hour here and
# whose threads are those of the plan and adversarial tests.
stage_tsan() {
  local -x TSAN_OPTIONS=halt_on_error=1
  local status=0
  RELAY_TEST_SCALE=0.09 tests_under tsan tsan -j2 \
    -E '^(core_(property|checker|reference|precision)|planner)_test$' || status=1
  # Left out of the engine's: what takes long and is about texts, not threads.
  GTEST_FILTER='-EngineTools.*:EngineLife.AFullQueue*:EngineLife.WrongOptions*' \
    tests_under tsan-above tsan -j2 || status=1
  TSAN_OPTIONS+=:exitcode=99 command_line_of tsan-above || status=1
  return "$status"
}

# For long, by hand: scripts/fuzz.sh.
stage_fuzz() {
  if ! command -v clang++ >/dev/null; then
    echo "fuzz: skipped, there is no clang++ (scripts/setup.sh installs it; only the corpora were run, by the unit tests)"
    return 0
  fi
  scripts/fuzz.sh 10
}

# An emulated processor is slow: fewer random cases (tests/core/test_env.h). All kernel sets run in
# one process, so that the reference, most of the time, is computed once for them. Other processors
# show that each set is found only where it can run: by bf16, by SVE, by the length of its vectors.
# Left out: the planner's own tests and those of the checker, in which nothing is Arm's.
stage_aarch64() {
  local -x RELAY_TEST_SCALE="${RELAY_TEST_SCALE:-0.05}"
  local status=0
  QEMU_CPU=max,sve256=on RELAY_TEST_ISAS="sve256 neonbf16 neon plain" \
    tests_under aarch64 aarch64 -j 2 -E '^(planner|core_checker)_test$' || return 1
  report_isas "sve256 neonbf16 neon plain" "sve256 neonbf16 neon plain"
  on_cpu() {  # qemu's name, the sets it has, the tests to run
    echo "--- $1: $2"
    QEMU_CPU="$1" RELAY_TEST_ISAS="$2" run_tests aarch64 aarch64 -R "^core_($3)_test$" || status=1
  }
  on_cpu cortex-a72 "neon plain" "error|state|tiled"
  on_cpu max,sve512=on "neonbf16 neon plain" error
  on_cpu max,sve=off "neonbf16 neon plain" error
  on_cpu a64fx "neon plain" error
  return "$status"
}

# Two cases at a time, each on all threads: those that wait must not spin.
stage_ggml-ops() { OMP_WAIT_POLICY=passive .venv/bin/python tests/ggml/check_ops.py; }

stage_install() { scripts/test_install.sh build/release; }

stage_e2e() {
  .venv/bin/python -m pytest -q tests/evaluation || return 1
  .venv/bin/python -m pytest -q -rs tests/e2e
}

# vLLM lies outside the checkout, so that its 7 GB are installed once.
stage_vllm() {
  plugins/vllm/setup_vllm.sh || return 1
  local venv="${RELAY_VLLM_VENV:-$HOME/.cache/relay/vllm-0.32.0}"
  "$venv/bin/python" -m relay_attention.doctor &&
    "$venv/bin/python" -m pytest -q -p no:cacheprovider plugins/vllm/tests tests/peft
}

# What a stage checked, for the table.
measure() {
  local log="build/test-logs/$1.log"
  case "$1" in
    unit | asan | tsan | aarch64)
      cat "build/test-logs/$1/"*.xml 2>/dev/null | sed -n 's/^<testsuites tests="\([0-9]*\)" failures="\([0-9]*\)".*/\1 \2/p' |
        awk '{ all += $1; failed += $2 } END { if (all) printf "%d cases, %d failed", all, failed }'
      sed -n 's/^kernel sets: NOT run, this CPU lacks them:/; kernel sets not run:/p' "$log" | tr -d '\n' ;;
    cuda)
      cat build/test-logs/cuda/*.xml 2>/dev/null |
        awk '/<testcase / { if (/result="skipped"/) ++skipped; else ++all } /<failure / { ++failed }
             END { print all + 0 " cases, " failed + 0 " failures, " skipped + 0 " skipped" }' ;;
    fuzz) grep -E '^fuzz: (skipped|[a-z_]+: Done)' "$log" | sed -E 's/^fuzz: //; s/: Done ([0-9]+) runs.*/ \1/' |
      paste -sd ',' | sed 's/,/, /g' ;;
    ggml-ops) grep -oE '[0-9]+/[0-9]+ tests passed' "$log" | tail -n 1 ;;
    e2e | vllm) grep -E '[0-9]+ (passed|failed|error)' "$log" | tail -n 1 | tr -d '=' ;;
  esac
}

chosen=()
for arg in "$@"; do
  case "$arg" in
    -h | --help | --list) usage; exit 0 ;;
    *)
      if [ -z "${about[$arg]:-}" ]; then echo "test: no stage '$arg'" >&2; usage >&2; exit 2; fi
      chosen+=("$arg") ;;
  esac
done
[ "${#chosen[@]}" -gt 0 ] || chosen=("${stages[@]}")

mkdir -p build/test-logs
export NINJA_STATUS='[%f/%t %es] '
passed=0 failed=0 rows=()
for stage in "${chosen[@]}"; do
  echo
  echo "=== $stage: ${about[$stage]}"
  rm -rf "build/test-logs/$stage"
  started=$SECONDS
  "stage_$stage" </dev/null 2>&1 | tee "build/test-logs/$stage.log"
  result=${PIPESTATUS[0]}
  seconds=$((SECONDS - started))
  if [ "$result" = 0 ]; then verdict=passed; passed=$((passed + 1)); else verdict=FAILED; failed=$((failed + 1)); fi
  echo "=== $stage: $verdict after $seconds s"
  rows+=("$(printf '%-9s %-7s %5d s  %s' "$stage" "$verdict" "$seconds" "$(measure "$stage")")")
done

echo
printf '%s\n' "${rows[@]}"
printf '%-9s %-7s %5d s\n' all "" "$SECONDS"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
