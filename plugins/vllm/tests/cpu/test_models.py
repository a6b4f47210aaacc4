"""Real vLLM, with Relay and with its own attention, over small random-weight models."""

import engines
import pytest
import tiny_models
import torch
from relay_attention.cpu import served

PREFIX = torch.randint(
    3, tiny_models.VOCABULARY, (300,), generator=torch.Generator().manual_seed(1)
)


def prompts(count: int = 6) -> list[engines.Prompt]:
    """Prompts over one prefix of 300 tokens, of growing length."""
    generator = torch.Generator().manual_seed(2)
    return [
        PREFIX.tolist()
        + torch.randint(3, tiny_models.VOCABULARY, (5 + 7 * i,), generator=generator).tolist()
        for i in range(count)
    ]


def answers(model, relay, tokens=16, **options):
    with engines.engine(model, relay=relay, **options) as llm:
        return engines.generate(llm, prompts(), tokens)


@pytest.mark.parametrize("name", tiny_models.CPU)
def test_same_tokens(name, model_folder):
    """In f32 the tokens are equal. In bf16, where rounding decides near ties, Relay may be as far
    from the f32 answers as vLLM's own attention is; printed beside vLLM at another batch size."""
    model = tiny_models.write(name, model_folder)
    truth = answers(model, relay=False, dtype="float32")
    exact = engines.compare(truth, answers(model, relay=True, dtype="float32"))
    print(f"\n{name} f32, Relay and vLLM: {exact}")
    assert exact.share == 1.0
    assert exact.largest < 1e-3

    own = answers(model, relay=False)
    relay = answers(model, relay=True)
    yardstick = engines.compare(own, answers(model, relay=False, max_num_seqs=1))
    print(f"{name} bf16, Relay and vLLM: {engines.compare(own, relay)}")
    print(f"{name} bf16, vLLM and itself at batch 1: {yardstick}")
    own_error, relay_error = engines.compare(truth, own), engines.compare(truth, relay)
    print(f"{name} bf16 and f32, vLLM: {own_error}")
    print(f"{name} bf16 and f32, Relay: {relay_error}")
    assert relay_error.mean <= 1.25 * own_error.mean


@pytest.fixture(scope="module")
def llama(model_folder):
    return tiny_models.write("llama", model_folder)


@pytest.fixture(scope="module")
def llama_answers(llama):
    return answers(llama, relay=False, dtype="float32")


@pytest.mark.parametrize(
    "options",
    [
        dict(enable_prefix_caching=False),
        dict(max_num_batched_tokens=64, max_num_seqs=8),  # prompts in chunks
        dict(block_size=32),  # vectors one after the other, no tiles
    ],
    ids=["no prefix cache", "chunked prefill", "small blocks"],
)
def test_same_tokens_with(options, llama, llama_answers):
    found = engines.compare(llama_answers, answers(llama, relay=True, dtype="float32", **options))
    print(f"\n{found}")
    assert found.share == 1.0


def test_several_answers_to_one_prompt(llama):
    """n > 1: the answers share the prompt's blocks, the last one only up to the branch."""
    found = []
    for relay in (False, True):
        with engines.engine(llama, relay=relay, dtype="float32") as llm:
            sampling = dict(n=4, temperature=1.0, seed=7, logprobs=1)
            found.append(engines.generate(llm, prompts(3), 16, **sampling))
    assert engines.compare(*found).share == 1.0


def test_layers_of_both_kinds_in_one_model(llama, llama_answers, monkeypatch):
    """Every other layer is left to vLLM's own kernel."""
    made = []

    def refuse_every_other(impl, config):
        made.append(impl)
        return "the test wants it" if len(made) % 2 else None

    monkeypatch.setattr(served, "refusal", refuse_every_other)
    with engines.engine(llama, relay=None, dtype="float32") as llm:
        assert engines.served_layers(llm) == [[False, True, False, True]]
        found = engines.compare(llama_answers, engines.generate(llm, prompts(), 16))
    assert found.share == 1.0


def test_float16(llama, llama_answers):
    found = engines.compare(llama_answers, answers(llama, relay=True, dtype="float16"))
    own = engines.compare(llama_answers, answers(llama, relay=False, dtype="float16"))
    print(f"\nf16 and f32, vLLM: {own}\nf16 and f32, Relay: {found}")
    assert found.mean <= 1.25 * own.mean
