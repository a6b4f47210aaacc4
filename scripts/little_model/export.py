"""Writes the little model as engines load it: as a GGUF file and as a Hugging Face folder.

Both hold the same bf16 weights.
"""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import vocabulary
from model import SHAPE, Shape
from safetensors.numpy import save_file

NAME = "little"
DESCRIPTION = "Made by Relay's scripts/little_model: answers questions about facts in its prompt."
# Hugging Face's names of a layer's weights, and GGUF's.
MATRICES = {
    "q": ("self_attn.q_proj", "attn_q"),
    "k": ("self_attn.k_proj", "attn_k"),
    "v": ("self_attn.v_proj", "attn_v"),
    "o": ("self_attn.o_proj", "attn_output"),
    "gate": ("mlp.gate_proj", "ffn_gate"),
    "up": ("mlp.up_proj", "ffn_up"),
    "down": ("mlp.down_proj", "ffn_down"),
}
NORMS = {
    "attention_norm": ("input_layernorm", "attn_norm"),
    "ffn_norm": ("post_attention_layernorm", "ffn_norm"),
}


def rounded(weights: dict) -> dict:
    return jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), weights)


def _stored(array) -> np.ndarray:
    """As files keep matrices: a row for each output."""
    array = np.asarray(array).astype(ml_dtypes.bfloat16)
    return np.ascontiguousarray(array.T if array.ndim == 2 else array)


def write_hugging_face(weights: dict, folder: Path, shape: Shape = SHAPE) -> None:
    tensors = {
        "model.embed_tokens.weight": _stored(weights["embedding"].T),
        "model.norm.weight": _stored(weights["norm"]),
    }
    for number, layer in enumerate(weights["layers"]):
        for ours, (theirs, _) in (MATRICES | NORMS).items():
            tensors[f"model.layers.{number}.{theirs}.weight"] = _stored(layer[ours])
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rope_base,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_base},
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": vocabulary.ID[vocabulary.END],
    }
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": vocabulary.ID[token], "content": token, "special": True, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
            for token in vocabulary.SPECIAL + vocabulary.UNUSED
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": vocabulary.WORD_PATTERN},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {
                    "type": "ByteLevel",
                    "add_prefix_space": False,
                    "trim_offsets": True,
                    "use_regex": False,
                },
            ],
        },
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": vocabulary.ID,
            "merges": [list(merge) for merge in vocabulary.MERGES],
        },
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": vocabulary.END,
        "chat_template": vocabulary.CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.context,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name, content in {
        "config.json": config,
        "generation_config.json": {"eos_token_id": vocabulary.ID[vocabulary.END]},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": tokenizer_config,
    }.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")


def _interleaved(stored: np.ndarray, heads: int) -> np.ndarray:
    """GGUF's Llama rotates neighbouring elements of a head, Hugging Face's its two halves."""
    rows, columns = stored.shape
    halves = stored.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows, columns)


def write_gguf(weights: dict, path: Path, shape: Shape = SHAPE) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name(NAME)
    writer.add_description(DESCRIPTION)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)

    kinds = dict.fromkeys(vocabulary.SPECIAL, gguf.TokenType.CONTROL)
    kinds |= dict.fromkeys(vocabulary.UNUSED, gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.PRE_TOKENIZER)
    writer.add_token_list(vocabulary.TOKENS)
    writer.add_token_types([kinds.get(t, gguf.TokenType.NORMAL) for t in vocabulary.TOKENS])
    writer.add_token_merges([" ".join(merge) for merge in vocabulary.MERGES])
    writer.add_eos_token_id(vocabulary.ID[vocabulary.END])
    writer.add_add_bos_token(False)
    writer.add_chat_template(vocabulary.CHAT_TEMPLATE)

    def add(name: str, array: np.ndarray) -> None:
        if array.ndim == 1:  # norms, which llama.cpp keeps in f32
            writer.add_tensor(name, array.astype(np.float32))
        else:
            raw = array.view(np.uint8)
            writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)

    add("token_embd.weight", _stored(weights["embedding"].T))
    add("output_norm.weight", _stored(weights["norm"]))
    for number, layer in enumerate(weights["layers"]):
        for ours, (_, theirs) in (MATRICES | NORMS).items():
            array = _stored(layer[ours])
            if ours in ("q", "k"):
                array = _interleaved(array, shape.heads if ours == "q" else shape.kv_heads)
            add(f"blk.{number}.{theirs}.weight", array)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
