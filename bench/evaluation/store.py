"""Results on disk. Every finished task is a file, written whole, so that a run that was killed goes
on where it stopped; results.json and a CSV for each section are put together from them."""

import csv
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from programs import ROOT, Programs
from tasks import EvaluationError, Row, Task, to_json

RESULT_COLUMNS = ["system", "metric", "unit", "better", "median", "low", "high", "n"]


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def machine() -> str:
    name = platform.machine()
    if Path("/proc/cpuinfo").is_file():
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
        name = found[1] if found else name
    gpus = output_of("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return ", ".join([name, f"{os.cpu_count()} threads", *gpus.splitlines()])


def commit() -> str:
    if given := os.environ.get("RELAY_COMMIT"):
        return given
    head = output_of("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD") or "unknown"
    changed = output_of("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return head + ("+changes" if changed else "")


def system() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def versions(relay: Path) -> dict[str, str]:
    pin = (ROOT / "cmake/llama-cpp.requirements.txt").read_text()
    llama = re.search(r"^llama-cpp-python==(\S+)", pin, re.M)
    found = {
        "relay": output_of(str(relay), "--version").removeprefix("relay "),
        "llama-cpp-python": llama[1] if llama else "unknown",
        "python": platform.python_version(),
        "system": system(),
    }
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return found | ({"driver": driver.splitlines()[0]} if driver else {})


def write_whole(path: Path, text: str) -> None:
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


class Store:
    def __init__(self, folder: Path, identity: dict, fresh: bool) -> None:
        self.folder, self.identity = folder, identity
        self._tasks = folder / "tasks"
        about = folder / "run.json"
        if fresh and folder.exists():
            shutil.rmtree(self._tasks, ignore_errors=True)
            about.unlink(missing_ok=True)
        self._tasks.mkdir(parents=True, exist_ok=True)
        if about.is_file():
            before = json.loads(about.read_text())
            for name, value in identity.items():
                if before.get(name) != value:
                    raise EvaluationError(
                        f"{folder} holds results of another {name} ({before.get(name)}, now "
                        f"{value}): --fresh measures all anew, --out FOLDER keeps them"
                    )
        else:
            write_whole(about, json.dumps(identity, indent=1))

    def _file(self, task: Task) -> Path:
        return self._tasks / f"{task.key}.json"

    def _read(self, task: Task) -> dict | None:
        file = self._file(task)
        return json.loads(file.read_text()) if file.is_file() else None

    def has(self, task: Task) -> bool:
        """Whole: not if a part of it failed."""
        found = self._read(task)
        return found is not None and not found["failures"]

    def _failed(self, task: Task) -> Path:
        return self._tasks / f"{task.key}.failed"

    def failure(self, task: Task) -> str:
        """Why it, or a part of it, failed when it was last tried; "" if it did not."""
        file = self._failed(task)
        if file.is_file():
            return file.read_text()
        found = self._read(task)
        return "\n".join(found["failures"]) if found is not None else ""

    def put_failure(self, task: Task, reason: str) -> None:
        write_whole(self._failed(task), reason)

    def put(self, task: Task, rows: list[Row], seconds: float, programs: Programs) -> None:
        made = {
            "task": task.name,
            "parameters": task.parameters,
            "seconds": seconds,
            "finished": datetime.datetime.now().isoformat(timespec="seconds"),
            "load": os.getloadavg()[0],
            "left_out": programs.notes,
            "failures": programs.failures,
            "versions": programs.versions,
            "rows": [to_json(row) for row in rows],
        }
        write_whole(self._file(task), json.dumps(made, indent=1))
        self._failed(task).unlink(missing_ok=True)

    def seconds(self, task: Task) -> float:
        return self._read(task)["seconds"]

    def write(self, tasks: list[Task], left_out: list[str]) -> Path:
        """results.json and the CSV files, of the tasks that are finished."""
        done = [found for t in tasks if (found := self._read(t)) is not None]
        rows = [row for task in done for row in task["rows"]]
        versions = dict(self.identity["versions"])
        for task in done:
            versions |= task.get("versions", {})
        results = {
            **self.identity,
            "versions": versions,
            "finished": max((t["finished"] for t in done), default=None),
            "seconds": sum(t["seconds"] for t in done),
            "most_load": max((t["load"] for t in done), default=0),
            "tasks": len(tasks),
            "tasks_done": len(done),
            "missing": [t.name for t in tasks if self._read(t) is None],
            "failed": {t.name: reason for t in tasks if (reason := self.failure(t))},
            "left_out": left_out + [note for t in done for note in t["left_out"]],
            "rows": rows,
        }
        path = self.folder / "results.json"
        write_whole(path, json.dumps(results, indent=1) + "\n")
        for section in {row["section"] for row in rows}:
            self._write_csv(section, [row for row in rows if row["section"] == section], versions)
        return path

    def _write_csv(self, section: str, rows: list[dict], versions: dict[str, str]) -> None:
        identity = {k: v for k, v in self.identity.items() if isinstance(v, str)}
        identity["versions"] = ", ".join(f"{k} {v}" for k, v in versions.items())
        columns = list(dict.fromkeys(name for row in rows for name in row["case"]))
        with (self.folder / f"{section}.csv").open("w", newline="") as file:
            out = csv.DictWriter(file, [*identity, *columns, *RESULT_COLUMNS], restval="")
            out.writeheader()
            for row in rows:
                values = {name: row[name] for name in RESULT_COLUMNS}
                out.writerow({**identity, **row["case"], **values})


def read(path: Path) -> dict:
    """A results.json; raises EvaluationError for what is none."""
    if path.is_dir():
        path = path / "results.json"
    try:
        results = json.loads(path.read_text())
        results["rows"] = [Row(**row) for row in results["rows"]]
    except OSError as error:
        raise EvaluationError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path} is no results.json of the evaluation: {error}") from error
    return results
