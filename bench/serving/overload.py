"""More users than the server has room for; then all of them leave, then it is ended under load."""

import contextlib
import http.client
import json
import signal
import subprocess
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from common import chat, relay_server, require, wait_idle, wait_running
from console import DemoError, say
from results import percentile
from servers import Server
from users import CHAT, Answer, ask

TOKENS = 16  # of each answer


@dataclass
class Load:
    """Users who ask again as soon as they are answered, or may come again, until `end`."""

    server: Server
    users: int
    end: float = 0.0
    answered: int = 0  # tokens of whole answers
    refused: int = 0
    errors: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, seconds: float) -> float:
        """Returns tokens a second, of whole answers alone."""
        begin = time.monotonic()
        self.end = begin + seconds
        threads = [threading.Thread(target=self._ask, args=(u,)) for u in range(self.users)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise DemoError(f"{len(self.errors)} requests failed, the first: {self.errors[0]}")
        return self.answered / (time.monotonic() - begin)

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
                    self.answered += answer.completion_tokens
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
    for user in range(users):
        asked = (server, chat(f"Tell user {user} a long story.", 4000), Answer(user), 0.0)
        threading.Thread(target=ask, args=asked, daemon=True).start()
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
            Load(server, args.users).run(2)
            room = 2 * args.users  # those that are computed, and those that wait
            peak = Load(server, room).run(args.seconds)
            overload = Load(server, 10 * room)
            goodput = overload.run(args.seconds)
            took = sorted(refusals(log))
            if not took or overload.refused == 0:
                raise DemoError("nobody was refused: this was no overload")
            say(
                f"{room} users: {peak:.1f} tokens/s; {10 * room} users: {goodput:.1f} in whole "
                f"answers ({100 * goodput / peak:.0f} %), {overload.refused} refusals"
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
                goodput_of_95_percent=goodput >= 0.95 * peak,
                refusals_within_50_ms=percentile(took, 99) <= 50,
                idle_within_a_second=idle <= 1,
                status_0=status == 0,
            )
