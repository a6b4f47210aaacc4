"""What the driver does: a task measures one thing with one program and gives rows of results."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field


class EvaluationError(Exception):
    """Something that the user can act on; printed without a traceback."""


def reason_of(error: Exception) -> str:
    """Of what nobody foresaw also what it is."""
    return str(error) if isinstance(error, EvaluationError) else f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Row:
    """One result. `low` and `high` are the quartiles of n measurements; for n = 1 they say nothing.
    better: "lower", "higher", or "" for what is neither."""

    section: str
    case: dict
    system: str
    metric: str
    unit: str
    better: str
    median: float
    low: float
    high: float
    n: int

    def key(self) -> tuple:
        return (self.section, json.dumps(self.case, sort_keys=True), self.system, self.metric)

    @staticmethod
    def of(section, case, system, metric, unit, better, values: list[float]) -> "Row":
        ordered = sorted(values)
        median, low, high = (quantile(ordered, at) for at in (0.5, 0.25, 0.75))
        return Row(section, case, system, metric, unit, better, median, low, high, len(ordered))


def quantile(ordered: list[float], at: float) -> float:
    """Of values in order; linear between the neighbours, as `relay bench op` has it."""
    place = (len(ordered) - 1) * at
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True)
class Task:
    """`parameters` say all that the results depend on; `seconds` is a guess."""

    section: str
    parameters: dict
    seconds: float
    run: Callable[[], list[Row]] = field(compare=False)

    @property
    def name(self) -> str:
        told = [v for v in self.parameters.values() if isinstance(v, str) and v]
        numbers = ("prefix", "prompt", "without", "requests", "layers", "token_ms", "max_batch")
        told += [f"{k} {v}" for k, v in self.parameters.items() if k in numbers and v]
        return f"{self.section}: {', '.join(told)}"

    @property
    def key(self) -> str:
        text = json.dumps([self.section, self.parameters], sort_keys=True)
        return f"{self.section}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def to_json(row: Row) -> dict:
    return asdict(row)
