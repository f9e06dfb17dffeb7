"""``text_encoder/`` -> our own GPT-OSS: MXFP4 experts as they are stored, or experts in a floating-point type.

On a CPU a tensor that is stored in the dtype it is wanted in stays where it is: its pages are the file's, read as they are
touched and dropped by the system, or by `Pages.drop`, without being written anywhere. The file must not be changed
while it is in use.

A small model may have layers of its own to write with, in ``reasoner/`` beside ``text_encoder/``: see `load_writer`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lens.formats.files import CheckpointError
from lens.formats.parts import Part
from lens.formats.safetensors import DTYPES, Pages, Stored, assign, check_entries, load_parameters, open_shards
from lens.formats.text_encoder import described
from lens.gpt_oss import GptOss, GptOssConfig, RopeScaling

_DEFAULT_THETA = 150000.0
_HEAD = "lm_head.weight"
REASONER = "reasoner"  # a checkpoint's folder


def gpt_oss_config(settings: Mapping[str, Any], where: str) -> GptOssConfig:
    """The configuration of checked settings. Errors: CheckpointError for what contradicts itself or is not supported."""

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{where}: not a configuration of GPT-OSS: {what}")

    values = {f.name: settings[f.name] for f in fields(GptOssConfig) if settings.get(f.name) is not None}
    values.pop("rope_scaling", None)
    depth = values.setdefault("num_hidden_layers", 36)  # transformers' defaults where they are not the released ones
    experts = values.setdefault("num_local_experts", 128)
    kinds = tuple(values.get("layer_types") or (("sliding_attention", "full_attention") * depth)[:depth])
    if len(kinds) != depth:
        raise refuse(f"layer_types names {len(kinds)} layers, num_hidden_layers is {depth}")
    values["layer_types"] = kinds
    rope = settings.get("rope_parameters") or settings.get("rope_scaling")
    values["rope_theta"], values["rope_scaling"] = _rope(rope, settings.get("rope_theta"), refuse)
    values["packed"] = settings.get("quantization_config") is not None
    if not isinstance(values.get("attention_bias", True), bool):
        raise refuse(f"attention_bias must be true or false, got {values['attention_bias']!r}")
    config = GptOssConfig(**values)
    if not 1 <= config.num_experts_per_tok <= experts:
        raise CheckpointError(
            f"{where}: num_experts_per_tok must be 1 to num_local_experts = {experts}, got {config.num_experts_per_tok}"
        )
    window = settings.get("sliding_window", config.sliding_window)
    if "sliding_attention" in kinds and (type(window) is not int or window < 1):
        raise CheckpointError(
            f"{where}: sliding_window must be a positive whole number, because layer_types has sliding_attention, got "
            f"{window!r}"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"{where}: num_key_value_heads must divide num_attention_heads = {config.num_attention_heads}, got "
            f"{config.num_key_value_heads}"
        )
    if config.head_dim % 2:
        raise refuse(f"head_dim must be even, got {config.head_dim}")
    if config.packed and (config.hidden_size % 32 or config.intermediate_size % 32):
        raise refuse(
            f"MXFP4 needs hidden_size and intermediate_size that are multiples of 32, got {config.hidden_size} and "
            f"{config.intermediate_size}"
        )
    if settings.get("hidden_act", "silu") != "silu":
        raise refuse(f"hidden_act must be silu, got {settings['hidden_act']!r}")
    return config


def _rope(rope: Any, theta: Any, refuse: Any) -> tuple[float, RopeScaling | None]:
    """rope_theta and the scaling of rope_parameters, also by their older names rope_scaling and, beside it, rope_theta."""
    if rope is None:
        return _number("rope_theta", theta, _DEFAULT_THETA, refuse), RopeScaling()
    if not isinstance(rope, dict):
        raise refuse(f"rope_parameters must be an object, got {str(rope)[:40]}")
    theta = _number("rope_theta", rope.get("rope_theta", theta), _DEFAULT_THETA, refuse)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise refuse(f"rope_type must be default or yarn, got {str(kind)[:40]!r}; transformers' encoder may know it")
    for key in ("mscale", "mscale_all_dim", "partial_rotary_factor"):
        if rope.get(key) not in (None, 1, 1.0):
            raise refuse(f"{key} of rope_parameters is not supported, got {str(rope[key])[:40]}")
    length = rope.get("original_max_position_embeddings", 4096)
    if type(length) is not int or length < 1:
        raise refuse(f"original_max_position_embeddings must be a positive whole number, got {str(length)[:40]}")
    factor = rope.get("attention_factor")
    return theta, RopeScaling(
        factor=_number("factor", rope.get("factor"), 32.0, refuse),
        original_length=length,
        beta_fast=_number("beta_fast", rope.get("beta_fast"), 32.0, refuse),
        beta_slow=_number("beta_slow", rope.get("beta_slow"), 1.0, refuse),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=None if factor is None else _number("attention_factor", factor, 1.0, refuse),
    )


def _number(name: str, value: Any, default: float, refuse: Any) -> float:
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise refuse(f"{name} must be a positive number, got {str(value)[:40]}")
    return float(value)


def load_gpt_oss(
    source: Path | Part, dtype: torch.dtype, device: torch.device | str, depth: int | None = None
) -> GptOss:
    """``text_encoder/``, or a file, -> GptOss, activations in ``dtype``. The embedding keeps the stored dtype.

    ``depth``: decoder layers to keep; those after them are checked, not read. Errors: CheckpointError.
    """
    part = Part.of(source)
    settings, tensors = described(part)
    config = gpt_oss_config(settings, str(part))
    layers = config.num_hidden_layers
    if depth is not None and depth > layers:
        raise CheckpointError(
            f"{part}: num_hidden_layers must be at least {depth}, because the transformer's selected_layer_index "
            f"names layer {depth - 1}, got {layers}"
        )
    with torch.device("meta"):
        model = GptOss(config)
    expected: dict[str, tuple[list[int], Iterable[str]]] = {
        name: (list(value.shape), DTYPES if value.is_floating_point() else ("U8",))
        for name, value in model.state_dict().items()
    }
    check_entries(part.weights, tensors, expected)
    if depth is not None:
        del model.layers[depth:]
    for name, value in model.state_dict(keep_vars=True).items():
        own = tensors[name]
        kind = dtype if value.is_floating_point() else torch.uint8
        if name == "embed_tokens.weight":
            kind = DTYPES[own.dtype]
        assign(model, name, _placed(own, kind, torch.device(device)), True)
    model.pages = Pages({own.shard for own in tensors.values()})
    for shard in {own.shard for own in tensors.values()}:
        shard.close()
    return model.eval()


def _placed(stored: Stored, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of a file: mapped, where it is wanted as it lies, else a copy."""
    if device.type == "cpu" and (mapped := stored.mapped(dtype)) is not None:
        return mapped
    value = torch.empty(stored.shape, dtype=dtype, device=device)

    def into(found: Tensor) -> None:
        value.copy_(found)

    stored.read(into)
    return value


def load_lm_head(source: Path | Part | None, model: GptOss, device: torch.device | str) -> Tensor:
    """The LM head [V, D] beside a loaded model, which drawing does without; on a CPU mapped, and read when it is first used.

    CheckpointError where the files have none, or ``model`` kept fewer layers than it has.
    """
    part = None if source is None else Part.of(source)
    place = "the text encoder" if part is None else str(part.weights)
    depth, config = len(model.layers), model.config
    if depth < config.num_hidden_layers:
        raise CheckpointError(f"{place}: {depth} of {config.num_hidden_layers} layers are loaded: it cannot write")
    shards = {} if part is None else open_shards(part.weights, part.variant)
    if _HEAD not in shards:
        raise CheckpointError(f"{place}: {_HEAD} is missing, without which the text encoder cannot write")
    dtype, shape = shards[_HEAD].entries[_HEAD][:2]
    expected = [config.vocab_size, config.hidden_size]
    if shape != expected or dtype not in DTYPES:
        raise CheckpointError(f"{place}: {_HEAD}: expected {expected}, got {shape} of {dtype}")
    return _placed(Stored(shards[_HEAD], _HEAD, shape), DTYPES[dtype], torch.device(device))


def load_writer(source: Path | Part | None, dtype: torch.dtype, device: torch.device | str) -> GptOss | None:
    """The text encoder with decoder layers and last norm of ``reasoner/``, where such a folder lies beside its own: another
    model than the one that gives features, by which it writes. None where there is no such folder.

    ``reasoner/model.safetensors`` has the text encoder's names, "layers.N..." and "norm.weight", all of them and no others:
    token embedding and LM head are the text encoder's. Errors: CheckpointError.
    """
    part = None if source is None else Part.of(source)
    folder = None if part is None or not part.weights.is_dir() else part.weights.parent / REASONER
    if part is None or folder is None or not folder.is_dir():
        return None
    writer = load_gpt_oss(part, dtype, device)
    learned = nn.ModuleDict({"layers": writer.layers, "norm": writer.norm})
    load_parameters(learned, folder, dtype=dtype, device=device)
    return writer
