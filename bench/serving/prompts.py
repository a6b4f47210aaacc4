"""Users of one system prompt, and as many of two, mixed."""

import statistics
import tempfile
from pathlib import Path

from common import chat, relay_server, require, words
from console import say
from users import run_round

TOKENS = 32  # of each answer


def run(args) -> None:
    cells = 2 * args.prompt_tokens + args.users * (TOKENS + 64) + 1024
    options = ["-c", str(cells), "--parallel", str(args.users)]
    systems = [f"Prompt {number}. {words(args.prompt_tokens)}" for number in (1, 2)]
    with (
        tempfile.TemporaryDirectory() as folder,
        relay_server(args, Path(folder) / "serve.log", *options) as server,
    ):
        server.wait_ready(600)
        run_round(server, [chat("Are you there?", 1, system) for system in systems], "computing")
        rates: dict[int, list[float]] = {1: [], 2: []}
        for turn in range(args.rounds):
            for count in (1, 2) if turn % 2 == 0 else (2, 1):
                bodies = [
                    chat(f"Question {turn}.{user}?", TOKENS, systems[user % count])
                    for user in range(args.users)
                ]
                answers = run_round(server, bodies, f"{count} prompts")
                # As the demo counts.
                tokens = sum(len(a.times) - 1 for a in answers)
                seconds = max(a.times[-1] for a in answers) - min(a.times[0] for a in answers)
                rates[count].append(tokens / seconds)
    one, two = (statistics.median(rates[count]) for count in (1, 2))
    spread = " to ".join(
        f"{f(b / a for a, b in zip(rates[1], rates[2], strict=True)):.2f}" for f in (min, max)
    )
    say(
        f"{args.users} users, prompts of {args.prompt_tokens} tokens: {one:.1f} tokens/s over one, "
        f"{two:.1f} over two mixed: {two / one:.2f}x ({spread} in {args.rounds} rounds)"
    )
    require(nine_tenths_of_one_prompt=two >= 0.9 * one)
