#!/usr/bin/env python3
"""Figures of relay serve, each from one run on one machine.

  restart      a start that computes a pinned prompt, and one that finds it in the prompt cache
  inter-token  time between tokens of requests that decode, and beside a long prompt
  prompts      users of one system prompt, and as many of two, mixed
  together     clients that arrive together with a prompt that is new: p95 of the time to first
               token, and decoding, with llama-server's beside. Half an hour a round, on two cores
  single       one client whose prompts share nothing, with llama-server's figures beside
  overhead     what of a step is neither computing nor choosing tokens: scheduling and HTTP
  overload     ten times as many users as there is room for: what is still answered, how fast the
               rest is refused; then all leave at once, then the server is ended under load
  soak         half an hour of users of all kinds, those too that leave, dawdle and send rubbish:
               whether memory grows, and whether anything is stuck

    python3 bench/serving overload -m model.gguf
    python3 bench/serving soak -m model.gguf --minutes 30 -- --cache-type-k q8_0 --cache-type-v q8_0

Each ends with an error where it misses its target.
`relay synth llama-3.2-1b model.gguf --type q4_0` makes a model; relay serve gets what follows --.
"""

import argparse
import importlib
import sys
from pathlib import Path

from common import ROOT
from console import DemoError

FIGURES = (
    "restart", "inter-token", "prompts", "together", "single", "overhead", "overload", "soak"
)  # fmt: skip
OF_MANY = ("prompts", "together", "overhead")


def main() -> None:
    own, more = sys.argv[1:], []
    if "--" in own:
        at = own.index("--")
        own, more = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser(
        prog="python3 bench/serving",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("figure", choices=FIGURES)
    parser.add_argument("-m", "--model", type=Path, required=True)
    parser.add_argument("--relay", type=Path, default=ROOT / "build/release/bin/relay")
    parser.add_argument("--prompt-tokens", type=int, help="default: 4096, and 6000 for inter-token")
    parser.add_argument("--users", type=int, help=f"default: 8, 32 for {', '.join(OF_MANY)}")
    parser.add_argument("--seconds", type=float, default=30, help="of one load (30)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="of prompts, together, single and overload (3)"
    )
    parser.add_argument("--minutes", type=float, default=30, help="of the soak (30)")
    args = parser.parse_args(own)
    args.more = more
    args.prompt_tokens = args.prompt_tokens or (6000 if args.figure == "inter-token" else 4096)
    args.users = args.users or (32 if args.figure in OF_MANY else 8)
    try:
        importlib.import_module(args.figure.replace("-", "_")).run(args)
    except DemoError as error:
        sys.exit(f"serving: {error}")


if __name__ == "__main__":
    main()
