"""A whole vLLM, with Relay and without: plugins/vllm/bench, on CPUs and on GPUs."""

import csv
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import load
import workload
from fields import Field
from programs import VLLM_BENCH, Programs
from tasks import EvaluationError, Row, Task
from workload import SHAREGPT_INPUT, SHAREGPT_OUTPUT

NAMES = {"vLLM": "vllm", "Relay": "vllm with Relay", "no caching": "vllm, no prefix caching"}


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
    fixed = "context" if programs.device == "cuda" else "shape"
    if problem[fixed] != (always := STEP_FIELDS[fixed].default):
        raise EvaluationError(f"vllm_steps: on this device '{fixed}' is always {always}")
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
        programs.note_vllm()
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
        programs.note_vllm()
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
    return Task("vllm_steps", named, 130 + 12 * len(cases), run)


# --- Serving: vLLM's own `bench serve`, one variant of vLLM a task -------------------------------

VARIANTS = {"no-caching": "no caching", "vllm": "vLLM", "relay": "Relay"}
SERVING_FIELDS = {
    "shape": Field(str, default="llama-1b"),
    "variants": Field(str, many=True, default=list(VARIANTS), choices=tuple(VARIANTS)),
    "prefix": Field(int, many=True, least=1),
    "prefixes": Field(int, many=True, default=[1], least=1),
    "input_mean": Field(float, default=SHAREGPT_INPUT, least=1),
    "output_mean": Field(float, default=SHAREGPT_OUTPUT, least=1),
    "requests": Field(int, default=64, least=1, about="of a case, at least"),
    "seconds": Field(float, default=1.0, least=0.1, about="for which requests arrive, at least"),
    "concurrency": Field(int, default=32, least=1),
    "rates": Field(float, many=True, default=[math.inf], least=0.001, about="inf: all at once"),
    "bound": Field(float, default=0.0, least=0, about="s/token, of normalised latency p95: no "
                   "higher rate is tried once it is broken"),
    "price_per_hour": Field(float, default=0.0, least=0, about="dollars"),
    "rounds": Field(int, default=3, least=1),
    "if_installed": Field(bool, default=False),
}  # fmt: skip


def serving(problem: dict, programs: Programs) -> list[list[Task]]:
    if not is_there(problem, programs, "vllm_serving"):
        return []
    return [
        [serve_task(problem, programs, prefix, variant) for variant in problem["variants"]]
        for prefix in problem["prefix"]
    ]


def requests_of(problem: dict, rate: float) -> int:
    """As vllm_serve.py has it."""
    if math.isinf(rate):
        return problem["requests"]
    return max(problem["requests"], round(rate * problem["seconds"]))


def serve_task(problem: dict, programs: Programs, prefix: int, variant: str) -> Task:
    command = [programs.vllm_python(), VLLM_BENCH / "vllm_serve.py", "--no-offline"]
    command += ["--variants", variant, "--prefix", prefix]
    for name in ("prefixes", "rates"):
        command += ["--" + name, ",".join(map(str, problem[name]))]
    same = ("shape", "input_mean", "output_mean", "requests", "seconds", "concurrency", "rounds")
    for name in same:
        command += ["--" + name.replace("_", "-"), problem[name]]
    if problem["bound"]:
        command += ["--bound", 1e3 * problem["bound"]]
    named = dict(variant=variant, prefix=prefix)
    named |= {k: v for k, v in problem.items() if k not in ("variants", "prefix", "if_installed")}

    def run() -> list[Row]:
        programs.note_vllm()
        return serving_rows(problem, prefix, programs.run_into_json(command))

    on_gpu = programs.device == "cuda"
    start, tokens_per_second = (100, 3000) if on_gpu else (70, 20)
    seconds = start
    for rate in problem["rates"]:
        count = requests_of(problem, rate)
        arriving = 0 if math.isinf(rate) else count / rate
        answering = count * problem["output_mean"] / tokens_per_second
        seconds += len(problem["prefixes"]) * (15 + max(arriving, answering))
    return Task("vllm_serving", named, problem["rounds"] * seconds, run)


def serving_rows(problem: dict, prefix: int, report: dict) -> list[Row]:
    """Of each variant that the report has. A case that the bound left out in any round is left out:
    the rounds that did measure it are the luckier ones."""
    rows = []
    cases = [(prefixes, rate) for prefixes in problem["prefixes"] for rate in problem["rates"]]
    for name, runs in report.items():
        for number, (prefixes, rate) in enumerate(cases):
            found = [run[number] for run in runs["serve"]]
            if None in found:
                continue
            case = case_of(problem, prefix, prefixes, rate)

            def add(metric, unit, better, values, case=case, system=NAMES[name]):
                rows.append(Row.of("vllm_serving", case, system, metric, unit, better, values))

            def told(key, scale=1.0, found=found):
                return [scale * run[key] for run in found]

            add("output throughput", "tokens/s", "higher", told("output_throughput"))
            # At a rate below the highest, the price would be the rate's.
            per_hour = problem["price_per_hour"] if math.isinf(rate) else 0.0
            for price in load.prices(per_hour, told("output_throughput")):
                add(*price)
            add("requests", "1/s", "higher", told("request_throughput"))
            for p in load.PERCENTILES:
                add(f"time to first token p{p}", "s", "lower", told(f"p{p}_ttft_ms", 1e-3))
                add(f"inter-token latency p{p}", "s", "lower", told(f"p{p}_itl_ms", 1e-3))
                add(f"normalised latency p{p}", "s/token", "lower",
                    told(f"p{p}_normalised_ms", 1e-3))  # fmt: skip
            if problem["bound"] and not math.isinf(rate):
                add("bound", "s/token", "", [problem["bound"]])
            add_lengths(add, case, problem, requests_of(problem, rate))
    return rows


def case_of(problem: dict, prefix: int, prefixes: int, rate: float) -> dict:
    return dict(
        model=problem["shape"], prompt=prefix, prompts=prefixes,
        rate="all at once" if math.isinf(rate) else rate, requests=requests_of(problem, rate),
        concurrency=problem["concurrency"], input=problem["input_mean"],
        output=problem["output_mean"],
    )  # fmt: skip


def add_lengths(add, case: dict, problem: dict, count: int) -> None:
    levels = [[case["prompt"], case["prompts"]]]
    means = {k: problem[k] for k in ("input_mean", "output_mean")}
    work = workload.generate(levels, count, 0, **means, sigma=1.0)
    for what, mean in workload.own_means(work).items():
        add(what, "tokens", "", [mean])


# --- Throughput on GPUs: all requests at once, many prompts in one engine ------------------------

THROUGHPUT_FIELDS = {
    "shape": Field(str, default="llama-2-7b"),
    "variants": Field(str, many=True, default=list(VARIANTS), choices=tuple(VARIANTS)),
    "prefix": Field(int, many=True, least=1),
    "requests": Field(int, default=256, least=1),
    "concurrency": Field(int, default=256, least=1),
    "price_per_hour": Field(float, default=0.0, least=0, about="dollars"),
    "rounds": Field(int, default=2, least=1),
    "if_installed": Field(bool, default=False),
}


def throughput(problem: dict, programs: Programs) -> list[list[Task]]:
    if programs.device != "cuda":
        raise EvaluationError("vllm_throughput runs on GPUs only (--device cuda); [[vllm_serving]] "
                              "measures it on CPUs")  # fmt: skip
    if not is_there(problem, programs, "vllm_throughput"):
        return []
    engines: dict[bool, list[str]] = {}  # with Relay, and without: also without prefix caching
    for variant in problem["variants"]:
        engines.setdefault(variant == "relay", []).append(variant)
    return [[throughput_task(problem, programs, variants) for variants in engines.values()]]


def throughput_task(problem: dict, programs: Programs, variants: list[str]) -> Task:
    """One engine, in each of the variants that it can be."""
    cases = ",".join(f"{prefix}x{problem['requests']}" for prefix in problem["prefix"])
    command = [programs.vllm_python(), VLLM_BENCH / "cuda_throughput.py", "--cases", cases]
    command += ["--variants", ",".join(variants)]
    for name in ("shape", "concurrency", "rounds"):
        command += ["--" + name, problem[name]]

    def run() -> list[Row]:
        programs.note_vllm()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rounds.csv"
            programs.run([*command, "--csv", file])
            return throughput_rows(problem, file)

    named = dict(variants=", ".join(variants))
    named |= {k: v for k, v in problem.items() if k not in ("variants", "if_installed")}
    seconds = problem["rounds"] * (80 + 25 * len(problem["prefix"]) * len(variants))
    return Task("vllm_throughput", named, seconds, run)


def throughput_rows(problem: dict, file: Path) -> list[Row]:
    with file.open(newline="") as lines:
        rounds = list(csv.DictReader(lines))
    of_all = dict(input_mean=SHAREGPT_INPUT, output_mean=SHAREGPT_OUTPUT) | problem
    rows = []
    for variant, prefix in dict.fromkeys((r["variant"], int(r["prompt"])) for r in rounds):
        found = [r for r in rounds if (r["variant"], int(r["prompt"])) == (variant, prefix)]
        case = case_of(of_all, prefix, 1, math.inf)

        def add(metric, unit, better, values, case=case, system=NAMES[VARIANTS[variant]]):
            rows.append(Row.of("vllm_throughput", case, system, metric, unit, better, values))

        for metric, unit, key in (("output throughput", "tokens/s", "tokens_per_s"),
                                  ("requests", "1/s", "requests_per_s")):  # fmt: skip
            add(metric, unit, "higher", [float(r[key]) for r in found])
        speeds = [float(r["tokens_per_s"]) for r in found]
        for price in load.prices(problem["price_per_hour"], speeds):
            add(*price)
        add_lengths(add, case, of_all, problem["requests"])
    return rows


STEPS = SimpleNamespace(FIELDS=STEP_FIELDS, points=steps)
SERVING = SimpleNamespace(FIELDS=SERVING_FIELDS, points=serving)
THROUGHPUT = SimpleNamespace(FIELDS=THROUGHPUT_FIELDS, points=throughput)
