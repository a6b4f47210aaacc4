"""What of a step is neither computing nor choosing tokens, while many users decode.

That is scheduling, which the other threads of a step wait for, and HTTP, whose threads take their
time from those that compute: it counts as a share of all cores' time.
"""

import contextlib
import os
import tempfile
import time
from pathlib import Path

from common import (
    chat,
    keep_asking,
    metrics,
    relay_server,
    require,
    wait_decoding,
    wait_running,
)
from console import DemoError, say
from servers import Server

NAMES = ("relay:steps_total", "relay:compute_seconds_total", "relay:sampling_seconds_total")


def cpu_seconds_of_http(server: Server) -> float:
    """Of all threads but the engine's and those that it has begun, which have its name.

    Threads of HTTP come and go, and only the process still counts what those took that have ended.
    """
    process = Path(f"/proc/{server.process.pid}")
    user, system = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
    engine = 0
    for task in (process / "task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # one that ended just now
            if (task / "comm").read_text().strip() == "relay-engine":
                engine += int((task / "schedstat").read_text().split()[0])
    if not engine:
        raise DemoError("relay serve has no thread that is called relay-engine")
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK") - engine / 1e9


def run(args) -> None:
    options = ["-c", str(args.users * 4096), "--parallel", str(args.users)]
    with (
        tempfile.TemporaryDirectory() as folder,
        relay_server(args, Path(folder) / "serve.log", *options) as server,
    ):
        server.wait_ready(600)
        questions = [chat(f"Question {user}?", 4000) for user in range(args.users)]
        answers = keep_asking(server, questions)
        wait_running(server, args.users)
        wait_decoding(server, answers)

        def spent() -> tuple[float, ...]:
            """At the end of a step, of which all these are."""
            begun = metrics(server)[NAMES[0]]
            while (now := metrics(server))[NAMES[0]] == begun:
                time.sleep(0.001)
            return (*(now[name] for name in NAMES), time.monotonic())

        before = spent()
        http = cpu_seconds_of_http(server)
        time.sleep(args.seconds)
        # Not what looking for the end of a step takes.
        http = (cpu_seconds_of_http(server) - http) / args.seconds
        after = spent()
        wait_decoding(server, answers)  # none has failed meanwhile
    steps, computing, sampling, wall = (b - a for a, b in zip(before, after, strict=True))
    scheduling = 1 - (computing + sampling) / wall
    http /= len(os.sched_getaffinity(0))
    say(
        f"{args.users} users, {steps:.0f} steps of {1000 * wall / steps:.1f} ms: "
        f"{100 * computing / wall:.1f} % computing, {100 * sampling / wall:.1f} % choosing tokens, "
        f"{100 * scheduling:.2f} % scheduling; HTTP {100 * http:.2f} % of all cores' time"
    )
    require(scheduling_and_http_under_2_percent=scheduling + http < 0.02)
