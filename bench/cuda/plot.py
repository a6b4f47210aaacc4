#!/usr/bin/env python3
"""Plots of op_bench.py's CSV files, beside the formula of the paper.

    python3 bench/cuda/plot.py build/bench/cuda/paper.csv --out build/bench/cuda

For each model: latency over prefix length for each batch size, sharing on and off, with the spread
(10th to 90th percentile) as a band; and how often faster sharing makes it, beside
b (s + c) / (s + b c), which counts KV bytes alone: b requests, s shared tokens, c of each one's
own.
"""

import argparse
import csv
import json
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

# Of viridis, dark to light: also in grey, and to eyes that do not tell red from green, the order
# of the batch sizes is seen. Markers say it again.
COLORS = plt.get_cmap("viridis")
MARKERS = "osD^vP*X"
LABELS = {
    "relay": "Relay",
    "relay-off": "Relay, sharing off",
    "fa3": "FA3",
    "fi": "FlashInfer decode",
    "fi-cascade": "FlashInfer cascade",
}
DASHES = {"relay": "-", "relay-off": "--", "fa3": ":"}


def formula(batch, shared, own):
    return batch * (shared + own) / (shared + batch * own)


def load(path):
    """{(model, batch): {competitor: {prefix: row of the better mode}}}"""
    found = defaultdict(lambda: defaultdict(dict))
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if not row["median_us"] or row["competitor"] == "relay-plan" or row["prefix"] == "0":
                continue
            for key in ("median_us", "p10_us", "p90_us", "bytes_us", "flops_us"):
                row[key] = float(row[key]) if row[key] else 0.0
            for key in ("prefix", "own", "batch", "q_heads", "kv_heads", "dim"):
                row[key] = int(row[key])
            heads = f"{row['q_heads']}/{row['kv_heads']}x{row['dim']}"
            model = f"{row['model']} ({heads})" if row["model"] else heads
            rows = found[model, row["batch"]][row["competitor"]]
            old = rows.get(row["prefix"])
            if old is None or row["median_us"] < old["median_us"]:
                rows[row["prefix"]] = row
    return found


def style(index, count):
    # Not to the end: the lightest yellow is lost on white.
    return {"color": COLORS(0.85 * index / max(1, count - 1)), "marker": MARKERS[index % 8]}


def prefix_axis(axis, prefixes):
    axis.set_xscale("log", base=2)
    axis.set_xticks(prefixes, [f"{p // 1024}k" if p >= 1024 else str(p) for p in prefixes])
    axis.minorticks_off()
    axis.set_xlabel("shared prefix, tokens")
    axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def plain_number(value, _):
    return f"{value:g}"


def latency(axis, batches, found, model, names):
    prefixes = set()
    for index, batch in enumerate(batches):
        for name in names:
            rows = sorted(found[model, batch].get(name, {}).values(), key=lambda r: r["prefix"])
            if not rows:
                continue
            x = [r["prefix"] for r in rows]
            prefixes.update(x)
            look = style(index, len(batches))
            axis.plot(
                x,
                [r["median_us"] for r in rows],
                DASHES.get(name, "-."),
                linewidth=1.4,
                markersize=3.5,
                **look,
            )
            axis.fill_between(
                x,
                [r["p10_us"] for r in rows],
                [r["p90_us"] for r in rows],
                color=look["color"],
                alpha=0.25,
                linewidth=0,
            )
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter(plain_number)
    axis.set_ylabel("attention of one layer, µs")
    axis.set_title(model, loc="left", fontsize=10)
    prefix_axis(axis, sorted(prefixes))


def gain(axis, batches, found, model):
    prefixes, top = set(), 1.0
    shown = [b for b in batches if b > 1]
    for batch in shown:
        index = batches.index(batch)
        on, off = (found[model, batch].get(n, {}) for n in ("relay", "relay-off"))
        x = sorted(on.keys() & off.keys())
        if not x:
            continue
        prefixes.update(x)
        look = style(index, len(batches))
        ratio = [off[p]["median_us"] / on[p]["median_us"] for p in x]
        low = [off[p]["p10_us"] / on[p]["p90_us"] for p in x]
        high = [off[p]["p90_us"] / on[p]["p10_us"] for p in x]
        told = [formula(batch, p, on[p]["own"]) for p in x]
        top = max(top, *told, *high)
        axis.plot(x, ratio, "-", linewidth=1.4, markersize=3.5, **look)
        axis.fill_between(x, low, high, color=look["color"], alpha=0.25, linewidth=0)
        axis.plot(x, told, ":", color=look["color"], linewidth=1.2)
    axis.axhline(1, color="#888888", linewidth=0.8)
    axis.set_yscale("log", base=2)
    axis.set_ylim(0.7, 1.3 * top)
    axis.yaxis.set_major_formatter(plain_number)
    axis.set_ylabel("sharing off / on")
    axis.set_title(model, loc="left", fontsize=10)
    prefix_axis(axis, sorted(prefixes))


def figure(models, batches, draw, legend, title, note, path):
    columns = min(2, len(models))
    lines = -(-len(models) // columns)
    width, height = 5.2 * columns + 1.4, 3.6 * lines + 1.0
    fig, axes = plt.subplots(lines, columns, figsize=(width, height), squeeze=False)
    for axis, model in zip(axes.flat, models, strict=False):
        draw(axis, model)
    for axis in axes.flat[len(models) :]:
        axis.set_visible(False)
    handles = [
        Line2D(
            [],
            [],
            linestyle="-",
            markersize=4,
            label=f"{b} requests" if b > 1 else "1 request",
            **style(i, len(batches)),
        )
        for i, b in enumerate(batches)
    ]
    handles += [
        Line2D([], [], color="#333333", linestyle=dash, label=text) for text, dash in legend
    ]
    fig.legend(handles=handles, loc="center right", fontsize=8, frameon=False)
    fig.suptitle(title, x=0.01, ha="left", fontsize=12)
    fig.text(0.01, 0.005, note, fontsize=7, color="#555555")
    fig.tight_layout(rect=(0, 0.02, 1 - 1.45 / width, 0.98))
    fig.savefig(path, dpi=150)
    plt.close(fig)
    print(path)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("csv", type=Path)
    parser.add_argument("--out", type=Path, help="folder of the PNG files (that of the CSV)")
    parser.add_argument(
        "--with",
        dest="names",
        default="relay,relay-off",
        help="what the latency shows (relay,relay-off)",
    )
    args = parser.parse_args()
    out = args.out or args.csv.parent
    out.mkdir(parents=True, exist_ok=True)
    found = load(args.csv)
    models = list(dict.fromkeys(model for model, _ in found))
    batches = sorted({batch for _, batch in found})
    if not models:
        parser.error(f"{args.csv} holds no measurement")
    own = sorted({r["own"] for c in found.values() for rows in c.values() for r in rows.values()})
    about = args.csv.with_suffix(".json")
    note = f"{args.csv.name}; {'/'.join(map(str, own))} tokens of each request's own"
    if about.exists():
        said = json.loads(about.read_text())["about"]
        note += f"; {said['gpu']}, driver {said['driver']}, commit {said['commit'] or 'unknown'}, "
        note += f"read {said['read_gbs']:.0f} GB/s, bf16 {said['bf16_tflops']:.0f} TFLOP/s"
    note += "; medians, bands from the 10th to the 90th percentile"
    names = args.names.split(",")
    figure(
        models,
        batches,
        lambda a, m: latency(a, batches, found, m, names),
        [(LABELS.get(n, n), DASHES.get(n, "-.")) for n in names],
        "Decode attention over a shared prefix",
        note,
        out / f"{args.csv.stem}_latency.png",
    )
    if any({"relay", "relay-off"} <= c.keys() for c in found.values()):
        figure(
            models,
            batches,
            lambda a, m: gain(a, batches, found, m),
            [("measured", "-"), ("b(s+c)/(s+bc)", ":")],
            "How often faster with sharing than without",
            note,
            out / f"{args.csv.stem}_gain.png",
        )


if __name__ == "__main__":
    main()
