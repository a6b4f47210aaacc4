"""Servers under load: relay serve (sharing on, off, and with llama.cpp's own attention);
llama-server, which is given its best: prompts computed once and restored into each of its slots;
and vLLM without prefix caching, with it, and with Relay. The servers of a case stand side by side
and take turns: a machine's speed may differ by a third from one quarter of an hour to the next."""

import contextlib
import functools
import itertools
import os
import re
import sys
import tempfile
from pathlib import Path

import load
import workload
from fields import Field, Levels
from programs import (
    MODEL_FIELDS,
    VLLM_BENCH,
    VLLM_TYPES,
    Programs,
    clean_environment,
    servers_errors,
)
from shapes import SHAPES
from tasks import EvaluationError, Row, Task, reason_of

SECTION = "serving"
RELAY = {
    "relay": ([], {}),
    "relay-off": ([], {"RELAY_SHARING": "off"}),
    "relay, llama.cpp's attention": (["--relay", "off"], {}),
}
STOCK = {"llama-server": "on", "llama-server, -fa off": "off"}
VLLM = {
    "vllm": ([], {"RELAY_DISABLE": "1"}),
    "vllm, no prefix caching": (["--no-enable-prefix-caching"], {"RELAY_DISABLE": "1"}),
    "vllm with Relay": ([], {}),
}
VLLM_KV_GIB = 2
# What its log says if Relay attends.
VLLM_USES_RELAY = re.compile(r"attention \(\w+\) is computed by")
EXPERIMENTS = ("throughput", "arrivals", "prompts", "without", "levels", "sharers", "trace")

FIELDS = {
    "experiment": Field(str, choices=EXPERIMENTS),
    **MODEL_FIELDS,
    "kv_type": Field(str, default="f16", choices=("f16", "bf16", "q8_0")),
    "system_prompt": Field(int, many=True, default=[], least=0),
    "prompts": Field(int, many=True, default=[1], least=1),
    "levels": Levels(default=[]),
    "without": Field(float, many=True, default=[0.0], least=0),
    "requests": Field(int, many=True, least=1),
    "parallel": Field(int, default=16, least=1),
    "input_mean": Field(float, default=workload.SHAREGPT_INPUT, least=1),
    "output_mean": Field(float, default=workload.SHAREGPT_OUTPUT, least=2),
    "sigma": Field(float, default=1.0, least=0),
    "rates": Field(float, many=True, default=[], least=0.001),
    "bound": Field(float, default=0.0, least=0, about="s/token, of normalised latency p95"),
    "price_per_hour": Field(float, default=0.0, least=0, about="dollars"),
    "time_scale": Field(float, default=1.0, least=0),
    "block_tokens": Field(int, default=32, least=1),
    "max_prompt": Field(int, default=2048, least=1),
    "block_size": Field(int, default=0, least=0, about="of vLLM's cache; 0: its own choice"),
    "threads": Field(int, default=0, least=0, about="of every server; 0: one for each CPU"),
    "systems": Field(str, many=True, choices=(*RELAY, *STOCK, *VLLM)),
    "rounds": Field(int, default=3, least=1),
    "seconds": Field(float, default=60.0, least=1, about="a guess, of one system"),
    "if_installed": Field(bool, default=False, about="leave out what needs a trace or a vLLM"),
}


def points(problem: dict, programs: Programs) -> list[list[Task]]:
    replayed = problem["experiment"] == "trace"
    if replayed and problem["if_installed"]:
        if programs.if_there("serving, trace", programs.trace) is None:
            return []
    file = programs.trace() if replayed else None
    if problem["experiment"] == "arrivals" and not problem["rates"]:
        raise EvaluationError("serving: arrivals need the field 'rates'")
    if replayed and problem["rates"]:
        raise EvaluationError("serving: a trace has arrivals of its own, and no 'rates'")
    if problem["levels"] and (problem["system_prompt"] or problem["prompts"] != [1]):
        raise EvaluationError("serving: 'levels' are instead of 'system_prompt' and 'prompts'")
    if any(share > 1 for share in problem["without"]):
        raise EvaluationError("serving: 'without' is a share, from 0 to 1")
    systems = [name for name in problem["systems"] if is_there(problem, programs, name)]
    if not systems:
        return []
    return [[task_of(problem, programs, case, systems, file)] for case in cases_of(problem)]


def is_there(problem: dict, programs: Programs, system: str) -> bool:
    if system not in VLLM:
        programs.binary("relay" if system in RELAY else "llama-server")
        return True
    if problem["weights"] != problem["kv_type"] or problem["kv_type"] not in VLLM_TYPES:
        raise EvaluationError(
            f"serving: of {system}, 'weights' and 'kv_type' are the same: {', '.join(VLLM_TYPES)}"
        )
    if problem["if_installed"]:
        return programs.if_there(f"serving, {system}", programs.vllm_python) is not None
    programs.vllm_python()
    return True


def cases_of(problem: dict) -> list[dict]:
    made = []
    grid = (problem["system_prompt"] or [0], problem["prompts"], problem["without"])
    for (tokens, prompts, without), count in itertools.product(
        itertools.product(*grid), problem["requests"]
    ):
        levels = problem["levels"] or ([[tokens, prompts]] if tokens else [])
        made.append(
            dict(
                experiment=problem["experiment"],
                model=problem["shape"],
                layers=problem["layers"] or SHAPES[problem["shape"]].layers,
                weights=problem["weights"],
                kv_type=problem["kv_type"],
                prompt=sum(level[0] for level in levels),
                prompts=levels[-1][1] if levels else 0,
                levels="+".join(f"{g}x{t}" for t, g in levels),
                without=without,
                requests=count,
                parallel=min(count, problem["parallel"]),
                input=problem["input_mean"],
                output=problem["output_mean"],
            )
        )
    return made


def levels_of(case: dict) -> list:
    if not case["levels"]:
        return []
    return [
        [int(tokens), int(groups)]
        for groups, tokens in (part.split("x") for part in case["levels"].split("+"))
    ]


def workload_of(problem: dict, case: dict, file, round_number: int, rate=None):
    if file is not None:
        return workload.replay(
            file,
            case["requests"],
            round_number,
            **{k: problem[k] for k in ("time_scale", "block_tokens", "max_prompt")},
        )
    return workload.generate(
        levels_of(case),
        case["requests"],
        round_number,
        rate=rate,
        without=case["without"],
        **{k: problem[k] for k in ("input_mean", "output_mean", "sigma")},
    )


def task_of(problem: dict, programs: Programs, case: dict, systems: list[str], file) -> Task:
    same = (
        "ffn",
        "vocabulary",
        "sigma",
        "rates",
        "rounds",
        "bound",
        "price_per_hour",
        "threads",
    )
    named = dict(systems=", ".join(systems)) | case | {k: problem[k] for k in same}
    if file is not None:
        replayed = ("time_scale", "block_tokens", "max_prompt")
        named |= dict(trace=file.name) | {k: problem[k] for k in replayed}
    if any(system in VLLM for system in systems):
        named |= {"block_size": problem["block_size"]}

    def run() -> list[Row]:
        runs = [Run(problem, programs, case, system) for system in systems]
        return in_turns(problem, programs, case, runs, file)

    return Task(SECTION, named, len(systems) * problem["seconds"], run)


def in_turns(problem: dict, programs: Programs, case: dict, runs: list["Run"], file) -> list[Row]:
    """All rates and rounds of a case, each by one server after the other. A system that fails loses
    only itself."""

    def each(do, first: int = 0) -> None:
        for run in runs[first:] + runs[:first]:
            try:
                with servers_errors():
                    do(run)
            except Exception as error:  # an answer that nobody foresaw is no reason to lose others
                runs.remove(run)
                run.stack.close()  # or it would take time from them
                reason = f"{run.system}: {reason_of(error)}"
                programs.failures.append(reason)
                print(f"\nfailed: {reason}", file=sys.stderr)

    with contextlib.ExitStack() as stack:
        for run in runs:
            stack.push(run.stack)
        first = workload_of(problem, case, file, 0)  # all rounds have its lengths
        each(functools.partial(Run.begin, first=first))
        for rate in problem["rates"] or [None]:
            for number in range(problem["rounds"]):
                work = workload_of(problem, case, file, number, rate)
                turn = functools.partial(Run.round, work=work, number=number, rate=rate)
                each(turn, number % max(1, len(runs)))
            each(functools.partial(Run.end, rate=rate))
    if not runs:
        raise EvaluationError("\n".join(programs.failures))
    return [row for run in runs for row in run.made]


class Run:
    """One system's server over all rates and rounds of a case."""

    def __init__(self, problem, programs, case, system) -> None:
        self.problem, self.programs, self.case, self.system = problem, programs, case, system
        self.made: list[Row] = []
        self.found: dict[str, list] = {}  # of this rate: metric -> unit, which is better, values
        self.memory: list[float] = []
        self.stack = contextlib.ExitStack()  # its server

    def add(self, case: dict, metric: str, unit: str, better: str, values: list[float]) -> None:
        self.made.append(Row.of(SECTION, case, self.system, metric, unit, better, values))

    def begin(self, first: workload.Workload) -> None:
        """Starts the server, and has it compute the prompts."""
        saves = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="relay-slots-"))
        self.up = self.stack.enter_context(self.server(first, saves))
        self.up.wait_ready(600)
        self.check_attention(self.up)
        for what, mean in workload.own_means(first).items():
            self.add(self.case, what, "tokens", "", [mean])
        prime = self.prime(self.up, first)
        if first.prefixes:
            self.add(self.case, "prompts computed", "s", "lower", [prime])
        self.up.pause()  # while others have their turn

    def round(self, work: workload.Workload, number: int, rate: float | None) -> None:
        self.up.resume()
        self.restore(self.up, work)
        answers = load.send(self.up, work.requests)
        for metric, (unit, better, value) in load.measures(work.requests, answers).items():
            self.found.setdefault(metric, [unit, better]).append(value)
        self.memory.append(resident_bytes(self.up.process.pid))
        together = rate is None and self.case["requests"] == self.case["parallel"]
        if number == 0 and together and self.system not in VLLM:
            self.add(self.case, "KV held", "B", "lower", [self.kv_bytes(self.up, answers)])
        self.up.pause()

    def end(self, rate: float | None) -> None:
        """The rows of a rate."""
        case = self.case | ({} if rate is None else {"rate": rate})
        for metric, (unit, better, *values) in self.found.items():
            self.add(case, metric, unit, better, values)
        self.add(case, "resident memory", "B", "lower", self.memory)
        speeds = self.found["output throughput"][2:]
        for told in load.prices(self.problem["price_per_hour"], speeds):
            self.add(case, *told)
        if rate is not None and self.problem["bound"] > 0:
            self.add(case, "bound", "s/token", "", [self.problem["bound"]])
        self.found, self.memory = {}, []

    def server(self, work: workload.Workload, saves: str):
        from servers import Server, free_port

        longest = work.longest + 16
        address = ["--host", "127.0.0.1", "--port", str(free_port())]
        if self.system in VLLM:
            command, environment = self.vllm(longest)
        elif self.system in STOCK:
            command, environment = self.llama_server(longest, saves), {}
        else:
            command, environment = self.relay(longest, work)
        logs = self.programs.out / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        log = logs / f"{re.sub('[^a-z0-9]+', '-', self.system.lower())}.log"
        command = [str(part) for part in (*command, *address)]
        return Server(self.system, command, clean_environment(**environment), log)

    def model(self) -> list:
        threads = self.problem["threads"] or os.cpu_count()  # by themselves they differ
        return ["-m", self.programs.model(self.problem), "-t", threads]

    def llama_server(self, longest: int, saves: str) -> list:
        parallel, kv_type = self.case["parallel"], self.case["kv_type"]
        command = [self.programs.binary("llama-server"), *self.model(), "-np", parallel]
        command += ["-c", parallel * longest, "-fa", STOCK[self.system], "--no-webui"]
        # A KV cache for each slot, which its attention reads fastest, as in the demo.
        command += ["--no-kv-unified", "--cache-ram", "0", "--slot-save-path", f"{saves}/"]
        return command + ["-ctk", kv_type, "-ctv", kv_type]

    def relay(self, longest: int, work: workload.Workload) -> tuple[list, dict]:
        more, environment = RELAY[self.system]
        parallel, kv_type = self.case["parallel"], self.case["kv_type"]
        # Room for each prompt once, so that resident memory shows what is shared.
        own = work.longest_own + 16
        cells = sum(len(prefix) for prefix in work.prefixes) + parallel * own + 256
        command = [self.programs.binary("relay"), "serve", *self.model(), *more]
        command += ["--parallel", parallel, "-c", cells, "--max-model-len", longest]
        command += ["--max-queue", self.case["requests"]]
        command += ["--cache-type-k", kv_type, "--cache-type-v", kv_type]
        return command, environment

    def vllm(self, longest: int) -> tuple[list, dict]:
        more, environment = VLLM[self.system]
        python, case = self.programs.vllm_python(), self.case
        self.programs.note_vllm()
        model = self.programs.vllm_model(case["model"], case["layers"], longest)
        command = [python, VLLM_BENCH / "vllm_cli.py", "serve", model, *more]
        command += ["--load-format", "dummy", "--dtype", VLLM_TYPES[case["weights"]]]
        command += ["--max-model-len", longest, "--max-num-seqs", case["parallel"]]
        command += ["--enable-prompt-tokens-details"]
        command += ["--enforce-eager"] * (self.programs.device == "cpu")
        if size := self.problem["block_size"]:
            command += ["--block-size", size]
        if threads := self.problem["threads"]:
            environment = environment | {"OMP_NUM_THREADS": str(threads)}
        return command, environment | {
            "VLLM_CPU_KVCACHE_SPACE": str(VLLM_KV_GIB),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }

    def check_attention(self, server) -> None:
        """That vLLM has not silently left Relay aside, or taken it."""
        if self.system in VLLM:
            used = VLLM_USES_RELAY.search(server.log.read_text(errors="replace"))
            if bool(used) != (self.system == "vllm with Relay"):
                raise EvaluationError(
                    f"{self.system}: Relay is {'' if used else 'not '}in use; "
                    "python -m relay_attention.doctor says why"
                )

    def prime(self, server, work: workload.Workload) -> float:
        """Computes each prefix once, outside of what is measured; seconds."""
        seconds, parallel = 0.0, self.case["parallel"]
        for number, prefix in enumerate(work.prefixes):
            request = workload.Request(0.0, prefix, 1)
            if self.system in STOCK:
                slot = number % parallel
                (answer,) = load.send(server, [request], id_slot=slot)
                name = {"filename": f"prompt-{number}"}
                server.json("POST", f"/slots/{slot}?action=save", name)
            else:
                (answer,) = load.send(server, [request])
            seconds += answer.last
        return seconds

    def restore(self, server, work: workload.Workload) -> None:
        """Before each round, as requests that begin with no prompt or another one overwrite it."""
        if self.system in STOCK and work.prefixes:
            for slot in range(self.case["parallel"]):
                name = {"filename": f"prompt-{slot % len(work.prefixes)}"}
                server.json("POST", f"/slots/{slot}?action=restore", name)

    def kv_bytes(self, server, answers: list) -> float:
        if self.system in STOCK:
            shape = SHAPES[self.case["model"]]
            element = {"f16": 2, "bf16": 2, "q8_0": 34 / 32}[self.case["kv_type"]]
            token = shape.kv_bytes_per_token(1) / shape.layers * self.case["layers"] * element
            return token * sum(a.prompt_tokens + a.completion_tokens for a in answers)
        text = server.request("GET", "/metrics", timeout=10)[1].decode()
        found = re.search(r"^relay:kv_bytes_used(?:\{.*\})? (\S+)$", text, re.M)
        if found is None:
            raise EvaluationError("relay serve's /metrics does not tell relay:kv_bytes_used")
        return float(found[1])


def resident_bytes(pid: int) -> float:
    """Of a process and those that it started."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return 1024.0 * int(found[1]) + sum(resident_bytes(int(child)) for child in children)
