"""The operator on an NVIDIA GPU: bench/cuda/op_bench.py, one set of its problems a task."""

import csv
import tempfile
from pathlib import Path

from fields import Field
from programs import ROOT, Programs
from shapes import formula
from tasks import EvaluationError, Row, Task

SECTION = "cuda_operator"
FIELDS = {
    "sets": Field(str, many=True),
    "only": Field(str, default=""),
    "competitors": Field(str, many=True, default=[]),
    "reps": Field(int, default=0, least=0),
    "seconds": Field(int, default=540, least=1),
}


def points(problem: dict, programs: Programs) -> list[list[Task]]:
    return [[task_of(problem, programs, name)] for name in problem["sets"]]


def task_of(problem: dict, programs: Programs, name: str) -> Task:
    command = [programs.cuda_python(), ROOT / "bench/cuda/op_bench.py", "--set", name]
    command += ["--only", problem["only"], "--reps", problem["reps"]]
    command += ["--budget", problem["seconds"]]
    if problem["competitors"]:
        command += ["--with", ",".join(problem["competitors"])]

    def run() -> list[Row]:
        with tempfile.TemporaryDirectory() as folder:
            said = programs.run([*command, "--out", folder])
            if "out of time" in said:
                raise EvaluationError(
                    f"cuda_operator, {name}: op_bench.py ran out of time; raise the field 'seconds'"
                )
            programs.notes += [
                f"cuda_operator, {line.removeprefix('left out: ')}"
                for line in said.splitlines()
                if line.startswith("left out: ")
            ]
            (file,) = Path(folder).glob("*.csv")
            return rows_of(file)

    named = dict(set=Path(name).stem) | {k: problem[k] for k in ("only", "competitors", "reps")}
    return Task(SECTION, named, problem["seconds"] / 2, run)


def rows_of(file: Path) -> list[Row]:
    """The better of plain launch and CUDA graph of each case and competitor; the spread that
    op_bench.py tells is that of the 10th to the 90th percentile."""
    best: dict[tuple, Row] = {}
    with file.open(newline="") as lines:
        for found in csv.DictReader(lines):
            if not found["median_us"] or found["competitor"] == "relay-plan":
                continue
            heads = f"{found['q_heads']}/{found['kv_heads']}x{found['dim']}"
            case = dict(model=found["model"] or heads, heads=heads, levels=found["levels"])
            case |= {k: int(found[name]) for k, name in
                     (("prefix", "prefix"), ("context", "own"), ("batch", "batch"))}  # fmt: skip
            median, low, high = (1e-6 * float(found[k]) for k in ("median_us", "p10_us", "p90_us"))
            name, n = found["competitor"], int(found["n"])
            row = Row(SECTION, case, name, "latency", "s", "lower", median, low, high, n)
            if row.key() not in best or median < best[row.key()].median:
                best[row.key()] = row
            gain = formula(case["batch"], case["prefix"], case["context"])
            paper = Row(SECTION, case, "formula", "speed-up", "x", "", gain, gain, gain, 1)
            best[paper.key()] = paper
    return list(best.values())
