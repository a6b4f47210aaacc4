"""An unmodified llama.cpp with Relay's module and without: bench/llama_cpp.py."""

import csv
import sys
import tempfile
from pathlib import Path

from fields import Field
from programs import MODEL_FIELDS, ROOT, Programs
from tasks import EvaluationError, Row, Task

SECTION = "llama_cpp"
SYSTEMS = {"fa-on": "llama.cpp", "fa-off": "llama.cpp, -fa off", "relay": "llama.cpp with Relay"}
FIELDS = {
    **MODEL_FIELDS,
    "prompt": Field(int, many=True, least=0),
    "batch": Field(int, many=True, least=1),
    "tokens": Field(int, default=16, least=1),
    "rounds": Field(int, default=3, least=1),
    "seconds": Field(float, default=300.0, least=1, about="a guess"),
}


def points(problem: dict, programs: Programs) -> list[list[Task]]:
    programs.binary("llama-batched-bench")
    return [[task_of(problem, programs, prompt)] for prompt in problem["prompt"]]


def task_of(problem: dict, programs: Programs, prompt: int) -> Task:
    def run() -> list[Row]:
        model = programs.model(problem)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "rounds.csv"
            command = [sys.executable, ROOT / "bench/llama_cpp.py", "--model", model]
            command += ["--npp", prompt, "--npl", ",".join(map(str, problem["batch"]))]
            command += ["--ntg", problem["tokens"], "--rounds", problem["rounds"], "--csv", file]
            command += ["--bin", programs.build / "bin"]
            command += ["--module", programs.build / "lib/libggml-relay.so"]
            programs.run(command)
            return rows_of(problem, file)

    named = dict(prompt=prompt) | {
        k: v for k, v in problem.items() if k not in ("prompt", "seconds")
    }
    return Task(SECTION, named, problem["seconds"] / len(problem["prompt"]), run)


def rows_of(problem: dict, file: Path) -> list[Row]:
    speeds: dict[tuple, list[float]] = {}
    with file.open(newline="") as lines:
        for found in csv.DictReader(lines):
            for phase in ("prefill", "decode"):
                if phase == "decode" or int(found["npp"]) > 0:
                    key = (found["config"], phase, int(found["npp"]), int(found["npl"]))
                    speeds.setdefault(key, []).append(float(found[f"{phase}_tps"]))
    if not speeds:
        raise EvaluationError("bench/llama_cpp.py measured nothing")
    rows = []
    for (config, phase, prompt, batch), values in speeds.items():
        case = dict(model=problem["shape"], prefix=prompt, batch=batch)
        system, metric = SYSTEMS[config], f"{phase} speed"
        rows.append(Row.of(SECTION, case, system, metric, "tokens/s", "higher", values))
    return rows
