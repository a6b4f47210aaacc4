"""Clients of a server: every request is sent when it arrives, and what each saw is kept."""

import time

from tasks import EvaluationError, quantile
from workload import Request

PERCENTILES = (50, 95, 99)


def body_of(request: Request, **more) -> dict:
    return dict(
        prompt=request.prompt,
        max_tokens=request.output,
        stream=True,
        stream_options={"include_usage": True},
        temperature=0,
        ignore_eos=True,
        **more,
    )


def send(server, requests: list[Request], **more) -> list:
    """The answers, with times from the begin; raises EvaluationError if one failed."""
    from users import Answer, ask, at_once

    answers = [Answer(number) for number in range(len(requests))]
    begin = time.monotonic()

    def client(request: Request, answer) -> None:
        time.sleep(max(0.0, begin + request.arrival - time.monotonic()))
        ask(server, body_of(request, **more), answer, begin, "/v1/completions")

    at_once(server, client, list(zip(requests, answers, strict=True)))
    failed = [a for a in answers if a.error]
    if failed:
        raise EvaluationError(
            f"{server.name}: {len(failed)} of {len(answers)} requests failed, the first with "
            f"{failed[0].error}; its log is {server.log}"
        )
    return answers


def prices(per_hour: float, speeds: list[float]) -> list[tuple]:
    """Metric, unit, which is better, values: where a price is stated, dollars at these tokens/s."""
    if not per_hour:
        return []
    dollars = [per_hour / 3600 * 1e6 / speed for speed in speeds]
    return [("price", "$/1M tokens", "lower", dollars), ("price of an hour", "$/h", "", [per_hour])]


def measures(requests: list[Request], answers: list) -> dict[str, tuple[str, str, float]]:
    """Metric -> unit, which is better, value of this round."""
    pairs = list(zip(requests, answers, strict=True))
    tokens = sum(a.completion_tokens for a in answers)
    wall = max(a.last for a in answers) - min(r.arrival for r in requests)
    found = {
        "output throughput": ("tokens/s", "higher", tokens / wall),
        "requests": ("1/s", "higher", len(answers) / wall),
        "cached share of prompts": (
            "", "", sum(a.cached_tokens for a in answers) / sum(a.prompt_tokens for a in answers)
        ),
    }  # fmt: skip
    series = {
        "time to first token": ("s", [a.first - r.arrival for r, a in pairs]),
        "inter-token latency": (
            "s", [b - a for x in answers for a, b in zip(x.times, x.times[1:], strict=False)]
        ),
        "normalised latency": (
            "s/token", [(a.last - r.arrival) / a.completion_tokens for r, a in pairs]
        ),
    }  # fmt: skip
    for name, (unit, values) in series.items():
        for p in PERCENTILES if values else ():
            found[f"{name} p{p}"] = (unit, "lower", quantile(sorted(values), p / 100))
    return found
