"""What a figure shows, in sentences with the numbers of the results, and whether it agrees with the
paper. Each function takes a figure's rows."""

import plots
from plots import choose, name_of, tokens, values
from tasks import Row


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


def span(found: list[tuple[dict, float]]) -> str:
    ratios = [ratio for _, ratio in found]
    if len(ratios) == 1 or max(ratios) - min(ratios) < 0.005:
        return ratio_text(ratios[0])
    return f"{ratio_text(min(ratios))} to {ratio_text(max(ratios))}"


def place(case: dict) -> str:
    model = plots.title_of(case)
    return f"{model}, {tokens(case['prefix'])} shared tokens, batch {case['batch']}"


def against_others(rows: list[Row], metric: str = "latency") -> list[str]:
    said = []
    systems = {r.system for r in choose(rows, metric)}
    for ours in ("relay", "vllm with Relay"):
        for other in plots.in_order(systems - {"relay", "relay-off", "vllm with Relay"}):
            same_host = (ours == "vllm with Relay") == other.startswith("vllm")
            found = pairs(rows, metric, ours, other)
            if found and same_host and not other.startswith("cost model"):
                best = max(found, key=lambda pair: pair[1])
                said.append(
                    f"{name_of(ours)} against {name_of(other)}: {span(found)}, most at "
                    f"{place(best[0]) if 'prefix' in best[0] else best[0]}."
                )
    return said


def operator_latency(rows: list[Row]) -> list[str]:
    said = []
    gains = plots.gains(rows)
    shared = [r for r in gains if r.case["batch"] > 1 and r.case["prefix"] > 0]
    if shared:
        best = max(shared, key=lambda r: r.median)
        (formula,) = [r.median for r in choose(rows, "speed-up", "formula", **best.case)][:1]
        said.append(
            f"Sharing makes attention up to {ratio_text(best.median)} as fast ({place(best.case)}; "
            f"the formula says {ratio_text(formula)} there)."
        )
        on = choose(rows, "latency", "cost model", **best.case)
        off = choose(rows, "latency", "cost model, off", **best.case)
        predicted = off[0].median / on[0].median if on and off else formula
        share = best.median / formula
        if share > 0.75:
            said.append("**Agrees** with the paper: reading is the limit here too.")
        elif best.median > 0.75 * predicted:
            said.append(
                f"**Agrees in direction, not in size**: {share:.0%} of the formula. "
                f"Our cost model, which counts arithmetic too, says {ratio_text(predicted)}: with "
                "sharing, arithmetic takes longer than reading here, and sharing saves none of it."
            )
        else:
            said.append(
                f"**Agrees in direction, not in size**: {share:.0%} of the formula, and less than "
                f"the {ratio_text(predicted)} of our cost model. What neither counts: KV "
                "that stays in a cache, and others at work on the machine."
            )
    alone = [r.median for r in gains if r.case["batch"] == 1]
    if alone:
        said.append(
            f"At batch 1 sharing on is {min(alone):.2f} to {max(alone):.2f} times as fast as off, "
            "where the paper's kernel lost up to 27 %: one request is planned alike either way."
        )
    return said + against_others(rows)


def operator_batch(rows: list[Row]) -> list[str]:
    said = []
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
            if all(ends) and not system.startswith("cost model"):
                growth[system] = ends[1][0].median / ends[0][0].median
        text = ", ".join(f"{name_of(s)} {ratio_text(g)}" for s, g in growth.items())
        said.append(
            f"- {plots.title_of(case)}, {tokens(prefix)} shared tokens, from {first} to {last} "
            f"requests ({last / first:g}x): {text}."
        )
    if said:
        said.insert(0, "How much longer a step's attention takes with more requests:\n")
    return said


def operator_gain(rows: list[Row]) -> list[str]:
    lines = [
        "| shape | shared | batch | measured | formula | cost model |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for case in plots.panels_of(rows):
        found = [r for r in plots.gains(rows, **case) if r.case["batch"] > 1]
        found = [r for r in found if r.case["prefix"] > 0]
        for batch in plots.at_most(values(found, "batch"), 3):
            prefix = max(values(choose(found, batch=batch), "prefix"))
            (gain,) = choose(found, batch=batch, prefix=prefix)
            (formula,) = choose(rows, "speed-up", "formula", **gain.case)
            on = choose(rows, "latency", "cost model", **gain.case)
            off = choose(rows, "latency", "cost model, off", **gain.case)
            cells = [
                plots.title_of(case),
                tokens(prefix),
                str(batch),
                f"{ratio_text(gain.median)} ({ratio_text(gain.low)} to {ratio_text(gain.high)})",
                ratio_text(formula.median),
                ratio_text(off[0].median / on[0].median) if on and off else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def decode_steps(rows: list[Row]) -> list[str]:
    found = pairs(rows, "decode step", "vllm with Relay", "vllm")
    if not found:
        return []
    best = max(found, key=lambda pair: pair[1])
    said = [f"With Relay a step is {span(found)} as fast, most at {place(best[0])}."]
    return said + [verdict(best[1] > 1.1, "a whole engine gains, and less than attention alone")]


def llama_cpp(rows: list[Row]) -> list[str]:
    lines = [
        "| phase | prompt | batch | llama.cpp | without flash attention | with Relay | gain |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
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
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", "Tokens a second; the gain is over the better of llama.cpp's two ways."]


def verdict(agrees: bool, what: str) -> str:
    return f"**Agrees**: {what}." if agrees else f"**Does not agree** here: not so that {what}."


WHY_LESS = (
    "On a small model and a CPU a layer's KV of the prompt may fit the cache, so that reading it "
    "once saves less than on the paper's GPUs; the rest of the gain is that of Relay's kernels and "
    "of the engine."
)


def throughput(rows: list[Row]) -> list[str]:
    metric, said = "output throughput", by_field("prompt")(rows)
    stock = [
        pair
        for system in ("llama-server", "llama-server, -fa off")
        for pair in pairs(rows, metric, "relay", system)
    ]
    if stock:
        best = max(ratio for _, ratio in stock)
        sharing = [ratio for _, ratio in pairs(rows, metric, "relay", "relay-off")]
        text = verdict(best > 1.1, f"throughput rises, by up to {ratio_text(best)}")
        if sharing:
            text += f" Sharing alone makes up to {ratio_text(max(sharing))} of it. {WHY_LESS}"
        said.append("\n" + text)
    prices = sorted(choose(rows, "price", "relay"), key=lambda r: r.case["prompt"])
    if prices:
        text = ", ".join(f"{tokens(r.case['prompt'])}: {r.median:.2f}" for r in prices)
        said.append(
            "Dollars per million answered tokens with Relay, by prompt, at the price that the "
            f"problem file states for this machine: {text}."
        )
    return said


def vllm_throughput(rows: list[Row]) -> list[str]:
    said = []
    for other in ("vllm", "vllm, no prefix caching"):
        found = pairs(rows, "output throughput", "vllm with Relay", other)
        if found:
            best = max(found, key=lambda pair: pair[1])
            said.append(
                f"vLLM with Relay answers {span(found)} as much as {name_of(other)}, most at "
                f"{tokens(best[0]['prompt'])} tokens of prompt."
            )
    caching = pairs(rows, "output throughput", "vllm with Relay", "vllm")
    if caching:
        best = max(ratio for _, ratio in caching)
        said.append(verdict(best > 1.1, "it beats prefix caching"))
    return said


def arrivals(rows: list[Row]) -> list[str]:
    said, held = [], {}
    metric = "normalised latency p95"
    for system in plots.in_order({r.system for r in rows}):
        bounds = choose(rows, "bound", system)
        measured = choose(rows, metric, system)
        if not bounds or not measured:
            continue
        bound = bounds[0].median
        rates = [r.case["rate"] for r in measured if r.median <= bound]
        held[system] = max(rates, default=0.0)
        said.append(
            f"- {name_of(system)}: holds {held[system]:g} requests/s with the p95 of normalised "
            f"latency under {1e3 * bound:g} ms/token"
            + (" (the highest rate measured)." if rates and max(rates) == max(
                r.case["rate"] for r in measured) else ".")
        )  # fmt: skip
    for metric in ("time to first token p50", "normalised latency p95", "inter-token latency p95"):
        for ours, other in (("relay", "llama-server"), ("vllm with Relay", "vllm")):
            found = pairs(rows, metric, ours, other)
            if found:
                said.append(f"- {metric}, {name_of(other)} over {name_of(ours)}: {span(found)}.")
    if held.get("relay") and "llama-server" in held:
        better = held["relay"] > held["llama-server"]
        equal = held["relay"] == held["llama-server"]
        text = "a higher rate holds" if not equal else "a higher rate holds (of those measured)"
        said.append("\n" + verdict(better, text))
    return said


def by_field(field: str):
    """Relay's throughput over others', for each value of a field."""

    def text_of(value) -> str:
        return f"{value:.0%}" if field == "without" else str(value)

    def found(rows: list[Row]) -> list[str]:
        said = []
        for other in plots.in_order({r.system for r in rows} - {"relay"}):
            ratios = {
                case[field]: ratio
                for case, ratio in pairs(rows, "output throughput", "relay", other)
            }
            text = ", ".join(f"{text_of(v)}: {ratio_text(r)}" for v, r in sorted(ratios.items()))
            if text:
                said.append(f"- Relay's throughput over that of {name_of(other)}: {text}.")
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


def trace(rows: list[Row]) -> list[str]:
    lines = [
        "| shape | ms a token | places | at once | reads saved | attention saved | shared |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for row in choose(rows, "read without sharing over with, all steps"):
        case = row.case
        at = dict(model=case["model"], token_ms=case["token_ms"], max_batch=case["max_batch"])
        (busy,) = [r for r in choose(rows, "requests at once", **at) if "time" not in r.case]
        (time,) = choose(rows, "attention without sharing over with, all steps", **at)
        (own,) = choose(rows, "share of KV attended", **at, level="own")
        cells = [
            plots.title_of(case),
            f"{case['token_ms']:g}",
            str(case["max_batch"] or "any"),
            f"{busy.median:.0f}",
            f"{1 - 1 / row.median:.0%} ({ratio_text(row.median)})",
            f"{1 - 1 / time.median:.0%} ({ratio_text(time.median)})",
            f"{1 - own.median:.0%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    levels = [
        f"level {depth} {found[0].median:.1%}"
        for depth in range(1, 4)
        if (found := choose(rows, "share of KV attended", level=f"level {depth}"))
    ]
    return [
        *lines,
        "",
        "The last column is the share of the KV attended in decode steps that at least one other "
        f"request attends at that moment ({', '.join(levels)}). Reads saved are of KV slots; "
        "attention saved is the cost model's, for this machine.",
    ]


def replay(rows: list[Row]) -> list[str]:
    said = []
    for metric in ("time to first token p50", "normalised latency p95", "output throughput"):
        for other in plots.in_order({r.system for r in rows} - {"relay"}):
            found = pairs(rows, metric, "relay", other)
            if found:
                said.append(f"- {metric}: Relay {span(found)} as good as {name_of(other)}.")
    return said


def errors(rows: list[Row]) -> list[str]:
    said = []
    for kv_type in values(rows, "kv_type"):
        ours = choose(rows, "relative rms error", "relay", kv_type=kv_type)
        ratios = [
            mine.median / other.median
            for mine in ours
            for other in choose(rows, "relative rms error", "ggml", **mine.case)
            if other.median
        ]
        if ratios:
            said.append(
                f"- {kv_type}: Relay's error is {min(ratios):.2g} to {max(ratios):.2g} times that "
                f"of ggml's flash attention, at most {max(r.median for r in ours):.1e}."
            )
    return said


def answers(rows: list[Row]) -> list[str]:
    lines = [
        "| model | KV | prompt | Relay against | answers the same | tokens the same | largest "
        "difference of a log-probability | mean KL | largest KL |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in choose(rows, "greedy answers the same"):
        case = row.case
        (same_tokens,) = choose(rows, "greedy tokens the same", **case)
        numbers = [
            choose(rows, metric, **case)[0].median
            for metric in ("largest log-probability difference", "mean KL divergence",
                           "largest KL divergence")
        ]  # fmt: skip
        cut = f" of {case['layers']} layers" if case["layers"] else ""
        model = plots.title_of({"model": case["model"]})
        against = "sharing off" if case["against"] == "relay-off" else case["against"]
        text = " | ".join(f"{n:.1e}" for n in numbers)
        lines.append(
            f"| {model}{cut}, {case['weights']} | {case['kv_type']} "
            f"| {tokens(case['prompt'])} | {against} | {row.median:.0%} "
            f"| {same_tokens.median:.1%} | {text} |"
        )
    worst = min(r.median for r in choose(rows, "greedy tokens the same"))
    lines += ["", verdict(worst > 0.95, "answers stay what they were, up to near ties")]
    return lines


def little_model(rows: list[Row]) -> list[str]:
    lines = ["| system | answers right |", "|---|--:|"]
    for row in choose(rows, "answers right"):
        lines.append(f"| {name_of(row.system)} | {row.median:.1%} |")
    return lines
