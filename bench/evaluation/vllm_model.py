"""A model for vLLM with random weights: its configuration, and a tokenizer with a word a token.

usage: python bench/evaluation/vllm_model.py FOLDER SHAPE LAYERS TOKENS          (by vLLM's Python)
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "plugins/vllm/bench"))

from shapes import SHAPES, write_config  # noqa: E402  vLLM's benches', not the evaluation's
from vllm_serve import write_tokenizer  # noqa: E402

if __name__ == "__main__":
    folder, shape, layers, tokens = Path(sys.argv[1]), *sys.argv[2:]
    write_config(folder, int(tokens), SHAPES[shape] | {"num_hidden_layers": int(layers)})
    write_tokenizer(folder)
