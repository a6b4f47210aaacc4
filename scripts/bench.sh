#!/usr/bin/env bash
# Measures a set of bench/evaluation's problems on a machine that has nothing else to do, then draws
# its plots and writes its report beside the results: build/evaluation/<set>/evaluation.md. A run
# that was stopped, or that had no time for all (--budget MINUTES), goes on. With --docs: writes
# docs/evaluation.md from all results that lie there.
# usage: scripts/bench.sh [set [options of the driver...]]      (bench; operators, vllm, long, slow, full, smoke)
#        scripts/bench.sh --docs
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
[ -x "$python" ] || { echo "bench: no .venv; run scripts/setup.sh" >&2; exit 1; }

case "${1:-bench}" in
  --docs)
    mapfile -t results < <(ls build/evaluation/*/results.json 2>/dev/null | grep -v /smoke/)
    [ "${#results[@]}" -gt 0 ] || { echo "bench: no results in build/evaluation; run make bench" >&2; exit 1; }
    exec "$python" bench/evaluation report "${results[@]}" ;;
  -*) sed -n '2,7s/^# //p' scripts/bench.sh >&2; exit 2 ;;
esac

set="${1:-bench}"
status=0  # what failed is in the report as well
"$python" bench/evaluation run --set "$set" "${@:2}" || status=$?
out="build/evaluation/$set"
"$python" bench/evaluation report "$out" --document "$out/evaluation.md" --images "$out"
exit "$status"
