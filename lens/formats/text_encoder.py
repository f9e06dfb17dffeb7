"""``text_encoder/`` <-> transformers' GPT-OSS model, with experts in bfloat16 or packed MXFP4."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lens.formats.files import CheckpointError, read_json, write_json
from lens.formats.safetensors import DTYPES, check_entries, load_parameters, open_shards, save_tensors


def packed_experts(folder: Path) -> bool:
    """Whether a text encoder's experts are stored in MXFP4: on a GPU their kernels keep them where they were loaded."""
    return read_json(folder / "config.json").get("quantization_config") is not None


def load_text_encoder(
    folder: Path, dtype: torch.dtype, device: torch.device | str, depth: int | None = None
) -> nn.Module:
    """``text_encoder/`` -> transformers' GptOssModel (no LM head) in eval mode; MXFP4 experts through transformers.

    ``depth``: decoder layers to keep; what comes after the last selected one is never read.

    The released config names a class, LensGptOssEncoder, that no library has; model_type gpt_oss is what counts.
    """
    from transformers import GptOssConfig, GptOssModel

    path = folder / "config.json"
    config = read_json(path)
    if config.get("model_type") != "gpt_oss":
        raise CheckpointError(f"{path}: model_type must be gpt_oss, got {config.get('model_type')!r}")
    quantization = config.get("quantization_config")
    if quantization is not None and (not isinstance(quantization, dict) or quantization.get("quant_method") != "mxfp4"):
        raise CheckpointError(
            f"{path}: quantization_config must be absent or of quant_method mxfp4, got {quantization!r}"
        )
    shards = open_shards(folder)
    try:
        parsed = GptOssConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = GptOssModel(parsed)
    except Exception as error:  # whatever transformers trips over in a configuration
        raise CheckpointError(f"{path}: not a configuration of GPT-OSS: {error!r}") from error
    if depth is not None and depth > len(model.layers):
        raise CheckpointError(
            f"{path}: num_hidden_layers must be at least {depth}, because the transformer's selected_layer_index "
            f"names layer {depth - 1}, got {len(model.layers)}"
        )
    prefix = "model." if any(key.startswith("model.") for key in shards) else ""
    if quantization is not None:
        check_entries(folder, shards, _mxfp4_entries(model, prefix), ("lm_head.",))
        model = _load_mxfp4(folder, parsed, dtype, device)
    else:
        unread = tuple(f"layers.{n}." for n in range(len(model.layers) if depth is None else depth, len(model.layers)))
        load_parameters(model, folder, lambda name: [prefix + name], dtype, device, ("lm_head.",), unread)
        model.rotary_emb = type(model.rotary_emb)(parsed).to(device)  # its tables are computed, not stored
    if depth is not None:
        del model.layers[depth:]
    left = [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]
    if left:
        raise CheckpointError(f"{folder}: {left[0]!r} is neither stored nor computed by this version of transformers")
    return model.eval()


def with_lm_head(model: Any, folder: Path | None) -> Any:
    """A loaded GptOssModel, its weights shared, with the LM head of ``folder``/text_encoder, as transformers' causal LM.

    CheckpointError where the folder has no head, or ``model`` kept fewer layers than it has.
    """
    from transformers import GptOssForCausalLM

    place = Path() if folder is None else folder / "text_encoder"
    depth, config = len(model.layers), model.config
    if depth < config.num_hidden_layers:
        raise CheckpointError(f"{place}: {depth} of {config.num_hidden_layers} layers are loaded: it cannot write")
    with torch.device("meta"):
        causal = GptOssForCausalLM(config)
    like, key = next(model.parameters()), "lm_head.weight"
    head = torch.empty(config.vocab_size, config.hidden_size, dtype=model.dtype, device=like.device)
    shards = {} if folder is None else open_shards(place)
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


def _mxfp4_entries(model: nn.Module, prefix: str) -> dict[str, tuple[list[int], Iterable[str]]]:
    """Stored keys of a GPT-OSS model whose experts are MXFP4: 32 inputs share a scale, a byte of a block holds two."""
    entries: dict[str, tuple[list[int], Iterable[str]]] = {}
    for name, value in model.state_dict().items():
        shape = list(value.shape)
        if ".experts." in name and not name.endswith("_bias"):
            experts, inputs, outputs = shape
            entries[f"{prefix}{name}_blocks"] = [experts, outputs, inputs // 32, 16], ("U8",)
            entries[f"{prefix}{name}_scales"] = [experts, outputs, inputs // 32], ("U8",)
        else:
            entries[prefix + name] = shape, DTYPES
    return entries


def _load_mxfp4(folder: Path, config: Any, dtype: torch.dtype, device: torch.device | str) -> Any:
    """GPT-OSS with MXFP4 experts (``*_blocks``, ``*_scales``), by transformers: dequantised on a CPU."""
    from transformers import GptOssModel, Mxfp4Config

    on_cpu = torch.device(device).type == "cpu"
    kwargs = {"quantization_config": Mxfp4Config(dequantize=True)} if on_cpu else {"device_map": {"": str(device)}}
    try:
        with _quiet_transformers():  # it reports the LM head we leave out; keys and shapes are already checked
            return GptOssModel.from_pretrained(folder, config=config, dtype=dtype, **kwargs)
    except Exception as error:
        raise CheckpointError(f"{folder}: transformers cannot load this GPT-OSS checkpoint: {error}") from error


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
