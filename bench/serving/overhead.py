"""What of a step is neither computing nor choosing tokens, while many users decode.

That is scheduling. HTTP has threads of its own: what they take from those that compute counts as
computing.
"""

import tempfile
import time
from pathlib import Path

from common import (
    ask_in_background,
    chat,
    metric,
    relay_server,
    require,
    wait_decoding,
    wait_running,
)
from console import say

NAMES = ("relay:steps_total", "relay:compute_seconds_total", "relay:sampling_seconds_total")


def run(args) -> None:
    options = ["-c", str(args.users * 4096), "--parallel", str(args.users)]
    with (
        tempfile.TemporaryDirectory() as folder,
        relay_server(args, Path(folder) / "serve.log", *options) as server,
    ):
        server.wait_ready(600)
        questions = [chat(f"Question {user}?", 4000) for user in range(args.users)]
        answers = ask_in_background(server, questions)
        wait_running(server, args.users)
        wait_decoding(server, answers)

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
