"""Attention of the models that the operator is measured with."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    title: str
    heads: int
    kv_heads: int
    head_dim: int
    layers: int

    def kv_bytes_per_token(self, element_bytes: int = 2) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * element_bytes


SHAPES = {
    "llama-2-7b": Shape("Llama-2-7B", 32, 32, 128, 32),
    "llama-2-13b": Shape("Llama-2-13B", 40, 40, 128, 40),
    "mistral-7b": Shape("Mistral-7B", 32, 8, 128, 32),
    "phi-2": Shape("phi-2", 32, 32, 80, 32),
    "llama-3.2-1b": Shape("Llama-3.2-1B", 32, 8, 64, 16),
    "tiny": Shape("tiny", 4, 2, 32, 3),
}


def formula(batch: int, shared: int, own: int) -> float:
    """The paper's speed-up of attention: b (s + c) / (s + b c)."""
    return batch * (shared + own) / (shared + batch * own)
