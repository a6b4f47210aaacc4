"""Relay beside stock llama-server: one long system prompt, many users at once.

Makes a model (or takes RELAY_DEMO_MODEL), cuts a real text to a system prompt of several thousand
tokens, starts llama-server and `relay serve` in turn, sends both the same concurrent streaming chat
requests, and ends with one table. Then it repeats a round with sharing off and compares the greedy
answers. At last it asks a little model, which is trained to look facts up in its prompt, in each
engine: how many answers are right? Results go to build/demo/: results.json, requests.csv and, with
matplotlib, demo.png.

llama-server is given its best: the prompt is computed once, saved, and restored into every slot
through its slot API (as it stands, it would compute it once per slot); each slot has a KV cache of
its own, which its attention reads fastest; flash attention on or off, whichever a short measurement
on this machine finds faster.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from answers import Exam, ask_all, make_little_model, report
from console import START, DemoError, say
from results import Outcome, compare, plot, table, write_results
from servers import Server
from setup import (
    ROOT,
    Setup,
    best_flash_attention,
    commit,
    cpu_name,
    find_prompt,
    llama_server,
    look_up,
    make_model,
    relay_server,
)
from users import chat_body, run_round

LITTLE_QUESTIONS = 64


def run_stock(setup: Setup, flash: str) -> Outcome:
    outcome = Outcome(
        f"llama-server (-fa {flash})",
        "the prompt computed once, then restored into each slot; one KV cache per slot",
    )
    with tempfile.TemporaryDirectory(dir=setup.out, prefix="slots-") as saves:
        with llama_server(setup, flash, setup.users, "--slot-save-path", f"{saves}/") as server:
            loaded = server.wait_ready(300)
            begin = time.monotonic()
            body = {**chat_body(setup.prompt, 0, 0, 1), "id_slot": 0}
            first = run_round(server, [body], "llama-server computes the prompt")[0]
            outcome.prompt_seconds = first.last
            say(f"llama-server: prompt of {first.prompt_tokens} tokens in {first.last:.1f} s")
            server.json("POST", "/slots/0?action=save", {"filename": "prompt"})
            for slot in range(1, setup.users):
                server.json("POST", f"/slots/{slot}?action=restore", {"filename": "prompt"})
            outcome.ready_seconds = loaded + time.monotonic() - begin
            for number in range(1, setup.rounds + 1):
                bodies = [
                    {**body, "id_slot": slot} for slot, body in enumerate(setup.bodies(number))
                ]
                answers = run_round(server, bodies, f"llama-server, round {number}")
                outcome.rounds.append(answers)
                held = sum(a.prompt_tokens + a.completion_tokens for a in answers)
                outcome.kv_bytes = max(outcome.kv_bytes, held * setup.kv_bytes_per_token)
                say(f"llama-server: round {number} took {max(a.last for a in answers):.1f} s")
    if outcome.cached_share() < 0.5:
        outcome.given += "; it could NOT reuse the prompt (a sliding window, perhaps)"
    return outcome


def relay_kv_bytes(server: Server) -> int:
    text = server.request("GET", "/metrics", timeout=10)[1].decode()
    found = re.search(r"^relay:kv_bytes_used(?:\{.*\})? (\S+)$", text, re.M)
    if found is None:
        raise DemoError("relay serve's /metrics does not tell relay:kv_bytes_used")
    return int(float(found[1]))


def run_relay(setup: Setup, sharing: str, rounds: int) -> Outcome:
    outcome = Outcome("relay serve", "--pin-prompt")
    name = "relay serve" if sharing == "on" else "relay serve, sharing off"
    with relay_server(setup, sharing) as server:
        outcome.ready_seconds = server.wait_ready(600)
        log = server.log.read_text(errors="replace")
        pinned = re.search(r"pinned .*: (\d+) tokens, .* ([\d.]+) s$", log, re.M)
        if pinned is None:
            raise DemoError(f"relay serve does not tell that it pinned the prompt:\n{server.log}")
        if "Relay active" not in log:
            raise DemoError(f"relay serve runs without the Relay module, see {server.log}")
        outcome.prompt_seconds = float(pinned[2])
        say(f"{name}: prompt of {pinned[1]} tokens pinned in {pinned[2]} s")
        for number in range(1, rounds + 1):
            answers = run_round(server, setup.bodies(number), f"{name}, round {number}")
            outcome.rounds.append(answers)
            if number == 1:
                # The prompt and what every user of this round added: finished requests stay cached
                # until room is needed. Later rounds would count the earlier ones' too.
                outcome.kv_bytes = relay_kv_bytes(server)
            say(f"{name}: round {number} took {max(a.last for a in answers):.1f} s")
    return outcome


def demo(args: argparse.Namespace) -> None:
    build = Path(args.build).resolve()
    for program in ("relay", "llama-server", "llama-batched-bench"):
        if not (build / "bin" / program).is_file():
            raise DemoError(f"there is no {build}/bin/{program}; run: make build")
    out = ROOT / "build/demo"
    out.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(out).free < 2**30 + args.prompt_tokens * 2**18:
        raise DemoError(f"{out} has too little space left (1 GiB and the saved prompt are needed)")

    model = make_model(args, build, out)
    source, text = find_prompt(args)
    setup = Setup(
        model, out / "prompt.txt", "", 64, args.users, args.rounds, args.tokens, build, out
    )
    look_up(setup, text, args.prompt_tokens)
    setup.prompt_file.write_text(setup.prompt)
    if setup.prompt_tokens < 0.9 * args.prompt_tokens:
        say(f"note: {source} has only {setup.prompt_tokens} tokens")
    say(f"system prompt: the first {setup.prompt_tokens} tokens of {source}")

    flash, rates = args.stock_fa, {}
    if flash == "best":
        flash, rates = best_flash_attention(build / "bin", model)
        say(
            "llama-server's flash attention, decode of 8 rows: "
            + ", ".join(f"{name} {rate:.1f} tokens/s" for name, rate in rates.items())
            + f"; it gets '{flash}'"
        )
    stock = run_stock(setup, flash)
    relay = run_relay(setup, "on", args.rounds)
    unshared = run_relay(setup, "off", 1)
    agreement = compare(relay.rounds[0], unshared.rounds[0])
    with_stock = compare(relay.answers(), stock.answers())
    say("whether answers are right: the little model and its prompt of facts")
    make_little_model()
    exam = Exam.draw(LITTLE_QUESTIONS)
    little = ask_all(exam, build, out / "answers")

    machine = f"{cpu_name()}, {os.cpu_count()} CPUs"
    title = (
        f"{args.users} users at once, system prompt of {setup.prompt_tokens} tokens, "
        f"{args.tokens} tokens each, {args.rounds} rounds"
    )
    summary = {
        "commit": commit(),
        "machine": machine,
        "model": model.name,
        "prompt_source": source,
        "prompt_tokens": setup.prompt_tokens,
        "users": args.users,
        "rounds": args.rounds,
        "tokens": args.tokens,
        "stock_flash_attention_tokens_per_s": rates,
        "kv_bytes_per_token": setup.kv_bytes_per_token,
        "greedy_sharing_on_off": asdict(agreement),
        "greedy_relay_stock": asdict(with_stock),
        "answers_right": {name: exam.right(given) for name, given in little.items()},
        "answers_asked": LITTLE_QUESTIONS,
        "sharing_off_decode_tokens_per_s": unshared.decode_rate(),
        "servers": {},
    }
    write_results(out, [stock, relay], summary)
    plotted = plot(stock, relay, title, out / "demo.png")

    print(f"\n{title}\n{model.name}, {machine}\n")
    print(table(stock, relay))
    print(f"\nllama-server was given: {stock.given}.")
    print(
        f"Left to itself it computes the prompt once per slot: {args.users} x "
        f"{stock.prompt_seconds:.0f} s = {args.users * stock.prompt_seconds:.0f} s (not run)."
    )
    print(f"Relay's decode with sharing off: {unshared.decode_rate():.1f} tokens/s (one round).")
    print(f"Greedy, sharing on and off: {agreement} agree.")
    print(f"Greedy, Relay and llama-server: {with_stock} agree.")
    print("Answers right, of a little model that looks facts up in its prompt:")
    print("\n".join(f"  {line}" for line in report(exam, little)))
    files = "results.json, requests.csv" + (", demo.png" if plotted else "")
    print(f"\nResults: {out}: {files}. Took {time.monotonic() - START:.0f} s.")


def parse_arguments() -> argparse.Namespace:
    def env(name: str, default) -> str:  # argparse converts defaults that are strings
        return os.environ.get(f"RELAY_DEMO_{name}", str(default))

    def positive(text: str) -> int:
        value = int(text)
        if value < 1:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    parser = argparse.ArgumentParser(
        description="Relay beside stock llama-server: one long system prompt, many users at once.",
        epilog="Each option can be given as RELAY_DEMO_<NAME> in the environment, for make demo.",
    )
    add = parser.add_argument
    add("--model", default=env("MODEL", ""), help="a GGUF model; default: made with relay synth")
    add("--prompt", default=env("PROMPT", ""), help="text file; default: the system's GPL-3")
    add(
        "--prompt-tokens",
        type=positive,
        default=env("PROMPT_TOKENS", 4096),
        help="cut it to so many (%(default)s)",
    )
    add("--users", type=positive, default=env("USERS", 16), help="requests at once (%(default)s)")
    add("--rounds", type=positive, default=env("ROUNDS", 2), help="(%(default)s)")
    add("--tokens", type=positive, default=env("TOKENS", 32), help="per answer (%(default)s)")
    flash_attention = ["best", "on", "off"]
    add(
        "--stock-fa",
        choices=flash_attention,
        default=env("STOCK_FA", "best"),
        help="llama-server's flash attention; best: measured first",
    )
    build = env("BUILD", ROOT / "build/release")
    add("--build", default=build, help="build folder (%(default)s)")
    args = parser.parse_args()
    if args.stock_fa not in flash_attention:  # argparse does not look at defaults
        parser.error(f"RELAY_DEMO_STOCK_FA is one of {', '.join(flash_attention)}")
    return args


def main() -> int:
    def stop(*_args) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)
    try:
        demo(parse_arguments())
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: interrupted; the servers are stopped", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
