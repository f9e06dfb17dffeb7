"""Names of weights: our model's -> the released keys, and the released keys under the prefixes that files put before them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lens.formats.files import CheckpointError
from lens.formats.safetensors import Shard, Stored, stored_as

# What ComfyUI, diffusers, trainers and wrappers put before the names of a transformer.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "model.", "module.", "net.")


def without_prefix(shards: Mapping[str, Shard], known: str, prefixes: Sequence[str] = PREFIXES) -> dict[str, Stored]:
    """The tensors by released name: without the prefix under which ``known``, a name that every such file has, is found.

    Names without that prefix stay as they are, to be refused as unexpected. CheckpointError where two become one.
    """
    tensors = stored_as(shards)
    if known in tensors:
        return tensors
    prefix = next((p for p in prefixes if p + known in tensors), "")
    renamed = {key.removeprefix(prefix): stored for key, stored in tensors.items()}
    if len(renamed) < len(tensors):
        key = next(key for key in tensors if not key.startswith(prefix) and prefix + key in tensors)
        raise CheckpointError(f"{tensors[key].shard.path}: both {key} and {prefix}{key}, expected one of them")
    return renamed


# ------------------------------------------------------------------------------------------------ names

_TOP = {
    "image_in": "img_in",
    "text_in": "txt_in",
    "time_embedding": "time_text_embed.timestep_embedder",
    "final_modulation": "norm_out.linear",
    "image_out": "proj_out",
}
_STREAM = {
    "image": {
        "modulation": "img_mod.1", "norm1": "img_norm1.weight", "norm2": "img_norm2.weight", "qkv": "attn.img_qkv",
        "q_norm": "attn.norm_q.weight", "k_norm": "attn.norm_k.weight", "out": "attn.to_out.0", "mlp": "img_mlp",
    },
    "text": {
        "modulation": "txt_mod.1", "norm1": "txt_norm1.weight", "norm2": "txt_norm2.weight", "qkv": "attn.txt_qkv",
        "q_norm": "attn.norm_added_q.weight", "k_norm": "attn.norm_added_k.weight", "out": "attn.to_add_out",
        "mlp": "txt_mlp",
    },
}  # fmt: skip


def released_names(name: str) -> list[str]:
    """Our parameter name -> the released keys it is made of, stacked along the rows in this order."""
    if match := re.fullmatch(r"text_norms\.(\d+)", name):
        return [f"txt_norm.{match[1]}.weight"]
    if match := re.fullmatch(r"blocks\.(\d+)\.(image|text)\.(\w+)(\.weight|\.bias)?", name):
        index, stream, part, leaf = match[1], _STREAM[match[2]], match[3], match[4] or ""
        prefix = f"transformer_blocks.{index}."
        if part == "w13":
            return [f"{prefix}{stream['mlp']}.w1.weight", f"{prefix}{stream['mlp']}.w3.weight"]
        if part == "w2":
            return [f"{prefix}{stream['mlp']}.w2.weight"]
        return [f"{prefix}{stream[part]}{leaf}"]
    top, _, rest = name.partition(".")
    return [f"{_TOP[top]}.{rest}"]
