"""Two workers with a core each: tensor parallel, and as tasks of a Ray cluster."""

import os
from pathlib import Path

import engines
import pytest
import ray
import tiny_models
from test_models import answers, prompts


@pytest.fixture(scope="module")
def cores():
    found = sorted(os.sched_getaffinity(0))[:2]
    assert len(found) == 2, "two workers need two cores"
    return found


@pytest.fixture(scope="module")
def model(model_folder):
    return tiny_models.write("llama", model_folder)


def test_tensor_parallel_gives_the_same_tokens(model, cores, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
    options = dict(dtype="float32", tensor_parallel_size=2, distributed_executor_backend="mp")
    own = answers(model, relay=False, **options)
    assert engines.compare(own, answers(model, relay=True, **options)).share == 1.0


def test_ray_workers_give_the_same_tokens(model, cores):
    """vLLM's own Ray executor refuses CPUs ("current platform cpu does not support ray"), so each
    Ray worker has an engine, and half of the prompts: data parallel, as Ray's users run CPUs."""

    @ray.remote(num_cpus=1)
    def answer(core: int, share: list[engines.Prompt], relay: bool) -> list[engines.Answer]:
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(core)
        with engines.engine(model, relay=relay, dtype="float32") as llm:
            return engines.generate(llm, share, 16)

    environment = {
        "PYTHONPATH": os.pathsep.join(map(str, Path(__file__).parents[:2])),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "HF_HUB_OFFLINE": "1",
    }
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env=dict(env_vars=environment),
    )
    try:
        found = []
        for relay in (False, True):
            halves = [answer.remote(core, prompts()[i::2], relay) for i, core in enumerate(cores)]
            found.append([a for half in ray.get(halves) for a in half])
    finally:
        ray.shutdown()
    assert engines.compare(*found).share == 1.0
