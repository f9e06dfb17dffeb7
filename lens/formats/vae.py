"""``vae/`` <-> diffusers' AutoencoderKLFlux2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from lens.formats.files import CheckpointError, read_json, write_json
from lens.formats.safetensors import load_parameters, save_tensors


def load_vae(folder: Path, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """``vae/`` -> diffusers' AutoencoderKLFlux2 in eval mode."""
    from diffusers import AutoencoderKLFlux2

    path = folder / "config.json"
    config = read_json(path)
    if config.get("_class_name") != "AutoencoderKLFlux2":
        raise CheckpointError(f"{path}: _class_name must be AutoencoderKLFlux2, got {config.get('_class_name')!r}")
    try:
        with torch.device("meta"):
            vae = AutoencoderKLFlux2.from_config(config)
    except Exception as error:  # whatever diffusers trips over in a configuration
        raise CheckpointError(f"{path}: not a configuration of AutoencoderKLFlux2: {error}") from error
    load_parameters(vae, folder, dtype=dtype, device=device)
    return vae.eval()


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
