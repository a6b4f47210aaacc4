#!/usr/bin/env bash
# Makes the little model in build/little_model: little.gguf and hf/, a Hugging Face folder. Trained anew only
# where its sources have changed. A few minutes on two cores; its Python packages go into .venv-jax.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=build/little_model
sources=scripts/little_model

say() { echo "little model: $*"; }
fail() { echo "little model: $*" >&2; exit 1; }

mkdir -p "$out"
exec 9>"$out/lock"
flock 9  # two at once: the second finds it made

want="$(cat "$sources/requirements.txt" - <<<"$(python3 --version)" | sha256sum | cut -d' ' -f1)"
if [ "$(cat .venv-jax/relay-stamp 2>/dev/null)" != "$want" ]; then
  say "installing Python packages into .venv-jax"
  rm -rf .venv-jax
  python3 -m venv .venv-jax
  .venv-jax/bin/python -m pip install --disable-pip-version-check --quiet --only-binary :all: --no-deps \
    -r "$sources/requirements.txt" || fail "pip could not install $sources/requirements.txt; its message is above."
  echo "$want" >.venv-jax/relay-stamp
fi

want="$(cat "$sources"/{requirements.txt,task.py,vocabulary.py,model.py,train.py,export.py} | sha256sum | cut -d' ' -f1)"
if [ "$(cat "$out/stamp" 2>/dev/null)" != "$want" ]; then
  rm -rf "$out/stamp" "$out/hf" "$out/little.gguf"
  say "training it"
  .venv-jax/bin/python "$sources/train.py" "$out" || fail "it could not be trained, see above"
  echo "$want" >"$out/stamp"
fi
say "it is in $out"
