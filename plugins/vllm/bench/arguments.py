"""What the benches' command lines share."""

import argparse
import csv
import math
import time
from pathlib import Path


def numbers(text: str) -> list[int]:
    """Parses "1,8,32"."""
    return [int(n) for n in text.split(",")]


def rates(text: str) -> list[float]:
    """Parses "0.5,2,inf"."""
    return [float(n) for n in text.split(",")]


class Budget:
    """Seconds of a whole run, from now on."""

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds

    @property
    def spent(self) -> bool:
        return time.perf_counter() >= self._end


def add_budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget",
        type=lambda text: Budget(float(text)),
        default=Budget(math.inf),
        help="seconds from the start, after which no case begins; what was measured is reported",
    )


def write_csv(path: Path | None, rows: list[dict]) -> None:
    """For --csv: all rows so far, so that a run that is ended early leaves what it has."""
    if path and rows:
        unfinished = path.with_name(path.name + ".unfinished")
        with unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        unfinished.replace(path)
