"""The figures of both servers: table, files, plot, and how far their answers agree."""

from __future__ import annotations

import csv
import json
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from users import Answer


@dataclass
class Outcome:
    """One server's figures."""

    name: str
    given: str
    prompt_seconds: float = 0.0  # computing the system prompt for the first time
    ready_seconds: float = 0.0  # from start to the first request that finds the prompt in place
    kv_bytes: int = 0  # held for the prompt and one round of users
    rounds: list[list[Answer]] = field(default_factory=list)

    def answers(self) -> list[Answer]:
        return [answer for answers in self.rounds for answer in answers]

    def first_token(self, percent: int) -> float:
        values = sorted(answer.first for answer in self.answers())
        return percentile(values, percent)

    def decode_rate(self) -> float:
        """Tokens after each user's first, over the time from the first token to the last."""
        tokens = 0
        seconds = 0.0
        for answers in self.rounds:
            tokens += sum(answer.completion_tokens - 1 for answer in answers)
            seconds += max(a.last for a in answers) - min(a.first for a in answers)
        return tokens / seconds

    def wall(self) -> float:
        return sum(max(answer.last for answer in answers) for answers in self.rounds)

    def cached_share(self) -> float:
        return statistics.fmean(a.cached_tokens / a.prompt_tokens for a in self.answers())


def percentile(ordered: list[float], percent: int) -> float:
    """Linear between the neighbours, as numpy does it."""
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def table(stock: Outcome, relay: Outcome) -> str:
    """The one table. A ratio above 1 is in Relay's favour."""
    rows = [("", stock.name, relay.name, "ratio")]

    def row(label: str, ours: float, theirs: float, text: str, more_is_better: bool = False):
        ratio = ours / theirs if more_is_better else theirs / ours
        rows.append((label, text.format(theirs), text.format(ours), f"{ratio:.2f}x"))

    row("time to first token, p50", relay.first_token(50), stock.first_token(50), "{:.2f} s")
    row("time to first token, p95", relay.first_token(95), stock.first_token(95), "{:.2f} s")
    row("decode tokens/s", relay.decode_rate(), stock.decode_rate(), "{:.1f}", True)
    row("wall time, all rounds", relay.wall(), stock.wall(), "{:.1f} s")
    row("KV held", relay.kv_bytes / 2**20, stock.kv_bytes / 2**20, "{:.0f} MiB")
    row("prompt computed once", relay.prompt_seconds, stock.prompt_seconds, "{:.1f} s")
    row("start until prompt in place", relay.ready_seconds, stock.ready_seconds, "{:.1f} s")

    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for number, cells in enumerate(rows):
        first, *others = cells
        line = first.ljust(widths[0])
        for cell, width in zip(others, widths[1:], strict=True):
            line += "   " + cell.rjust(width)
        lines.append(line)
        if number == 0:
            lines.append("-" * len(line))
    return "\n".join(lines)


@dataclass
class Agreement:
    """How far two sets of greedy answers agree: a difference ends an answer's agreement."""

    answers: int = 0
    equal_answers: int = 0
    tokens: int = 0
    equal_tokens: int = 0

    def __str__(self) -> str:
        return (
            f"{self.equal_answers} of {self.answers} answers, "
            f"{self.equal_tokens} of {self.tokens} tokens up to the first difference"
        )


def compare(ours: list[Answer], theirs: list[Answer]) -> Agreement:
    result = Agreement()
    for a, b in zip(ours, theirs, strict=True):
        tokens = max(a.completion_tokens, b.completion_tokens)
        result.answers += 1
        result.tokens += tokens
        if a.text == b.text and a.completion_tokens == b.completion_tokens:
            result.equal_answers += 1
            result.equal_tokens += tokens
            continue
        common = len(os.path.commonprefix([a.text, b.text]))
        # A piece is one token's text (now and then two, where a character needs both).
        length = 0
        for piece in a.pieces:
            length += len(piece)
            if length > common:
                break
            result.equal_tokens += 1
    return result


def write_results(out: Path, outcomes: list[Outcome], summary: dict) -> None:
    for outcome in outcomes:
        summary["servers"][outcome.name] = {
            "given": outcome.given,
            "time_to_first_token_p50_s": outcome.first_token(50),
            "time_to_first_token_p95_s": outcome.first_token(95),
            "decode_tokens_per_s": outcome.decode_rate(),
            "wall_s": outcome.wall(),
            "kv_bytes": outcome.kv_bytes,
            "prompt_s": outcome.prompt_seconds,
            "ready_s": outcome.ready_seconds,
            "cached_share": outcome.cached_share(),
        }
    (out / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    with (out / "requests.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["server", "round", "user", "first_s", "last_s", "prompt_tokens", "cached_tokens"]
            + ["completion_tokens"]
        )
        for outcome in outcomes:
            for number, answers in enumerate(outcome.rounds, 1):
                for a in answers:
                    writer.writerow(
                        [outcome.name, number, a.user, f"{a.first:.4f}", f"{a.last:.4f}"]
                        + [a.prompt_tokens, a.cached_tokens, a.completion_tokens]
                    )


def plot(stock: Outcome, relay: Outcome, title: str, path: Path) -> bool:
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        ("time to first token, p95 (s)", [o.first_token(95) for o in (stock, relay)], "{:.1f}"),
        ("decode (tokens/s)", [o.decode_rate() for o in (stock, relay)], "{:.0f}"),
        ("KV held (MiB)", [o.kv_bytes / 2**20 for o in (stock, relay)], "{:.0f}"),
    ]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(10, 3.4))
    for axis, (label, values, text) in zip(axes, panels, strict=True):
        bars = axis.bar(["llama-server", "relay serve"], values, color=["#9aa5b1", "#2f6fde"])
        axis.bar_label(bars, [text.format(value) for value in values], padding=2)
        axis.set_title(label, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(0, max(values) * 1.15)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    return True
