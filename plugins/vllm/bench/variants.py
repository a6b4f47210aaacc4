"""What the benches of whole engines compare, by the names that --variants takes."""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    key: str  # on the command line, and in files
    name: str
    relay: bool
    caching: bool = True  # of prefixes


VARIANTS = {
    v.key: v
    for v in (
        Variant("no-caching", "no caching", relay=False, caching=False),
        Variant("vllm", "vLLM", relay=False),
        Variant("relay", "Relay", relay=True),
    )
}


def variants(text: str) -> list[Variant]:
    """Parses "vllm,relay"."""
    unknown = [key for key in text.split(",") if key not in VARIANTS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"no variant is called {', '.join(unknown)}; there are {', '.join(VARIANTS)}"
        )
    return [VARIANTS[key] for key in text.split(",")]


def add_variants(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variants",
        type=variants,
        default=variants("vllm,relay"),
        help=f"of {', '.join(VARIANTS)} (vllm,relay)",
    )
