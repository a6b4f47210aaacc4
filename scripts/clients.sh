#!/usr/bin/env bash
# Tries clients that the tests do not install against a running server, unchanged:
#   scripts/clients.sh [--with-guidellm] [--vllm VENV] [--call-token ID] http://127.0.0.1:8080 [api-key]
# They go into build/clients, outside the tests' environment: some hundred MB, the first time only.
# The model's template has to know tools. Random weights never begin a call by themselves: for those
# give the token that begins one (relay synth tiny model.gguf --vocab gemma-4: --call-token 48).
# VENV is an environment that has vLLM (plugins/vllm/setup_vllm.sh makes one): its `vllm bench serve`.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,7s/^# \{0,1\}//p' "$0"; }
guidellm=0
vllm=""
export RELAY_CALL_TOKEN=
while :; do
  case "${1:-}" in
    --with-guidellm) guidellm=1; shift ;;
    --vllm) vllm="${2:?$(usage)}"; shift 2 ;;
    --call-token) RELAY_CALL_TOKEN="${2:?$(usage)}"; shift 2 ;;
    *) break ;;
  esac
done
case "${1:-}" in http://* | https://*) url="${1%/}" ;; *) usage >&2; exit 2 ;; esac
key="${2:-none}"

packages=(langchain-openai==1.7.4 litellm==1.110.2 schemathesis==4.32.5)
[ "$guidellm" = 1 ] && packages+=(guidellm==0.8.1)
venv=build/clients
stamp="$(printf '%s\n' "${packages[@]}" | sha256sum | cut -d' ' -f1)"
if [ "$(cat "$venv/stamp" 2>/dev/null)" != "$stamp" ]; then
  python3 -m venv "$venv"
  "$venv/bin/pip" install --quiet --disable-pip-version-check "${packages[@]}"
  echo "$stamp" >"$venv/stamp"
fi

export OPENAI_API_KEY="$key" RELAY_URL="$url" LITELLM_LOCAL_MODEL_COST_MAP=True
model="$("$venv/bin/python" - <<'PY'
import json, os, urllib.request
request = urllib.request.Request(
    os.environ["RELAY_URL"] + "/v1/models",
    headers={"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]},
)
print(json.load(urllib.request.urlopen(request))["data"][0]["id"])
PY
)"
export RELAY_MODEL_NAME="$model"

echo "=== LangChain's ChatOpenAI: invoke, stream, tools"
"$venv/bin/python" - <<'PY'
import os
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return "sunny"

chat = ChatOpenAI(base_url=os.environ["RELAY_URL"] + "/v1", model=os.environ["RELAY_MODEL_NAME"], max_tokens=60)
assert chat.invoke("Hello").usage_metadata["output_tokens"] > 0
assert len(list(chat.stream("Hello"))) > 1
token = os.environ["RELAY_CALL_TOKEN"]
bias = {"logit_bias": {token: 100}, "temperature": 0} if token else {}
answer = chat.bind_tools([weather], tool_choice="weather").bind(**bias).invoke("Weather in Ulm?")
# Random weights seldom find the end of the arguments.
calls = answer.tool_calls + (answer.invalid_tool_calls if token else [])
assert calls and calls[0]["name"] == "weather", answer
print("passed")
PY

echo "=== LiteLLM: whole and streamed"
"$venv/bin/python" - <<'PY'
import os
import litellm

options = dict(model="openai/" + os.environ["RELAY_MODEL_NAME"], api_base=os.environ["RELAY_URL"] + "/v1",
               messages=[{"role": "user", "content": "Hello"}], max_tokens=12)
assert litellm.completion(**options).usage.completion_tokens > 0
assert len(list(litellm.completion(stream=True, **options))) > 1
print("passed")
PY

# One worker: Python 3.11 miscounts the depth of recursion where threads parse at once.
# (Answers are as long as the context allows: serve with --max-model-len 512, say.)
echo "=== schemathesis: every endpoint of /openapi.json, no 5xx that was not meant"
"$venv/bin/schemathesis" run "$url/openapi.json" --url "$url" -H "Authorization: Bearer $key" \
  --checks not_a_server_error --max-examples 50 --request-timeout 120 --workers 1

# Prompts of a benchmark's own making would need the model's tokenizer from Hugging Face.
for i in $(seq 32); do
  echo "{\"prompt\": \"Tell me what is behind door $i.\", \"output_tokens_count\": 32}"
done >"$venv/prompts.jsonl"

if [ -n "$vllm" ]; then
  for kind in "openai-chat /v1/chat/completions" "openai /v1/completions"; do
    echo "=== vllm bench serve: ${kind#* }"
    RELAY_DISABLE=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_LOGGING_LEVEL=ERROR \
      "$vllm/bin/python" plugins/vllm/bench/vllm_cli.py bench serve --backend "${kind% *}" --endpoint "${kind#* }" \
      --base-url "$url" --model "$model" --skip-tokenizer-init --dataset-name custom \
      --dataset-path "$venv/prompts.jsonl" --custom-output-len 32 --num-prompts 32 --max-concurrency 4 \
      --disable-tqdm --save-result --result-dir "$venv" --result-filename vllm.json | sed -n '/=====/,$p'
    "$venv/bin/python" -c 'import json, sys; sys.exit(json.load(open(sys.argv[1]))["completed"] != 32)' "$venv/vllm.json"
  done
fi

if [ "$guidellm" = 1 ]; then
  echo "=== guidellm: a short benchmark"
  "$venv/bin/guidellm" run --backend "kind=openai_http,target=$url,model=$model,api_key=$key" \
    --profile kind=concurrent,streams=4 --constraint kind=max_requests,count=32 \
    --data "kind=json_file,path=$venv/prompts.jsonl" --output kind=console --disable-progress
fi
