"""One client whose prompts share nothing, with relay serve and with llama-server by turns."""

import time

from common import both_servers, chat, require, say_ratio, words
from console import DemoError
from users import Answer, ask

TOKENS = 64  # of each answer


def run(args) -> None:
    cells = args.prompt_tokens + TOKENS + 256
    options = ["-c", str(cells), "--parallel", "1"]
    slot = ["-c", str(cells), "-np", "1"]
    seconds: dict[str, dict[str, list[float]]] = {"first token": {}, "decoding": {}, "answer": {}}
    with both_servers(args, slot, options) as (llama, relay):
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
    ratios = {name: say_ratio(name, by[llama.name], by[relay.name]) for name, by in seconds.items()}
    require(never_below_098=ratios["answer"] >= 0.98)
