"""The little model: a Llama of two layers. Its shape, its first weights, and what it computes."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import vocabulary


@dataclass(frozen=True)
class Shape:
    vocabulary: int = len(vocabulary.TOKENS)
    layers: int = 2
    width: int = 128
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 64  # one that Relay's kernels serve
    ffn: int = 128
    rope_base: float = 100_000.0
    norm_epsilon: float = 1e-5
    context: int = 4096


SHAPE = Shape()


def first_weights(seed: int, shape: Shape = SHAPE) -> dict:
    """Random weights with a bent towards looking things up, which training then works out.

    From plain noise a model finds out how to recall only after thousands of steps. Here the heads
    of the first layer begin by looking one, two, three and four tokens back, which tells each token
    its neighbours ("smeared keys", Olsson et al. 2022); those of the second begin by looking at
    what is like the query and copying it. A few dozen steps are then enough.
    """
    rng = np.random.default_rng(seed)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return rng.normal(0, gain * rows**-0.5, (rows, columns))

    def for_each_head(blocks: list[np.ndarray], axis: int) -> np.ndarray:
        """The KV heads' blocks, repeated for the query heads that read them."""
        group = shape.heads // shape.kv_heads
        return np.concatenate([block for block in blocks for _ in range(group)], axis)

    q_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layers = [
        dict(
            q=matrix(shape.width, q_width),
            k=matrix(shape.width, kv_width),
            v=matrix(shape.width, kv_width),
            o=matrix(q_width, shape.width, 0.2),
            gate=matrix(shape.width, shape.ffn),
            up=matrix(shape.width, shape.ffn),
            down=matrix(shape.ffn, shape.width, 0.2),
            attention_norm=np.ones(shape.width),
            ffn_norm=np.ones(shape.width),
        )
        for _ in range(shape.layers)
    ]

    # All embeddings have one direction in common. It gives the first layer queries and keys that
    # are the same for all tokens, so that only the distance decides: the fastest rotations tell
    # neighbours apart.
    common = rng.normal(size=shape.width)
    common /= np.linalg.norm(common)
    fast = 8
    strength = 6.0
    angles = shape.rope_base ** (-np.arange(fast) / (shape.head_dim / 2))

    def turned(back: int) -> np.ndarray:
        vector = np.zeros(shape.head_dim)
        vector[:fast] = strength * np.cos(back * angles)
        vector[shape.head_dim // 2 :][:fast] = -strength * np.sin(back * angles)
        return vector

    keys = np.tile(turned(0), shape.kv_heads)
    queries = np.concatenate([turned(head + 1) for head in range(shape.heads)])
    size = (shape.width / 2) ** 0.5  # of the common part, once normalised
    layers[0]["k"] = 0.2 * layers[0]["k"] + np.outer(common, keys) / size
    layers[0]["q"] = 0.2 * layers[0]["q"] + np.outer(common, queries) / size
    for layer in layers[1:]:
        k_blocks = np.split(layer["k"], shape.kv_heads, 1)
        v_blocks = np.split(layer["v"].T, shape.kv_heads, 0)
        layer["q"] = 0.3 * layer["q"] + for_each_head(k_blocks, 1)
        layer["o"] = layer["o"] + 0.5 / shape.heads * for_each_head(v_blocks, 0)

    spread = 0.1
    embedding = rng.normal(0, spread, (shape.vocabulary, shape.width))
    embedding += spread * shape.width**0.5 * common  # as long as the rest
    weights = dict(embedding=embedding, layers=layers, norm=np.ones(shape.width))
    return jax.tree.map(lambda array: jnp.asarray(array, jnp.float32), weights)


def _norm(x, weight, shape: Shape):
    scale = jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + shape.norm_epsilon)
    return x * scale * weight


def _rotate(x, positions, shape: Shape):
    half = shape.head_dim // 2
    angles = positions[:, None, None] * shape.rope_base ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def hidden_states(weights: dict, tokens, shape: Shape = SHAPE):
    """What the output matrix (the embedding again) is applied to: [batch, tokens, width]."""
    batch, length = tokens.shape
    positions = jnp.arange(length)
    hidden = weights["embedding"][tokens]
    mask = positions[:, None] >= positions
    for layer in weights["layers"]:
        x = _norm(hidden, layer["attention_norm"], shape)
        kv = (batch, length, shape.kv_heads, shape.head_dim)
        q = _rotate((x @ layer["q"]).reshape(batch, length, -1, shape.head_dim), positions, shape)
        k = _rotate((x @ layer["k"]).reshape(kv), positions, shape)
        v = (x @ layer["v"]).reshape(kv)
        q = q.reshape(batch, length, shape.kv_heads, -1, shape.head_dim)
        scores = jnp.einsum("bqkgd,bskd->bkgqs", q, k) * shape.head_dim**-0.5
        shares = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1)
        mixed = jnp.einsum("bkgqs,bskd->bqkgd", shares, v).reshape(batch, length, -1)
        hidden = hidden + mixed @ layer["o"]
        x = _norm(hidden, layer["ffn_norm"], shape)
        hidden = hidden + (jax.nn.silu(x @ layer["gate"]) * (x @ layer["up"])) @ layer["down"]
    return _norm(hidden, weights["norm"], shape)
