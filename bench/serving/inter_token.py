"""Time between tokens of requests that decode, without and with a long prompt among them."""

import tempfile
import time
from pathlib import Path

from common import chat, keep_asking, relay_server, require, wait_decoding, words
from console import DemoError, say
from results import percentile
from users import Answer, ask


def run(args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        cells = args.prompt_tokens + args.users * 4096 + 1024
        longest = max(args.prompt_tokens, 4096) + 1024
        options = ["-c", str(max(cells, longest)), "--max-model-len", str(longest)]
        with relay_server(args, Path(folder) / "serve.log", *options) as server:
            server.wait_ready(600)
            start = time.monotonic()
            questions = [f"Question {user}: {words(32)}" for user in range(args.users)]
            answers = keep_asking(server, [chat(q, 4000) for q in questions], start)
            wait_decoding(server, answers)
            begin = time.monotonic() - start
            time.sleep(args.seconds)
            middle = time.monotonic() - start
            arriving = Answer(args.users)
            ask(server, chat(words(args.prompt_tokens), 1), arriving, start)
            end = time.monotonic() - start
            wait_decoding(server, answers)  # and the gap in which that ended is over
            for answer in [*answers, arriving]:
                if answer.error:
                    raise DemoError(f"user {answer.user}: {answer.error}")
            say(f"{arriving.prompt_tokens} tokens among {args.users}: {end - middle:.1f} s")

        def gaps(since: float, until: float) -> list[float]:
            """All of which some part is within."""
            result = []
            for answer in answers:
                pairs = zip(answer.times, answer.times[1:], strict=False)
                result += [b - a for a, b in pairs if a < until and b > since]
            return result

        ratios = {}
        for name, percent in (("p50", 50), ("p99", 99)):
            without = percentile(sorted(gaps(begin, middle)), percent)
            beside = percentile(sorted(gaps(middle, end)), percent)
            ratios[name] = beside / without
            say(
                f"between tokens, {name}: {1000 * without:.0f} ms, beside the long prompt "
                f"{1000 * beside:.0f} ms: {ratios[name]:.2f}x"
            )
        require(**{f"at_most_twice_at_{name}": ratio <= 2 for name, ratio in ratios.items()})
