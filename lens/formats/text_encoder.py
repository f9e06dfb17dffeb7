"""``text_encoder/`` <-> transformers' GPT-OSS model, with experts in bfloat16 or packed MXFP4."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lens.formats.contents import of_names
from lens.formats.files import CheckpointError, write_json
from lens.formats.mxfp4 import packed_modules, warn_expanded, why_expanded
from lens.formats.names import without_prefix
from lens.formats.parts import Part
from lens.formats.safetensors import DTYPES, Stored, check_entries, load_parameters, open_shards, save_tensors

_PREFIXES = ("model.", "text_encoder.", "text_encoder.model.", "module.", "module.model.")
TOKENIZER_KEY = "tokenizer_json"  # where ComfyUI keeps the tokenizer inside the text encoder's file
# What the features depend on. Whatever else a config.json says, `attn_implementation` or the labels of a classifier, is of
# no use here, and some of it would be obeyed: another attention, code from a hub, gigabytes of labels.
_SETTINGS = (
    "attention_bias", "attention_dropout", "experts_per_token", "head_dim", "hidden_act", "hidden_size",
    "initial_context_length", "initializer_range", "intermediate_size", "layer_types", "max_position_embeddings",
    "num_attention_heads", "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "num_local_experts",
    "pad_token_id", "bos_token_id", "eos_token_id", "quantization_config", "rms_norm_eps", "rope_parameters", "rope_scaling",
    "rope_theta", "sliding_window", "swiglu_alpha", "swiglu_limit", "tie_word_embeddings", "vocab_size",
)  # fmt: skip
_WHOLE = {
    "head_dim": 1 << 14, "hidden_size": 1 << 18, "intermediate_size": 1 << 20, "max_position_embeddings": 1 << 30,
    "num_attention_heads": 1 << 12, "num_hidden_layers": 1000, "num_key_value_heads": 1 << 12, "num_local_experts": 1 << 14,
    "num_experts_per_tok": 1 << 14, "vocab_size": 1 << 24,
}  # fmt: skip


def packed_experts(source: Path | Part) -> bool:
    """Whether a text encoder's experts are stored in MXFP4: on a GPU their kernels keep them where they were loaded, but
    where `mxfp4.why_expanded` has a reason."""
    settings = Part.of(source).settings() or {}
    return settings.get("quantization_config") is not None


def vocab_size(source: Path | Part) -> int | None:
    """Tokens that a text encoder has; None where its files do not tell."""
    tensors = text_encoder_tensors(source, 0)
    embedding = tensors.get("embed_tokens.weight")
    return embedding.shape[0] if embedding and embedding.shape else None


def text_encoder_tensors(source: Path | Part, depth: int | None = None) -> dict[str, Stored]:
    """The tensors of a GPT-OSS by transformers' name without "model.", also from ComfyUI's names; neither the LM head nor
    what comes after ``depth`` layers."""
    part = Part.of(source)
    found = without_prefix(open_shards(part.weights, part.variant), "embed_tokens.weight", _PREFIXES)
    tensors: dict[str, Stored] = {}
    for key, stored in found.items():
        if key.startswith("lm_head.") or key == TOKENIZER_KEY:
            continue
        if depth is not None and (match := re.match(r"layers\.(\d{1,6})\.", key)) and int(match[1]) >= depth:
            continue
        name, shape = key, stored.shape
        if match := re.fullmatch(r"(.+\.experts\.(?:gate_up|down)_proj)\.(weight|bias)", key):
            name = match[1] if match[2] == "weight" else f"{match[1]}_bias"
            if match[2] == "weight" and len(shape) == 3:  # ComfyUI's [experts, outputs, inputs]
                stored = replace(stored, shape=[shape[0], shape[2], shape[1]], transposed=True)
        if name in tensors:
            raise CheckpointError(f"{stored.shard.path}: both {key} and {tensors[name].key}, expected one of them")
        tensors[name] = stored
    return tensors


def described(part: Part) -> tuple[dict[str, Any], dict[str, Stored]]:
    """The settings of a text encoder, checked, or what its tensors tell where it has none; and its tensors by name.

    Errors: CheckpointError, also for more layers than keys, before so many are built.
    """
    settings = part.settings()
    if settings is not None:
        settings = checked_settings(settings, str(part))
    tensors = text_encoder_tensors(part)
    if settings is None:
        settings = config_of_tensors(tensors, part.weights)
    if settings.get("num_hidden_layers", 0) > max(100, len(tensors)):
        raise CheckpointError(
            f"{part}: num_hidden_layers is {settings['num_hidden_layers']}, more than the keys stored"
        )
    return settings, tensors


def load_text_encoder(
    source: Path | Part, dtype: torch.dtype, device: torch.device | str, depth: int | None = None
) -> nn.Module:
    """``text_encoder/``, or a file, -> transformers' GptOssModel (no LM head) in eval mode; MXFP4 experts through
    transformers.

    ``depth``: decoder layers to keep; what comes after the last selected one is never read.

    The released config names a class, LensGptOssEncoder, that no library has; model_type gpt_oss is what counts.
    """
    from transformers import GptOssConfig, GptOssModel

    part = Part.of(source)
    settings, tensors = described(part)
    try:
        parsed = GptOssConfig.from_dict(settings)
        with torch.device("meta"):
            model = GptOssModel(parsed)
    except Exception as error:  # whatever transformers trips over in a configuration
        raise CheckpointError(f"{part}: not a configuration of GPT-OSS: {error!r}") from error
    _check_routing(parsed, str(part))
    if depth is not None and depth > len(model.layers):
        raise CheckpointError(
            f"{part}: num_hidden_layers must be at least {depth}, because the transformer's selected_layer_index "
            f"names layer {depth - 1}, got {len(model.layers)}"
        )
    if settings.get("quantization_config") is not None:
        check_entries(part.weights, tensors, _mxfp4_entries(model))
        model = _load_mxfp4(part, parsed, dtype, device)
    else:
        unread = tuple(f"layers.{n}." for n in range(len(model.layers) if depth is None else depth, len(model.layers)))
        load_parameters(model, tensors, dtype=dtype, device=device, unread=unread)
        model.rotary_emb = type(model.rotary_emb)(parsed).to(device)  # its tables are computed, not stored
    if depth is not None:
        del model.layers[depth:]
    left = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    if left:
        raise CheckpointError(
            f"{part.weights}: {left[0]!r} is neither stored nor computed by this version of transformers"
        )
    return model.eval()


def checked_settings(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The settings that count, or CheckpointError: sizes that no model has are refused before they are built."""
    if config.get("model_type") != "gpt_oss":
        raise CheckpointError(f"{source}: model_type must be gpt_oss, got {config.get('model_type')!r}")
    quantization = config.get("quantization_config")
    if quantization is not None and (not isinstance(quantization, dict) or quantization.get("quant_method") != "mxfp4"):
        raise CheckpointError(
            f"{source}: quantization_config must be absent or of quant_method mxfp4, got {quantization!r}"
        )
    for key, most in _WHOLE.items():
        value = config.get(key)
        if key in config and (type(value) is not int or not 1 <= value <= most):
            raise CheckpointError(
                f"{source}: not a configuration of GPT-OSS: {key} must be a whole number from 1 to {most}, got {str(value)[:40]}"
            )
    for key in ("rms_norm_eps", "swiglu_alpha", "swiglu_limit"):
        value = config.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise CheckpointError(
                f"{source}: not a configuration of GPT-OSS: {key} must be a positive number, got {str(value)[:40]}"
            )
    kinds = config.get("layer_types")
    if kinds is not None and (
        not isinstance(kinds, list)
        or len(kinds) > _WHOLE["num_hidden_layers"]
        or not all(kind in ("sliding_attention", "full_attention") for kind in kinds)
    ):
        raise CheckpointError(
            f"{source}: not a configuration of GPT-OSS: layer_types must be a list of sliding_attention and "
            f"full_attention, got {str(kinds)[:40]}"
        )
    return {key: config[key] for key in _SETTINGS if key in config}


def _check_routing(config: Any, source: str) -> None:
    """What transformers takes without a look, and trips over when the first prompt is encoded."""
    if not 1 <= config.num_experts_per_tok <= config.num_local_experts:
        raise CheckpointError(
            f"{source}: num_experts_per_tok must be 1 to num_local_experts = {config.num_local_experts}, got "
            f"{config.num_experts_per_tok}"
        )
    window = config.sliding_window
    if "sliding_attention" in config.layer_types and (type(window) is not int or window < 1):
        raise CheckpointError(
            f"{source}: sliding_window must be a positive whole number, because layer_types has sliding_attention, got "
            f"{window!r}"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise CheckpointError(
            f"{source}: num_key_value_heads must divide num_attention_heads = {config.num_attention_heads}, got "
            f"{config.num_key_value_heads}"
        )


def config_of_tensors(tensors: Mapping[str, Stored], where: Path) -> dict[str, Any]:
    """The configuration of a GPT-OSS without config.json: sizes by the tensors, all else as released."""
    names = (
        "embed_tokens.weight",
        "layers.0.self_attn.sinks",
        "layers.0.self_attn.q_proj.bias",
        "layers.0.self_attn.k_proj.bias",
        "layers.0.mlp.router.bias",
    )
    expert = "layers.0.mlp.experts.down_proj"
    if missing := [name for name in (*names, expert) if name not in tensors or not tensors[name].shape]:
        found = of_names(stored.key for stored in tensors.values())
        raise CheckpointError(f"{where}: no GPT-OSS text encoder in bf16: {missing[0]} is missing; {found}")
    embedding, sinks, queries, keys, router = (tensors[name].shape for name in names)
    layers = 1 + max(int(match[1]) for key in tensors if (match := re.match(r"layers\.(\d{1,6})\.", key)))
    values = {
        "model_type": "gpt_oss",
        "vocab_size": embedding[0],
        "hidden_size": embedding[-1],
        "intermediate_size": tensors[expert].shape[-2],
        "num_hidden_layers": layers,
        "num_attention_heads": sinks[0],
        "head_dim": queries[0] // max(1, sinks[0]),
        "num_key_value_heads": keys[0] * sinks[0] // max(1, queries[0]),
        "num_local_experts": router[0],
    }
    return checked_settings(values, str(where))


def with_lm_head(model: Any, source: Path | Part | None) -> Any:
    """A loaded GptOssModel, its weights shared, with the LM head of ``source``, as transformers' causal LM.

    CheckpointError where the files have no head, or ``model`` kept fewer layers than it has.
    """
    from transformers import GptOssForCausalLM

    part = None if source is None else Part.of(source)
    place = "the text encoder" if part is None else str(part.weights)
    depth, config = len(model.layers), model.config
    if depth < config.num_hidden_layers:
        raise CheckpointError(f"{place}: {depth} of {config.num_hidden_layers} layers are loaded: it cannot write")
    with torch.device("meta"):
        causal = GptOssForCausalLM(config)
    like, key = next(model.parameters()), "lm_head.weight"
    head = torch.empty(config.vocab_size, config.hidden_size, dtype=model.dtype, device=like.device)
    shards = {} if part is None else open_shards(part.weights, part.variant)
    if key not in shards:
        raise CheckpointError(f"{place}: {key} is missing, without which the text encoder cannot write")

    def keep(stored: torch.Tensor) -> None:
        if stored.shape != head.shape:
            raise CheckpointError(f"{place}: {key}: expected {list(head.shape)}, got {list(stored.shape)}")
        head.copy_(stored)

    shards[key].read(key, keep)
    causal.model = model
    causal.lm_head.weight = nn.Parameter(head, requires_grad=False)
    return causal.eval()


def _mxfp4_entries(model: nn.Module) -> dict[str, tuple[list[int], Iterable[str]]]:
    """Stored keys of a GPT-OSS model whose experts are MXFP4: 32 inputs share a scale, a byte of a block holds two."""
    entries: dict[str, tuple[list[int], Iterable[str]]] = {}
    for name, value in model.state_dict().items():
        shape = list(value.shape)
        if ".experts." in name and not name.endswith("_bias"):
            experts, inputs, outputs = shape
            entries[f"{name}_blocks"] = [experts, outputs, inputs // 32, 16], ("U8",)
            entries[f"{name}_scales"] = [experts, outputs, inputs // 32], ("U8",)
        else:
            entries[name] = shape, DTYPES
    return entries


def _load_mxfp4(part: Part, config: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """GPT-OSS with MXFP4 experts (``*_blocks``, ``*_scales``), by transformers: dequantised on a CPU, and with a warning
    on a GPU where transformers cannot keep them packed."""
    from transformers import GptOssModel, Mxfp4Config

    folder = part.weights
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: MXFP4 experts are read from a folder in transformers' layout, got a file")
    why = "" if torch.device(device).type == "cpu" else why_expanded()
    expand = why or torch.device(device).type == "cpu"
    kwargs = {"quantization_config": Mxfp4Config(dequantize=True)} if expand else {"device_map": {"": str(device)}}
    try:
        with _quiet_transformers():  # it reports the LM head we leave out; keys and shapes are already checked
            model = GptOssModel.from_pretrained(folder, config=config, dtype=dtype, **kwargs)
    except Exception as error:
        raise CheckpointError(f"{folder}: transformers cannot load this GPT-OSS checkpoint: {error}") from error
    if torch.device(device).type != "cpu" and not packed_modules(model):  # whatever was foretold: its class decides
        warn_expanded(folder, why or "transformers does not say why")
        model = model.to(device)
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def save_text_encoder(model: nn.Module, folder: Path) -> None:
    """Write ``text_encoder/`` of a GPT-OSS model of transformers: configuration and bfloat16 weights."""
    tensors = {name: value.to("cpu", torch.bfloat16).contiguous() for name, value in model.state_dict().items()}
    save_tensors(folder, "model", tensors)
    config: Any = model.config
    values = json.loads(config.to_json_string(use_diff=False))
    values.update(architectures=["GptOssForCausalLM"], dtype="bfloat16", torch_dtype="bfloat16")
    for key in ("_name_or_path", "transformers_version"):
        values.pop(key, None)
    write_json(folder / "config.json", dict(sorted(values.items())))
