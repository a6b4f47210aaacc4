"""One client whose prompts share nothing, with relay serve and with llama-server by turns."""

import statistics
import tempfile
import time
from pathlib import Path

from common import chat, llama_server, relay_server, require, words
from console import DemoError, say
from users import Answer, ask

TOKENS = 64  # of each answer


def run(args) -> None:
    cells = args.prompt_tokens + TOKENS + 256
    options = ["-c", str(cells), "--parallel", "1"]
    slot = ["-c", str(cells), "-np", "1"]
    seconds: dict[str, dict[str, list[float]]] = {"first token": {}, "decoding": {}, "answer": {}}
    with (
        tempfile.TemporaryDirectory() as folder,
        llama_server(args, Path(folder) / "llama-server.log", *slot) as llama,
        relay_server(args, Path(folder) / "serve.log", *options) as relay,
    ):
        for server in (llama, relay):
            server.wait_ready(600)
        for turn in range(args.rounds + 1):
            for server in (llama, relay) if turn % 2 == 0 else (relay, llama):
                answer = Answer(0)
                question = f"{server.name} {turn}. {words(args.prompt_tokens)}"
                body = chat(question, TOKENS) | {"temperature": 0, "logprobs": False}
                ask(server, body, answer, time.monotonic())
                if answer.error:
                    raise DemoError(f"{server.name}: {answer.error}")
                if turn == 0:
                    continue  # warm-up
                first, last = answer.times[0], answer.times[-1]
                took = {"first token": first, "decoding": last - first, "answer": last}
                for name, value in took.items():
                    seconds[name].setdefault(server.name, []).append(value)
    ratios = {}
    for name, by in seconds.items():
        pairs = [a / b for a, b in zip(by[llama.name], by[relay.name], strict=True)]
        ratios[name] = statistics.median(pairs)
        say(
            f"{name}: llama-server {statistics.median(by[llama.name]):.2f} s, relay serve "
            f"{statistics.median(by[relay.name]):.2f} s: {ratios[name]:.2f}x as fast "
            f"({min(pairs):.2f} to {max(pairs):.2f} in {args.rounds} rounds)"
        )
    require(never_below_098=ratios["answer"] >= 0.98)
