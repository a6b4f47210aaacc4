"""A recorded trace on paper: `relay bench trace` finds what each decode step shares, and asks the
cost model what that saves. (Its replay against servers is a problem of `serving`.)"""

import itertools

from fields import Field
from programs import Programs
from tasks import Row, Task

SECTION = "trace"
FIELDS = {
    "shapes": Field(str, many=True),
    "kv_type": Field(str, default="f16", choices=("f32", "f16", "bf16", "q8_0")),
    "block_size": Field(int, default=512, least=1),
    "token_ms": Field(float, many=True, default=[50.0], least=0.001),
    "max_batch": Field(int, many=True, default=[0], least=0),
    "every": Field(float, default=10.0, least=0.001, about="seconds between steps looked at"),
    "threads": Field(int, default=0, least=0),
    "if_installed": Field(bool, default=False, about="without a trace, leave it out"),
}


def points(problem: dict, programs: Programs) -> list[list[Task]]:
    if problem["if_installed"]:
        if programs.if_there(SECTION, programs.trace) is None:
            return []
    file = programs.trace()
    grid = itertools.product(problem["shapes"], problem["token_ms"], problem["max_batch"])
    return [[task_of(problem, programs, file, *case)] for case in grid]


def task_of(problem, programs, file, shape: str, token_ms: float, max_batch: int) -> Task:
    same = {k: problem[k] for k in ("kv_type", "every")}
    case = dict(trace=file.name, model=shape, token_ms=token_ms, max_batch=max_batch) | same
    command = [programs.binary("relay"), "bench", "trace", "--json", "--trace", file]
    command += ["--shape", shape, "--token-ms", token_ms, "--max-batch", max_batch]
    command += ["--kv-type", problem["kv_type"], "--every", problem["every"]]
    command += ["--block-size", problem["block_size"], "--threads", problem["threads"]]

    def run() -> list[Row]:
        return rows_of(case, programs.run_json(command))

    named = case | {k: problem[k] for k in ("block_size", "threads")}
    return Task(SECTION, named, 20 / problem["every"] + 1, run)


def rows_of(case: dict, report: dict) -> list[Row]:
    """Over the steps: medians and quartiles; of levels, shares of all the KV that is attended."""
    steps, mean = report["steps"], report["mean"]
    rows = []

    def add(case: dict, metric: str, unit: str, values: list[float]) -> None:
        rows.append(Row.of(SECTION, case, "relay", metric, unit, "", values))

    def once(case: dict, metric: str, unit: str, value: float) -> None:
        add(case, metric, unit, [value])

    add(case, "requests at once", "", [s["batch"] for s in steps])
    add(case, "read without sharing over with", "x",
        [s["kv_slots_attended"] / s["kv_slots_read"] for s in steps])  # fmt: skip
    add(case, "attention without sharing over with", "x",
        [s["seconds_off"] / s["seconds_on"] for s in steps])  # fmt: skip
    once(case, "read without sharing over with, all steps", "x",
         mean["kv_slots_attended"] / mean["kv_slots_read"])  # fmt: skip
    once(case, "attention without sharing over with, all steps", "x",
         mean["seconds_off"] / mean["seconds_on"])  # fmt: skip
    once(case, "attention of a step, sharing", "s", mean["seconds_on"])
    once(case, "attention of a step, no sharing", "s", mean["seconds_off"])
    rest = {k: mean[k] for k in ("kv_slots_attended", "kv_slots_read")}
    for number, level in enumerate(mean["levels"], 1):
        for name in rest:
            rest[name] -= level[name]
        add_level(once, case, f"level {number}", level, mean)
    add_level(once, case, "own", rest, mean)
    for step in steps:
        at = case | {"time": step["time"]}
        for number, level in enumerate(step["levels"], 1):
            share = level["kv_slots_attended"] / step["kv_slots_attended"]
            once(at | {"level": f"level {number}"}, "share of KV attended, step", "", share)
        once(at, "saved share of attention", "", 1 - step["seconds_on"] / step["seconds_off"])
        once(at, "requests at once", "", step["batch"])
    return rows


def add_level(once, case: dict, level: str, reads: dict, mean: dict) -> None:
    at = case | {"level": level}
    once(at, "share of KV attended", "", reads["kv_slots_attended"] / mean["kv_slots_attended"])
    once(at, "share of KV read", "", reads["kv_slots_read"] / mean["kv_slots_read"])
