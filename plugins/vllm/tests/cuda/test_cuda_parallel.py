"""Two GPUs, tensor parallel."""

from concurrent.futures import ThreadPoolExecutor

import engines
import pytest
import remote
import tiny_models
import torch
from test_cuda_models import CALLS, GRAPHS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two NVIDIA GPUs here"),
]


ENVIRONMENT = {
    # As vLLM runs by default: an engine process whose workers are its own.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    # All-reduce by vLLM's own kernels. FlashInfer's, its default, compile for minutes, in eager
    # mode too, and need NVLink multicast.
    "VLLM_ALLREDUCE_USE_FLASHINFER": "0",
}
# FlashInfer's fusion of all-reduce and norm is a switch of its own.
UNFUSED = dict(pass_config=dict(fuse_allreduce_rms=False))
OPTIONS = {
    "eager": dict(compilation_config=UNFUSED),
    "graphs": GRAPHS | dict(compilation_config=GRAPHS["compilation_config"] | UNFUSED),
}
SECONDS = 150  # an engine of three processes, of which each imports vLLM, starts for half a minute


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_as_near_to_float32_as_flash_attention(options, model_folder):
    model = tiny_models.write("llama", model_folder)
    options = options | dict(tensor_parallel_size=2, distributed_executor_backend="mp")

    def answer(relay: bool) -> remote.Result:
        return remote.run(
            model, CALLS, relay=relay, environment=ENVIRONMENT, timeout=SECONDS, **options
        )

    with ThreadPoolExecutor() as both:  # at once, as most of the time is their start
        own, relay = both.map(answer, (False, True))
    assert len(own.served) == len(relay.served) == 2, "not two workers"
    assert relay.plans > 0 and relay.read < 0.7 * relay.attended, "nothing was shared"
    truth = remote.Truth(model)
    asked = CALLS[1][0]
    own_error, relay_error = (truth.error(asked, r.answers[1]) for r in (own, relay))
    print(f"\nvLLM's own {own_error}; with Relay {relay_error}")
    print(engines.compare(own.answers[1], relay.answers[1]))
    assert relay_error.mean <= 1.25 * own_error.mean
