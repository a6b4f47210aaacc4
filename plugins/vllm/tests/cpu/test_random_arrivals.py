"""A thousand requests that come at random times into a KV cache far too small for them."""

import arrivals
import engines
import psutil
import pytest
import tiny_models

REQUESTS = 1000
BLOCK = 64
BLOCKS = 24


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_random_arrivals(name, model_folder):
    model = tiny_models.write(name, model_folder)
    requests = arrivals.schedule(3, REQUESTS)
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
            results.append(arrivals.run(llm, requests, lambda: psutil.Process().memory_info().rss))
    own, relay = results
    print(f"\n{name}: {relay.preempted} preemptions (vLLM alone {own.preempted})")
    assert relay.preempted > 0, "the cache is not small enough to test preemption"
    pairs = zip(own.answers, relay.answers, strict=True)
    different = sum(a.tokens != b.tokens for a, b in pairs)
    assert different == 0, f"{different} of {REQUESTS} answers differ"
    half = len(relay.memory) // 2
    assert relay.memory[-1] - relay.memory[half] < 32 << 20, f"memory grew: {relay.memory}"
