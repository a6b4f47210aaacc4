"""What the figures share: a server, and what it is asked."""

import contextlib
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts/demo"))  # its servers and users

from console import DemoError, say  # noqa: E402
from servers import Server, clean_environment, free_port  # noqa: E402
from setup import best_flash_attention  # noqa: E402
from users import Answer, ask  # noqa: E402


def relay_server(args, log: Path, *more: str) -> Server:
    command = [str(args.relay), "serve", "-m", str(args.model), "--port", str(free_port())]
    command += ["--drain-timeout", "0", *more, *args.more]
    return Server("relay serve", command, clean_environment(), log)


def llama_server(args, log: Path, *more: str) -> Server:
    command = [str(args.relay.parent / "llama-server"), "-m", str(args.model), "--no-webui"]
    # The copies of idle slots in host memory would only cost time here.
    command += ["--host", "127.0.0.1", "--port", str(free_port()), "--cache-ram", "0", *more]
    return Server("llama-server", command, clean_environment(), log)


def words(tokens: int) -> str:
    """A text of about so many tokens: each of these words is one, in any vocabulary."""
    some = "time year people way day man thing life world school state family group".split()
    return " ".join(some[i * i // 7 % len(some)] for i in range(tokens))


def chat(content: str, tokens: int, system: str | None = None) -> dict:
    """A streaming question, whose answer has exactly so many tokens."""
    messages = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return {
        "messages": messages,
        "max_tokens": tokens,
        "ignore_eos": True,
        "logprobs": True,  # so that a token without a whole character is sent as well
        "stream": True,
        "stream_options": {"include_usage": True},
    }


@contextlib.contextmanager
def both_servers(args, slots: list[str], own: list[str]) -> Iterator[tuple[Server, Server]]:
    """llama-server, with the flash attention it is faster with, and relay serve, both ready."""
    flash, rates = best_flash_attention(args.relay.parent, args.model)
    compared = ", ".join(f"{name} {rate:.1f} tokens/s" for name, rate in rates.items())
    say(f"llama-server's flash attention, decode of 8 rows: {compared}; it gets '{flash}'")
    with (
        tempfile.TemporaryDirectory() as folder,
        llama_server(args, Path(folder) / "llama-server.log", *slots, "-fa", flash) as llama,
        relay_server(args, Path(folder) / "serve.log", *own) as relay,
    ):
        for server in (llama, relay):
            server.wait_ready(600)
        yield llama, relay


def say_ratio(what: str, llama: list[float], relay: list[float]) -> float:
    """The median of how many times as fast relay serve was, round by round, in seconds."""
    pairs = [a / b for a, b in zip(llama, relay, strict=True)]
    ratio = statistics.median(pairs)
    say(
        f"{what}: llama-server {statistics.median(llama):.2f} s, relay serve "
        f"{statistics.median(relay):.2f} s: {ratio:.2f}x as fast "
        f"({min(pairs):.2f} to {max(pairs):.2f} in {len(pairs)} rounds)"
    )
    return ratio


def keep_asking(server: Server, bodies: list[dict], begin: float = 0.0) -> list[Answer]:
    """What each is answered, from now on: who has a whole answer asks again."""

    def ask_until_error(body: dict, answer: Answer) -> None:
        while not answer.error:
            ask(server, body, answer, begin)

    answers = [Answer(user) for user in range(len(bodies))]
    for asked in zip(bodies, answers, strict=True):
        threading.Thread(target=ask_until_error, args=asked, daemon=True).start()
    return answers


def wait_decoding(server: Server, answers: list[Answer]) -> None:
    """Until each has some tokens more than now."""
    wanted = [len(answer.times) + 8 for answer in answers]
    while any(len(a.times) < count for a, count in zip(answers, wanted, strict=True)):
        server.check_alive()
        if failed := [answer for answer in answers if answer.error]:
            raise DemoError(f"user {failed[0].user}: {failed[0].error}")
        time.sleep(0.1)


def require(**targets: bool) -> None:
    """Ends with an error that names the targets that are missed."""
    if missed := [name.replace("_", " ") for name, met in targets.items() if not met]:
        raise DemoError("missed: " + ", ".join(missed))


def metrics(server: Server) -> dict[str, float]:
    """All at one time, by name; of those with several labels the last."""
    _, text = server.request("GET", "/metrics")
    lines = (line for line in text.decode().splitlines() if line and line[0] != "#")
    return {line.split("{")[0].split()[0]: float(line.split()[-1]) for line in lines}


def metric(server: Server, name: str) -> float:
    found = metrics(server)
    if name not in found:
        raise DemoError(f"/metrics has no {name}")
    return found[name]


def wait_running(server: Server, requests: int) -> None:
    deadline = time.monotonic() + 60
    while metric(server, "vllm:num_requests_running") < requests:
        if time.monotonic() > deadline:
            raise DemoError(f"not all of {requests} requests run after 60 s")
        time.sleep(0.1)


def wait_idle(server: Server) -> float:
    """Seconds until nothing runs or waits any more."""
    begin = time.monotonic()
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting")
    while any(metric(server, name) > 0 for name in names):
        if time.monotonic() > begin + 60:
            raise DemoError("requests are stuck: something runs 60 s after all clients have left")
        time.sleep(0.02)
    return time.monotonic() - begin
