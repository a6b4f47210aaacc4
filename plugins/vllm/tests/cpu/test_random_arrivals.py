"""A thousand requests that come at random times into a KV cache far too small for them."""

import random

import engines
import psutil
import pytest
import tiny_models
from vllm import SamplingParams

REQUESTS = 1000
BLOCK = 64
BLOCKS = 24


def schedule(seed: int) -> list[tuple[int, list[int], int]]:
    """(step of arrival, prompt, tokens to answer). Prompts begin with one of a few prefixes, of
    which more exist than the cache can keep."""
    r = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [r.randrange(3, tiny_models.VOCABULARY) for _ in range(count)]

    prefixes = [tokens(r.choice([64, 128, 192, 200])) for _ in range(8)]
    requests, step = [], 0
    for _ in range(REQUESTS):
        step += r.choice([0, 0, 0, 1, 1, 2])
        prefix = r.choice(prefixes) if r.random() < 0.8 else []
        requests.append((step, prefix + tokens(r.randint(1, 100)), r.randint(1, 24)))
    return requests


def run(llm, requests) -> tuple[list[list[int]], int, list[int]]:
    """The answers, how often a request was preempted, and the process's memory on the way."""
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    preempted = 0
    preempt = scheduler._preempt_request

    def counting(*args, **kwargs):
        nonlocal preempted
        preempted += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = counting
    waiting = list(enumerate(requests))
    answers: dict[int, list[int]] = {}
    memory = []
    step = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0][1][0] <= step:
            i, (_, prompt, count) = waiting.pop(0)
            parameters = SamplingParams(
                temperature=0, max_tokens=count, ignore_eos=True, detokenize=False
            )
            engine.add_request(str(i), {"prompt_token_ids": prompt}, parameters)
        for output in engine.step():
            if output.finished:
                answers[int(output.request_id)] = list(output.outputs[0].token_ids)
        step += 1
        if step % 100 == 0:
            memory.append(psutil.Process().memory_info().rss)
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, (
        "blocks leaked (one is the null block)"
    )
    return [answers[i] for i in range(len(requests))], preempted, memory


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_random_arrivals(name, model_folder):
    model = tiny_models.write(name, model_folder)
    requests = schedule(seed=3)
    results = []
    for relay in (False, True):
        with engines.engine(
            model,
            relay=relay,
            dtype="float32",
            block_size=BLOCK,
            num_gpu_blocks_override=BLOCKS,
            max_num_seqs=16,
            max_num_batched_tokens=256,
            max_model_len=512,
        ) as llm:
            results.append(run(llm, requests))
    (own, own_preempted, _), (relay, preempted, memory) = results
    print(f"\n{name}: {preempted} preemptions (vLLM alone {own_preempted})")
    assert preempted > 0, "the cache is not small enough to test preemption"
    different = sum(a != b for a, b in zip(own, relay, strict=True))
    assert different == 0, f"{different} of {REQUESTS} answers differ"
    half = len(memory) // 2
    assert memory[-1] - memory[half] < 32 << 20, f"memory grew: {memory}"
