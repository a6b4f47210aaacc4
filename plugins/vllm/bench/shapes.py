"""The models that the benches of whole engines use: random weights in the shapes of known ones."""

import json
from pathlib import Path

VOCABULARY = 32000
# The shape of the repository's other benches; Hugging Face's names.
SHAPE = dict(
    vocab_size=VOCABULARY,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
)


def _shape(hidden: int, feed_forward: int, layers: int, heads: int, kv_heads: int) -> dict:
    return dict(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
    )


SHAPES = {
    "llama-1b": SHAPE,
    "llama-2-7b": _shape(4096, 11008, 32, 32, 32),
    "llama-2-13b": _shape(5120, 13824, 40, 40, 40),
    "llama-3-8b": _shape(4096, 14336, 32, 32, 8),
    "mistral-7b": _shape(4096, 14336, 32, 32, 8),
}


def write_config(folder: Path, max_tokens: int, shape: dict = SHAPE) -> None:
    """A model folder for `load_format="dummy"`: vLLM makes the weights up."""
    config = dict(
        shape,
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=max_tokens,
    )
    (folder / "config.json").write_text(json.dumps(config))
