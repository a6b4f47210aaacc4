#!/usr/bin/env python3
"""ggml's own suite for FLASH_ATTN_EXT through the module, and who computed what.

    python3 tests/ggml/check_ops.py [--build build/release] [--params REGEX]

Passes if every case passes and Relay itself computed at least 95 % of those that ggml's CPU backend
supports. The suite's reference is ggml's own slow implementation (`use_ref`), which the module
leaves to ggml: the statistics list those computations as `reference_wanted`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

LEAST_SHARE = 0.95


def parse_arguments():
    root = Path(__file__).resolve().parents[2]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=Path, default=root / "build/release")
    parser.add_argument("--bin", type=Path, help="folder of test-backend-ops (BUILD/bin)")
    parser.add_argument("--module", type=Path, help="BUILD/lib/libggml-relay.so")
    parser.add_argument("--params", help="run only the cases whose parameters match")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.bin = args.bin or args.build / "bin"
    args.module = (args.module or args.build / "lib/libggml-relay.so").resolve()
    return args


def main():
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        stats_file = Path(folder) / "stats.json"
        command = [str(args.bin / "test-backend-ops"), "test", "-b", "RELAY"]
        command += ["-o", "FLASH_ATTN_EXT", "-j", str(args.jobs)]
        if args.params:
            command += ["-p", args.params]
        env = dict(os.environ, GGML_BACKEND_PATH=str(args.module), RELAY_STATS_FILE=str(stats_file))
        suite = subprocess.run(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        lines = re.sub(r"\x1b\[[0-9;]*m", "", suite.stdout).splitlines()
        for line in lines:
            if not line.startswith("  FLASH_ATTN_EXT(") or line.endswith(("FAIL", "not supported")):
                print(line)
        if suite.returncode != 0:
            sys.exit(f"the suite failed with exit code {suite.returncode}")
        passed = [m for line in lines if (m := re.match(r"\s*(\d+)/(\d+) tests passed", line))]
        # The suite is content when there is no backend RELAY; we are not.
        if len(passed) != 1 or int(passed[0][1]) == 0 or passed[0][1] != passed[0][2]:
            sys.exit("no case ran: was the module loaded? See above.")
        stats = json.loads(stats_file.read_text())

    cases = int(passed[0][1])
    served = stats["served"]
    handed_on = {k: v for k, v in stats["handed_on"].items() if k != "reference_wanted"}
    print(f"kernels: {stats['isa']}; {cases} cases; served by Relay: {served}", end="")
    print(f"; handed on: {sum(handed_on.values())}")
    for reason, count in sorted(handed_on.items(), key=lambda item: -item[1]):
        print(f"  {reason}: {count}")
    if served + sum(handed_on.values()) != cases:
        sys.exit("the counts do not add up to the number of cases")
    if served < LEAST_SHARE * cases:
        sys.exit(f"Relay served {served / cases:.1%}, less than {LEAST_SHARE:.0%}")
    print(f"ok: Relay served {served / cases:.1%}")


if __name__ == "__main__":
    main()
