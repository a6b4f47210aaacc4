"""Turns a prefix that PEFT has tuned into the file that `relay serve --kv-prefix` loads.

usage: python scripts/kv_prefix_from_peft.py <PEFT's folder> <output.gguf>

The folder holds adapter_config.json and adapter_model.safetensors of a PrefixTuningConfig. PEFT
saves the keys and values themselves, with a prefix_projection applied. They go into the file as
they are, in f32 and in Hugging Face's order of a head's elements; Relay puts them into the model's.
Needs gguf, numpy and safetensors, which .venv-jax has once scripts/little_model/make.sh has run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

ARCHITECTURE = "kvprefix"


class NotAPrefix(Exception):
    """What the user can act on."""


def read_peft(folder: Path) -> np.ndarray:
    """Keys and values: [layers, 2, positions, KV heads, head size]."""
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise NotAPrefix(f"{folder} cannot be read: {error}") from error
    if config.get("peft_type") != "PREFIX_TUNING":
        kind = config.get("peft_type")
        raise NotAPrefix(f"{folder} is an adapter of type {kind}; only PREFIX_TUNING has a prefix")
    if config.get("num_transformer_submodules") != 1:
        raise NotAPrefix(f"{folder} is of a model with an encoder; Relay serves decoders")
    if set(tensors) != {"prompt_embeddings"}:
        raise NotAPrefix(
            f"{folder} holds {', '.join(sorted(tensors))}, not prompt_embeddings alone"
        )
    names = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")
    sizes = [config.get(name) for name in names]
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        told = ", ".join(f"{name} {size}" for name, size in zip(names, sizes, strict=True))
        raise NotAPrefix(f"{folder}: adapter_config.json does not tell the prefix's sizes: {told}")
    positions, layers, heads, width = sizes
    saved = tensors["prompt_embeddings"].astype(np.float32)
    if saved.shape != (positions, 2 * layers * width) or width % heads != 0:
        raise NotAPrefix(
            f"{folder}: prompt_embeddings has the shape {saved.shape}, which is not that of "
            f"{positions} positions, {layers} layers and {heads} KV heads, together {width} wide"
        )
    if not np.isfinite(saved).all():
        raise NotAPrefix(f"{folder}: prompt_embeddings holds NaN or infinity")
    return saved.reshape(positions, layers, 2, heads, width // heads).transpose(1, 2, 0, 3, 4)


def write_kv_prefix(prefix: np.ndarray, path: Path) -> None:
    layers, _, positions, heads, head_size = prefix.shape
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    writer.add_uint32(f"{ARCHITECTURE}.positions", positions)
    writer.add_uint32(f"{ARCHITECTURE}.layer_count", layers)
    writer.add_uint32(f"{ARCHITECTURE}.head_count_kv", heads)
    writer.add_uint32(f"{ARCHITECTURE}.head_size", head_size)
    for number, (keys, values) in enumerate(prefix):
        for name, tensor in (("key", keys), ("value", values)):
            rows = np.ascontiguousarray(tensor.reshape(positions, heads * head_size))
            writer.add_tensor(f"layer.{number}.{name}", rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        prefix = read_peft(Path(sys.argv[1]))
    except NotAPrefix as error:
        print(f"kv_prefix_from_peft: {error}", file=sys.stderr)
        return 1
    try:
        write_kv_prefix(prefix, Path(sys.argv[2]))
    except OSError as error:
        print(f"kv_prefix_from_peft: cannot write {sys.argv[2]}: {error.strerror}", file=sys.stderr)
        return 1
    layers, _, positions, heads, head_size = prefix.shape
    print(f"{positions} positions, {layers} layers, {heads} KV heads of {head_size}: {sys.argv[2]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
