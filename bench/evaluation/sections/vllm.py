"""A whole vLLM, with Relay and without: plugins/vllm/bench, on CPUs and on GPUs."""

import csv
import tempfile
from pathlib import Path
from types import SimpleNamespace

from fields import Field
from programs import VLLM_BENCH, Programs
from tasks import Row, Task
from workload import SHAREGPT_INPUT, SHAREGPT_OUTPUT

NAMES = {"vLLM": "vllm", "Relay": "vllm with Relay", "no caching": "vllm, no prefix caching"}
PERCENTILES = (50, 95, 99)


# --- Decode steps -----------------------------------------------------------------------------

STEP_FIELDS = {
    "shape": Field(str, default="llama-1b"),
    "prefix": Field(int, many=True, least=1),
    "batch": Field(int, many=True, least=1),
    "context": Field(int, default=16, least=1),
    "rounds": Field(int, default=5, least=1),
    "if_installed": Field(bool, default=False),
}


def steps(problem: dict, programs: Programs) -> list[list[Task]]:
    if not is_there(problem, programs, "vllm_steps"):
        return []
    if programs.device == "cuda":
        return [[cuda_steps(problem, programs)]]
    return [[cpu_steps(problem, programs, prefix)] for prefix in problem["prefix"]]


def is_there(problem: dict, programs: Programs, what: str) -> bool:
    if problem["if_installed"]:
        return programs.if_there(what, programs.vllm_python) is not None
    programs.vllm_python()
    return True


def step_rows(shape: str, prefix: int, context: int, batch: int, vllm: list, relay: list) -> list:
    case = dict(model=shape, prefix=prefix, context=context, batch=batch)
    return [
        Row.of("vllm_steps", case, system, "decode step", "s", "lower", seconds)
        for system, seconds in (("vllm", vllm), ("vllm with Relay", relay))
    ]


def cpu_steps(problem: dict, programs: Programs, prefix: int) -> Task:
    command = [programs.vllm_python(), VLLM_BENCH / "vllm_step.py", "--prefix", prefix]
    command += ["--batch", ",".join(map(str, problem["batch"])), "--context", problem["context"]]
    command += ["--rounds", problem["rounds"]]

    def run() -> list[Row]:
        rows = []
        for found in programs.run_into_json(command)["results"]:
            if found["what"].startswith("decode"):
                batch = int(found["what"].split()[1])
                rows += step_rows(
                    "llama-1b", prefix, problem["context"], batch, found["vllm"], found["relay"]
                )
        return rows

    named = dict(prefix=prefix) | {k: problem[k] for k in ("batch", "context", "rounds")}
    return Task("vllm_steps", named, 90 + prefix / 40, run)


def cuda_steps(problem: dict, programs: Programs) -> Task:
    cases = [f"{p}x{b}" for p in problem["prefix"] for b in problem["batch"]]
    command = [programs.vllm_python(), VLLM_BENCH / "cuda_step.py", "--shape", problem["shape"]]
    command += ["--cases", ",".join(cases), "--rounds", problem["rounds"]]

    def run() -> list[Row]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "steps.csv"
            programs.run([*command, "--csv", file])
            turns: dict[str, list[dict]] = {}
            with file.open(newline="") as lines:
                for turn in csv.DictReader(lines):
                    turns.setdefault(turn["case"], []).append(turn)
        rows = []
        for case, found in turns.items():
            prefix, batch = map(int, case.split("x"))
            vllm, relay = (
                [1e-3 * float(turn[k]) for turn in found] for k in ("vllm_ms", "relay_ms")
            )
            rows += step_rows(problem["shape"], prefix, 16, batch, vllm, relay)
        return rows

    named = {k: problem[k] for k in ("shape", "prefix", "batch", "rounds")}
    return Task("vllm_steps", named, 240 + 20 * len(cases), run)


# --- Serving: vLLM's own `bench serve` ----------------------------------------------------------

SERVING_FIELDS = {
    "shape": Field(str, default="llama-1b"),
    "prefix": Field(int, many=True, least=1),
    "prefixes": Field(int, many=True, default=[1], least=1),
    "input_mean": Field(float, default=SHAREGPT_INPUT, least=1),
    "output_mean": Field(float, default=SHAREGPT_OUTPUT, least=1),
    "requests": Field(int, default=64, least=1),
    "concurrency": Field(int, default=32, least=1),
    "rates": Field(float, many=True, default=[], least=0.001),
    "rounds": Field(int, default=3, least=1),
    "if_installed": Field(bool, default=False),
}


def serving(problem: dict, programs: Programs) -> list[list[Task]]:
    if not is_there(problem, programs, "vllm_serving"):
        return []
    return [[serve_task(problem, programs, prefix)] for prefix in problem["prefix"]]


def serve_task(problem: dict, programs: Programs, prefix: int) -> Task:
    rates = [*problem["rates"], float("inf")]
    command = [programs.vllm_python(), VLLM_BENCH / "vllm_serve.py"]
    command += ["--variants", "no-caching,vllm,relay", "--no-offline"]
    command += ["--prefix", prefix, "--prefixes", ",".join(map(str, problem["prefixes"]))]
    command += ["--rates", ",".join(map(str, rates))]
    for name in ("shape", "input_mean", "output_mean", "requests", "concurrency", "rounds"):
        command += ["--" + name.replace("_", "-"), problem[name]]
    named = dict(prefix=prefix) | {k: v for k, v in problem.items() if k != "prefix"}

    def run() -> list[Row]:
        return serving_rows(problem, prefix, rates, programs.run_into_json(command))

    cases = len(problem["prefixes"]) * len(rates)
    return Task("vllm_serving", named, problem["rounds"] * 3 * (60 + 60 * cases), run)


def serving_rows(problem: dict, prefix: int, rates: list[float], report: dict) -> list[Row]:
    rows = []
    cases = [(prefixes, rate) for prefixes in problem["prefixes"] for rate in rates]
    for name, system in NAMES.items():
        runs = report[name]["serve"]
        for number, (prefixes, rate) in enumerate(cases):
            found = [run[number] for run in runs]
            case = dict(
                model=problem["shape"], prompt=prefix, prompts=prefixes,
                rate=rate if rate != float("inf") else "all at once",
                input=problem["input_mean"], output=problem["output_mean"],
            )  # fmt: skip

            def add(metric, unit, better, key, scale=1.0, found=found, case=case, system=system):
                values = [scale * run[key] for run in found]
                rows.append(Row.of("vllm_serving", case, system, metric, unit, better, values))

            add("output throughput", "tokens/s", "higher", "output_throughput")
            add("requests", "1/s", "higher", "request_throughput")
            for p in PERCENTILES:
                add(f"time to first token p{p}", "s", "lower", f"p{p}_ttft_ms", 1e-3)
                add(f"inter-token latency p{p}", "s", "lower", f"p{p}_itl_ms", 1e-3)
                key = f"p{p}_normalised_ms"
                add(f"normalised latency p{p}", "s/token", "lower", key, 1e-3)
    return rows


STEPS = SimpleNamespace(FIELDS=STEP_FIELDS, points=steps)
SERVING = SimpleNamespace(FIELDS=SERVING_FIELDS, points=serving)
