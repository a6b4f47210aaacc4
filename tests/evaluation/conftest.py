"""The driver of bench/evaluation, with a made-up `relay` that answers at once and counts calls."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
DRIVER = ROOT / "bench/evaluation"
sys.path.insert(0, str(DRIVER))

# Answers `relay bench op --json` as the real one does, and writes down what it was asked. It waits
# for `pause` to go away if its prefix is the one named in there.
FAKE_RELAY = """#!{python}
import json, pathlib, sys, time
here = pathlib.Path(__file__).resolve().parent
args = sys.argv[1:]
if args == ["--version"]:
    print("relay 0.0-fake"); sys.exit()
if args[:2] != ["bench", "op"]:
    sys.exit("fake relay: " + " ".join(args))
option = lambda name: args[args.index(name) + 1]
prefix = int(option("--prefix"))
with (here / "calls").open("a") as calls:
    calls.write(f"{{prefix}}\\n")
pause = here / "pause"
while pause.exists() and int(pause.read_text()) == prefix:
    time.sleep(0.01)
def way(seconds):
    return dict(seconds_median=seconds, seconds_quartile_low=0.9 * seconds,
                seconds_quartile_high=1.1 * seconds, seconds_predicted=seconds,
                share_of_roofline=0.5)
rounds = int(option("--rounds"))
print(json.dumps(dict(results=[
    dict(batch=int(batch), rounds=rounds, sharing_on=way(1e-6 * prefix),
         sharing_off=way(1e-6 * prefix * int(batch)), outputs_differ_by=1e-7)
    for batch in option("--batch").split(",")])))
"""


class Evaluation:
    """The driver as a process, in a folder of its own."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder, self.bin = folder, folder / "build/bin"
        self.bin.mkdir(parents=True)
        relay = self.bin / "relay"
        relay.write_text(FAKE_RELAY.format(python=sys.executable))
        relay.chmod(0o755)
        self.out = folder / "out"

    def problems(self, text: str, name: str = "set.toml") -> pathlib.Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def command(self, *arguments) -> list[str]:
        return [sys.executable, str(DRIVER), *map(str, arguments)]

    def environment(self, **more: str) -> dict[str, str]:
        known = {"RELAY_COMMIT": "abc", "RELAY_VLLM_VENV": str(self.folder / "no-vllm")}
        return {k: v for k, v in os.environ.items() if k != "RELAY_TRACE"} | known | more

    def start(self, problems: pathlib.Path, *more, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            self.command("run", "--set", problems, "--build", self.bin.parent, "--out", self.out,
                         *more),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=self.environment(**environment),
        )  # fmt: skip

    def run(self, problems: pathlib.Path, *more, **environment: str):
        process = self.start(problems, *more, **environment)
        process.out, process.err = process.communicate(timeout=60)
        return process

    def calls(self) -> list[int]:
        file = self.bin / "calls"
        return [int(line) for line in file.read_text().split()] if file.exists() else []

    def results(self) -> dict:
        return json.loads((self.out / "results.json").read_text())


@pytest.fixture
def evaluation(tmp_path):
    return Evaluation(tmp_path)
