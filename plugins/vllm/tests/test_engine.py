"""Real vLLM engines over tiny models of every kind of attention: Relay against vLLM's own kernel.

Greedy tokens of random models hang by the last digit, so the yardstick is the same model computed
in f32: Relay may not be further from it than vLLM's own bf16 is.
"""

import random

import engines
import pytest
import tiny_models

TOKENS = 24


def prompts() -> list[list[int]]:
    """Two system prompts of several blocks, requests of many lengths below each, and one alone."""
    draw = random.Random(7)
    word = lambda: draw.randrange(3, tiny_models.VOCABULARY)  # noqa: E731
    system = [[word() for _ in range(n)] for n in (300, 270)]
    asked = [system[i % 2] + [word() for _ in range(3 + 11 * i)] for i in range(8)]
    return asked + [[word() for _ in range(40)]]


@pytest.mark.parametrize("name", tiny_models.CONFIGS)
def test_as_near_to_exact_as_vllm(name, model_folder):
    model = tiny_models.write(name, model_folder)
    with engines.engine(model, relay=False, dtype="float32") as llm:
        exact = engines.generate(llm, prompts(), TOKENS)
    with engines.engine(model, relay=False) as llm:
        own = engines.generate(llm, prompts(), TOKENS)
    with engines.engine(model, relay=True) as llm:
        relay = engines.generate(llm, prompts(), TOKENS)
        again = engines.generate(llm, prompts(), TOKENS)  # now out of the prefix cache
    yardstick = engines.compare(exact, own)
    for answers in (relay, again):
        agreement = engines.compare(exact, answers)
        print(f"{name} against f32: Relay {agreement}; vLLM {yardstick}")
        print(f"{name}: Relay against vLLM {engines.compare(own, answers)}")
        # The largest of some thousand differences: of two samples of one distribution, either may
        # be the larger by half.
        assert agreement.largest <= 1.5 * yardstick.largest


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_f32_gives_the_same_tokens(name, model_folder):
    """Without bf16 in the way there is no room for another token."""
    model = tiny_models.write(name, model_folder)
    answers = []
    for relay in (False, True):
        with engines.engine(model, relay=relay, dtype="float32") as llm:
            answers.append(engines.generate(llm, prompts(), TOKENS))
    agreement = engines.compare(*answers)
    print(f"{name} in f32: {agreement}")
    assert agreement.share == 1.0
    assert agreement.largest < 1e-3


def test_preemption_and_eviction_change_nothing(model_folder):
    """A cache of a few hundred tokens: requests are preempted and their prefixes evicted."""
    model = tiny_models.write("llama", model_folder)
    with engines.engine(model, relay=True) as llm:
        calm = engines.generate(llm, prompts(), TOKENS)
    small = dict(kv_cache_memory_bytes=3 << 20, max_model_len=512, max_num_batched_tokens=512)
    with engines.engine(model, relay=True, **small) as llm:
        pressed = engines.generate(llm, prompts() * 3, TOKENS)
    for i in range(3):
        agreement = engines.compare(calm, pressed[i * len(calm) : (i + 1) * len(calm)])
        print(f"under pressure: {agreement}")
        assert agreement.share >= 0.9
        assert agreement.largest <= 0.2


def test_several_answers_to_one_prompt(model_folder):
    model = tiny_models.write("llama", model_folder)
    with engines.engine(model, relay=True) as llm:
        one = engines.generate(llm, prompts()[:2], TOKENS)
        # Greedy sampling refuses n > 1: a temperature of next to nothing is the same.
        four = engines.generate(llm, prompts()[:2], TOKENS, n=4, temperature=1e-3, top_k=1)
    for i, answer in enumerate(one):
        agreement = engines.compare([answer] * 4, four[4 * i : 4 * i + 4])
        assert agreement.share >= 0.9
