"""Clients that arrive together, with one long prompt that neither engine has seen before.

The first answers tell how long everybody waits for that prompt. llama-server runs as its own
defaults have it, but for as many slots as there are clients, each with its own KV cache, which its
attention reads fastest, and for flash attention, which is on or off, whichever is faster. At the
second question of each client both engines have the prompt: then the answers are longer, and tell
how fast each decodes.
"""

import time

from common import both_servers, chat, require, say_ratio, words
from console import say
from results import percentile
from users import run_round

ANSWERS = {"unseen prompt": 8, "seen prompt": 32}  # rounds, and the tokens of each answer


def run(args) -> None:
    most = max(ANSWERS.values())
    each = args.prompt_tokens + most + 256
    own = ["-c", str(args.prompt_tokens + args.users * (2 * most + 512))]
    own += ["--parallel", str(args.users), "--max-model-len", str(each)]
    slots = ["-np", str(args.users), "-c", str(args.users * each), "--no-kv-unified"]
    seconds: dict[str, dict[str, list[float]]] = {name: {} for name in (*ANSWERS, "decoding")}
    with both_servers(args, slots, own) as (llama, relay):
        for turn in range(args.rounds):
            system = f"Prompt {turn}. {words(args.prompt_tokens)}"
            for server in (llama, relay) if turn % 2 == 0 else (relay, llama):
                for number, (name, tokens) in enumerate(ANSWERS.items()):
                    bodies = [
                        chat(f"Question {number}.{user}: who are you?", tokens, system)
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
                # Of the last round, as the demo counts.
                decoding = max(answer.last for answer in answers) - first[0]
                seconds["decoding"].setdefault(server.name, []).append(decoding)
    ratios = {}
    for name, by in seconds.items():
        what = f"{args.users} clients together, prompt of {args.prompt_tokens} tokens: "
        what += f"{name}, p95 of the time to first token" if name in ANSWERS else name
        ratios[name] = say_ratio(what, by[llama.name], by[relay.name])
    require(
        tenth_of_llama_servers_p95=ratios["unseen prompt"] >= 10,
        twice_llama_servers_decode_throughput=ratios["decoding"] >= 2,
    )
