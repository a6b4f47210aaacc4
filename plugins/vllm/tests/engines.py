"""vLLM engines driven by this process, one after the other, with Relay or with vLLM's own
attention."""

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from relay_attention import plugin
from vllm import LLM, CompletionOutput, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.plugins import load_general_plugins
from vllm.v1.attention import selector
from vllm.v1.attention.backends.registry import AttentionBackendEnum

Prompt = list[int]


@contextmanager
def engine(
    model: Path, *, relay: bool | None, dtype: str = "bfloat16", **options: object
) -> Iterator[LLM]:
    """An engine over `model`; its attention is Relay's, or vLLM's own. None: Relay's where its
    layers say so."""
    load_general_plugins()  # now, so that the engine does not undo what follows
    selector._cached_get_attn_backend.cache_clear()
    os.environ["RELAY_DISABLE"] = "1" if relay is False else "0"  # for workers of their own
    if relay is not False:
        plugin.register()
    else:
        AttentionBackendEnum[plugin.find_device().replaces].clear_override()
    defaults = dict(
        dtype=dtype,
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=1024,
        max_num_seqs=32,
        kv_cache_memory_bytes=64 << 20,
        disable_log_stats=True,
    )
    llm = LLM(str(model), **(defaults | options))
    try:
        assert relay is None or all(
            layers == [relay] * len(layers) for layers in served_layers(llm)
        )
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def served_layers(llm: LLM) -> list[list[bool]]:
    """For each worker, whether Relay computes the attention of each layer."""

    def look(worker: object) -> list[bool]:
        context = worker.model_runner.compilation_config.static_forward_context
        layers = [layer for layer in context.values() if hasattr(layer, "impl")]
        return [getattr(layer.impl, "operator", None) is not None for layer in layers]

    return llm.collective_rpc(look)


@dataclass
class Answer:
    """Greedy tokens, and for each the log-probabilities of the likeliest tokens there."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


def generate(llm: LLM, prompts: Sequence[Prompt], tokens: int, **sampling: object) -> list[Answer]:
    """Greedy answers of exactly `tokens` tokens. n > 1 gives n answers to each prompt in a row."""
    parameters = SamplingParams(
        **(dict(temperature=0, logprobs=5) | sampling),
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
    )
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)
    return [answer_of(o) for output in outputs for o in output.outputs]


def answer_of(output: CompletionOutput) -> Answer:
    logprobs = [{t: p.logprob for t, p in at.items()} for at in output.logprobs or []]
    return Answer(list(output.token_ids), logprobs)


@dataclass
class Agreement:
    """Of two sets of answers to the same prompts, up to where each pair first differs: what follows
    answers another question."""

    equal: int = 0
    tokens: int = 0
    # Differences between log-probabilities of the same token at the same place.
    largest: float = 0.0
    total: float = 0.0
    compared: int = 0

    @property
    def share(self) -> float:
        return self.equal / self.tokens

    @property
    def mean(self) -> float:
        return self.total / self.compared

    def __str__(self) -> str:
        return (
            f"{100 * self.share:.1f} % equal tokens, log-probabilities within {self.largest:.4f}, "
            f"{self.mean:.5f} on average"
        )


def compare(left: Sequence[Answer], right: Sequence[Answer]) -> Agreement:
    assert len(left) == len(right)
    result = Agreement()
    for a, b in zip(left, right, strict=True):
        result.tokens += len(a.tokens)
        for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)):
            for token in a.logprobs[i].keys() & b.logprobs[i].keys():
                difference = abs(a.logprobs[i][token] - b.logprobs[i][token])
                result.largest = max(result.largest, difference)
                result.total += difference
                result.compared += 1
            if x != y:
                break
            result.equal += 1
    return result
