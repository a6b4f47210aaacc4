"""Requests as a server gets them: seeded token ids, lengths and arrivals."""

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

from tasks import EvaluationError

# Ids that every vocabulary has and that are ordinary words in it.
FIRST_TOKEN, TOKENS = 1000, 28000
# Means of ShareGPT, as the vLLM paper counts them (Kwon et al., 2023, figure 11).
SHAREGPT_INPUT, SHAREGPT_OUTPUT = 161.0, 338.0


@dataclass(frozen=True)
class Request:
    arrival: float  # seconds from the round's begin
    prompt: list[int]
    output: int  # tokens to answer
    shared: int = 0  # tokens of its prompt that are a system prompt's


@dataclass(frozen=True)
class Workload:
    """prefixes: what requests begin with, each computed once before a round begins."""

    prefixes: list[list[int]]
    requests: list[Request]

    @property
    def longest(self) -> int:
        return max(len(r.prompt) + r.output for r in self.requests)

    @property
    def longest_own(self) -> int:
        """Without the system prompt."""
        return max(len(r.prompt) - r.shared + r.output for r in self.requests)


def words(count: int, *seed) -> list[int]:
    source = random.Random(repr(seed))
    return [FIRST_TOKEN + source.randrange(TOKENS) for _ in range(count)]


def lognormal(source: random.Random, mean: float, sigma: float) -> int:
    """A length of this mean, cut at 4 and at four times the mean."""
    value = source.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma)
    return int(min(max(value, min(4.0, mean)), 4 * mean))


def arrivals(count: int, rate: float | None, seed: int) -> list[float]:
    """Poisson arrivals at `rate` a second; all at once without a rate."""
    if rate is None:
        return [0.0] * count
    source = random.Random(f"arrivals {seed}")
    now, times = 0.0, []
    for _ in range(count):
        now += source.expovariate(rate)
        times.append(now)
    return times


def prefixes_of(levels: list) -> list[list[int]]:
    """The whole prefix of each group of the last level."""
    groups = levels[-1][1] if levels else 0
    made = []
    for group in range(groups):
        prefix: list[int] = []
        for depth, (tokens, parts) in enumerate(levels):
            prefix += words(tokens, "level", depth, group * parts // groups)
        made.append(prefix)
    return made


def generate(
    levels: list,
    count: int,
    round_number: int,
    *,
    rate: float | None = None,
    without: float = 0.0,
    input_mean: float,
    output_mean: float,
    sigma: float,
) -> Workload:
    """`without`: the share of requests that begin with no system prompt."""
    prefixes = prefixes_of(levels)
    times = arrivals(count, rate, round_number)
    # Lengths are the same in every round and for every system; the text is not.
    source = random.Random("lengths")
    bare = set(random.Random("without").sample(range(count), round(without * count)))
    if len(bare) == count:
        prefixes = []
    requests = []
    for i in range(count):
        own = words(lognormal(source, input_mean, sigma), "own", round_number, i)
        output = lognormal(source, output_mean, sigma)
        prefix = prefixes[i % len(prefixes)] if prefixes and i not in bare else []
        requests.append(Request(times[i], prefix + own, output, len(prefix)))
    return Workload(prefixes, requests)


def own_means(work: Workload) -> dict[str, float]:
    """Mean lengths of what the requests ask below their system prompt, and of the answers."""
    count = len(work.requests)
    return {
        "own prompt, mean": sum(len(r.prompt) - r.shared for r in work.requests) / count,
        "answer, mean": sum(r.output for r in work.requests) / count,
    }


def replay(
    file: Path,
    count: int,
    round_number: int,
    *,
    time_scale: float,
    block_tokens: int,
    max_prompt: int,
) -> Workload:
    """The first requests of a trace, shrunk: `block_tokens` tokens for each block of 512, answers
    alike, times by `time_scale`. Equal block ids are equal text, another one in each round, so that
    no round finds what the one before has left in a cache. Requests whose prompt is then longer
    than `max_prompt` are left out."""
    scale = block_tokens / 512
    requests = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if len(requests) == count:
            break
        try:
            found = json.loads(line)
            size = max(1, round(found["input_length"] * scale))
            blocks = (words(block_tokens, "block", round_number, i) for i in found["hash_ids"])
            prompt = [token for block in blocks for token in block]
            output = max(1, round(found["output_length"] * scale))
            arrival = found["timestamp"] / 1000 * time_scale
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f"{file}, line {number}: {error!r}") from error
        if size <= max_prompt:
            requests.append(Request(arrival, prompt[:size], output))
    if not requests:
        raise EvaluationError(f"{file}: no request has at most {max_prompt} tokens after scaling")
    return Workload([], requests)
