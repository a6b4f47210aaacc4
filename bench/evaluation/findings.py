"""What a figure shows, in sentences with the numbers of the results, and whether it agrees with the
paper. Each function takes a figure's rows."""

import plots
from plots import choose, name_of, tokens, values
from shapes import formula
from tasks import Row

LEAST_GAIN = 1.1  # what is less is no gain to speak of
NEAR_TIE = 0.1  # nat: the probabilities of two tokens are within a tenth


def either(items: list) -> str:
    *most, last = map(str, items)
    return f"{', '.join(most)} or {last}" if most else last


def ratio_text(value: float) -> str:
    return f"{value:.2f}x" if value < 10 else f"{value:.1f}x"


def pairs(rows: list[Row], metric: str, ours: str, theirs: str) -> list[tuple[dict, float]]:
    """Case, and by how much ours is better, wherever both were measured."""
    found = []
    for mine in choose(rows, metric, ours):
        for other in choose(rows, metric, theirs):
            if other.case == mine.case and mine.median and other.median:
                ratio = mine.median / other.median
                found.append((mine.case, ratio if mine.better == "higher" else 1 / ratio))
    return found


def with_spread(row: Row) -> str:
    return f"{ratio_text(row.median)} ({ratio_text(row.low)} to {ratio_text(row.high)})"


def span(found: list[tuple[dict, float]]) -> str:
    ratios = [ratio for _, ratio in found]
    if len(ratios) == 1 or max(ratios) - min(ratios) < 0.005:
        return ratio_text(ratios[0])
    return f"{ratio_text(min(ratios))} to {ratio_text(max(ratios))}"


def place(case: dict) -> str:
    model = plots.title_of(case)
    return f"{model}, {tokens(case['prefix'])} shared tokens, batch {case['batch']}"


def table(head: str, rows: list[list[str]]) -> list[str]:
    """head: names between bars, as its first line has them; numbers stand right but for the first
    column."""
    columns = head.split(" | ")
    lines = [f"| {head} |", "|---|" + "--:|" * (len(columns) - 1)]
    return lines + [f"| {' | '.join(cells)} |" for cells in rows]


# --- Verdicts -------------------------------------------------------------------------------------


def agrees(what: str) -> str:
    return f"**Agrees**: {what}."


def in_direction(what: str) -> str:
    return f"**Agrees in direction, not in size**: {what}."


def differs(what: str) -> str:
    return f"**Does not agree** here: {what}."


def undecided(what: str) -> str:
    return f"**Undecided**: {what}."


# --- The operator ---------------------------------------------------------------------------------


def against_others(rows: list[Row]) -> list[str]:
    said = []
    systems = {r.system for r in choose(rows, "latency")} - {"limit"}
    for ours in ("relay", "vllm with Relay"):
        for other in plots.in_order(systems - {"relay", "relay-off", "vllm with Relay"}):
            found = pairs(rows, "latency", ours, other)
            same_host = (ours == "vllm with Relay") == other.startswith("vllm")
            if found and same_host and not other.startswith("cost model"):
                best = max(found, key=lambda pair: pair[1])
                said.append(
                    f"{name_of(ours)} against {name_of(other)}: {span(found)} as fast, most at "
                    f"{place(best[0])}."
                )
    return said


def predicted_gain(rows: list[Row], case: dict) -> float | None:
    """The cost model's, where there is one."""
    on = choose(rows, "latency", "cost model", **case)
    off = choose(rows, "latency", "cost model, off", **case)
    return off[0].median / on[0].median if on and off else None


def operator_latency(rows: list[Row]) -> list[str]:
    gains = plots.gains(rows)
    shared = [r for r in gains if r.case["batch"] > 1 and r.case["prefix"] > 0]
    said = []
    if shared:
        best = max(shared, key=lambda r: r.median)
        promised = choose(rows, "speed-up", "formula", **best.case)[0].median
        said.append(
            f"Sharing makes attention up to {ratio_text(best.median)} as fast ({place(best.case)}; "
            f"the formula says {ratio_text(promised)} there)."
        )
        said.append(about_size(rows, best, promised))
        said += losses(shared) + about_model(rows, shared)
    alone = [r.median for r in gains if r.case["batch"] == 1]
    if alone:
        said.append(
            f"At batch 1 sharing on is {min(alone):.2f} to {max(alone):.2f} times as fast as off, "
            "where the paper's kernel lost up to 27 %: one request is planned alike either way."
        )
    return said + against_others(rows)


def about_size(rows: list[Row], best: Row, promised: float) -> str:
    """Whether the largest gain is what the formula promises; if not, what the limit is."""
    share, predicted = best.median / promised, predicted_gain(rows, best.case)
    limit = choose(rows, "latency", "limit", **best.case)
    if best.median < LEAST_GAIN:
        return differs("sharing gains nothing that counts")
    if share > 0.75:
        return agrees("reading is the limit here too")
    if predicted and best.median > 0.75 * predicted:
        return in_direction(
            f"{share:.0%} of the formula. Our cost model, which counts arithmetic too, says "
            f"{ratio_text(predicted)}: with sharing, arithmetic takes longer than reading here, "
            "and sharing saves none of it"
        )
    if predicted:
        return in_direction(
            f"{share:.0%} of the formula, and less than the {ratio_text(predicted)} of our cost "
            "model. What neither counts: KV that stays in a cache, and others at work on the "
            "machine"
        )
    if limit:
        on = choose(rows, "latency", "relay", **best.case)[0].median
        return in_direction(
            f"{share:.0%} of the formula, which counts reading alone. The step takes "
            f"{1e6 * on:.0f} µs, of which this GPU needs {1e6 * limit[0].median:.0f} to read each "
            "KV byte once and to multiply, whichever takes longer; the rest is starting, waiting "
            "and merging, which the formula does not know"
        )
    return in_direction(f"{share:.0%} of the formula")


def losses(shared: list[Row]) -> list[str]:
    """Where sharing costs, and whether that is more than its spread."""
    found = sorted((r for r in shared if r.median < 0.95), key=lambda r: r.median)
    if not found:
        return []
    sure = sum(r.high < 1 for r in found)
    told = "; ".join(f"{with_spread(r)} at {place(r.case)}" for r in found[:4])
    more = f"; and {len(found) - 4} more" if len(found) > 4 else ""
    return [
        f"In {len(found)} of {len(shared)} cases sharing makes attention slower by more than 5 %, "
        f"beyond the spread in {sure or 'none'} of them: {told}{more}."
    ]


def about_model(rows: list[Row], shared: list[Row]) -> list[str]:
    found = [(r, r.median / p) for r in shared if (p := predicted_gain(rows, r.case))]
    if not found:
        return []
    least, most = (pick(found, key=lambda pair: pair[1]) for pick in (min, max))
    return [
        f"The gain is {least[1]:.2f} ({place(least[0].case)}) to {most[1]:.2f} times "
        f"({place(most[0].case)}) what our cost model says."
    ]


def operator_batch(rows: list[Row]) -> list[str]:
    said, on_and_off = [], []
    for case in plots.panels_of(rows):
        prefix = max(values(choose(rows, **case), "prefix"))
        batches = values(choose(rows, "latency", "relay", **case, prefix=prefix), "batch")
        if len(batches) < 2:
            continue
        first, last = batches[0], batches[-1]
        growth = {}
        for system in plots.in_order(r.system for r in choose(rows, "latency", **case)):
            ends = [
                choose(rows, "latency", system, **case, prefix=prefix, batch=b)
                for b in (first, last)
            ]
            if all(ends) and not system.startswith("cost model") and system != "limit":
                growth[system] = ends[1][0].median / ends[0][0].median
        text = ", ".join(f"{name_of(s)} {ratio_text(g)}" for s, g in growth.items())
        said.append(
            f"- {plots.title_of(case)}, {tokens(prefix)} shared tokens, from {first} to {last} "
            f"requests ({last / first:g}x): {text}."
        )
        if {"relay", "relay-off"} <= growth.keys():
            on_and_off.append(growth["relay-off"] / growth["relay"])
    if said:
        said.insert(0, "How much longer a step's attention takes with more requests:\n")
    if on_and_off:
        ends = dict.fromkeys(map(ratio_text, (min(on_and_off), max(on_and_off))))
        text = f"with sharing it grows {' to '.join(ends)} less than without"
        told = (
            agrees
            if min(on_and_off) > 1.25
            else in_direction
            if max(on_and_off) > 1.25
            else differs
        )
        said.append("\n" + told(text))
    return said


def operator_gain(rows: list[Row]) -> list[str]:
    lines, shares, most = [], [], 0.0
    for case in plots.panels_of(rows):
        found = [r for r in plots.gains(rows, **case) if r.case["batch"] > 1]
        found = [r for r in found if r.case["prefix"] > 0]
        for batch in plots.at_most(values(found, "batch"), 3):
            prefix = max(values(choose(found, batch=batch), "prefix"))
            (gain,) = choose(found, batch=batch, prefix=prefix)
            (promised,) = choose(rows, "speed-up", "formula", **gain.case)
            predicted = predicted_gain(rows, gain.case)
            shares.append(gain.median / promised.median)
            most = max(most, gain.median)
            lines.append([
                plots.title_of(case),
                tokens(prefix),
                str(batch),
                with_spread(gain),
                ratio_text(promised.median),
                *([ratio_text(predicted)] if predicted else []),
            ])  # fmt: skip
    if not lines:
        return []
    ends = dict.fromkeys(f"{pick(shares):.0%}" for pick in (min, max))
    text = f"{' to '.join(ends)} of what the formula says"
    told = agrees if min(shares) > 0.75 else in_direction if most > LEAST_GAIN else differs
    head = "shape | shared | batch | measured | formula"
    if any(len(cells) > len(head.split(" | ")) for cells in lines):
        head += " | cost model"
    return [*table(head, lines), "", told(text)]


def kernels(rows: list[Row]) -> list[str]:
    """relay-kernel-bench's names are type/d:<head size>/rows:<rows>."""
    found: dict[tuple, dict[int, Row]] = {}
    for row in choose(rows, "time"):
        parts = row.case["kernel"].split("/")
        if len(parts) == 3 and parts[1].startswith("d:") and parts[2].startswith("rows:"):
            found.setdefault((parts[0], parts[1][2:]), {})[int(parts[2][5:])] = row
    counts = sorted({count for times in found.values() for count in times})
    lines = [
        [kv_type, head]
        + [f"{1e6 * times[c].median:.1f}" if c in times else "" for c in counts]
        for (kv_type, head), times in found.items()
    ]  # fmt: skip
    head = " | ".join(["KV", "head size", *(f"{c} rows" for c in counts)])
    return [*table(head, lines), "", "Microseconds for one tile."] if lines else []


# --- Whole engines --------------------------------------------------------------------------------


def setting(rows: list[Row]) -> list[str]:
    """What was served, and to how many."""
    said = []
    for name, found in plots.models_of([r for r in rows if "model" in r.case]).items():
        weights = [f"weights in {w}" for w in values(found, "weights")]
        parts = [", ".join([name, *weights])]
        if requests := values(found, "requests"):
            together = values(found, "parallel") or values(found, "concurrency")
            at_once = f"at most {either(together)} at once"
            at_once = "all of them at once" if together == requests else at_once
            parts.append(f"{either(requests)} requests, {at_once}")
        means = [choose(found, metric) for metric in ("own prompt, mean", "answer, mean")]
        if all(means):
            own, answer = (
                " to ".join(
                    dict.fromkeys(f"{pick(r.median for r in m):.1f}" for pick in (min, max))
                )
                for m in means
            )
            parts.append(f"own prompts of {own} tokens and answers of {answer} in the mean")
        if len(parts) > 1:
            said.append("\n" + "; ".join(parts) + ".")
    return said


def decode_steps(rows: list[Row]) -> list[str]:
    found = pairs(rows, "decode step", "vllm with Relay", "vllm")
    if not found:
        return []
    best = max(found, key=lambda pair: pair[1])
    said = [f"With Relay a step is {span(found)} as fast, most at {place(best[0])}."]
    if best[1] < 1.05:
        return [*said, differs("a step gains nothing")]
    alone = formula(*(best[0][name] for name in ("batch", "prefix", "context")))
    less = f", and less than the {ratio_text(alone)} that the formula says of attention alone"
    return [*said, agrees("a whole engine gains" + (less if best[1] < alone else ""))]


def llama_cpp(rows: list[Row]) -> list[str]:
    lines = []
    for row in choose(rows, system="llama.cpp with Relay"):
        phase, case = row.metric, row.case
        others = [
            [r.median for r in choose(rows, phase, system, **case)]
            for system in ("llama.cpp", "llama.cpp, -fa off")
        ]
        best = max((speed for speeds in others for speed in speeds), default=None)
        cells = [phase.split()[0], tokens(case["prefix"]), str(case["batch"])]
        cells += [f"{speeds[0]:.1f}" if speeds else "" for speeds in others]
        cells += [f"{row.median:.1f}", ratio_text(row.median / best) if best else ""]
        lines.append(cells)
    head = "phase | prompt | batch | llama.cpp | without flash attention | with Relay | gain"
    return [*table(head, lines), "", "Tokens a second; the gain is over the better of llama.cpp's "
            "two ways."]  # fmt: skip


def throughput(rows: list[Row]) -> list[str]:
    metric, said = "output throughput", by_field("prompt")(rows)
    sharing = pairs(rows, metric, "relay", "relay-off")
    if sharing:
        best = max(sharing, key=lambda pair: pair[1])
        where = f"{plots.model_name(best[0])}, a prompt of {tokens(best[0]['prompt'])} tokens"
        if best[1] > LEAST_GAIN:
            text = in_direction if best[1] < 2 else agrees
            said.append("\n" + text(
                f"sharing alone raises throughput by up to {ratio_text(best[1])} ({where})"
            ))  # fmt: skip
        else:
            said.append("\n" + differs(
                f"with sharing alone, throughput is {span(sharing)} of what it is without. A "
                "layer's KV of these prompts may fit the cache, where reading it once saves little"
            ))  # fmt: skip
        said.append(
            "What Relay gains over llama-server beyond that is its kernels' and its engine's."
        )
    return said + prices(rows, "relay")


def prices(rows: list[Row], ours: str) -> list[str]:
    found = sorted(choose(rows, "price", ours), key=lambda r: r.case["prompt"])
    if not found:
        return []
    hours = sorted({r.median for r in choose(rows, "price of an hour", ours)})
    text = ", ".join(
        f"{plots.model_name(r.case)}, {tokens(r.case['prompt'])}: ${r.median:.2f}" for r in found
    )
    return [
        f"A million answered tokens with {name_of(ours)}, by model and prompt, if an hour of this "
        f"machine costs {either([f'${h:g}' for h in hours])} (stated, not measured): {text}."
    ]


def vllm_throughput(rows: list[Row]) -> list[str]:
    said = []
    for other in ("vllm", "vllm, no prefix caching"):
        found = pairs(rows, "output throughput", "vllm with Relay", other)
        if found:
            best = max(found, key=lambda pair: pair[1])
            most = "most " if len(found) > 1 else ""
            said.append(
                f"vLLM with Relay answers {span(found)} as much as {name_of(other)}, {most}at "
                f"{tokens(best[0]['prompt'])} tokens of prompt."
            )
    caching = pairs(rows, "output throughput", "vllm with Relay", "vllm")
    if caching:
        best = max(ratio for _, ratio in caching)
        once = max(r.n for r in choose(rows, "output throughput", "vllm with Relay")) == 1
        if once:
            said.append(undecided(
                f"{ratio_text(best)} of what prefix caching reaches, measured once"
            ))  # fmt: skip
        elif best > LEAST_GAIN:
            told = agrees if best >= 2 else in_direction
            said.append(told(f"it reaches up to {ratio_text(best)} of what prefix caching does"))
        else:
            said.append(differs(f"it reaches {ratio_text(best)} of what prefix caching does"))
    return said + prices(rows, "vllm with Relay")


def arrivals(rows: list[Row]) -> list[str]:
    said, held, highest = [], {}, {}
    metric = "normalised latency p95"
    for system in plots.in_order({r.system for r in rows}):
        bounds = choose(rows, "bound", system)
        measured = choose(rows, metric, system)
        if not bounds or not measured:
            continue
        bound = bounds[0].median
        within = [r for r in measured if r.median <= bound]
        best = max(within, key=lambda r: r.case["rate"], default=None)
        held[system] = best.case["rate"] if best else 0.0
        highest[system] = max(r.case["rate"] for r in measured)
        about = ["the highest rate measured"] * (held[system] == highest[system])
        about += ["its upper quartile does not"] * (best is not None and best.high > bound)
        said.append(
            f"- {name_of(system)}: holds {rate_text(held[system])} with the p95 of normalised "
            f"latency under {1e3 * bound:g} ms/token"
            + (f" ({'; '.join(about)})." if about else ".")
        )
    for metric in ("time to first token p50", "normalised latency p95", "inter-token latency p95"):
        for ours, other in (("relay", "llama-server"), ("vllm with Relay", "vllm")):
            found = pairs(rows, metric, ours, other)
            if found:
                said.append(f"- {metric}, {name_of(other)} over {name_of(ours)}: {span(found)}.")
    for ours, other in (("relay", "llama-server"), ("vllm with Relay", "vllm")):
        if {ours, other} <= {r.system for r in rows}:
            said.append("\n" + about_rates(ours, other, held, highest))
    return said


def rate_text(held: float) -> str:
    return f"{held:g} requests/s" if held else "none of the rates measured"


def about_rates(ours: str, other: str, held: dict, highest: dict) -> str:
    if ours not in held or other not in held:
        return undecided("no bound was stated, so that there is no highest rate under it")
    mine, theirs = held[ours], held[other]
    if mine != theirs:
        told = agrees if mine > theirs else differs
        return told(
            f"{name_of(ours)} holds {rate_text(mine)}, {name_of(other)} {rate_text(theirs)}"
        )
    if mine == 0:
        return undecided("neither holds any of the rates measured")
    both = (
        "the highest rate measured" if mine == highest[ours] else "the same of the rates measured"
    )
    return undecided(f"both hold {both}")


def by_field(field: str, ours: str = "relay"):
    """Our throughput over others', for each value of a field."""

    def text_of(value) -> str:
        if field == "without":
            return f"{value:.0%}"
        return tokens(value) if isinstance(value, int | float) else str(value)

    def by_value(item: tuple) -> tuple:
        return plots.in_a_row(item[0])

    def found(rows: list[Row]) -> list[str]:
        said = []
        models = plots.models_of(rows)
        for name, shown in models.items():
            for other in plots.in_order({r.system for r in shown} - {ours}):
                ratios = {
                    case[field]: ratio
                    for case, ratio in pairs(shown, "output throughput", ours, other)
                }
                text = ", ".join(
                    f"{text_of(v)}: {ratio_text(r)}"
                    for v, r in sorted(ratios.items(), key=by_value)
                )
                what = f"{name}: {name_of(ours)}" if len(models) > 1 else name_of(ours)
                if text:
                    said.append(f"- {what}'s throughput over that of {name_of(other)}: {text}.")
        return said

    return found


def sharers(rows: list[Row]) -> list[str]:
    said = []
    for metric, what in (("KV held", "KV"), ("resident memory", "resident memory")):
        for system in plots.in_order({r.system for r in choose(rows, metric)}):
            found = sorted(choose(rows, metric, system), key=lambda r: r.case["requests"])
            if len(found) > 1:
                first, last = found[0], found[-1]
                said.append(
                    f"- {name_of(system)}: {what} {first.median / 2**20:.0f} MiB with "
                    f"{first.case['requests']} request, {last.median / 2**20:.0f} MiB with "
                    f"{last.case['requests']}."
                )
    for system in plots.in_order({r.system for r in rows}):
        found = sorted(choose(rows, "inter-token latency p50", system),
                       key=lambda r: r.case["requests"])  # fmt: skip
        if len(found) > 1:
            said.append(
                f"- {name_of(system)}: a step takes {found[-1].median / found[0].median:.1f} times "
                f"as long with {found[-1].case['requests']} requests as with "
                f"{found[0].case['requests']} (inter-token latency, p50)."
            )
    return said


# --- The trace ------------------------------------------------------------------------------------


def trace(rows: list[Row]) -> list[str]:
    lines = []
    for row in choose(rows, "read without sharing over with, all steps"):
        case = row.case
        at = dict(model=case["model"], token_ms=case["token_ms"], max_batch=case["max_batch"])
        (busy,) = [r for r in choose(rows, "requests at once", **at) if "time" not in r.case]
        (time,) = choose(rows, "attention without sharing over with, all steps", **at)
        (own,) = choose(rows, "share of KV attended", **at, level="own")
        lines.append([
            plots.title_of(case),
            f"{case['token_ms']:g}",
            str(case["max_batch"] or "none"),
            f"{busy.median:.0f}",
            f"{1 - 1 / row.median:.0%} ({ratio_text(row.median)})",
            f"{1 - 1 / time.median:.0%} ({ratio_text(time.median)})",
            f"{1 - own.median:.0%}",
        ])  # fmt: skip
    levels = [
        f"level {depth} {found[0].median:.1%}"
        for depth in range(1, 4)
        if (found := choose(rows, "share of KV attended", level=f"level {depth}"))
    ]
    head = (
        "shape | ms a token | batch limit | requests at once | reads saved | attention saved | "
        "shared"
    )
    return [
        *table(head, lines),
        "",
        "Batch limit: how many requests decode at once at most, while others wait. The last column "
        "is the share of the KV attended in decode steps that at least one other request attends "
        f"at that moment (in the first row {', '.join(levels)}). Reads saved are of KV slots; "
        "attention saved is the cost model's, for this machine.",
    ]


def replay(rows: list[Row]) -> list[str]:
    said = []
    for metric in ("time to first token p50", "normalised latency p95", "output throughput"):
        for ours in ("relay", "vllm with Relay"):
            for other in plots.in_order({r.system for r in rows} - {ours}):
                found = pairs(rows, metric, ours, other)
                if found and other.startswith("vllm") == ours.startswith("vllm"):
                    said.append(
                        f"- {metric}: {name_of(ours)} {span(found)} as good as {name_of(other)}."
                    )
    return said


# --- Quality --------------------------------------------------------------------------------------


def errors(rows: list[Row]) -> list[str]:
    rows = plots.shown_errors(rows)
    systems = plots.in_order(r.system for r in rows)
    types = [t for t in plots.KV_TYPES if t in values(rows, "kv_type")]
    lines, worst = [], {}
    for kv_type in types:
        for kind in values(rows, "values"):
            cells = []
            for system in systems:
                found = choose(rows, system=system, kv_type=kv_type, values=kind)
                cells.append(f"{found[0].median:.1e}" if found else "none")
                if found:
                    key = kv_type, system
                    worst[key] = max(worst.get(key, 0.0), found[0].median)
            lines.append([kv_type, kind, *cells])
    if not lines:
        return []
    said = table(" | ".join(["KV", "values", *map(name_of, systems)]), lines)
    ratios = {
        t: worst[t, "relay"] / worst[t, "ggml"]
        for t in types
        if (t, "relay") in worst and worst.get((t, "ggml"))
    }
    if ratios:
        text = ", ".join(f"{t} {ratio:.2g}" for t, ratio in ratios.items())
        told = agrees if max(ratios.values()) < 1.5 else differs
        said += ["", told(f"Relay's largest error over that of ggml's flash attention: {text}")]
    return said


def answers(rows: list[Row]) -> list[str]:
    lines = []
    for row in choose(rows, "greedy answers the same"):
        case = row.case

        def told(metric: str, style: str, case=case) -> str:
            found = choose(rows, metric, **case)
            return format(found[0].median, style) if found else ""

        cut = f" of {case['layers']} layers" if case["layers"] else ""
        lines.append([
            f"{plots.title_of({'model': case['model']})}{cut}, {case['weights']}",
            case["kv_type"],
            tokens(case["prompt"]),
            "sharing off" if case["against"] == "relay-off" else case["against"],
            f"{row.median:.0%}",
            told("greedy tokens the same", ".1%"),
            told(MARGIN, ".3f"),
            told("largest log-probability difference", ".1e"),
            told("mean KL divergence", ".1e"),
            told("largest KL divergence", ".1e"),
        ])  # fmt: skip
    head = (
        "model | KV | prompt | Relay against | answers the same | tokens the same | margin where "
        "they part | largest difference of a log-probability | mean KL | largest KL"
    )
    parted = [r for r in choose(rows, "greedy answers the same") if r.median < 1]
    margins = [r.median for r in choose(rows, MARGIN)]
    if not parted:
        text = agrees("all answers stay what they were")
    elif len(margins) < len(parted):
        text = undecided("some answers change, and how near a tie that was is not known")
    elif max(margins) < NEAR_TIE:
        text = agrees(
            "answers part only at near ties: the two tokens were at most "
            f"{max(margins):.3f} nat apart, which is a tenth of their probability or less"
        )
    else:
        text = differs(f"answers part where two tokens were up to {max(margins):.2f} nat apart")
    return [*table(head, lines), "", text]


MARGIN = "largest margin where answers part"


def little_model(rows: list[Row]) -> list[str]:
    found = choose(rows, "answers right")
    lines = [[name_of(r.system), str(r.case["questions"]), f"{r.median:.1%}"] for r in found]
    said = table("system | questions | right", lines)
    prompted = [r for r in found if r.system != "relay, tuned prefix"]
    if len(prompted) > 1:
        low, high = min(r.median for r in prompted), max(r.median for r in prompted)
        alike = high - low <= 1.5 / min(r.case["questions"] for r in prompted)
        said += ["", "With the same prompt all have as many right, within one." if alike else
                 f"With the same prompt, {low:.1%} to {high:.1%} are right."]  # fmt: skip
    return said
