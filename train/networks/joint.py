"""Encoder, decoder and token head as they are trained together (train/vae/joint.py), and the terms of their loss."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..loop.checkpoints import folder_tensors, load_state
from ..loop.keys import keyed
from ..objectives.autoencoding import head_loss, kl_loss, moments_of, reconstruction_loss
from .codec import autoencoder, head_of


class Joint(nn.Module):
    """The whole autoencoder and, where its weight is above 0, the token head."""

    def __init__(self, config: ModuleType, head: float):
        super().__init__()
        self.vae: Any = autoencoder(config.MODEL, config.SEED)
        self.head = head_of(config, "joint") if head > 0 else None

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[n, 3, H, W] -> float32 mean and log variance [n, c, H/8, W/8]."""
        return moments_of(self.vae.quant_conv(self.vae.encoder(x)).float())

    def pixels(self, z: Tensor) -> Tensor:
        return self.vae.decoder(self.vae.post_quant_conv(z)).float()


def objective(
    model: Joint,
    x: Tensor,
    labels: Tensor,
    noises: tuple[Tensor, Tensor, Tensor],
    detail: float,
    kl: float,
    head: float,
) -> dict[str, Tensor]:
    """Loss terms, unweighted, and their weighted sum "loss". x [n, 3, H, W]; noises: unit normal [n, c, h, w] of the
    posterior, of the added noise, and the latter's level [n, 1, 1, 1]."""
    mean, log_variance = model.moments(x)
    z = mean + (0.5 * log_variance).exp() * noises[0]
    rough = z + noises[2] * z.detach().std((0, 2, 3), keepdim=True) * noises[1]
    out = {
        "picture": reconstruction_loss(model.pixels(rough), x, detail),
        "kl": kl_loss(mean, log_variance, x[0].numel()),
    }
    out["loss"] = out["picture"] + kl * out["kl"]
    if model.head is not None:
        out["head"] = head_loss(model.head(rough), labels)
        out["loss"] = out["loss"] + head * out["head"]
    return out


def draw_noises(config: ModuleType, step: int, batch: int, level: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = keyed(config.SEED, "joint noise", step)
    shape = (batch, config.MODEL["latent_channels"], config.SIDE // 8, config.SIDE // 8)
    posterior, added = (torch.randn(shape, generator=generator) for _ in range(2))
    return posterior, added, level * torch.rand(batch, 1, 1, 1, generator=generator)


def start_joint(model: Joint, init: Path) -> None:
    """Autoencoder weights of a joint state file, of a stage folder with both halves, or of a checkpoint folder."""
    if init.is_file():
        average = load_state(init, "vae joint")["ema"]["average"]
        tensors = {k.removeprefix("vae."): v for k, v in average.items() if k.startswith("vae.")}
    elif (init / "decoder.pt").is_file():
        tensors, names = {}, {"decoder": "post_quant_conv", "encoder": "quant_conv"}
        for part, point in names.items():
            for name, value in load_state(init / f"{part}.pt", f"vae {part}")["ema"]["average"].items():
                which, rest = name.split(".", 1)
                tensors[f"{part if which == 'body' else point}.{rest}"] = value
    else:
        tensors = {k: v for k, v in folder_tensors(init / "vae").items() if not k.startswith("bn.")}
    missing, unexpected = model.vae.load_state_dict(tensors, strict=False)
    missing = [name for name in missing if not name.startswith("bn.")]  # statistics, measured at the end
    if missing or unexpected:
        raise ValueError(f"vae joint: --init {init} lacks {missing[:3]} and has unknown {unexpected[:3]}")
