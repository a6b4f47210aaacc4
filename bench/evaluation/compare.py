"""Two results.json: what changed, said only where it is both significant and large enough.

Significant: the notches of the two medians, median ± 1.57 · (quartile distance) / √n, do not
overlap (McGill, Tukey and Larsen, 1978: about the 95 % level). Fewer than three measurements are
never significant; how many such pairs there were is told.
"""

import math
from dataclasses import dataclass

from tasks import Row

LEAST_CHANGE = 0.10
LEAST_N = 3


def notch(row: Row) -> tuple[float, float]:
    half = 1.57 * (row.high - row.low) / math.sqrt(row.n)
    return row.median - half, row.median + half


@dataclass(frozen=True)
class Change:
    before: Row
    after: Row

    @property
    def ratio(self) -> float:
        return self.after.median / self.before.median if self.before.median else math.inf

    @property
    def better(self) -> bool:
        return (self.after.median > self.before.median) == (self.after.better == "higher")

    def significant(self) -> bool:
        if min(self.before.n, self.after.n) < LEAST_N:
            return False
        (a, b), (c, d) = notch(self.before), notch(self.after)
        return b < c or d < a

    def large(self) -> bool:
        return abs(self.ratio - 1) >= LEAST_CHANGE

    def __str__(self) -> str:
        row = self.after
        case = ", ".join(f"{k} {v}" for k, v in row.case.items() if v not in ("", 0, 0.0))
        return (
            f"{'better' if self.better else 'WORSE '} {self.ratio:6.2f}x  {row.section}, "
            f"{row.system}, {row.metric}: {self.before.median:.4g} -> {row.median:.4g} {row.unit}"
            f"  ({case})"
        )


def changes(before: list[Row], after: list[Row]) -> tuple[list[Change], dict[str, int]]:
    """What to speak of, and how many pairs there were of each kind."""
    old = {row.key(): row for row in before}
    counts = dict(compared=0, too_few=0, only_before=0, only_after=0)
    found = []
    measured = [row for row in after if row.better]
    for row in measured:
        if row.key() not in old:
            counts["only_after"] += 1
            continue
        change = Change(old[row.key()], row)
        counts["compared"] += 1
        counts["too_few"] += min(change.before.n, row.n) < LEAST_N
        if change.large() and change.significant():
            found.append(change)
    keys = {row.key() for row in measured}
    counts["only_before"] = sum(row.better != "" and row.key() not in keys for row in before)
    found.sort(key=lambda c: (c.better, -abs(math.log(max(c.ratio, 1e-12)))))
    return found, counts


def report(before: dict, after: dict) -> tuple[str, bool]:
    """The text, and whether something became worse."""
    found, counts = changes(before["rows"], after["rows"])
    lines = []
    for name in ("machine", "commit"):
        if before.get(name) != after.get(name):
            lines.append(f"{name}: {before.get(name)} -> {after.get(name)}")
    if before.get("machine") != after.get("machine"):
        lines.append("another machine: changes are the machines' as well")
    lines += [str(change) for change in found]
    lines.append(
        f"{counts['compared']} pairs compared, {len(found)} changed by {LEAST_CHANGE:.0%} or more "
        f"significantly; {counts['too_few']} have fewer than {LEAST_N} measurements; "
        f"{counts['only_before']} only before, {counts['only_after']} only after"
    )
    return "\n".join(lines), any(not change.better for change in found)
