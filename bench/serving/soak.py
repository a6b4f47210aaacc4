"""Half an hour of users of all kinds: whether memory grows, and whether anything is stuck."""

import http.client
import json
import random
import socket
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

from common import chat, relay_server, require, wait_idle, words
from console import DemoError, Ticker, say
from servers import Server
from users import CHAT, Answer, ask, at_once

WARM_UP = 5  # minutes
SYSTEMS = [f"You are number {number}. {words(200)}" for number in range(4)]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


def question(source: random.Random) -> dict:
    system = source.choice([*SYSTEMS, None])
    return chat(f"Question {source.randrange(10**6)}?", source.randrange(1, 32), system)


def asks(server: Server, source: random.Random) -> None:
    answer = Answer(0)
    ask(server, question(source), answer, 0.0)
    if answer.error and not answer.error.startswith("429"):
        raise DemoError(answer.error)


def wants_json(server: Server, source: random.Random) -> None:
    body = question(source) | {
        "stream": False,
        "stream_options": None,
        "ignore_eos": False,
        "max_tokens": 24,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    }
    expect(server, body, {200, 429})


def sends_rubbish(server: Server, source: random.Random) -> None:
    body = question(source) | source.choice(
        [{"messages": 7}, {"max_tokens": -5}, {"temperature": "hot"}, {"messages": []}]
    )
    expect(server, body, {400, 429})  # a full queue is told before the request is read
    with socket.create_connection(("127.0.0.1", server.port), 5) as raw:
        raw.sendall(source.randbytes(source.randrange(1, 4000)))


def leaves(server: Server, source: random.Random) -> None:
    """Before the answer, or after some of it."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    body = question(source) | {"max_tokens": 400}
    connection.request("POST", CHAT, json.dumps(body))
    if source.random() < 0.5:
        connection.getresponse().read(source.randrange(1, 2000))
    connection.close()


def dawdles(server: Server, source: random.Random) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", CHAT, json.dumps(question(source)))
    response = connection.getresponse()
    for _ in range(20):
        if not response.read(20):
            break
        time.sleep(0.1)
    connection.close()


def looks(server: Server, source: random.Random) -> None:
    path = source.choice(["/metrics", "/health", "/v1/models", "/", "/state"])
    if server.request("GET", path)[0] != 200:
        raise DemoError(f"GET {path} was refused")


def expect(server: Server, body: dict, statuses: set[int]) -> None:
    status, text = server.request("POST", CHAT, body)
    if status not in statuses:
        raise DemoError(f"{status} {text[:300].decode(errors='replace')} for {body}")


KINDS = {asks: 10, wants_json: 2, sends_rubbish: 2, leaves: 4, dawdles: 1, looks: 2}


def resident_mib(server: Server) -> float:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def run(args) -> None:
    if args.minutes <= WARM_UP + 1:
        raise DemoError(f"a soak takes more than {WARM_UP + 1} minutes")
    done: Counter[str] = Counter()
    problems: list[str] = []
    samples: list[tuple[float, float]] = []  # minute, MiB

    def user(number: int, server: Server, end: float) -> None:
        source = random.Random(number)
        while time.monotonic() < end:
            kind = source.choices(list(KINDS), list(KINDS.values()))[0]
            try:
                kind(server, source)
                done[kind.__name__] += 1
            except (DemoError, OSError, http.client.HTTPException, ValueError) as error:
                problems.append(f"{kind.__name__}: {error!r}")
                time.sleep(1)

    def watch(server: Server, begin: float, end: float) -> None:
        while (now := time.monotonic()) < end:
            samples.append(((now - begin) / 60, resident_mib(server)))
            time.sleep(5)

    def status() -> str:
        return f"{samples[-1][0]:.0f} min, {samples[-1][1]:.0f} MiB, {done.total()} done"

    options = ["-c", "16384", "--max-model-len", "4096", "--parallel", str(args.users)]
    options += ["--max-queue", str(args.users)]
    with (
        tempfile.TemporaryDirectory() as folder,
        relay_server(args, Path(folder) / "serve.log", *options) as server,
    ):
        server.wait_ready(600)
        begin = time.monotonic()
        end = begin + 60 * args.minutes
        samples.append((0, resident_mib(server)))
        everybody = [(user, number, server, end) for number in range(2 * args.users)]
        with Ticker(status):
            at_once(server, lambda do, *what: do(*what), [*everybody, (watch, server, begin, end)])
        server.check_alive()
        wait_idle(server)
    warm = [mib for minute, mib in samples if WARM_UP <= minute < WARM_UP + 1]
    late = [mib for minute, mib in samples if minute >= args.minutes - 1]
    first, last = statistics.median(warm), statistics.median(late)
    say(", ".join(f"{name} {count}" for name, count in done.most_common()))
    say(
        f"resident after {WARM_UP} minutes {first:.1f} MiB, at the end {last:.1f} MiB: "
        f"{100 * (last / first - 1):+.2f} %"
    )
    if problems:
        raise DemoError(f"{len(problems)} requests went wrong, the first: {problems[0]}")
    require(memory_grows_under_1_percent=last < 1.01 * first)
