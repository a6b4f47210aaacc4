"""One tile's kernels, in the cache: relay-kernel-bench (Google Benchmark)."""

from fields import Field
from programs import Programs
from tasks import Row, Task

SECTION = "kernels"
FIELDS = {
    "filter": Field(str, default=".", about="a regular expression over the benchmarks' names"),
    "repetitions": Field(int, default=3, least=1),
}


def points(problem: dict, programs: Programs) -> list[list[Task]]:
    command = [programs.binary("relay-kernel-bench"), "--benchmark_format=json"]
    command += [f"--benchmark_filter={problem['filter']}"]
    command += [f"--benchmark_repetitions={problem['repetitions']}"]

    def run() -> list[Row]:
        seconds: dict[str, list[float]] = {}
        for found in programs.run_json(command)["benchmarks"]:
            if found.get("run_type") == "iteration":
                unit = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}[found["time_unit"]]
                seconds.setdefault(found["run_name"], []).append(unit * found["cpu_time"])
        return [
            Row.of(SECTION, {"kernel": name}, "relay", "time", "s", "lower", values)
            for name, values in seconds.items()
        ]

    return [[Task(SECTION, dict(problem), 120.0 * problem["repetitions"], run)]]
