"""Two GPUs, tensor parallel."""

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


# As vLLM runs by default: an engine process whose workers are its own.
OWN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}
# Without vLLM's fusion of all-reduce and norm, which FlashInfer compiles for minutes, eager or not.
UNFUSED = dict(pass_config=dict(fuse_allreduce_rms=False))
OPTIONS = {
    "eager": dict(compilation_config=UNFUSED),
    "graphs": GRAPHS | dict(compilation_config=GRAPHS["compilation_config"] | UNFUSED),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_as_near_to_float32_as_flash_attention(options, model_folder):
    model = tiny_models.write("llama", model_folder)
    options = options | dict(tensor_parallel_size=2, distributed_executor_backend="mp")
    own, relay = (
        remote.run(model, CALLS, relay=relay, environment=OWN_PROCESS, **options)
        for relay in (False, True)
    )
    assert relay.plans > 0 and len(relay.served) == 2
    truth = remote.Truth(model)
    asked = CALLS[1][0]
    own_error, relay_error = (truth.error(asked, r.answers[1]) for r in (own, relay))
    print(f"\nvLLM's own {own_error}; with Relay {relay_error}")
    print(engines.compare(own.answers[1], relay.answers[1]))
    assert relay_error.mean <= 1.25 * own_error.mean
