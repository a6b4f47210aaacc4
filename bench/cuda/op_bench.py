#!/usr/bin/env python3
"""The decode operator on a GPU: Relay beside FA3 as vLLM builds it, and FlashInfer's decode and
cascade.

    python3 bench/cuda/op_bench.py --set quick --out build/bench/cuda

A set is a file of bench/cuda/problems (quick, targets, never_slower, paper, fp8) or another such
one. Everything of one case runs in turn, from a cold L2, by CUDA events: medians of 9, plainly
launched and as a CUDA graph; a kernel's time is the better of the two, a peer's that of its best
variant. Limits (read bandwidth, bf16 products) are measured in the same run. Each output is checked
against double precision. Writes <set>.csv (each median and its spread) and <set>.json.

The peers need no installation of their engines: bench/cuda/peers.py says where they are looked for.
What cannot run is left out, and the reason is printed.
"""

import argparse
import csv
import datetime
import json
import os
import re
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
import peers
import problem
import relay_cuda
from timing import Entry, Timer

ROOT = Path(__file__).resolve().parents[2]
# How each competitor of ours differs from the operator as it comes.
OURS = {
    "relay": {},
    "relay-off": {"sharing": "off"},
    "relay-mma": {"path": "mma"},
    "relay-wgmma": {"path": "wgmma"},
    "relay-q8": {"queries": "fp8"},
}
PEERS = ["fa3", "fi", "fi-cascade", "fi-cascade-fa2"]
COLUMNS = [
    "set", "case", "model", "q_heads", "kv_heads", "dim", "block_size", "kv", "levels", "prefix",
    "own", "ragged", "batch", "competitor", "variant", "mode", "median_us", "p10_us", "p25_us",
    "p75_us", "p90_us", "min_us", "max_us", "n", "bytes", "flops", "bytes_us", "flops_us", "share",
    "error", "rms_error",
]  # fmt: skip


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", default="quick", help="problem sets, by commas (quick)")
    parser.add_argument("--only", default="", help="only cases whose name matches this pattern")
    parser.add_argument(
        "--with",
        dest="competitors",
        default="",
        help=f"instead of the set's: some of {','.join([*OURS, *PEERS])}",
    )
    parser.add_argument("--reps", type=int, default=0, help="timed runs of each (the set's, or 9)")
    parser.add_argument("--modes", default="plain,graph", help="how to launch (plain,graph)")
    parser.add_argument(
        "--flush",
        choices=["read", "write"],
        default="read",
        help="how the L2 cache is emptied (read)",
    )
    parser.add_argument("--budget", type=float, default=540, help="start no case after s (540)")
    parser.add_argument(
        "--library", type=Path, help="librelay-cuda.so (RELAY_CUDA_LIBRARY, build/)"
    )
    parser.add_argument("--jit", action="store_true", help="let FlashInfer compile what it lacks")
    parser.add_argument("--table", choices=["set", "full", "brief"], default="set")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build/bench/cuda")
    )
    args = parser.parse_args()
    args.modes = args.modes.split(",")
    return args


def say(text):
    print(text, flush=True)


def shortly(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def output_of(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def identity():
    head = os.environ.get("RELAY_COMMIT") or output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "started": datetime.datetime.now().isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(), "driver": driver.split("\n")[0], "commit": head[:12],
        "torch": torch.__version__, "cuda": torch.version.cuda,
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
    }  # fmt: skip


class Bench:
    def __init__(self, args, sets):
        self.args = args
        self.began = time.monotonic()
        self.timer = Timer(args.flush)
        self.identity = identity()
        self.rows, self.missing, self.sources = [], {}, {}
        self.failure = ""
        # One random pool for all: filled once, each case takes its front.
        free = torch.cuda.mem_get_info()[0]
        wanted = max((2 * case.elements for data in sets for case in data["cases"]), default=0)
        size = min(max(wanted, 4 << 30), free - (6 << 30)) // 2 // 2048 * 2048
        self.pool = torch.empty(size, dtype=torch.bfloat16, device="cuda")
        for piece in self.pool.split(1 << 28):
            piece.normal_()
        self.limits = self.timer.limits(self.pool[: 2 << 30])
        self.pool[: 2 << 30].normal_()  # copying left its halves alike
        self.relay = self.fa3 = self.flashinfer = None

    def try_to(self, what, action):
        """The result of `action`, or None, and the reason is printed once."""
        try:
            return action()
        except Exception as error:
            torch.cuda.synchronize()
            reason = shortly(error)
            if self.missing.setdefault(what, reason) == reason and what not in self.sources:
                self.sources[what] = None
                say(f"left out: {what}: {reason}")
            return None

    def open_peers(self, competitors):
        def once(name, made, make):
            if made is not None or name in self.missing:
                return made
            made = self.try_to(name, make)
            if made is not None:
                self.sources[name] = made.source
                say(f"{name}: {made.source}")
            return made

        if any(name in OURS for name in competitors):
            self.relay = once("relay", self.relay, lambda: relay_cuda.Library(self.args.library))
        if "fa3" in competitors:
            self.fa3 = once("fa3", self.fa3, peers.Fa3)
        if any(name.startswith("fi") for name in competitors):
            make = lambda: peers.FlashInfer(self.args.jit)  # noqa: E731
            self.flashinfer = once("flashinfer", self.flashinfer, make)

    def variants(self, name, p, out):
        """(variant, maker of the call) of a competitor; none where it is not there."""
        if name in OURS:
            if self.relay is None:
                return
            plan = self.relay.plan(p, **OURS[name])
            plan.plan_batch()
            self.plans[name] = plan
            yield plan.path, lambda: plan.attend_call(out)
        elif name == "fa3" and self.fa3 is not None:
            yield from self.fa3.variants(p, out)
        elif name == "fi" and self.flashinfer is not None:
            yield from self.flashinfer.decode(p, out)
        elif name.startswith("fi-cascade") and self.flashinfer is not None and p.levels:
            backend = "fa2" if name.endswith("fa2") else "auto"
            yield from self.flashinfer.cascade(p, out, backend)

    def prepare(self, name, p, reps):
        """The competitor's fastest variant and the entries that time it; checks its output."""
        out = torch.zeros_like(p.q)
        best, error = None, None
        for variant, make in self.variants(name, p, out):
            tried = self.try_to(f"{name} ({variant})", lambda make=make: self.trial(make))
            if tried is None:
                continue
            if error is None:
                # The first variant reads the very values that the reference reads.
                result = getattr(tried[0], "out", out)
                error = self.error(p, result)
                self.outs[name] = result.clone()
            if best is None or tried[2] < best[2]:
                best = (*tried, variant)
        if best is None:
            return []
        run, host_us, gpu_us, variant = best
        if gpu_us > self.slow_us:
            reps = min(reps, self.slow_reps)
        self.chosen[name] = (variant, error)
        entries = []
        for mode in self.args.modes:
            if mode == "plain":
                entries.append(Entry((name, mode), run, reps, host_us))
            else:
                graph = self.try_to(f"{name} as a graph", lambda: self.timer.graph(run))
                if graph is not None:
                    host_us = self.timer.warm(graph.replay)[0]
                    entries.append(Entry((name, mode), graph.replay, reps, host_us))
                    self.graphs.append(graph)
        return entries

    def trial(self, make):
        run = make()
        host_us, gpu_us = self.timer.warm(run)
        if gpu_us < 1000:
            gpu_us = min(gpu_us, self.timer.once(run, host_us), self.timer.once(run, host_us))
        return run, host_us, gpu_us

    def error(self, p, out):
        """Difference to double precision in some rows: the largest, relative to their largest
        value, and the root of the mean square, relative to theirs."""
        pairs = p.some_pairs()
        if self.truth is None:
            self.truth = p.reference(pairs)
        got = torch.stack([out[r, h] for r, h in pairs]).double()
        off = got - self.truth
        largest = off.abs().max() / self.truth.abs().max()
        return float(largest), float(off.norm() / self.truth.norm())

    def run_case(self, data, case):
        p = problem.Problem(case, self.pool)
        self.plans, self.outs, self.chosen, self.graphs, self.truth = {}, {}, {}, [], None
        self.slow_us, self.slow_reps = data.get("slow_us", 1e9), data.get("slow_reps", 5)
        reps = self.args.reps or data.get("reps", 9)
        entries = []
        for name in data["competitors"]:
            entries += self.try_to(name, lambda name=name: self.prepare(name, p, reps)) or []
        self.timer.measure(entries)
        limits = {
            "bytes_us": p.bytes / self.limits["read_gbs"] / 1e3,
            "flops_us": p.flops / self.limits["bf16_tflops"] / 1e6,
        }
        ideal = max(limits.values())
        result = {
            "case": case.name,
            "batch": case.batch,
            "ideal_us": ideal,
            "times": {},
            "bound": max(limits, key=limits.get)[:-3],
            "errors": {},
            "rms_errors": {},
            "spreads": {},
        }
        for entry in entries:
            name, mode = entry.key
            variant, error = self.chosen[name]
            stats = entry.stats()
            self.add(
                data,
                case,
                name,
                variant,
                mode,
                stats,
                error=error[0],
                rms_error=error[1],
                bytes=p.bytes,
                flops=p.flops,
                share=ideal / stats["median_us"],
                **limits,
            )
            if stats["median_us"] < result["times"].get(name, 1e30):
                result["times"][name] = stats["median_us"]
                result["spreads"][name] = stats["p90_us"] - stats["p10_us"]
            result["errors"][name], result["rms_errors"][name] = error
        if "relay" in self.plans and "relay" in result["times"]:
            self.try_to("the plan's time", lambda: self.time_plan(data, case, reps, result))
            self.try_to("the same bits", lambda: self.same_bits(p, result))
        if "relay" in self.outs and "fa3" in self.outs:
            difference = (self.outs["relay"].float() - self.outs["fa3"].float()).abs().max()
            result["to_fa3"] = float(difference)
        self.graphs.clear()
        for plan in self.plans.values():
            plan.free()
        return result

    def time_plan(self, data, case, reps, result):
        plan = self.plans["relay"]
        entries = [Entry(("relay-plan", "plain"), plan.plan_batch, reps)]
        graph = self.timer.graph(plan.plan_batch)
        entries.append(Entry(("relay-plan", "graph"), graph.replay, reps))
        for entry in entries:
            entry.host_us = self.timer.warm(entry.run)[0]
        self.timer.measure(entries)
        for entry in entries:
            stats = entry.stats()
            self.add(data, case, "relay-plan", "", entry.key[1], stats)
        result["plan_us"] = min(entry.stats()["median_us"] for entry in entries)
        # The host has just written the tables: in an engine they are in the L2 cache.
        warm = Entry(("relay-plan", "graph, warm"), graph.replay, reps, entries[-1].host_us)
        self.timer.measure([warm], cold=False)
        self.add(data, case, "relay-plan", "", "graph, warm", warm.stats())
        result["plan_warm_us"] = warm.stats()["median_us"]
        summary = plan.summary()
        if summary:
            result["summary"] = summary

    def same_bits(self, p, result):
        outs = []
        for _ in range(3):
            out = torch.empty_like(p.q)
            self.plans["relay"].attend_call(out)()
            outs.append(out)
        result["same_bits"] = all(torch.equal(outs[0], out) for out in outs)

    def add(self, data, case, name, variant, mode, stats, **more):
        q_heads, kv_heads, dim = case.heads
        self.rows.append({
            "set": data["name"], "case": case.name, "model": case.model, "q_heads": q_heads,
            "kv_heads": kv_heads, "dim": dim, "block_size": case.block_size, "kv": case.kv,
            "levels": json.dumps(case.levels), "prefix": case.prefix, "own": case.own,
            "ragged": int(case.ragged), "batch": case.batch, "competitor": name,
            "variant": variant, "mode": mode, **stats, **more,
        })  # fmt: skip

    def run_set(self, data):
        if self.args.competitors:
            data["competitors"] = self.args.competitors.split(",")
        self.open_peers(data["competitors"])
        cases = [c for c in data["cases"] if re.search(self.args.only, c.name)]
        style = data.get("table", "full") if self.args.table == "set" else self.args.table
        say(f"\n{data['name']}: {len(cases)} cases; times in us; x: that one's time over Relay's")
        results = []
        try:
            for case in cases:
                if time.monotonic() - self.began > self.args.budget:
                    say(f"out of time: {len(cases) - len(results)} cases left out")
                    break
                if case.elements > self.pool.numel():
                    say(f"{case.name}: needs {case.kv_bytes / 1e9:.0f} GB, left out")
                    continue
                result = self.run_case(data, case)
                judge(result, case.expect)
                results.append(result)
                if style == "full":
                    say(line(result))
        except Exception as error:
            # An error of the GPU ends the process's use of it: what was measured is kept.
            say(traceback.format_exc()[-1500:])
            self.failure = f"{data['name']}, after {len(results)} cases: {shortly(error)}"
        self.write(data, results)
        summarize(data, results)
        return results

    def write(self, data, results):
        self.args.out.mkdir(parents=True, exist_ok=True)
        about = {
            **self.identity,
            **self.limits,
            "flush": self.args.flush,
            "sources": self.sources,
            "missing": self.missing,
        }
        with (self.args.out / f"{data['name']}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
            writer.writeheader()
            for row in self.rows:
                if row["set"] == data["name"]:
                    short = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
                    writer.writerow(short)
        text = json.dumps({"about": about, "results": results}, indent=1)
        (self.args.out / f"{data['name']}.json").write_text(text + "\n")


def judge(result, expect):
    """Compares with what is promised: how often faster, share of the limit, planning in us."""
    ours = result["times"].get("relay")
    result["missed"] = []
    if ours is None:
        return
    result["share"] = result["ideal_us"] / ours
    others = [result["times"][n] for n in ("fa3", "fi") if n in result["times"]]
    if others:
        result["best_peer"] = min(others) / ours
    for name, wanted in expect.items():
        if name == "plan_us":
            got = result.get("plan_us")
            good = got is None or got <= wanted
        else:
            got = result.get(name) if name in ("share", "best_peer") else None
            if name in result["times"]:
                got = result["times"][name] / ours
            good = got is None or got >= wanted
        if not good:
            result["missed"].append(f"{name} {got:.2f}, not {wanted}")


def line(result):
    times = result["times"]
    ours = times.get("relay")
    parts = [f"{result['case']:<28}", f"{result['bound']} {result['ideal_us']:.1f}"]
    short = {
        "relay": "relay",
        "relay-off": "off",
        "relay-mma": "mma",
        "relay-wgmma": "wgmma",
        "relay-q8": "fp8 queries",
        "fi-cascade": "casc",
        "fi-cascade-fa2": "casc2",
    }
    for name, us in times.items():
        text = f"{short.get(name, name)} {us:.1f}"
        if name == "relay":
            text += f"~{result['spreads'][name]:.1f} {100 * result['share']:.0f}%"
        elif ours:
            text += f" {us / ours:.2f}x"
        parts.append(text)
    if "plan_us" in result:
        parts.append(f"plan {result['plan_us']:.1f} warm {result.get('plan_warm_us', 0):.1f}")
    errors = "/".join(f"{1e3 * error:.1f}" for error in result["errors"].values())
    parts.append(f"e-3 {errors}")
    if result.get("same_bits") is False:
        parts.append("BITS DIFFER")
    if result["missed"]:
        parts.append("MISSED " + ", ".join(result["missed"]))
    return " | ".join(parts)


def summarize(data, results):
    """A set in a few lines: how it compares at worst, and what was missed."""
    measured = [r for r in results if "best_peer" in r]
    if measured:
        measured.sort(key=lambda r: r["best_peer"])
        slower = [r for r in measured if r["best_peer"] < 1]
        say(
            f"{data['name']}: slower than the better of FA3 and FlashInfer's decode in "
            f"{len(slower)} of {len(measured)} cases"
        )
        if data.get("table") == "brief":
            for r in measured[:25]:
                say(line(r))
    for name in ("relay", "fa3", "fi"):
        errors = [
            (r["errors"][name], r["rms_errors"][name]) for r in results if name in r["errors"]
        ]
        if errors:
            largest, rms = (max(values) for values in zip(*errors, strict=True))
            say(f"{name}: largest error {largest:.2e}, largest rms error of a case {rms:.2e}")
    shapes = {}
    for r in results:
        if {"relay", "relay-off"} <= r["times"].keys():
            shapes.setdefault((r["case"].split()[0], r["batch"]), []).append(r)
    for (heads, batch), rows in shapes.items():
        if data.get("table") == "brief" and batch in (1, 8, 32, 64):
            gains = " ".join(f"{r['times']['relay-off'] / r['times']['relay']:.1f}" for r in rows)
            say(f"{heads} B{batch}: on/off by prefix: {gains}")
    missed = [r for r in results if r["missed"]]
    say(f"{data['name']}: {len(missed)} of {len(results)} cases missed what is promised")


def main():
    args = parse_arguments()
    if not torch.cuda.is_available():
        sys.exit("op_bench: no GPU that torch can use")
    sets = [problem.load(name) for name in args.set.split(",")]
    torch.manual_seed(0)
    bench = Bench(args, sets)
    say(" | ".join(str(v) for v in bench.identity.values()))
    say(", ".join(f"{k} {v:.4g}" for k, v in bench.limits.items()))
    for data in sets:
        bench.run_set(data)
        if bench.failure:
            break
    say(f"took {time.monotonic() - bench.began:.0f} s; written to {args.out}")
    if bench.failure:
        sys.exit(f"op_bench: {bench.failure}")


if __name__ == "__main__":
    main()
