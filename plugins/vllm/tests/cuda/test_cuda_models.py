"""Real vLLM on a GPU, with Relay and with its own attention, over small random-weight models."""

import functools

import engines
import pytest
import remote
import tiny_models
import torch

pytestmark = pytest.mark.gpu

PREFIX = 700  # tokens that all prompts share; sharing needs 64
# Their windows, in every layer, hold so little of the prefix that at some steps none of it is worth
# sharing.
MAY_SHARE_NOTHING = {"mistral"}
TOKENS = 24
GRAPHS = dict(enforce_eager=False, compilation_config=dict(cudagraph_capture_sizes=[1, 4, 8]))


def prompts(count: int = 7) -> list[engines.Prompt]:
    """Prompts over one prefix, of growing length; every third shares only half of it."""
    generator = torch.Generator().manual_seed(2)

    def words(size: int) -> list[int]:
        return torch.randint(3, tiny_models.VOCABULARY, (size,), generator=generator).tolist()

    prefix = words(PREFIX)
    return [
        prefix[: PREFIX // 2 if i % 3 == 2 else PREFIX] + words(5 + 9 * i) for i in range(count)
    ]


CALLS = [(prompts(1), 2, {}), (prompts(), TOKENS, {})]  # the first leaves the prefix in the cache


def run(model, relay, calls=CALLS, **options):
    result = remote.run(model, calls, relay=relay, **options)
    if relay:
        assert result.plans > 0, "Relay attended nothing"
    return result


@pytest.fixture(scope="session")
def llama(model_folder):
    return tiny_models.write("llama", model_folder)


@pytest.mark.parametrize("how", ["eager", "graphs"])
@pytest.mark.parametrize("name", tiny_models.CUDA)
def test_as_near_to_float32_as_flash_attention(name, how, model_folder):
    """Log-probabilities of bf16 engines against float32, each after the tokens that it answered.
    Relay may be as far off as FlashAttention is; tokens that are equal are counted beside that."""
    model = tiny_models.write(name, model_folder)
    options = GRAPHS if how == "graphs" else {}
    own = run(model, False, **options)
    relay = run(model, True, **options)
    truth = remote.Truth(model)
    asked = CALLS[1][0]
    own_error = truth.error(asked, own.answers[1])
    relay_error = truth.error(asked, relay.answers[1])
    print(f"\n{name} {how}, vLLM's own and float32:   {own_error}")
    print(f"{name} {how}, with Relay and float32: {relay_error}")
    print(f"{name} {how}, both: {engines.compare(own.answers[1], relay.answers[1])}")
    assert relay_error.mean <= 1.25 * own_error.mean
    assert relay_error.largest <= 2 * own_error.largest
    assert name in MAY_SHARE_NOTHING or relay.read < 0.7 * relay.attended, "nothing was shared"


OPTIONS = {
    "no prefix cache": dict(enable_prefix_caching=False),
    "chunked prefill": dict(max_num_batched_tokens=64, max_num_seqs=8),
    "blocks of 64": dict(block_size=64),
    "float16": dict(dtype="float16"),
    "n-grams verified": dict(
        speculative_config=dict(
            method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1
        )
    ),
    "all in full graphs": dict(
        enforce_eager=False,
        compilation_config=dict(cudagraph_capture_sizes=[1, 4, 8, 64], cudagraph_mode="FULL"),
    ),
}


@pytest.fixture(scope="module")
def own_of(llama):
    """FlashAttention's answers in a dtype, computed once."""
    return functools.cache(lambda dtype: run(llama, False, dtype=dtype).answers[1])


@pytest.mark.parametrize("name", OPTIONS)
def test_as_near_to_float32_with(name, llama, own_of):
    truth = remote.Truth(llama)
    asked = CALLS[1][0]
    own_error = truth.error(asked, own_of(OPTIONS[name].get("dtype", "bfloat16")))
    relay_error = truth.error(asked, run(llama, True, **OPTIONS[name]).answers[1])
    print(f"\n{name}: vLLM's own {own_error}; with Relay {relay_error}")
    assert relay_error.mean <= 1.25 * own_error.mean


def test_fp8_kv_is_attended_as_flash_attention_does(llama):
    own, relay = (run(llama, relay, kv_cache_dtype="fp8") for relay in (False, True))
    truth = remote.Truth(llama)
    own_error, relay_error = (truth.error(CALLS[1][0], r.answers[1]) for r in (own, relay))
    print(f"\nfp8 KV: vLLM's own {own_error}; with Relay {relay_error}")
    assert relay_error.mean <= 1.25 * own_error.mean


def test_several_answers_to_one_prompt(llama):
    """n > 1: the answers share the prompt's blocks, the last one only up to the branch."""
    calls = [(prompts(3), TOKENS, dict(n=4, temperature=1.0, seed=7, logprobs=1))]
    relay = run(llama, True, calls)
    asked = [p for p in prompts(3) for _ in range(4)]
    truth = remote.Truth(llama)
    own_error = truth.error(asked, run(llama, False, calls).answers[0])
    relay_error = truth.error(asked, relay.answers[0])
    assert relay.read < 0.5 * relay.attended
    assert relay_error.mean <= 1.25 * own_error.mean


@pytest.mark.parametrize("options", [{}, GRAPHS], ids=["eager", "graphs"])
def test_nothing_waits_for_the_gpu(options, llama):
    run(llama, True, forbid_waiting=True, **options)


def test_stands_aside_where_results_may_not_depend_on_the_batch(llama):
    result = remote.run(llama, CALLS, relay=None, environment={"VLLM_BATCH_INVARIANT": "1"})
    assert not any(map(any, result.served)) and result.plans == 0
    assert "Relay leaves layers to vLLM's own kernel: VLLM_BATCH_INVARIANT=1" in result.log
