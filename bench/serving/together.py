"""Clients that arrive together, with one long prompt that neither engine has seen before.

The first answers tell how long everybody waits for that prompt. llama-server runs as its own
defaults have it, but for as many slots as there are clients, each with its own KV cache, which its
attention reads fastest. At the second question of each client both engines have the prompt.
"""

import time

from common import both_servers, chat, require, say_ratio, words
from console import say
from results import percentile
from users import run_round

TOKENS = 8  # of each answer


def run(args) -> None:
    each = args.prompt_tokens + TOKENS + 256
    own = ["-c", str(args.prompt_tokens + args.users * (2 * TOKENS + 512))]
    own += ["--parallel", str(args.users), "--max-model-len", str(each)]
    slots = ["-np", str(args.users), "-c", str(args.users * each), "--no-kv-unified"]
    rounds = ("unseen prompt", "seen prompt")
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in rounds}
    with both_servers(args, slots, own) as (llama, relay):
        for turn in range(args.rounds):
            system = f"Prompt {turn}. {words(args.prompt_tokens)}"
            for server in (llama, relay) if turn % 2 == 0 else (relay, llama):
                for number, name in enumerate(rounds):
                    bodies = [
                        chat(f"Question {number}.{user}: who are you?", TOKENS, system)
                        | {"temperature": 0, "logprobs": False}
                        for user in range(args.users)
                    ]
                    begin = time.monotonic()
                    answers = run_round(server, bodies, f"{server.name}, {name}")
                    first = sorted(answer.times[0] for answer in answers)
                    seconds[name].setdefault(server.name, []).append(percentile(first, 95))
                    say(
                        f"{server.name}, {name}, {args.users} clients: first token after "
                        f"{percentile(first, 50):.2f} s, p95 {percentile(first, 95):.2f} s; "
                        f"{time.monotonic() - begin:.0f} s in all"
                    )
    ratios = {}
    for name, by in seconds.items():
        what = f"{name} of {args.prompt_tokens} tokens, {args.users} clients together, "
        what += "p95 of the time to first token"
        ratios[name] = say_ratio(what, by[llama.name], by[relay.name])
    require(tenth_of_llama_servers_p95=ratios["unseen prompt"] >= 10)
