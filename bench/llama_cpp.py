#!/usr/bin/env python3
"""llama.cpp with and without Relay's module, side by side in one run.

    python3 bench/llama_cpp.py --model M.gguf --npp 4096 --npl 1,8,32 --rounds 3

Each round runs the same unmodified llama-batched-bench three times: flash attention on, flash
attention off, and with libggml-relay.so; the order rotates from round to round. The prompt is
shared by the whole batch (-pps -kvu). Reported are the medians over the rounds, their spread, and
Relay's speed relative to the better of the two others, as the median of the rounds' own ratios.
Every measurement goes into a CSV with the machine and the commit.

    ... --peer "ik=/path/to/ik_llama.cpp/llama-batched-bench -rtr -fa on"

measures another fork's llama-batched-bench in the same rounds, and Relay's speed relative to it.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"fa-on": ["-fa", "on"], "fa-off": ["-fa", "off"], "relay": ["-fa", "auto"]}
# Relay against the better of the others: (phase, whether the prompt is long, batch) -> least ratio.
LONG = 4096
GATES = {("prefill", True, None): 1.3, ("decode", True, 1): 1.0, ("decode", True, 8): 1.15,
         ("decode", True, 32): 1.3, ("decode", False, None): 0.98}  # fmt: skip


def numbers(text):
    return [int(part) for part in text.split(",")]


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, help="a GGUF file")
    parser.add_argument("--npp", type=numbers, default=[0, 4096], help="prompt tokens (0,4096)")
    parser.add_argument("--npl", type=numbers, default=[1, 8, 32], help="batch sizes (1,8,32)")
    parser.add_argument("--ntg", type=int, default=16, help="tokens generated per request (16)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds (3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads (all)")
    parser.add_argument("--ctk", default="f16", help="type of K in the KV cache (f16)")
    parser.add_argument("--ctv", default="f16", help="type of V in the KV cache (f16)")
    parser.add_argument(
        "--configs", default=",".join(CONFIGS), help="subset of " + ",".join(CONFIGS)
    )
    parser.add_argument(
        "--peer", action="append", default=[], metavar="NAME=COMMAND",
        help="another llama-batched-bench and its own options; may be repeated",
    )  # fmt: skip
    parser.add_argument("--bin", type=Path, default=ROOT / "build/release/bin")
    parser.add_argument("--module", type=Path, default=ROOT / "build/release/lib/libggml-relay.so")
    parser.add_argument("--csv", type=Path, default=ROOT / "build/bench/llama_cpp.csv")
    parser.add_argument(
        "--gate", action="store_true",
        help=f"fail below the promised ratios: from {LONG} tokens on a gain, below no loss",
    )  # fmt: skip
    args = parser.parse_args()
    args.configs = args.configs.split(",")
    if unknown := set(args.configs) - set(CONFIGS):
        parser.error(f"unknown configuration {', '.join(unknown)}")
    args.peers = {}
    for peer in args.peer:
        name, _, command = peer.partition("=")
        if not command or name in CONFIGS or name in args.peers:
            parser.error(f"--peer {peer}: give a new name, = and a command")
        args.peers[name] = shlex.split(command)
    if any(c in ("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl") for c in (args.ctv,)):
        args.configs = [c for c in args.configs if c != "fa-off"]  # llama.cpp refuses that pair
    args.columns = [*args.configs, *args.peers]
    for path in (args.model, args.bin / "llama-batched-bench", args.module):
        if not path.exists():
            parser.error(f"{path} is not there (build with cmake --preset release)")
    return args


def machine():
    model = platform.processor() or platform.machine()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} threads"


def commit():
    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False
        ).stdout.strip()

    head = git("rev-parse", "--short=12", "HEAD") or "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no")
    return head + ("+changes" if changed else "")


def measurement(line):
    """What a line of output says, a JSON object or (in older forks) a row of the table, or None."""
    if line.startswith("{"):
        return json.loads(line.replace("-nan", "NaN").replace(": nan", ": NaN"))
    cells = line.strip("|").split("|")
    if not line.startswith("|") or not cells[0].strip().isdigit():
        return None
    names = ["pp", "tg", "pl", "n_kv", "t_pp", "speed_pp", "t_tg", "speed_tg", "t", "speed"]
    return {
        name: float(cell) if "t_" in name or "speed" in name else int(float(cell))
        for name, cell in zip(names, cells, strict=True)
    }


def run(args, config):
    """One process of llama-batched-bench: a list of its measurements."""
    context = max(args.npp) + max(args.npl) * args.ntg
    if config in args.peers:
        first, *own = args.peers[config]
    else:
        first, own = str(args.bin / "llama-batched-bench"), ["-kvu", *CONFIGS[config]]
    command = [
        first, "-m", str(args.model),
        "-c", str((context + 255) // 256 * 256), "-t", str(args.threads),
        "-npp", ",".join(map(str, args.npp)), "-npl", ",".join(map(str, args.npl)),
        "-ntg", str(args.ntg), "-pps", "-ctk", args.ctk, "-ctv", args.ctv,
        "--output-format", "jsonl", *own,
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k not in ("GGML_BACKEND_PATH", "RELAY_DISABLE")}
    if config == "relay":
        env["GGML_BACKEND_PATH"] = str(args.module)
        env["RELAY_VERBOSE"] = "1"
    result = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{result.stderr[-3000:]}\nexit code {result.returncode}")
    summary = [line for line in result.stderr.splitlines() if line.startswith("relay:")]
    if config == "relay" and not any("served," in line and " 0 attention" not in line
                                     for line in summary):  # fmt: skip
        sys.exit(f"the module served nothing:\n{result.stderr[-3000:]}")
    rows = list(filter(None, map(measurement, (result.stdout + result.stderr).splitlines())))
    expected = len(args.npp) * len(args.npl)
    if len(rows) != expected:
        sys.exit(f"{config}: {len(rows)} measurements instead of {expected}\n{result.stdout}")
    return rows, summary


def measure(args):
    """{(config, phase, npp, npl): [tokens/s of each round]}, and Relay's last summary."""
    speeds = {}
    summary = []
    started = datetime.datetime.now().isoformat(timespec="seconds")
    identity = [started, machine(), commit(), args.model.name, f"{args.ctk}/{args.ctv}"]
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    new = not args.csv.exists()
    with args.csv.open("a", newline="") as file:
        out = csv.writer(file)
        if new:
            out.writerow(
                ["started", "machine", "commit", "model", "kv", "threads", "config", "round"]
                + ["npp", "ntg", "npl", "prefill_s", "prefill_tps", "decode_s", "decode_tps"]
            )
        for number in range(args.rounds):
            shift = number % len(args.columns)
            for config in args.columns[shift:] + args.columns[:shift]:
                print(f"round {number + 1}/{args.rounds}: {config}", file=sys.stderr, flush=True)
                rows, lines = run(args, config)
                summary = lines or summary
                for row in rows:
                    npp, npl = row["pp"], row["pl"]
                    out.writerow(
                        [*identity, args.threads, config, number, npp, args.ntg, npl]
                        + [row["t_pp"], row["speed_pp"], row["t_tg"], row["speed_tg"]]
                    )
                    speeds.setdefault((config, "decode", npp, npl), []).append(row["speed_tg"])
                    if npp > 0:
                        speeds.setdefault((config, "prefill", npp, npl), []).append(row["speed_pp"])
                file.flush()
    return speeds, summary


def gate_of(phase, npp, npl):
    return GATES.get((phase, npp >= LONG, npl), GATES.get((phase, npp >= LONG, None)))


def report(args, speeds):
    """Prints the table; returns the gates that were missed."""
    others = [c for c in args.configs if c != "relay"]
    missed = []
    print(f"\n{machine()} | {commit()} | {args.model.name} | KV {args.ctk}/{args.ctv}")
    print(f"tokens/s: median of {args.rounds} rounds (spread: (max-min)/median)\n")
    heads = ["npp", "B", "phase", *args.columns, "Relay/best", "(min-max)", "gate"]
    heads += [f"Relay/{peer}" for peer in args.peers]
    print("| " + " | ".join(heads) + " |\n|" + "---|" * len(heads))
    for npp in args.npp:
        for npl in args.npl:
            for phase in ("prefill", "decode"):
                if (args.configs[0], phase, npp, npl) not in speeds:
                    continue
                cells = [str(npp), str(npl), phase]
                for config in args.columns:
                    values = speeds[config, phase, npp, npl]
                    median = statistics.median(values)
                    spread = (max(values) - min(values)) / median
                    cells.append(f"{median:.1f} ({spread:.0%})")

                def relay_over(configs, key=(phase, npp, npl)):
                    return [
                        speeds[("relay", *key)][i] / max(speeds[(c, *key)][i] for c in configs)
                        for i in range(args.rounds)
                    ]

                if "relay" in args.configs and others:
                    ratios = relay_over(others)
                    ratio = statistics.median(ratios)
                    gate = gate_of(phase, npp, npl)
                    cells += [f"{ratio:.2f}x", f"{min(ratios):.2f}-{max(ratios):.2f}"]
                    cells.append(
                        "" if gate is None else f"{gate} {'ok' if ratio >= gate else 'MISSED'}"
                    )
                    if gate is not None and ratio < gate:
                        missed.append(f"{phase} at npp {npp}, B {npl}: {ratio:.2f}x < {gate}x")
                else:
                    cells += ["", "", ""]
                if "relay" in args.configs:
                    for peer in args.peers:
                        cells.append(f"{statistics.median(relay_over([peer])):.2f}x")
                print("| " + " | ".join(cells) + " |")
    return missed


def main():
    args = parse_arguments()
    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: the machine is busy (load {load:.1f}); expect noise", file=sys.stderr)
    speeds, summary = measure(args)
    missed = report(args, speeds)
    print()
    for line in summary:
        print(line)
    print(f"measurements: {args.csv}")
    if args.gate and missed:
        sys.exit("missed:\n  " + "\n  ".join(missed))


if __name__ == "__main__":
    main()
