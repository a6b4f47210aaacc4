"""Trains the little model and writes it, as GGUF and as a Hugging Face folder: a few minutes.

usage: python train.py <folder>          (scripts/little_model/make.sh calls it)
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import export
import jax
import jax.numpy as jnp
import numpy as np
import task
from model import first_weights, hidden_states
from vocabulary import ASSISTANT, END, SYSTEM, USER, encode

SEED = 1
# The share of right answers about facts of the longest prompt, below which nothing is written.
TRUSTED = 0.99


@dataclass(frozen=True)
class Stage:
    steps: int
    batch: int
    facts: int
    questions: int


# Recall is found on short prompts, then stretched. The last ones name every person.
STAGES = [
    Stage(80, 32, 6, 6),
    Stage(40, 12, 32, 16),
    Stage(20, 4, 96, 32),
    Stage(30, 2, len(task.NAMES), 48),
]
MATRIX_RATE, VECTOR_RATE = 0.01, 0.003


class Chats:
    """Random facts, then questions about some of them, as the tokens of whole chats."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._names, self._things = (
            np.array([encode(f" {word}")[0] for word in words])
            for words in (task.NAMES, task.THINGS)
        )

    def _sentences(self, pattern: str, names, things) -> np.ndarray:
        """The pattern's tokens with NAME and THING filled in, for each pair: [..., tokens]."""
        example = task.NAMES[0], task.THINGS[0]
        tokens = np.array(encode(pattern.replace("NAME", example[0]).replace("THING", example[1])))
        filled = np.broadcast_to(tokens, (*names.shape, len(tokens)))
        filled = np.where(filled == self._names[0], names[..., None], filled)
        return np.where(tokens == self._things[0], things[..., None], filled)

    def draw(self, stage: Stage) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [batch, length], and the places of the things in the answers."""
        rng, rows = self._rng, stage.batch
        names = self._names[rng.random((rows, len(self._names))).argsort(1)[:, : stage.facts]]
        things = rng.choice(self._things, names.shape)
        asked = rng.random(names.shape).argsort(1)[:, : stage.questions]
        pattern = task.Fact("NAME", "THING")
        facts = self._sentences(pattern.sentence(), names, things).reshape(rows, -1)
        turn = f"{USER}{pattern.question()}{ASSISTANT}{pattern.answer()}{END}"
        turns = self._sentences(
            turn, np.take_along_axis(names, asked, 1), np.take_along_axis(things, asked, 1)
        )
        head = np.broadcast_to(encode(SYSTEM + task.HEADING), (rows, 3))
        tokens = np.concatenate([head, facts, turns.reshape(rows, -1)], 1)
        named = np.flatnonzero(np.isin(tokens[0], self._things))  # in each row at the same places
        return tokens, named[-stage.questions :]


def loss_and_right(weights: dict, tokens, places):
    """The loss over the words of the answers, and the share of right things."""
    # The words of an answer: The, the thing, the full stop, and its end.
    offsets, importance = jnp.array([-1, 0, 1, 2]), jnp.array([0.1, 1, 0.1, 0.1])
    targets = places[:, None] + offsets
    logits = hidden_states(weights, tokens[:, :-1])[:, targets - 1] @ weights["embedding"].T
    wanted = tokens[:, targets]
    likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), wanted[..., None], -1)[..., 0]
    right = jnp.mean(logits[:, :, 1].argmax(-1) == wanted[:, :, 1])
    return -jnp.mean(likelihood @ importance) / importance.sum(), right


def orthogonal(matrix):
    """The nearest matrix without preferred directions, roughly (Newton and Schulz, as in Muon)."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (jnp.linalg.norm(x) + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.T if tall else x


@jax.jit
def step(weights, moments, tokens, places, rate, number):
    """Muon for the matrices of the layers, Adam for the rest."""
    slopes_of = jax.value_and_grad(loss_and_right, has_aux=True)
    (loss, right), slopes = slopes_of(weights, tokens, places)

    def update(path, weight, slope, first, second):
        if weight.ndim == 2 and path[-1].key != "embedding":
            first = 0.95 * first + slope
            shape = max(1, weight.shape[1] / weight.shape[0]) ** 0.5
            move = shape * orthogonal(slope + 0.95 * first)
            return weight - rate * MATRIX_RATE * move, first, second
        first = 0.9 * first + 0.1 * slope
        second = 0.98 * second + 0.02 * slope**2
        spread = jnp.sqrt(second / (1 - 0.98**number)) + 1e-9
        return weight - rate * VECTOR_RATE * first / (1 - 0.9**number) / spread, first, second

    updated = jax.tree_util.tree_map_with_path(update, weights, slopes, *moments)
    weights, *moments = jax.tree.transpose(
        jax.tree.structure(weights), jax.tree.structure((0, 0, 0)), updated
    )
    return weights, tuple(moments), loss, right


def train() -> dict:
    began = time.monotonic()
    weights = first_weights(SEED)
    moments = (jax.tree.map(jnp.zeros_like, weights),) * 2
    chats = Chats(SEED)
    total = sum(stage.steps for stage in STAGES)
    number = 0
    for stage in STAGES:
        for _ in range(stage.steps):
            number += 1
            rate = min(1, number / 20, max(0.02, 2 * (1 - number / total)))
            tokens, places = chats.draw(stage)
            weights, moments, loss, right = step(weights, moments, tokens, places, rate, number)
            if number % 20 == 0:
                print(
                    f"step {number} of {total}: chats of {tokens.shape[1]} tokens, "
                    f"loss {loss:.3f}, {100 * right:.1f} % right, {time.monotonic() - began:.0f} s",
                    flush=True,
                )
    return weights


def main() -> None:
    folder = Path(sys.argv[1])
    weights = export.rounded(train())
    tokens, places = Chats(SEED + 1).draw(Stage(0, 8, len(task.NAMES), 48))
    right = float(loss_and_right(weights, tokens, places)[1])
    print(f"unseen facts, chats of {tokens.shape[1]} tokens: {100 * right:.1f} % right")
    if right < TRUSTED:
        sys.exit(f"train: less than {100 * TRUSTED:.0f} %: nothing was written")
    export.write_hugging_face(weights, folder / "hf")
    export.write_gguf(weights, folder / "little.gguf")


if __name__ == "__main__":
    main()
