"""A thousand requests that come at random times into a KV cache far too small for them."""

import arrivals
import pytest
import remote
import tiny_models

pytestmark = pytest.mark.gpu

REQUESTS = 1000
OPTIONS = dict(
    block_size=16,
    num_gpu_blocks_override=96,
    max_num_seqs=16,
    max_num_batched_tokens=256,
    max_model_len=512,
)
GRAPHS = dict(
    enforce_eager=False, compilation_config=dict(cudagraph_capture_sizes=[1, 2, 4, 8, 16])
)


@pytest.mark.parametrize("how", ["eager", "graphs"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_random_arrivals(name, how, model_folder):
    """Without a crash or a leak, and as near to float32 as FlashAttention is."""
    model = tiny_models.write(name, model_folder)
    requests = arrivals.schedule(3, REQUESTS)
    options = OPTIONS | (GRAPHS if how == "graphs" else {})
    own, relay = (
        remote.run(model, [], requests, relay=relay, timeout=500, **options)
        for relay in (False, True)
    )
    assert relay.preempted > 0, "the cache is not small enough to test preemption"
    assert relay.plans > 0
    truth = remote.Truth(model)
    sample = range(0, REQUESTS, 4)
    prompts = [requests[i][1] for i in sample]
    own_error, relay_error = (
        truth.error(prompts, [r.answers[0][i] for i in sample]) for r in (own, relay)
    )
    print(f"\n{name} {how}: vLLM's own {own_error}; with Relay {relay_error}")
    assert relay_error.mean <= 1.25 * own_error.mean
    half = len(relay.memory) // 2
    assert relay.memory[-1] <= relay.memory[half] + (1 << 20), f"memory grew: {relay.memory}"
