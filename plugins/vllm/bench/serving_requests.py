"""Requests as services get them: lengths as in ShareGPT, below system prompts that many share."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[3] / "bench/evaluation"))

from workload import SHAREGPT_INPUT, SHAREGPT_OUTPUT, Workload, generate  # noqa: E402

__all__ = ["SHAREGPT_INPUT", "SHAREGPT_OUTPUT", "Workload", "requests_below"]


def requests_below(
    prompt: int, prompts: int, count: int, seed: int, input_mean: float, output_mean: float
) -> Workload:
    """`count` requests below `prompts` system prompts of `prompt` tokens each. Only the requests'
    own texts depend on the seed; lengths are lognormal, sigma 1."""
    return generate(
        [(prompt, prompts)] if prompt else [],
        count,
        seed,
        input_mean=input_mean,
        output_mean=output_mean,
        sigma=1.0,
    )
