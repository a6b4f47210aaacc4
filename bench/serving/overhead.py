"""What of a step is neither computing nor choosing tokens, while many users decode.

That is scheduling. HTTP has threads of its own: what they take from those that compute counts as
computing.
"""

import tempfile
import threading
import time
from pathlib import Path

from common import chat, metric, relay_server, require, wait_running
from console import say
from users import Answer, ask

NAMES = ("relay:steps_total", "relay:compute_seconds_total", "relay:sampling_seconds_total")


def run(args) -> None:
    options = ["-c", str(args.users * 4096), "--parallel", str(args.users)]
    with (
        tempfile.TemporaryDirectory() as folder,
        relay_server(args, Path(folder) / "serve.log", *options) as server,
    ):
        server.wait_ready(600)
        answers = [Answer(user) for user in range(args.users)]
        for answer in answers:
            asked = (server, chat(f"Question {answer.user}?", 4000), answer, 0.0)
            threading.Thread(target=ask, args=asked, daemon=True).start()
        wait_running(server, args.users)
        while any(len(answer.times) < 8 for answer in answers):
            server.check_alive()
            time.sleep(0.1)

        def spent() -> tuple[float, ...]:
            """At the end of a step, of which all these are."""
            steps = metric(server, NAMES[0])
            while metric(server, NAMES[0]) == steps:
                time.sleep(0.001)
            return (*(metric(server, name) for name in NAMES), time.monotonic())

        before = spent()
        time.sleep(args.seconds)
        after = spent()
        wait_running(server, args.users)  # none has ended meanwhile
    steps, computing, sampling, wall = (b - a for a, b in zip(before, after, strict=True))
    rest = 1 - (computing + sampling) / wall
    say(
        f"{args.users} users, {steps:.0f} steps of {1000 * wall / steps:.1f} ms: "
        f"{100 * computing / wall:.1f} % computing, {100 * sampling / wall:.1f} % choosing tokens, "
        f"{100 * rest:.2f} % the rest"
    )
    require(rest_under_2_percent=rest < 0.02)
