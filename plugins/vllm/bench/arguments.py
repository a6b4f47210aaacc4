"""What the benches' command lines share."""

import csv
from pathlib import Path


def numbers(text: str) -> list[int]:
    """Parses "1,8,32"."""
    return [int(n) for n in text.split(",")]


def rates(text: str) -> list[float]:
    """Parses "0.5,2,inf"."""
    return [float(n) for n in text.split(",")]


def write_csv(path: Path | None, rows: list[dict]) -> None:
    """For --csv: all rows so far, so that a run that is ended early leaves what it has."""
    if path:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
