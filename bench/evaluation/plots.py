"""The figures. Systems keep their colour (Okabe and Ito's, told apart by the colour-blind), marker
and dash everywhere; bands and whiskers go from quartile to quartile. Where a field has fewer than
three values, bars stand in the place of a line."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.legend_handler import HandlerTuple
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator
from PIL import Image
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
    "vllm with Relay": ("#CC79A7", "X", "--"),
    "fa3": ("#009E73", "D", "-"),
    "fi": ("#D55E00", "^", "-"),
    "fi-cascade": ("#E69F00", "<", "--"),
    "fi-cascade-fa2": ("#CC79A7", "v", "-."),
    "cost model": ("#000000", "", ":"),
    "limit": ("#000000", "", ":"),
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
    "limit": "the hardware's limit",
    "relay, tuned prefix": "Relay, a tuned prefix in place of the prompt",
}
OTHER = ("#666666", "x", "-")
# A bar has no marker: its hatch stands for it.
HATCHES = {"o": "", "s": "///", "v": "...", "^": "\\\\\\", "<": "ooo", "D": "||", "P": "++",
           "X": "xx"}  # fmt: skip
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
    """A logarithmic y axis that has enough ticks with labels, however little it spans."""
    axis.set_yscale("log", base=base)
    low, high = axis.get_ylim()
    few = base == 10 and high / low < 3000
    axis.yaxis.set_major_locator(LogLocator(base, subs=(1, 2, 5) if few else (1,)))
    axis.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
    )
    axis.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def from_zero(axis, rows: list[Row], scale: float = 1.0, more: float = 1.12) -> None:
    """Room above the highest for its marker, or its label."""
    highest = max((scale * max(r.median, r.high) for r in rows), default=0.0)
    axis.set_ylim(0, more * highest or 1)


def far_apart(rows: list[Row]) -> bool:
    """Whether one system's line would press another's flat."""
    highest = [max(r.median for r in rows if r.system == s) for s in {r.system for r in rows}]
    return max(highest) > 20 * min(highest) > 0


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


def bars(axis, rows: list[Row], x: str | None, systems: list[str], scale: float, ticks) -> None:
    """A group of bars for each value of the case's field, or one group; each with its number."""
    groups = values(rows, x) if x else [None]
    width = 0.8 / len(systems)
    for row in rows:
        group = groups.index(row.case[x]) if x else 0
        at = group - 0.4 + (systems.index(row.system) + 0.5) * width
        height = top = scale * row.median
        axis.bar(at, height, 0.92 * width, linewidth=0, **fill_of(row.system))
        if row.n > 1:
            low, top = scale * row.low, scale * row.high
            axis.errorbar(at, height, [[height - low], [top - height]], capsize=2, color="black",
                          linewidth=0.9)  # fmt: skip
        number = f"{height:.3g}" if height < 1000 else f"{height:,.0f}"
        axis.annotate(number, (at, top), (0, 2), textcoords="offset points", ha="center",
                      fontsize=7)  # fmt: skip
    axis.set_xticks(range(len(groups)) if x else [], [ticks(v) for v in groups] if x else [])
    axis.grid(False, axis="x")
    axis.set_axisbelow(True)


def fill_of(system: str) -> dict:
    colour, marker, _ = LOOKS.get(system, OTHER)
    return dict(facecolor=colour, hatch=HATCHES.get(marker, "**"), edgecolor="white")


def patch_of(system: str):
    return plt.Rectangle((0, 0), 1, 1, label=name_of(system), **fill_of(system))


def grid(count: int, columns: int, width: float = 4.1, height: float = 3.2):
    """Four panels are two by two."""
    return panel_grid(count, min(columns, 2 if count == 4 else count), width, height)


def panel_grid(count: int, columns: int, width: float = 4.1, height: float = 3.2):
    rows = -(-count // columns)
    wide = max(width * columns, 7.2)  # room for the title
    figure, axes = plt.subplots(rows, columns, figsize=(wide, height * rows + 1.0), squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    return figure, list(axes.flat[:count])


def finish(figure, title: str, handles: list, note: str, path: Path) -> Path:
    """Legend below, so that panels keep their width. Handles in a tuple stand for one thing."""
    width, height = figure.get_size_inches()
    columns = max(1, int(width / 2.4))
    lines = -(-len(handles) // columns)
    bottom = (0.30 + 0.22 * lines) / height
    figure.suptitle(title, x=0.01, y=1 - 0.1 / height, ha="left", va="top", fontsize=12)
    if handles:
        together = [handle if isinstance(handle, tuple) else (handle,) for handle in handles]
        figure.legend(together, [first.get_label() for first, *_ in together], ncols=columns,
                      handler_map={tuple: HandlerTuple(ndivide=None)}, fontsize=8, frameon=False,
                      handlelength=2 * max(map(len, together)), loc="lower left",
                      bbox_to_anchor=(0.005, 0.17 / height))  # fmt: skip
    figure.text(0.01, 0.04 / height, note, fontsize=7, color=GREY)
    figure.tight_layout(rect=(0, bottom, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.BytesIO() as drawn:
        figure.savefig(drawn, dpi=130)
        plt.close(figure)
        # These files are kept with the documents: by a palette they are a third as large.
        image = Image.open(drawn).convert("RGB")
        image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
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
    return sorted(found.values(), key=in_a_row)


def in_a_row(value) -> tuple:
    """Numbers first; of levels those with fewer."""
    return (1, value.count("+"), value) if isinstance(value, str) else (0, 0, value)


def at_most(items: list, count: int) -> list:
    """So many of them, evenly, the first and the last among them."""
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def panels_of(rows: list[Row]) -> list[dict]:
    """The models of an operator, each with each KV type and number of own tokens."""
    names = [n for n in ("model", "kv_type", "context") if any(n in r.case for r in rows)]
    found = {json.dumps([r.case[n] for n in names]): {n: r.case[n] for n in names} for r in rows}
    order = [name for key, shape in SHAPES.items() for name in (key, shape.title)]
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
    # A row of panels for each model.
    columns = min(3, len(values(rows, fixed)))
    panels = []
    for case in panels_of(rows):
        shown = at_most(values(choose(rows, **case), fixed), columns)
        panels += [(case, value) for value in shown] + [None] * (columns - len(shown))
    figure, axes = panel_grid(len(panels), columns)
    for axis, panel in zip(axes, panels, strict=True):
        if panel is None:
            axis.set_visible(False)
            continue
        case, value = panel
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
            # Hollow, so that no colour is needed to tell which line is which batch's.
            hollow = dict(color=colour, marker="osD^vP"[index], markerfacecolor="white")
            line(axis, theory, "prefix", "formula", linestyle=":", **hollow)
            predicted = []
            for on in choose(rows, "latency", "cost model", **case, batch=batch):
                for off in choose(rows, "latency", "cost model, off", **on.case):
                    ratio = off.median / on.median
                    predicted.append(Row("", on.case, "", "", "", "", ratio, ratio, ratio, 1))
            line(axis, predicted, "prefix", "", linestyle="--", **hollow)
        axis.axhline(1, color="#888888", linewidth=0.8)
        plain(axis, title_of(case), "shared prefix, tokens", "sharing off / on")
        powers(axis, values(choose(found, **case), "prefix"))
        log_y(axis, 2)
    handles = [
        Line2D([], [], color=colours(0.85 * i / max(1, len(batches) - 1)), marker="osD^vP"[i],
               markersize=4.5, label=f"{b} requests")
        for i, b in enumerate(batches)
    ]  # fmt: skip
    dashes = [("measured", "-"), ("the paper's b(s+c)/(s+bc)", ":")]
    if choose(rows, "latency", "cost model"):
        dashes.append(("our cost model", "--"))
    handles += [Line2D([], [], color="#333333", linestyle=d, label=text) for text, d in dashes]
    return finish(figure, "How many times as fast attention is with sharing", handles, note, path)


def decode_steps(rows: list[Row], note: str, path: Path) -> Path | None:
    """Over the prompt, a panel for each of three batches; over the batch, where it varies more."""
    x, fixed = "prefix", "batch"
    if len(values(rows, x)) < len(values(rows, fixed)):
        x, fixed = fixed, x
    text = "{} shared tokens" if fixed == "prefix" else "batch {}"
    panels = [
        (f"{text.format(tokens(v))}, a step in ms", "decode step", 1e3, choose(rows, **{fixed: v}))
        for v in at_most(values(rows, fixed), 3)
    ]
    model = ", ".join(title_of({"model": m}) for m in values(rows, "model"))
    label = "shared prompt, tokens" if x == "prefix" else "requests"
    title = f"A whole vLLM's decode step, {model}"
    return draw(x, label, panels, title, note, path)


# --- Serving ------------------------------------------------------------------------------------

# Metric, title, scale.
THROUGHPUT = ("output throughput", "answered, tokens/s", 1)
INTER_TOKEN = ("inter-token latency p50", "inter-token latency p50, ms", 1e3)
KV_HELD = ("KV held", "KV held, MiB", 2**-20)
MEMORY = ("resident memory", "resident memory, MiB", 2**-20)


def over(
    rows: list[Row], x: str, label: str, metrics: list, title: str, note: str, path: Path,
    ticks: Callable = tokens,
) -> Path | None:  # fmt: skip
    """A panel for each metric, and for each model, over a field of the case."""
    models = models_of(rows)
    panels = [
        (text if len(models) == 1 else f"{name}\n{text}", metric, scale, shown)
        for name, shown in models.items()
        for metric, text, scale in metrics
        if choose(shown, metric)
    ]
    return draw(x, label, panels, title, note, path, ticks)


def draw(
    x: str | None, label: str, panels: list, title: str, note: str, path: Path,
    ticks: Callable = tokens,
) -> Path | None:  # fmt: skip
    """Panels (title, metric, scale, rows): lines over x; bars, where it has one value or two."""
    if not panels:
        return None
    systems = in_order(r.system for _, metric, _, shown in panels for r in choose(shown, metric))
    figure, axes = grid(len(panels), 3)
    looks: dict[Callable, None] = {}  # what the legend has to tell apart
    for axis, (text, metric, scale, shown) in zip(axes, panels, strict=True):
        found = choose(shown, metric)
        plain(axis, text, label, "")
        bounds = choose(shown, "bound")[:1] if metric == "normalised latency p95" else []
        if x and len(values(found, x)) >= 3:
            looks[key_of] = None
            for system in systems:
                line(axis, choose(found, system=system), x, system, scale)
            powers(axis, values(found, x), ticks)
            if far_apart(found):
                log_y(axis)
            else:
                from_zero(axis, found + bounds, scale)
        else:
            looks[patch_of] = None
            bars(axis, found, x, systems, scale, ticks)
            from_zero(axis, found + bounds, scale, 1.2)
        for bound in (scale * row.median for row in bounds):
            axis.axhline(bound, color="#444444", linewidth=1, linestyle=(0, (1, 1)))
            # Below its right end: what breaks it is above there, what holds is further down.
            axis.annotate("the bound", (0.99, bound), (0, -3), xycoords=("axes fraction", "data"),
                          textcoords="offset points", fontsize=7, color=GREY, ha="right",
                          va="top")  # fmt: skip
    handles = [tuple(look(s) for look in looks) for s in systems]
    return finish(figure, title, handles, note, path)


def models_of(rows: list[Row]) -> dict[str, list[Row]]:
    """By model, as it was cut."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(model_name(row.case), []).append(row)
    return found


def model_name(case: dict) -> str:
    name, shape = title_of({"model": case["model"]}), SHAPES.get(case["model"])
    layers = case.get("layers")
    return f"{name}, {layers} layers" if shape and layers and layers != shape.layers else name


def throughput(rows: list[Row], note: str, path: Path) -> Path | None:
    metrics = [
        THROUGHPUT,
        ("normalised latency p50", "normalised latency p50, ms/token", 1e3),
        ("price", "dollars per million tokens", 1),
    ]
    title = "All requests at once, over the length of the system prompt"
    return over(rows, "prompt", "system prompt, tokens", metrics, title, note, path)


def arrivals(rows: list[Row], note: str, path: Path) -> Path | None:
    metrics = [
        (f"{metric} p{p}", f"{metric} p{p}, {unit}", scale)
        for metric, unit, scale in (("normalised latency", "ms/token", 1e3),
                                    ("time to first token", "s", 1),
                                    ("inter-token latency", "ms", 1e3))
        for p in (50, 95, 99)
    ]  # fmt: skip
    rows = [r for r in rows if isinstance(r.case.get("rate"), int | float)]
    title = "Poisson arrivals"
    return over(rows, "rate", "requests/s", metrics, title, note, path, lambda v: f"{v:g}")


def prompts(rows: list[Row], note: str, path: Path) -> Path | None:
    metrics = [THROUGHPUT, INTER_TOKEN, MEMORY]
    title = "Several system prompts at once"
    return over(rows, "prompts", "system prompts", metrics, title, note, path)


def without(rows: list[Row], note: str, path: Path) -> Path | None:
    title, label = "A share of the requests without the system prompt", "share without"
    metrics = [THROUGHPUT, INTER_TOKEN]
    return over(rows, "without", label, metrics, title, note, path, lambda v: f"{v:.0%}")


def sharers(rows: list[Row], note: str, path: Path) -> Path | None:
    metrics = [THROUGHPUT, INTER_TOKEN, KV_HELD, MEMORY]
    title = "Cost and memory against the number that share one prompt"
    return over(rows, "requests", "requests at once", metrics, title, note, path)


def levels(rows: list[Row], note: str, path: Path) -> Path | None:
    metrics = [THROUGHPUT, INTER_TOKEN, KV_HELD]
    title, label = "Levels of prompts", "groups x tokens of each level"
    return over(rows, "levels", label, metrics, title, note, path,
                lambda v: v.replace("x", "×").replace("+", " +\n"))  # fmt: skip


def replay(rows: list[Row], note: str, path: Path) -> Path | None:
    metrics = [
        ("time to first token p50", "time to first token p50, s", 1),
        ("time to first token p95", "time to first token p95, s", 1),
        ("normalised latency p50", "normalised latency p50, ms/token", 1e3),
        ("normalised latency p95", "normalised latency p95, ms/token", 1e3),
        ("inter-token latency p95", "inter-token latency p95, ms", 1e3),
        ("cached share of prompts", "prompt tokens found cached, %", 100),
    ]
    panels = [
        (text, metric, scale, rows) for metric, text, scale in metrics if choose(rows, metric)
    ]
    return draw(None, "", panels, "The trace, scaled and replayed", note, path)


# --- The trace on paper ---------------------------------------------------------------------------

# What few requests share, many levels deep, is one colour: the legend has to stay readable.
LEVEL_COLOURS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999"]
PER_STEP = "share of KV attended, step"


def depth_of(level: str) -> int:
    return min(int(level.split()[-1]), len(LEVEL_COLOURS)) - 1


def by_depth(rows: list[Row]) -> dict[int, float]:
    """Percent of each colour's levels together."""
    found: dict[int, float] = {}
    for row in rows:
        if row.case["level"] != "own":
            depth = depth_of(row.case["level"])
            found[depth] = found.get(depth, 0.0) + 100 * row.median
    return found


def trace_levels(rows: list[Row], note: str, path: Path) -> Path | None:
    means = choose(rows, "share of KV attended")
    if not means:
        return None
    first = {k: v for k, v in means[0].case.items() if k != "level"}
    figure, axes = grid(2, 2, 6.2, 3.4)
    attended = by_depth(choose(means, **first))
    total = choose(rows, "read without sharing over with, all steps", **first)[0].median
    reads = by_depth(choose(rows, "share of KV read", **first))
    for depth, share in attended.items():
        for offset, height, hatch in ((-0.2, share, ""), (0.2, reads[depth] / total, "////")):
            axes[0].bar(depth + offset, height, 0.37, color=LEVEL_COLOURS[depth], hatch=hatch,
                        edgecolor="white", linewidth=0)  # fmt: skip
            axes[0].annotate(f"{height:.2g}", (depth + offset, height), (0, 2), fontsize=7,
                             textcoords="offset points", ha="center")  # fmt: skip
    own = choose(means, level="own", **first)[0].median
    plain(axes[0], f"KV that requests share, mean; the other {own:.1%} is each one's own", "",
          "% of the KV attended")  # fmt: skip
    deepest = len(LEVEL_COLOURS) - 1
    names = {d: f"level {d + 1}" + (" and deeper" if d == deepest else "") for d in attended}
    axes[0].set_xticks(list(names), list(names.values()))
    axes[0].grid(False, axis="x")
    axes[0].set_axisbelow(True)
    axes[0].set_ylim(0, 1.15 * max(attended.values(), default=0) or 1)
    trace_steps(axes[1], choose(rows, **first))
    handles = [plt.Rectangle((0, 0), 1, 1, facecolor=LEVEL_COLOURS[d], label=name)
               for d, name in names.items()]  # fmt: skip
    handles += [
        plt.Rectangle((0, 0), 1, 1, facecolor="#777777", hatch=hatch, edgecolor="white", label=text)
        for text, hatch in (("attended", ""), ("read, with sharing", "////"))
    ]
    handles.append(Line2D([], [], color="#000000", linewidth=1, linestyle="--",
                          label="saved of attention's time (cost model)"))  # fmt: skip
    title = f"A chat service's hour on paper, {title_of(first)}"
    return finish(figure, title, handles, note, path)


def trace_steps(axis, rows: list[Row]) -> None:
    """Level upon level, step by step."""
    steps: dict[float, dict[int, float]] = {r.case["time"]: {} for r in rows if "time" in r.case}
    for time in steps:
        steps[time] = by_depth(choose(rows, PER_STEP, time=time))
    times = sorted(steps)
    depths = sorted({depth for shares in steps.values() for depth in shares})
    minutes = [time / 60 for time in times]
    if depths:
        axis.stackplot(minutes, [[steps[t].get(d, 0.0) for t in times] for d in depths],
                       colors=[LEVEL_COLOURS[d] for d in depths], linewidth=0)  # fmt: skip
    saved = sorted(choose(rows, "saved share of attention"), key=lambda r: r.case["time"])
    axis.plot([r.case["time"] / 60 for r in saved], [100 * r.median for r in saved], "--",
              color="#000000", linewidth=1)  # fmt: skip
    plain(axis, "step by step", "minutes of the trace", "%")
    axis.set_axisbelow(True)
    highest = [sum(shares.values()) for shares in steps.values()]
    highest += [100 * r.median for r in saved]
    axis.set_ylim(0, 1.1 * max(highest, default=0) or 1)


# --- Quality --------------------------------------------------------------------------------------

KV_TYPES = ["f32", "f16", "bf16", "q8_0"]


def shown_errors(rows: list[Row]) -> list[Row]:
    """Of decoding, the longest and widest case."""
    rows = choose(rows, "relative rms error", phase="decode")
    for name in ("slots", "rows", "head_dim"):
        rows = [r for r in rows if r.case[name] == max(values(rows, name))]
    return rows


def errors(rows: list[Row], note: str, path: Path) -> Path | None:
    rows = shown_errors(rows)
    if not rows:
        return None
    slots = values(rows, "slots")[0]
    panels = values(rows, "values")
    figure, axes = grid(len(panels), 3)
    systems = in_order(r.system for r in rows)
    types = sorted(values(rows, "kv_type"), key=KV_TYPES.index)
    lowest = min(r.median for r in rows if r.median > 0)
    highest = max(r.median for r in rows)
    for axis, kind in zip(axes, panels, strict=True):
        for i, system in enumerate(systems):
            colour, marker, _ = LOOKS.get(system, OTHER)
            for t, kv_type in enumerate(types):
                at = t + 0.22 * (i - (len(systems) - 1) / 2)
                found = choose(rows, system=system, values=kind, kv_type=kv_type)
                axis.plot([at] * len(found), [r.median for r in found], marker, color=colour,
                          markersize=7, linestyle="")  # fmt: skip
                if not found:
                    axis.annotate("none", (at, 0.02), xycoords=("data", "axes fraction"),
                                  rotation=90, fontsize=7, color=colour, ha="center")  # fmt: skip
        axis.set_xticks(range(len(types)), types)
        axis.set_xlim(-0.5, len(types) - 0.5)
        plain(axis, f"{kind} values, {tokens(slots)} slots", "KV", "relative rms error")
        axis.set_yscale("log")
        axis.set_ylim(0.2 * lowest, 5 * highest)
    handles = [
        Line2D([], [], color=LOOKS.get(s, OTHER)[0], marker=LOOKS.get(s, OTHER)[1], linestyle="",
               label=name_of(s))
        for s in systems
    ]  # fmt: skip
    return finish(figure, "Errors of attention against double precision", handles, note, path)
