"""The operator on an NVIDIA GPU: bench/cuda/op_bench.py, one set of its problems a task."""

import csv
import json
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
    "jit": Field(bool, default=False, about="let FlashInfer compile what it lacks"),
    "seconds": Field(int, default=240, least=1, about="a guess"),
}
# Relative errors in bf16 and fp8 are at most a few percent; what is further off computes something
# else, and its time tells nothing.
WRONG = 0.2


def points(problem: dict, programs: Programs) -> list[list[Task]]:
    return [[task_of(problem, programs, name)] for name in problem["sets"]]


def task_of(problem: dict, programs: Programs, name: str) -> Task:
    command = [programs.cuda_python(), ROOT / "bench/cuda/op_bench.py", "--set", name]
    command += ["--library", programs.cuda_library(), "--only", problem["only"]]
    # What there is no time for is told, as what is missing; so is what it has measured kept.
    command += ["--reps", problem["reps"], "--budget", 2 * problem["seconds"]]
    if problem["competitors"]:
        command += ["--with", ",".join(problem["competitors"])]
    if problem["jit"]:
        command.append("--jit")

    def run() -> list[Row]:
        with tempfile.TemporaryDirectory() as folder:
            said = programs.run([*command, "--out", folder]).splitlines()
            left_out = [line for line in said if line.startswith("left out: ")]
            left_out += [line for line in said if line.endswith(" left out")]
            (file,) = Path(folder).glob("*.csv")
            about = json.loads(file.with_suffix(".json").read_text())["about"]
            programs.versions |= versions_of(about)
            rows, wrong = rows_of(file)
        left_out += [f"{system}: wrong results" for system in wrong]
        if not any(row.system == "relay" for row in rows):
            raise EvaluationError("\n".join(["op_bench.py measured no Relay", *left_out]))
        notes = (line.removeprefix("left out: ") for line in left_out)
        what = f"{SECTION}, {problem['only'].strip('^ ') or name}"
        programs.notes += [f"{what}, {note}" for note in notes]
        return rows

    same = ("only", "competitors", "reps", "jit")
    named = dict(set=Path(name).stem) | {k: problem[k] for k in same}
    return Task(SECTION, named, problem["seconds"], run)


def versions_of(about: dict) -> dict[str, str]:
    """What op_bench.py tells of itself. A peer's source names its engine and version."""
    found = {name: about[name] for name in ("driver", "cuda", "torch") if about.get(name)}
    peers = {k: v for k, v in about["sources"].items() if k in ("fa3", "flashinfer") and v}
    return found | {k: v.removeprefix(f"{k}-") for k, v in peers.items()}


def rows_of(file: Path) -> tuple[list[Row], list[str]]:
    """The better of plain launch and CUDA graph of each case and competitor; beside them the limit
    of the hardware: what reading each KV byte once takes, or the products, whichever is longer.
    And the competitors that computed something else."""
    best: dict[tuple, Row] = {}
    wrong: dict[str, None] = {}
    with file.open(newline="") as lines:
        for found in csv.DictReader(lines):
            if not found["median_us"] or found["competitor"] == "relay-plan":
                continue
            if float(found["rms_error"]) > WRONG:
                wrong[found["competitor"]] = None
                continue
            heads = f"{found['q_heads']}/{found['kv_heads']}x{found['dim']}"
            case = dict(model=found["model"] or heads, heads=heads, levels=found["levels"])
            case |= {k: int(found[name]) for k, name in
                     (("prefix", "prefix"), ("context", "own"), ("batch", "batch"))}  # fmt: skip
            median, low, high = (1e-6 * float(found[k]) for k in ("median_us", "p25_us", "p75_us"))
            name, n = found["competitor"], int(found["n"])
            row = Row(SECTION, case, name, "latency", "s", "lower", median, low, high, n)
            if row.key() not in best or median < best[row.key()].median:
                best[row.key()] = row
            gain = formula(case["batch"], case["prefix"], case["context"])
            least = 1e-6 * max(float(found["bytes_us"]), float(found["flops_us"]))
            for told in (
                Row(SECTION, case, "formula", "speed-up", "x", "", gain, gain, gain, 1),
                Row(SECTION, case, "limit", "latency", "s", "", least, least, least, 1),
            ):
                best[told.key()] = told
    return list(best.values()), list(wrong)
