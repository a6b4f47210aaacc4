"""The verify step of speculative decoding.

In a file that pytest runs last: once vLLM's n-gram proposer has been loaded, vLLM 0.32 cannot make
another engine in the same process (its kernel dispatcher trips over a module that numba brings)."""

import engines
import tiny_models
from test_models import answers


def test_same_tokens(model_folder):
    model = tiny_models.write("llama", model_folder)
    own = answers(model, relay=False, dtype="float32")
    speculation = dict(
        method="ngram", num_speculative_tokens=3, prompt_lookup_max=3, prompt_lookup_min=1
    )
    found = answers(model, relay=True, dtype="float32", speculative_config=speculation)
    assert engines.compare(own, found).share == 1.0
