"""More users than the server has room for; then all of them leave, then it is ended under load."""

import contextlib
import http.client
import json
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from common import chat, keep_asking, relay_server, require, wait_idle, wait_running
from console import DemoError, say
from results import percentile
from servers import Server
from users import CHAT, Answer, ask, at_once

TOKENS = 16  # of each answer


@dataclass
class Load:
    """Users who ask again as soon as they are answered, or may come again, until `end`."""

    server: Server
    users: int
    parallel: int  # so many are computed at once
    end: float = 0.0
    answered: list[tuple[float, int]] = field(default_factory=list)  # when, tokens; whole ones
    refused: int = 0
    errors: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, seconds: float) -> float:
        """Returns tokens a second, of whole answers alone."""
        begin = time.monotonic()
        self.end = begin + seconds
        at_once(self.server, self._ask, [(user,) for user in range(self.users)])
        if self.errors:
            raise DemoError(f"{len(self.errors)} requests failed, the first: {self.errors[0]}")
        # Answers that begin together end together. Where the time ends between two such waves, it
        # would count for or against this load by chance.
        in_time = sorted(one for one in self.answered if one[0] <= self.end)
        whole = in_time[: len(in_time) // self.parallel * self.parallel]
        if not whole:
            raise DemoError(f"{seconds:.0f} s are too few for {self.parallel} answers: --seconds")
        return sum(tokens for _, tokens in whole) / (whole[-1][0] - begin)

    def _ask(self, user: int) -> None:
        asked = 0
        while time.monotonic() < self.end:
            answer = Answer(user)
            asked += 1
            ask(self.server, chat(f"Question {user}.{asked}?", TOKENS), answer, 0.0)
            with self._lock:
                if answer.error.startswith("429"):
                    self.refused += 1
                elif answer.error:
                    self.errors.append(answer.error)
                else:
                    self.answered.append((time.monotonic(), answer.completion_tokens))
            if answer.retry_after:
                time.sleep(min(answer.retry_after, max(0.0, self.end - time.monotonic())))


def refusals(log: Path) -> list[float]:
    """Milliseconds that each took, as the server says."""
    found = []
    for line in log.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            request = json.loads(line)
            if isinstance(request, dict) and request.get("status") == 429:
                found.append(request["duration_ms"])
    return found


def leave_at_once(server: Server, users: int) -> float:
    """Seconds until nothing runs or waits after `users` clients have left."""
    connections = []
    for user in range(users):
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        body = json.dumps(chat(f"Tell user {user} a long story.", 4000))
        connection.request("POST", CHAT, body)
        connections.append(connection)
    wait_running(server, users)
    for connection in connections:
        connection.close()
    return wait_idle(server)


def end_under_load(server: Server, users: int) -> tuple[int, float]:
    """The server's status and the seconds that SIGTERM takes while `users` are answered."""
    stories = [chat(f"Tell user {user} a long story.", 4000) for user in range(users)]
    keep_asking(server, stories)
    wait_running(server, users)
    begin = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    try:
        status = server.process.wait(60)
    except subprocess.TimeoutExpired as error:
        raise DemoError("the server goes on 60 s after SIGTERM") from error
    return status, time.monotonic() - begin


def run(args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "serve.log"
        cells = args.users * 8192
        options = ["-c", str(cells), "--parallel", str(args.users), "--max-model-len", "8192"]
        options += ["--max-queue", str(args.users), "--log-format", "json", "--log-level", "debug"]
        with relay_server(args, log, *options) as server:
            server.wait_ready(600)
            room = 2 * args.users  # those that are computed, and those that wait
            Load(server, room, args.users).run(args.seconds)  # warm-up
            rates: dict[int, list[float]] = {room: [], 10 * room: []}
            refused = 0
            for turn in range(args.rounds):
                for users in rates if turn % 2 == 0 else reversed(rates):
                    load = Load(server, users, args.users)
                    rates[users].append(load.run(args.seconds))
                    refused += load.refused
            took = sorted(refusals(log))
            if not took:
                raise DemoError("nobody was refused: this was no overload")
            peak, goodput = (statistics.median(each) for each in rates.values())
            shares = [b / a for a, b in zip(*rates.values(), strict=True)]
            share = statistics.median(shares)
            say(
                f"{room} users: {peak:.1f} tokens/s; {10 * room} users: {goodput:.1f} in whole "
                f"answers: {100 * share:.1f} % ({100 * min(shares):.1f} to {100 * max(shares):.1f} "
                f"in {args.rounds} rounds), {refused} refusals"
            )
            say(
                f"a refusal takes the server {percentile(took, 50):.1f} ms, p99 "
                f"{percentile(took, 99):.1f} ms"
            )
            idle = leave_at_once(server, args.users)
            say(f"{args.users} clients left: idle after {idle:.2f} s")
            status, seconds = end_under_load(server, args.users)
            say(f"SIGTERM under load: status {status} after {seconds:.2f} s")
            require(
                goodput_of_95_percent=share >= 0.95,
                refusals_within_50_ms=percentile(took, 99) <= 50,
                idle_within_a_second=idle <= 1,
                status_0=status == 0,
            )
