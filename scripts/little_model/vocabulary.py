"""The little model's tokenizer: a token for each word of the task, and bytes for any other text.

Written as byte-level BPE in the manner of Llama 3, which llama.cpp and Hugging Face's tokenizers
both know: a word that the vocabulary holds is one token whatever the merges say ("ignore merges").
"""

from __future__ import annotations

import re

import task

SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = [SYSTEM, USER, ASSISTANT, END]
# A message ends where the next one begins; only an answer needs an end of its own.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% if message.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# How Llama 3 cuts text into words; llama.cpp has it built in, under this name.
PRE_TOKENIZER = "llama-bpe"
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_letters() -> list[str]:
    """The visible character for each byte, as byte-level BPE has it since GPT-2."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    letters = {byte: chr(byte) for byte in visible}
    letters |= {byte: chr(256 + number) for number, byte in enumerate(hidden)}
    return [letters[byte] for byte in range(256)]


_BYTES = _byte_letters()
_SPACE = _BYTES[ord(" ")]
_NEWLINE = _BYTES[ord("\n")]
_WORDS = ["Notes", "What", "The", " does", " keep", " keeps", " the"]
_WORDS += [f" {word}" for word in task.NAMES + task.THINGS]

# llama.cpp refuses a vocabulary without merges. None is needed; this one makes the blank line.
MERGES = [(_NEWLINE, _NEWLINE)]
TOKENS = [*SPECIAL, *_BYTES, _NEWLINE * 2, *(word.replace(" ", _SPACE) for word in _WORDS)]
# Engines like round sizes.
TOKENS += [f"<|unused_{number}|>" for number in range(-len(TOKENS) % 64)]
UNUSED = [token for token in TOKENS if token.startswith("<|unused_")]
ID = {token: number for number, token in enumerate(TOKENS)}


def encode(text: str) -> list[int]:
    """The tokens of a text of the task; it need not know how to cut any other."""
    pieces = re.findall(r"<\|\w+\|>| ?[A-Za-z]+|[.:?]", text)
    if "".join(pieces) != text:
        raise ValueError(f"not a text of the task: {text!r}")
    return [ID[piece.replace(" ", _SPACE)] for piece in pieces]
