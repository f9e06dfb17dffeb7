"""``vae/`` <-> diffusers' AutoencoderKLFlux2, in diffusers' names or those of FLUX.2's own files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lens.formats.contents import of_names
from lens.formats.files import CheckpointError, write_json
from lens.formats.names import without_prefix
from lens.formats.parts import Part
from lens.formats.safetensors import Stored, load_parameters, open_shards, save_tensors

_PREFIXES = ("first_stage_model.", "vae.", "model.", "module.")
_COUNTER = "bn.num_batches_tracked"  # counts training steps; no result reads it
# (whole numbers' range): sizes that could not be built, or only in hours, are refused before
_LIMITS = {
    "in_channels": (1, 1024), "out_channels": (1, 1024), "latent_channels": (1, 4096), "layers_per_block": (1, 64),
    "norm_num_groups": (1, 4096), "sample_size": (1, 1 << 20),
}  # fmt: skip
_LISTS = {
    "block_out_channels": (1, 1 << 16), "decoder_block_out_channels": (1, 1 << 16), "patch_size": (1, 64),
}  # fmt: skip


def vae_tensors(source: Path | Part) -> dict[str, Stored]:
    """The tensors of a VAE by diffusers' name, without the counter that no result reads."""
    part = Part.of(source)
    tensors = without_prefix(open_shards(part.weights, part.variant), "decoder.conv_in.weight", _PREFIXES)
    if any(key.startswith(("encoder.down.", "decoder.up.")) for key in tensors):
        tensors = _diffusers_names(tensors)
    tensors.pop(_COUNTER, None)
    return tensors


def _diffusers_names(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """FLUX.2's own names, which ComfyUI's file has, -> diffusers'; 1x1 convolutions of the attention become matrices."""
    stages = 1 + max((int(m[1]) for key in tensors if (m := re.match(r"decoder\.up\.(\d+)\.", key))), default=0)
    renamed: dict[str, Stored] = {}
    for key, stored in tensors.items():
        side, _, rest = key.partition(".")
        if side not in ("encoder", "decoder"):
            renamed[key] = stored
            continue
        if rest.startswith(("quant_conv.", "post_quant_conv.")):
            renamed[rest] = stored
            continue
        if match := re.fullmatch(r"(down|up)\.(\d+)\.(.+)", rest):
            way, stage, inner = match[1], int(match[2]), match[3]
            inner = re.sub(r"^block\.", "resnets.", inner).replace(".nin_shortcut.", ".conv_shortcut.")
            inner = re.sub(r"^(down|up)sample\.", rf"{way}samplers.0.", inner)
            rest = f"{way}_blocks.{stages - 1 - stage if way == 'up' else stage}.{inner}"
        elif match := re.fullmatch(r"mid\.block_(\d)\.(.+)", rest):
            rest = f"mid_block.resnets.{int(match[1]) - 1}.{match[2]}"
        elif match := re.fullmatch(r"mid\.attn_1\.(\w+)\.(\w+)", rest):
            layers = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
            rest = f"mid_block.attentions.0.{layers.get(match[1], match[1])}.{match[2]}"
            if stored.shape[2:] == [1, 1]:
                stored = replace(stored, shape=stored.shape[:2])
        elif rest.startswith("norm_out."):
            rest = f"conv_{rest}"
        renamed[f"{side}.{rest}"] = stored
    return renamed


def vae_channels(source: Path | Part) -> tuple[int, ...]:
    """Channels of its levels, by the tensors."""
    tensors = vae_tensors(source)
    keys = (f"encoder.down_blocks.{k}.resnets.0.conv1.weight" for k in range(16))
    return tuple(tensors[key].shape[0] for key in keys if key in tensors and tensors[key].shape)


def load_vae(source: Path | Part, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """``vae/``, or a file, -> diffusers' AutoencoderKLFlux2 in eval mode."""
    from diffusers import AutoencoderKLFlux2

    part = Part.of(source)
    config = part.settings()
    if config is not None:
        _check_settings(config, str(part))
    tensors = vae_tensors(part)
    if config is None:
        config = _config_of_tensors(tensors, part.weights)
    try:
        with torch.device("meta"):
            vae = AutoencoderKLFlux2.from_config(config)
    except Exception as error:  # whatever diffusers trips over in a configuration
        raise CheckpointError(f"{part}: not a configuration of AutoencoderKLFlux2: {error}") from error
    load_parameters(vae, tensors, dtype=dtype, device=device, unused=(_COUNTER,))
    return vae.eval()


def _check_settings(config: Mapping[str, Any], source: str) -> None:
    """What diffusers takes without a look, and trips over when the first picture is decoded or never."""
    if config.get("_class_name") != "AutoencoderKLFlux2":
        raise CheckpointError(f"{source}: _class_name must be AutoencoderKLFlux2, got {config.get('_class_name')!r}")

    def check(key: str, value: Any, low: int, high: int) -> None:
        if type(value) is not int or not low <= value <= high:
            raise CheckpointError(
                f"{source}: {key}: not a configuration of AutoencoderKLFlux2: expected {low} to {high}, got {str(value)[:40]}"
            )

    for key in _LIMITS.keys() & config.keys():
        check(key, config[key], *_LIMITS[key])
    for key in _LISTS.keys() & config.keys():
        values = config[key]
        if values is None and key == "decoder_block_out_channels":
            continue
        if not isinstance(values, list) or not 1 <= len(values) <= 16:
            raise CheckpointError(
                f"{source}: {key}: not a configuration of AutoencoderKLFlux2: expected a list of 1 to 16 numbers, got "
                f"{str(values)[:40]}"
            )
        for value in values:
            check(key, value, *_LISTS[key])
    for key in {"batch_norm_eps", "batch_norm_momentum"} & config.keys():
        value = config[key]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise CheckpointError(f"{source}: {key} must be a number from 0 to 1, got {value!r}")


def _config_of_tensors(tensors: Mapping[str, Stored], where: Path) -> dict[str, Any]:
    """The configuration of a VAE without config.json: channels and depth by the tensors, all else as released."""
    stages = [key for k in range(16) if (key := f"encoder.down_blocks.{k}.resnets.0.conv1.weight") in tensors]
    last = "post_quant_conv.weight"
    if not stages or last not in tensors or not tensors[last].shape:
        found = of_names(stored.key for stored in tensors.values())
        raise CheckpointError(f"{where}: no VAE of FLUX.2: {last} or the encoder is missing; {found}")
    layers = sum(1 for k in range(64) if f"encoder.down_blocks.0.resnets.{k}.conv1.weight" in tensors)
    return {
        "_class_name": "AutoencoderKLFlux2",
        "block_out_channels": [tensors[key].shape[0] for key in stages],
        "down_block_types": ["DownEncoderBlock2D"] * len(stages),
        "up_block_types": ["UpDecoderBlock2D"] * len(stages),
        "layers_per_block": layers,
        "latent_channels": tensors[last].shape[0],
    }


def save_vae(vae: nn.Module, folder: Path) -> None:
    """Write ``vae/`` of a diffusers AutoencoderKLFlux2: bfloat16 weights, statistics float32 for they scale all latents."""
    tensors = {
        name: value.cpu().contiguous() if name.startswith("bn.") else value.to("cpu", torch.bfloat16).contiguous()
        for name, value in vae.state_dict().items()
    }
    save_tensors(folder, "diffusion_pytorch_model", tensors)
    config: Any = vae.config
    values = {k: v for k, v in dict(config).items() if k not in ("_name_or_path", "_use_default_values")}
    write_json(folder / "config.json", dict(sorted({"_class_name": "AutoencoderKLFlux2", **values}.items())))
