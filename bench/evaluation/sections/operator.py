"""The attention operator on CPUs: Relay with and without sharing, ggml's, vLLM's kernel."""

import itertools

from fields import Field
from programs import VLLM_BENCH, VLLM_TYPES, Programs
from shapes import SHAPES, formula
from tasks import Row, Task

SECTION = "operator"
# Which program measures a system.
PROGRAM_OF = {"relay": "relay", "relay-off": "relay", "ggml": "ggml", "vllm": "vllm"}

FIELDS = {
    "models": Field(str, many=True, choices=tuple(SHAPES)),
    "kv_types": Field(str, many=True, default=["f16"], choices=("f32", "f16", "bf16", "q8_0")),
    "layout": Field(str, default="rows", choices=("rows", "tiles")),
    "prefix": Field(int, many=True, least=0),
    "context": Field(int, default=128, least=1),
    "batch": Field(int, many=True, least=1),
    "systems": Field(str, many=True, choices=tuple(PROGRAM_OF)),
    "if_installed": Field(str, many=True, default=[], choices=("vllm",)),
    "rounds": Field(int, default=5, least=1),
    "threads": Field(int, default=0, least=0),
}


def points(problem: dict, programs: Programs) -> list[list[Task]]:
    measured = {PROGRAM_OF[name] for name in problem["systems"]}
    for name in problem["if_installed"]:
        if programs.if_there(f"operator, {name}", programs.vllm_python) is not None:
            measured.add(PROGRAM_OF[name])
    makers = {"relay": relay_task, "ggml": ggml_task, "vllm": vllm_task}
    return [
        [
            makers[program](problem, programs, model, kv_type, prefix)
            for model, kv_type in itertools.product(problem["models"], problem["kv_types"])
            for program in makers
            if program in measured and (program != "vllm" or kv_type in VLLM_TYPES)
        ]
        for prefix in problem["prefix"]
    ]


def heads_of(model: str) -> list:
    shape = SHAPES[model]
    return [
        *("--heads", shape.heads, "--kv-heads", shape.kv_heads, "--head-dim", shape.head_dim),
    ]


def sizes_of(problem: dict, prefix: int) -> list:
    batch = ",".join(map(str, problem["batch"]))
    return ["--prefix", prefix, "--context", problem["context"], "--batch", batch] + [
        *("--rounds", problem["rounds"])
    ]


def parameters(problem: dict, program: str, model: str, kv_type: str, prefix: int) -> dict:
    same = ("context", "batch", "rounds", "threads", "layout")
    return dict(program=program, model=model, kv_type=kv_type, prefix=prefix) | {
        name: problem[name] for name in same
    }


READ = 2.2e10  # bytes a second


def guess(problem: dict, model: str, prefix: int, speed: float) -> float:
    """Seconds on 2 cores: the KV of so many layers as no cache holds is filled, then attended in
    each round, without sharing, at `speed` operations a second or as fast as it can be read."""
    shape = SHAPES[model]
    token = shape.kv_bytes_per_token() / shape.layers
    seconds = 1.0
    for batch in problem["batch"]:
        kv = token * (prefix + batch * problem["context"])
        attended = batch * (prefix + problem["context"])
        operations = 4 * shape.heads * shape.head_dim * attended
        round_seconds = max(attended * token / READ, operations / speed)
        seconds += (1 + 120e6 / kv) * (kv / 6e8 + (problem["rounds"] + 1) * round_seconds)
    return seconds


def case_of(problem: dict, model: str, kv_type: str, prefix: int, batch: int) -> dict:
    return dict(
        model=model, kv_type=kv_type, prefix=prefix, context=problem["context"], batch=batch
    )


def timing(case: dict, system: str, found: dict, rounds: int) -> Row:
    low, high = found["seconds_quartile_low"], found["seconds_quartile_high"]
    median = found["seconds_median"]
    return Row(SECTION, case, system, "latency", "s", "lower", median, low, high, rounds)


def exactly(case: dict, system: str, metric: str, unit: str, value: float) -> Row:
    """What is computed, not measured."""
    return Row(SECTION, case, system, metric, unit, "", value, value, value, 1)


def relay_task(problem, programs, model, kv_type, prefix) -> Task:
    command = [programs.binary("relay"), "bench", "op", "--json", "--kv-type", kv_type]
    command += heads_of(model) + sizes_of(problem, prefix)
    command += ["--layout", problem["layout"], "--threads", problem["threads"]]

    def run() -> list[Row]:
        rows = []
        report = programs.run_json(command)
        for found in report["results"]:
            batch = found["batch"]
            case = case_of(problem, model, kv_type, prefix, batch)
            on, off = found["sharing_on"], found["sharing_off"]
            rows += [
                timing(case, "relay", on, found["rounds"]),
                timing(case, "relay-off", off, found["rounds"]),
                exactly(case, "cost model", "latency", "s", on["seconds_predicted"]),
                exactly(case, "cost model, off", "latency", "s", off["seconds_predicted"]),
                exactly(case, "formula", "speed-up", "x", formula(batch, prefix, case["context"])),
                exactly(case, "relay", "share of roofline", "", on["share_of_roofline"]),
                exactly(
                    case, "relay", "difference to sharing off", "rms", found["outputs_differ_by"]
                ),
            ]
        return rows

    named = parameters(problem, "relay", model, kv_type, prefix)
    return Task(SECTION, named, guess(problem, model, prefix, 1.5e11), run)


def ggml_task(problem, programs, model, kv_type, prefix) -> Task:
    command = [programs.binary("relay-ggml-op-bench"), "--kv-type", kv_type]
    command += heads_of(model) + sizes_of(problem, prefix)
    if problem["threads"]:
        command += ["--threads", problem["threads"]]

    def run() -> list[Row]:
        return [
            timing(case_of(problem, model, kv_type, prefix, r["batch"]), "ggml", r, r["rounds"])
            for r in programs.run_json(command)["results"]
        ]

    named = parameters(problem, "ggml", model, kv_type, prefix)
    return Task(SECTION, named, guess(problem, model, prefix, 1.3e10), run)


def vllm_task(problem, programs, model, kv_type, prefix) -> Task:
    """Its Relay, on vLLM's tensors, keeps KV in tiles: a system of its own."""
    python = programs.vllm_python()
    command = [python, VLLM_BENCH / "vllm_op.py", "--dtype", VLLM_TYPES[kv_type]]
    command += heads_of(model) + sizes_of(problem, prefix)
    environment = {"OMP_NUM_THREADS": str(problem["threads"])} if problem["threads"] else {}

    def run() -> list[Row]:
        programs.note_vllm()
        rows = []
        for found in programs.run_into_json(command, environment)["cases"]:
            case = case_of(problem, model, kv_type, prefix, found["batch"])
            for system, key in (("vllm", "vllm_rounds_s"), ("vllm with Relay", "relay_rounds_s")):
                rows.append(Row.of(SECTION, case, system, "latency", "s", "lower", found[key]))
        return rows

    named = parameters(problem, "vllm", model, kv_type, prefix)
    return Task(SECTION, named, 11 + guess(problem, model, prefix, 1e11), run)
