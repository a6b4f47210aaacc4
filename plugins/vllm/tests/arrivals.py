"""Requests that come at random times into a KV cache far too small for them."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import engines
import tiny_models
from vllm import LLM, SamplingParams

Request = tuple[int, list[int], int]  # step of arrival, prompt, tokens to answer


def schedule(seed: int, count: int) -> list[Request]:
    """Prompts begin with one of a few prefixes, of which more exist than the cache can keep."""
    r = random.Random(seed)

    def tokens(size: int) -> list[int]:
        return [r.randrange(3, tiny_models.VOCABULARY) for _ in range(size)]

    prefixes = [tokens(r.choice([64, 128, 192, 200])) for _ in range(8)]
    requests, step = [], 0
    for _ in range(count):
        step += r.choice([0, 0, 0, 1, 1, 2])
        prefix = r.choice(prefixes) if r.random() < 0.8 else []
        requests.append((step, prefix + tokens(r.randint(1, 100)), r.randint(1, 24)))
    return requests


@dataclass
class Outcome:
    answers: list[engines.Answer]
    preempted: int  # how often a request was
    memory: list[int]  # bytes in use, on the way


def run(llm: LLM, requests: list[Request], memory_in_use: Callable[[], int]) -> Outcome:
    """Answers all requests. Asserts that no block of KV is lost."""
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
    answers: dict[int, engines.Answer] = {}
    memory = []
    step = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and waiting[0][1][0] <= step:
            i, (_, prompt, count) = waiting.pop(0)
            parameters = SamplingParams(
                temperature=0, logprobs=5, max_tokens=count, ignore_eos=True, detokenize=False
            )
            engine.add_request(str(i), {"prompt_token_ids": prompt}, parameters)
        for output in engine.step():
            if output.finished:
                answers[int(output.request_id)] = engines.answer_of(output.outputs[0])
        step += 1
        if step % 100 == 0:
            memory.append(memory_in_use())
    pool = scheduler.kv_cache_manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, (
        "blocks leaked (one is the null block)"
    )
    return Outcome([answers[i] for i in range(len(requests))], preempted, memory)
