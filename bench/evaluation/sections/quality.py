"""Whether answers stay what they were: errors of the operator against double precision
(relay-accuracy-bench), and whole answers with Relay's attention beside the host's own, on the same
prompts: of relay serve beside llama.cpp's, of vLLM beside vLLM's."""

import http.client
import json
import math

import workload
from fields import Field
from programs import (
    MODEL_FIELDS,
    VLLM_BENCH,
    VLLM_SHAPES,
    VLLM_TYPES,
    Programs,
    clean_environment,
    servers_errors,
)
from shapes import SHAPES
from tasks import EvaluationError, Row, Task

from sections.serving import RELAY

SECTION = "quality"
TOP = 20  # most probable tokens that the API tells
FIELDS = {
    "what": Field(str, choices=("operator", "answers", "vllm")),
    "kv_types": Field(str, many=True, choices=("f32", "f16", "bf16", "q8_0")),
    # operator
    "slots": Field(int, many=True, default=[4096], least=128),
    "rows": Field(int, many=True, default=[32], least=1),
    "head_dim": Field(int, many=True, default=[128], least=32),
    "group": Field(int, many=True, default=[4], least=1),
    "values": Field(str, many=True, default=["realistic"], choices=("realistic", "peaked", "flat")),
    # answers, and vllm, whose weights are of the type of its KV
    **MODEL_FIELDS,
    "prompt": Field(int, many=True, default=[1024], least=1),
    "requests": Field(int, default=8, least=1),
    "own": Field(int, default=32, least=1),
    "tokens": Field(int, default=16, least=1),
    "if_installed": Field(bool, default=False),
}


def points(problem: dict, programs: Programs) -> list[list[Task]]:
    if problem["what"] == "operator":
        return [[operator_task(problem, programs)]]
    make = answers_task
    if problem["what"] == "vllm":
        make = vllm_task
        if problem["if_installed"]:
            if programs.if_there("quality, vllm", programs.vllm_python) is None:
                return []
    return [
        [make(problem, programs, kv_type, prompt)]
        for kv_type in problem["kv_types"]
        for prompt in problem["prompt"]
    ]


def single(case: dict, system: str, metric: str, unit: str, better: str, value: float) -> Row:
    return Row(SECTION, case, system, metric, unit, better, value, value, value, 1)


# --- The operator -------------------------------------------------------------------------------


def operator_task(problem: dict, programs: Programs) -> Task:
    lists = {
        "kv-type": "kv_types", "slots": "slots", "rows": "rows", "head-dim": "head_dim",
        "group": "group", "values": "values",
    }  # fmt: skip
    command = [programs.binary("relay-accuracy-bench"), "--json"]
    for option, name in lists.items():
        command += [f"--{option}", ",".join(map(str, problem[name]))]

    def run() -> list[Row]:
        rows = []
        for found in programs.run_json(command)["results"]:
            names = ("kv_type", "heads", "kv_heads", "head_dim", "slots", "rows", "values")
            case = dict(what="operator") | {k: found[k] for k in names}
            case["phase"] = "prefill" if found["causal"] else "decode"
            ways = {"relay": "relay", "ggml": "ggml_flash", "ggml, -fa off": "ggml_softmax"}
            for system, key in ways.items():
                if key in found:
                    error = found[key]["rms"]
                    rows.append(single(case, system, "relative rms error", "", "lower", error))
        return rows

    named = dict(what="operator") | {name: problem[name] for name in lists.values()}
    runs = math.prod(len(problem[k]) for k in lists.values() if k != "slots")
    return Task(SECTION, named, 5 + runs * sum(problem["slots"]) / 2000, run)


# --- Whole answers ------------------------------------------------------------------------------

WAYS = {
    "relay": RELAY["relay"],
    "relay-off": RELAY["relay-off"],
    "llama.cpp": RELAY["relay, llama.cpp's attention"],
}


def answers_task(problem: dict, programs: Programs, kv_type: str, prompt: int) -> Task:
    case = dict(what="answers", model=problem["shape"], kv_type=kv_type, prompt=prompt)
    case |= {k: problem[k] for k in ("layers", "weights", "requests", "tokens")}
    binary = programs.binary("relay")

    def run() -> list[Row]:
        model = programs.model(problem)
        found = {
            way: answers(problem, programs, binary, model, kv_type, prompt, way) for way in WAYS
        }
        return [
            row
            for other in ("llama.cpp", "relay-off")
            for row in compare(case | {"against": other}, found["relay"], found[other])
        ]

    named = case | {k: problem[k] for k in ("ffn", "vocabulary", "own")}
    layers = problem["layers"] or SHAPES[problem["shape"]].layers
    # Of a long prompt llama.cpp's attention takes most of the time.
    return Task(SECTION, named, layers * (1 + prompt / 700 + (prompt / 1500) ** 2), run)


def answers(problem, programs, binary, model, kv_type, prompt, way) -> list[dict]:
    """The logprobs of each request's answer; all requests at once, over one shared prompt."""
    from servers import Server, free_port
    from users import at_once

    more, environment = WAYS[way]
    count, longest = problem["requests"], prompt + problem["own"] + problem["tokens"] + 16
    cells = prompt + count * (problem["own"] + problem["tokens"] + 16) + 256
    command = [str(binary), "serve", "-m", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(free_port()), "-c", str(cells), "--max-model-len", str(longest)]
    command += ["--parallel", str(count), *more]
    command += ["--cache-type-k", kv_type, "--cache-type-v", kv_type]
    logs = programs.out / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    shared = workload.words(prompt, "quality", prompt)
    prompts = [shared + workload.words(problem["own"], "question", i) for i in range(count)]
    found: list[dict | None] = [None] * count

    def ask(number: int) -> None:
        body = dict(
            prompt=prompts[number], max_tokens=problem["tokens"], temperature=0, logprobs=TOP,
            ignore_eos=True,
        )  # fmt: skip
        try:
            status, data = server.request("POST", "/v1/completions", body)
            found[number] = json.loads(data) if status == 200 else {"error": data.decode()[:500]}
        except (OSError, http.client.HTTPException, ValueError) as error:
            found[number] = {"error": repr(error)}

    log = logs / f"{way}.log"
    with servers_errors(), Server(way, command, clean_environment(**environment), log) as server:
        server.wait_ready(600)
        ask(0)  # so that the prompt is there, and shared from the first step on
        at_once(server, ask, [(i,) for i in range(count)])
    for answer in found:
        if answer is None or "error" in answer:
            raise EvaluationError(f"{way}: a request failed: {answer}")
    return [answer["choices"][0]["logprobs"] for answer in found]


def vllm_task(problem: dict, programs: Programs, kv_type: str, prompt: int) -> Task:
    if kv_type not in VLLM_TYPES:
        known = ", ".join(VLLM_TYPES)
        raise EvaluationError(f"{SECTION}, vllm: kv_types are {known}, not {kv_type}")
    case = dict(what="answers", model=problem["shape"], kv_type=kv_type, prompt=prompt)
    case |= {k: problem[k] for k in ("layers", "requests", "tokens")} | {"weights": kv_type}
    shape = VLLM_SHAPES.get(problem["shape"], problem["shape"])
    command = [programs.vllm_python(), VLLM_BENCH / "vllm_answers.py", "--shape", shape]
    command += ["--dtype", VLLM_TYPES[kv_type], "--prefix", prompt, "--logprobs", TOP]
    command += ["--requests", problem["requests"], "--own", problem["own"]]
    command += ["--tokens", problem["tokens"]]
    if problem["layers"]:
        command += ["--layers", problem["layers"]]

    def run() -> list[Row]:
        programs.note_vllm()
        found = programs.run_into_json(command)
        for answer in found["relay"] + found["vllm"]:  # named as JSON's keys are
            answer["tokens"] = [str(token) for token in answer["tokens"]]
        return compare(case | {"against": "vLLM"}, found["relay"], found["vllm"])

    named = case | {"against": "vLLM", "own": problem["own"]}
    layers = problem["layers"] or SHAPES[problem["shape"]].layers
    return Task(SECTION, named, 80 + layers * prompt / 1000, run)


def compare(case: dict, ours: list[dict], theirs: list[dict]) -> list[Row]:
    """Token by token, as far as both continue the same text. Where they part, the margin is how
    much likelier they hold their own token than ours."""
    total = agreed = same_answers = 0
    largest, divergences, margins = 0.0, [], []
    for a, b in zip(ours, theirs, strict=True):
        total += len(b["tokens"])
        same_answers += a["tokens"] == b["tokens"]
        for i in range(min(len(a["tokens"]), len(b["tokens"]))):
            p, q = b["top_logprobs"][i], a["top_logprobs"][i]
            divergences.append(divergence(p, q))
            largest = max(largest, *(abs(p[t] - q[t]) for t in p.keys() & q.keys()), 0.0)
            if a["tokens"][i] != b["tokens"][i]:
                margins.append(max(p.values()) - p.get(a["tokens"][i], min(p.values())))
                break
            agreed += 1
    rows = [
        single(case, "relay", "greedy answers the same", "", "higher", same_answers / len(ours)),
        single(case, "relay", "greedy tokens the same", "", "higher", agreed / total),
        single(case, "relay", "largest log-probability difference", "nat", "lower", largest),
        single(case, "relay", "mean KL divergence", "nat", "lower",
               sum(divergences) / len(divergences)),
        single(case, "relay", "largest KL divergence", "nat", "lower", max(divergences)),
    ]  # fmt: skip
    if margins:
        name = "largest margin where answers part"
        rows.append(single(case, "relay", name, "nat", "lower", max(margins)))
    return rows


def divergence(p: dict[str, float], q: dict[str, float]) -> float:
    """Kullback-Leibler divergence of the distributions over the tokens that both tell and one event
    for all others."""
    common = p.keys() & q.keys()
    sum_p = sum(math.exp(p[t]) for t in common)
    sum_q = sum(math.exp(q[t]) for t in common)
    result = sum(math.exp(p[t]) * (p[t] - q[t]) for t in common)
    rest_p, rest_q = 1 - sum_p, 1 - sum_q
    if rest_p > 1e-9 and rest_q > 1e-9:
        result += rest_p * math.log(rest_p / rest_q)
    return max(0.0, result)
