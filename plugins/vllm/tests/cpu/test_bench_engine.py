"""The engine that benches of whole sets of requests drive, here on a CPU."""

import sys
from pathlib import Path

import pytest
import tiny_models

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

from cuda_engine import Engine  # noqa: E402

PROMPT = list(range(3, 3 + 300))
OWN = [[number] * 20 for number in range(10, 14)]


@pytest.fixture(scope="module")
def engine(model_folder):
    model = tiny_models.write("llama", model_folder)
    made = Engine(
        str(model),
        dict(
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=1024,
            max_num_seqs=8,
            block_size=32,
            kv_cache_memory_bytes=64 << 20,
        ),
    )
    yield made
    made.close()


@pytest.fixture
def prompts(engine):
    engine.forget()
    assert engine.answer([PROMPT], 1).cached == 0
    return [PROMPT + own for own in OWN]


def test_answers_everything(engine, prompts):
    found = engine.answer(prompts, [5, 6, 7, 8])
    assert (found.tokens, found.unfinished, len(found.first)) == (5 + 6 + 7 + 8, 0, 4)
    assert found.cached == 4 * 288, "whole blocks of the prompt are in the cache"


def test_each_request_computes_its_prompt_where_the_cache_is_not_read(engine, prompts):
    assert engine.answer(prompts, 2, 1, 60.0, False).cached == 0


def test_what_takes_too_long_is_stopped_and_counts_until_then(engine, prompts):
    found = engine.answer(prompts, [2, 600, 600, 600], 1, 0.3)
    assert found.unfinished == 3 and len(found.first) == 1
    assert 2 + 3 < found.tokens < 2 + 3 * 600
    engine.forget()  # nothing of it is left
    assert engine.answer(prompts, 2).tokens == 8


def test_samples_that_are_stopped_count_too(engine, prompts):
    found = engine.answer(prompts[:2], [2, 600], 3, 0.3)
    assert found.unfinished == 3
    assert 3 * 2 + 3 < found.tokens < 3 * 2 + 3 * 600
    assert engine.answer(prompts[:2], 4, 3).tokens == 2 * 3 * 4
