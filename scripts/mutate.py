#!/usr/bin/env python3
"""Plants the faults of mutations.toml, one at a time, and shows whether the tests notice them.

    scripts/mutate.py              # all of them; some minutes each on two cores
    scripts/mutate.py --list
    scripts/mutate.py sink window  # those whose names hold one of these words

Works on a copy of the tree in build/mutate, whose kernels are compiled at -O1. Exit status 1 if a
fault survives: then a test is missing, or the fault is none. Also if a test does not end, which a
slow machine may do as well. CI runs --list, which fails if the code of a fault has changed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import tomllib

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "mutate"
SOURCE = WORK / "source"
BUILD = WORK / "build"
TEST_SECONDS = 600
# A fault that only shows in the hundredth random case may well be missed by another run.
ENVIRONMENT = {**os.environ, "RELAY_TEST_SCALE": "0.25", "RELAY_COST_MODEL": "fixed"}


class Fault:
    def __init__(self, entry: dict):
        self.name: str = entry["name"]
        self.tests: list[str] = entry["tests"]
        self.find: str = entry["find"]
        self.replace: str = entry["replace"]
        room = ROOT / entry["room"]
        files = [path for path in sorted(room.rglob("*")) if path.suffix in (".h", ".cpp")]
        places = [path for path in files for _ in range(path.read_text().count(self.find))]
        self.stale = ""
        if len(places) != 1:
            self.stale = f"'{self.name}' applies {len(places)} times, not once, in {entry['room']}"
            return
        self.file = places[0].relative_to(ROOT)

    def plant(self) -> None:
        text = (ROOT / self.file).read_text()
        (SOURCE / self.file).write_text(text.replace(self.find, self.replace))

    def remove(self) -> None:
        (SOURCE / self.file).write_text((ROOT / self.file).read_text())


def copy_tree() -> None:
    """Tracked files and new ones; what is unchanged keeps its time, so that little is rebuilt."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    wanted = {Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()}
    for path in wanted:
        target = SOURCE / path
        if target.is_file() and target.read_bytes() == (ROOT / path).read_bytes():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, target)
    for target in [path for path in SOURCE.rglob("*") if path.is_file()]:
        if target.relative_to(SOURCE) not in wanted:
            target.unlink()


def run(command: list, log) -> bool:
    log.write(f"$ {' '.join(map(str, command))}\n")
    log.flush()
    return subprocess.run(command, stdout=log, stderr=log, cwd=WORK).returncode == 0


def build(targets: list[str], log) -> bool:
    return run(["cmake", "--build", BUILD, "-j2", "--target", *targets], log)


class DoesNotEnd(Exception):
    """A test took longer than TEST_SECONDS: because of the fault, or of a slow machine."""


def notices(test: str, log) -> str:
    """What gave the fault away, or an empty text."""
    try:
        done = subprocess.run(
            [BUILD / "tests" / test], cwd=WORK, env=ENVIRONMENT, timeout=TEST_SECONDS,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise DoesNotEnd(f"{test} took more than {TEST_SECONDS} s") from None
    log.write(done.stdout)
    if done.returncode == 0:
        return ""
    failed = re.search(r"^\[  FAILED  \] (\w+\S*\.[^,\s]+)", done.stdout, re.MULTILINE)
    return f"{test}: {failed[1]}" if failed else f"{test}: exit status {done.returncode}"


def verdict_on(fault: Fault, log) -> tuple[str, str]:
    """The verdict, and what it stands on: a test that fails, else one that does not end."""
    endless = ""
    for test in fault.tests:
        try:
            if told := notices(test, log):
                return "noticed", told
        except DoesNotEnd as e:
            endless = str(e)
    return ("NO END", endless) if endless else ("SURVIVED", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only the faults whose names hold one of them")
    parser.add_argument("--list", action="store_true", help="names the faults and where they go")
    options = parser.parse_args()

    table = tomllib.loads((ROOT / "scripts" / "mutations.toml").read_text())
    wanted = [
        entry for entry in table["fault"]
        if not options.words or any(word in entry["name"] for word in options.words)
    ]  # fmt: skip
    faults = [Fault(entry) for entry in wanted]
    if stale := [fault.stale for fault in faults if fault.stale]:
        sys.exit("mutate: scripts/mutations.toml is out of date:\n" + "\n".join(stale))
    if options.list:
        for fault in faults:
            print(f"{fault.name}\n    {fault.file}: {', '.join(fault.tests)}")
        return
    if not faults:
        sys.exit("mutate: no fault has such a name; see --list")

    SOURCE.mkdir(parents=True, exist_ok=True)
    copy_tree()
    llama = sorted((ROOT / ".deps").glob("llama.cpp-*"))
    configure = ["cmake", "-S", SOURCE, "-B", BUILD, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
                 "-DCMAKE_CXX_FLAGS_RELEASE=-O1", "-DRELAY_KERNEL_LEVEL=-O1",
                 "-DRELAY_BUILD_BENCH=OFF"]  # fmt: skip
    if llama:  # the engine's tests link none of it, but are configured with it
        configure.append(f"-DRELAY_LLAMA_CPP_DIR={llama[-1]}")
    tests = sorted({test for fault in faults for test in fault.tests})
    count = {"noticed": 0, "NO END": 0, "SURVIVED": 0}
    with (WORK / "log.txt").open("w") as log:
        if not run(configure, log) or not build(tests, log):
            sys.exit(f"mutate: the tree itself does not build; see {WORK / 'log.txt'}")
        for test in tests:
            try:
                told = notices(test, log)
            except DoesNotEnd as e:
                told = str(e)
            if told:
                sys.exit(f"mutate: fails without any fault: {told}")
        for fault in faults:
            began = time.monotonic()
            log.write(f"\n=== {fault.name}\n")
            fault.plant()
            try:
                if not build(fault.tests, log):
                    sys.exit(f"mutate: '{fault.name}' does not compile; see {WORK / 'log.txt'}")
                verdict, told = verdict_on(fault, log)
            finally:
                fault.remove()
            count[verdict] += 1
            seconds = time.monotonic() - began
            print(f"{verdict:8} {seconds:4.0f} s  {fault.name}  [{told}]", flush=True)
    print(
        f"of {len(faults)} faults {count['noticed']} were noticed, {count['SURVIVED']} survived, "
        f"and of {count['NO END']} a test did not end"
    )
    sys.exit(0 if count["noticed"] == len(faults) else 1)


if __name__ == "__main__":
    main()
