"""The model that the benches of whole engines use: random weights in a 1B shape."""

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


def write_config(folder: Path, max_tokens: int) -> None:
    """A model folder for `load_format="dummy"`: vLLM makes the weights up."""
    config = dict(
        SHAPE,
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        bos_token_id=1,
        eos_token_id=2,
        max_position_embeddings=max_tokens,
    )
    (folder / "config.json").write_text(json.dumps(config))
