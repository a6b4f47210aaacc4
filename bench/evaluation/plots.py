"""The figures. Systems keep their colour (Okabe and Ito's, told apart by the colour-blind), marker
and dash everywhere; bands and bars go from quartile to quartile."""

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from shapes import SHAPES
from tasks import Row

LOOKS = {  # colour, marker, dash
    "relay": ("#0072B2", "o", "-"),
    "relay-off": ("#56B4E9", "s", "--"),
    "relay, llama.cpp's attention": ("#CC79A7", "v", "-."),
    "ggml": ("#D55E00", "^", "-"),
    "ggml, -fa off": ("#E69F00", "<", "--"),
    "llama-server": ("#D55E00", "^", "-"),
    "llama-server, -fa off": ("#E69F00", "<", "--"),
    "vllm": ("#009E73", "D", "-"),
    "vllm, no prefix caching": ("#8A8A00", "P", ":"),
    "vllm with Relay": ("#0072B2", "X", "-"),
    "fa3": ("#009E73", "D", "-"),
    "fi": ("#D55E00", "^", "-"),
    "fi-cascade": ("#E69F00", "<", "--"),
    "fi-cascade-fa2": ("#CC79A7", "v", "-."),
    "cost model": ("#000000", "", ":"),
}
NAMES = {
    "relay": "Relay",
    "relay-off": "Relay, sharing off",
    "relay, llama.cpp's attention": "relay serve, llama.cpp's attention",
    "ggml": "ggml (llama.cpp)",
    "ggml, -fa off": "ggml without flash attention",
    "vllm": "vLLM",
    "vllm, no prefix caching": "vLLM without prefix caching",
    "vllm with Relay": "vLLM with Relay",
    "fa3": "FA3",
    "fi": "FlashInfer decode",
    "fi-cascade": "FlashInfer cascade",
    "fi-cascade-fa2": "FlashInfer cascade (FA2)",
    "cost model": "cost model (predicted)",
}
OTHER = ("#666666", "x", "-")
GREY = "#555555"


def name_of(system: str) -> str:
    return NAMES.get(system, system)


def in_order(systems) -> list[str]:
    known = list(LOOKS)
    return sorted(set(systems), key=lambda s: (known.index(s) if s in known else 99, s))


def tokens(count: float) -> str:
    return f"{count / 1024:g}k" if count >= 1024 else f"{count:g}"


# --- Axes ---------------------------------------------------------------------------------------


def plain(axis, title: str, x: str, y: str) -> None:
    axis.set_title(title, loc="left", fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def powers(axis, values, label=tokens) -> None:
    """A logarithmic x axis with a tick for each value."""
    values = sorted(set(values))
    if not values or min(values) <= 0:
        axis.set_xticks(values, [label(v) for v in values])
        return
    axis.set_xscale("log", base=2)
    # Every other one where they would run into one another.
    shown = values if len(values) < 9 else values[::-2][::-1]
    axis.set_xticks(shown, [label(v) for v in shown])
    axis.minorticks_off()


def log_y(axis, base: int = 10) -> None:
    axis.set_yscale("log", base=base)
    axis.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    )
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def line(axis, rows: list[Row], x: str, system: str, scale: float = 1.0, **look) -> None:
    rows = sorted(rows, key=lambda r: r.case[x])
    if not rows:
        return
    colour, marker, dash = LOOKS.get(system, OTHER)
    look = dict(color=colour, marker=marker, linestyle=dash) | look
    at = [r.case[x] for r in rows]
    axis.plot(at, [scale * r.median for r in rows], linewidth=1.5, markersize=4.5, **look)
    if any(r.n > 1 for r in rows):
        low, high = ([scale * getattr(r, end) for r in rows] for end in ("low", "high"))
        axis.fill_between(at, low, high, color=look["color"], alpha=0.22, linewidth=0)


def key_of(system: str) -> Line2D:
    colour, marker, dash = LOOKS.get(system, OTHER)
    return Line2D([], [], color=colour, marker=marker, linestyle=dash, markersize=4.5,
                  label=name_of(system))  # fmt: skip


def grid(count: int, columns: int, width: float = 4.1, height: float = 3.2):
    columns = min(columns, count)
    rows = -(-count // columns)
    wide = max(width * columns, 7.2)  # room for the title
    figure, axes = plt.subplots(rows, columns, figsize=(wide, height * rows + 1.0), squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def finish(figure, title: str, handles: list, note: str, path: Path) -> Path:
    """Legend below, so that panels keep their width."""
    width, height = figure.get_size_inches()
    columns = max(1, int(width / 2.4))
    lines = -(-len(handles) // columns)
    bottom = (0.30 + 0.22 * lines) / height
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    if handles:
        figure.legend(handles=handles, loc="lower left", ncols=columns, fontsize=8, frameon=False,
                      bbox_to_anchor=(0.005, 0.17 / height))  # fmt: skip
    figure.text(0.01, 0.04 / height, note, fontsize=7, color=GREY)
    figure.tight_layout(rect=(0, bottom, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


# --- Choosing rows ------------------------------------------------------------------------------


def choose(rows: list[Row], /, metric: str | None = None, system: str | None = None, **case):
    return [
        r
        for r in rows
        if (metric is None or r.metric == metric)
        and (system is None or r.system == system)
        and all(r.case.get(k) == v for k, v in case.items())
    ]


def values(rows: list[Row], name: str) -> list:
    found = {json.dumps(r.case[name]): r.case[name] for r in rows if name in r.case}
    return sorted(found.values(), key=lambda v: (isinstance(v, str), v))


def at_most(items: list, count: int) -> list:
    """So many of them, evenly, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def panels_of(rows: list[Row]) -> list[dict]:
    """The models of an operator, each with each KV type and number of own tokens."""
    names = [n for n in ("model", "kv_type", "context") if any(n in r.case for r in rows)]
    found = {json.dumps([r.case[n] for n in names]): {n: r.case[n] for n in names} for r in rows}
    order = list(SHAPES)
    return sorted(
        found.values(),
        key=lambda c: (order.index(c["model"]) if c["model"] in order else 99, str(c)),
    )


def title_of(case: dict) -> str:
    model = SHAPES[case["model"]].title if case["model"] in SHAPES else case["model"]
    return f"{model}, {case['kv_type']}" if "kv_type" in case else model


# --- The operator -------------------------------------------------------------------------------


def operator_latency(rows: list[Row], note: str, path: Path) -> Path | None:
    return latency_over(rows, "prefix", "batch", note, path)


def operator_batch(rows: list[Row], note: str, path: Path) -> Path | None:
    return latency_over(rows, "batch", "prefix", note, path)


def latency_over(rows: list[Row], x: str, fixed: str, note: str, path: Path) -> Path | None:
    rows = [r for r in choose(rows, "latency") if r.case.get("prefix", 0) > 0]
    rows = [r for r in rows if r.system != "cost model, off"]
    if len(values(rows, x)) < 2:
        return None
    cases = panels_of(rows)
    panels = [(case, v) for case in cases for v in at_most(values(choose(rows, **case), fixed), 3)]
    figure, axes = grid(len(panels), 3)
    for axis, (case, value) in zip(axes, panels, strict=True):
        shown = choose(rows, **case, **{fixed: value})
        for system in in_order(r.system for r in shown):
            line(axis, choose(shown, system=system), x, system, 1e6)
        what = f"batch {value}" if fixed == "batch" else f"{tokens(value)} shared tokens"
        plain(axis, f"{title_of(case)}, {what}", "shared prefix, tokens" if x == "prefix" else
              "requests", "attention of a layer, µs")  # fmt: skip
        powers(axis, values(shown, x))
        log_y(axis)
    handles = [key_of(s) for s in in_order(r.system for r in rows)]
    over = "prefix length" if x == "prefix" else "batch size"
    return finish(figure, f"Decode attention over {over}", handles, note, path)


def gains(rows: list[Row], **case) -> list[Row]:
    """Sharing off over on, with the spread that both of them allow."""
    made = []
    for on in choose(rows, "latency", "relay", **case):
        for off in choose(rows, "latency", "relay-off", **on.case):
            if off.case == on.case:
                made.append(
                    Row(on.section, on.case, "relay", "speed-up", "x", "higher",
                        off.median / on.median, off.low / on.high, off.high / on.low, on.n)
                )  # fmt: skip
    return made


def operator_gain(rows: list[Row], note: str, path: Path) -> Path | None:
    found = [r for r in gains(rows) if r.case["batch"] > 1 and r.case["prefix"] > 0]
    if len(values(found, "prefix")) < 2:
        return None
    cases = panels_of(found)
    batches = at_most(values(found, "batch"), 6)
    figure, axes = grid(len(cases), 2, 5.2, 3.6)
    colours = plt.get_cmap("viridis")
    for axis, case in zip(axes, cases, strict=True):
        for index, batch in enumerate(batches):
            colour = colours(0.85 * index / max(1, len(batches) - 1))
            shown = choose(found, **case, batch=batch)
            line(axis, shown, "prefix", "relay", color=colour, marker="osD^vP"[index])
            theory = choose(rows, "speed-up", "formula", **case, batch=batch)
            line(axis, theory, "prefix", "formula", color=colour, marker="", linestyle=":")
            predicted = []
            for on in choose(rows, "latency", "cost model", **case, batch=batch):
                for off in choose(rows, "latency", "cost model, off", **on.case):
                    ratio = off.median / on.median
                    predicted.append(Row("", on.case, "", "", "", "", ratio, ratio, ratio, 1))
            line(axis, predicted, "prefix", "", color=colour, marker="", linestyle="--")
        axis.axhline(1, color="#888888", linewidth=0.8)
        plain(axis, title_of(case), "shared prefix, tokens", "sharing off / on")
        powers(axis, values(found, "prefix"))
        log_y(axis, 2)
    handles = [
        Line2D([], [], color=colours(0.85 * i / max(1, len(batches) - 1)), marker="osD^vP"[i],
               markersize=4.5, label=f"{b} requests")
        for i, b in enumerate(batches)
    ]  # fmt: skip
    handles += [
        Line2D([], [], color="#333333", linestyle=dash, label=text)
        for text, dash in
        (("measured", "-"), ("the paper's b(s+c)/(s+bc)", ":"), ("our cost model", "--"))
    ]  # fmt: skip
    return finish(figure, "How often faster attention is with sharing", handles, note, path)


def decode_steps(rows: list[Row], note: str, path: Path) -> Path | None:
    if len(values(rows, "prefix")) < 2:
        return None
    batches = at_most(values(rows, "batch"), 3)
    figure, axes = grid(len(batches), 3)
    for axis, batch in zip(axes, batches, strict=True):
        shown = choose(rows, batch=batch)
        for system in in_order(r.system for r in shown):
            line(axis, choose(shown, system=system), "prefix", system, 1e3)
        plain(axis, f"batch {batch}", "shared prompt, tokens", "decode step, ms")
        powers(axis, values(shown, "prefix"))
        axis.set_ylim(bottom=0)
    handles = [key_of(s) for s in in_order(r.system for r in rows)]
    model = ", ".join(map(str, values(rows, "model")))
    return finish(figure, f"A whole vLLM's decode step, {model}", handles, note, path)


# --- Serving ------------------------------------------------------------------------------------


def over(
    rows: list[Row], x: str, label: str, panels: list, title: str, note: str, path: Path,
    ticks: Callable = tokens,
) -> Path | None:  # fmt: skip
    """Panels (metric, label, scale) of lines over a field of the case."""
    rows = [r for r in rows if isinstance(r.case.get(x), int | float)]
    panels = [panel for panel in panels if choose(rows, panel[0])]
    if not panels or len(values(rows, x)) < 2:
        return None
    figure, axes = grid(len(panels), 3)
    for axis, (metric, text, scale) in zip(axes, panels, strict=True):
        shown = choose(rows, metric)
        for system in in_order(r.system for r in shown):
            line(axis, choose(shown, system=system), x, system, scale)
        plain(axis, text, label, "")
        powers(axis, values(shown, x), ticks)
        axis.set_ylim(bottom=0)
    handles = [key_of(s) for s in in_order(r.system for r in rows)]
    return finish(figure, title, handles, note, path)


def throughput(rows: list[Row], note: str, path: Path) -> Path | None:
    panels = [
        ("output throughput", "answered, tokens/s", 1),
        ("normalised latency p50", "normalised latency p50, ms/token", 1e3),
        ("price", "dollars per million tokens", 1),
    ]
    title = "All requests at once, over the length of the system prompt"
    return over(rows, "prompt", "system prompt, tokens", panels, title, note, path)


def arrivals(rows: list[Row], note: str, path: Path) -> Path | None:
    panels = [
        ("normalised latency p50", "normalised latency p50, ms/token", 1e3),
        ("normalised latency p95", "normalised latency p95, ms/token", 1e3),
        ("normalised latency p99", "normalised latency p99, ms/token", 1e3),
        ("time to first token p50", "time to first token p50, s", 1),
        ("time to first token p95", "time to first token p95, s", 1),
        ("inter-token latency p95", "inter-token latency p95, ms", 1e3),
    ]
    title = "Poisson arrivals at rising rates"
    return over(rows, "rate", "requests/s", panels, title, note, path, lambda v: f"{v:g}")


def prompts(rows: list[Row], note: str, path: Path) -> Path | None:
    panels = [
        ("output throughput", "answered, tokens/s", 1),
        ("inter-token latency p50", "inter-token latency p50, ms", 1e3),
        ("resident memory", "resident memory, MiB", 2**-20),
    ]
    title = "Several system prompts at once"
    return over(rows, "prompts", "system prompts", panels, title, note, path)


def without(rows: list[Row], note: str, path: Path) -> Path | None:
    panels = [
        ("output throughput", "answered, tokens/s", 1),
        ("inter-token latency p50", "inter-token latency p50, ms", 1e3),
    ]
    title = "A share of the requests without the system prompt"
    return over(rows, "without", "share without", panels, title, note, path, lambda v: f"{v:.0%}")


def sharers(rows: list[Row], note: str, path: Path) -> Path | None:
    panels = [
        ("output throughput", "answered, tokens/s", 1),
        ("inter-token latency p50", "inter-token latency p50, ms", 1e3),
        ("KV held", "KV held, MiB", 2**-20),
        ("resident memory", "resident memory, MiB", 2**-20),
    ]
    title = "Cost and memory against the number that share one prompt"
    return over(rows, "requests", "requests at once", panels, title, note, path)


def bars(rows: list[Row], group: str | None, panels: list, title: str, note: str, path: Path):
    panels = [panel for panel in panels if choose(rows, panel[0])]
    if not panels:
        return None
    systems = in_order(r.system for r in rows)
    groups = values(rows, group) if group else [None]
    figure, axes = grid(len(panels), 3)
    for axis, (metric, text, scale) in zip(axes, panels, strict=True):
        for i, system in enumerate(systems):
            found = [
                (g, row)
                for g, value in enumerate(groups)
                for row in choose(rows, metric, system, **({group: value} if group else {}))
            ]
            width = 0.8 / len(systems)
            at = [g - 0.4 + (i + 0.5) * width for g, _ in found]
            heights = [scale * row.median for _, row in found]
            error = [
                [scale * max(0, row.median - row.low) for _, row in found],
                [scale * max(0, row.high - row.median) for _, row in found],
            ]
            if all(row.n == 1 for _, row in found):
                error = None
            colour, _, dash = LOOKS.get(system, OTHER)
            axis.bar(at, heights, 0.92 * width, yerr=error, color=colour, capsize=2,
                     hatch="" if dash == "-" else "///", edgecolor="white", linewidth=0,
                     error_kw=dict(linewidth=0.9))  # fmt: skip
        labels = [str(v) for v in groups] if group else [""]
        axis.set_xticks(range(len(groups)), labels)
        plain(axis, text, "", "")
        axis.grid(False, axis="x")
        axis.set_axisbelow(True)
    handles = [
        plt.Rectangle((0, 0), 1, 1, label=name_of(s), facecolor=LOOKS.get(s, OTHER)[0],
                      hatch="" if LOOKS.get(s, OTHER)[2] == "-" else "///", edgecolor="white")
        for s in systems
    ]  # fmt: skip
    return finish(figure, title, handles, note, path)


def levels(rows: list[Row], note: str, path: Path) -> Path | None:
    panels = [
        ("output throughput", "answered, tokens/s", 1),
        ("inter-token latency p50", "inter-token latency p50, ms", 1e3),
        ("KV held", "KV held, MiB", 2**-20),
    ]
    title = "Two and three levels of prompts (groups x tokens)"
    return bars(rows, "levels", panels, title, note, path)


def replay(rows: list[Row], note: str, path: Path) -> Path | None:
    panels = [
        ("time to first token p50", "time to first token p50, s", 1),
        ("time to first token p95", "time to first token p95, s", 1),
        ("normalised latency p50", "normalised latency p50, ms/token", 1e3),
        ("normalised latency p95", "normalised latency p95, ms/token", 1e3),
        ("inter-token latency p95", "inter-token latency p95, ms", 1e3),
        ("cached share of prompts", "prompt tokens found cached, share", 1),
    ]
    return bars(rows, None, panels, "The trace, scaled and replayed", note, path)


# --- The trace on paper ---------------------------------------------------------------------------


def trace_levels(rows: list[Row], note: str, path: Path) -> Path | None:
    found = [r for r in rows if "level" in r.case]
    timed = [r for r in rows if "time" in r.case]
    if not found:
        return None
    first = {k: v for k, v in found[0].case.items() if k != "level"}
    figure, axes = grid(2, 2, 6.2, 3.4)
    names = [r.case["level"] for r in choose(found, "share of KV attended", **first)]
    # What few requests share many levels deep is one colour: the legend has to stay readable.
    most = 5
    depth = {n: min(i, most - 1) for i, n in enumerate(n for n in names if n != "own")}
    colours = plt.get_cmap("viridis")
    left = [0.0, 0.0]
    total = choose(rows, "read without sharing over with, all steps", **first)[0].median
    for name in names:
        shares = [
            choose(found, "share of KV attended", **first, level=name)[0].median,
            choose(found, "share of KV read", **first, level=name)[0].median / total,
        ]
        colour = "#bbbbbb" if name == "own" else colours(0.9 * depth[name] / (most - 1))
        axes[0].barh([1, 0], shares, left=left, color=colour, edgecolor="white", linewidth=0.4)
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes[0].set_yticks([1, 0], ["without sharing", "with sharing"])
    plain(axes[0], "KV read in decode steps, mean", "share of what is read without sharing", "")
    case = {k: v for k, v in first.items()}
    for metric, label, colour, dash in (
        ("attended, shared share", "of the KV attended, shared", "#0072B2", "-"),
        ("saved share of attention", "of attention's time saved (cost model)", "#D55E00", "--"),
    ):
        shown = sorted(choose(timed, metric, **case), key=lambda r: r.case["time"])
        axes[1].plot([r.case["time"] / 60 for r in shown], [r.median for r in shown], dash,
                     color=colour, linewidth=1.2, label=label)  # fmt: skip
    plain(axes[1], "step by step", "minutes of the trace", "share")
    axes[1].set_ylim(0, 1)
    axes[1].legend(fontsize=8, frameon=False)
    shown = list(dict.fromkeys(depth.values()))
    handles = [
        plt.Rectangle((0, 0), 1, 1, facecolor=colours(0.9 * d / (most - 1)),
                      label=f"level {d + 1}" + (" and deeper" if d == most - 1 else ""))
        for d in shown
    ]  # fmt: skip
    handles.append(plt.Rectangle((0, 0), 1, 1, facecolor="#bbbbbb", label="own"))
    title = f"A chat service's hour on paper, {title_of(first)}"
    return finish(figure, title, handles, note, path)


# --- Quality --------------------------------------------------------------------------------------


def errors(rows: list[Row], note: str, path: Path) -> Path | None:
    rows = choose(rows, "relative rms error")
    if not rows:
        return None
    slots = max(values(rows, "slots"))
    rows = [r for r in rows if r.case["slots"] == slots and r.case["phase"] == "decode"]
    rows = [r for r in rows if r.case["rows"] == max(values(rows, "rows"))]
    rows = [r for r in rows if r.case["head_dim"] == max(values(rows, "head_dim"))]
    panels = values(rows, "values")
    figure, axes = grid(len(panels), 3)
    systems = in_order(r.system for r in rows)
    for axis, kind in zip(axes, panels, strict=True):
        types = values(rows, "kv_type")
        for i, system in enumerate(systems):
            colour, marker, _ = LOOKS.get(system, OTHER)
            found = choose(rows, system=system, values=kind)
            at = [types.index(r.case["kv_type"]) + 0.15 * (i - (len(systems) - 1) / 2)
                  for r in found]  # fmt: skip
            axis.plot(at, [r.median for r in found], marker, color=colour, markersize=7)
        axis.set_xticks(range(len(types)), types)
        axis.set_xlim(-0.5, len(types) - 0.5)
        plain(axis, f"{kind} values, {tokens(slots)} slots", "KV", "relative rms error")
        axis.set_yscale("log")
    handles = [
        Line2D([], [], color=LOOKS.get(s, OTHER)[0], marker=LOOKS.get(s, OTHER)[1], linestyle="",
               label=name_of(s))
        for s in systems
    ]  # fmt: skip
    return finish(figure, "Errors of attention against double precision", handles, note, path)
