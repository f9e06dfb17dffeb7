"""Weights trained in one latent space, carried over to another.

A codec that is trained again spans nearly the same pictures in another basis. Where the old normalised tokens are close to
a linear map of the new ones, `z_old = z_new M`, a generator needs no new start: its input layer reads `M` first, its
output layer is followed by the inverse, and everything between keeps what it has learned. The noise is not quite white
in the old basis then, which the first few hundred steps of training put right.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from lens.vae import PixelCodec

from ..data.world import World
from .codec import Latents, to_model

SCENES = 1_024  # 16 tokens each: many more rows than the map has columns


def latent_map(old: Tensor, new: Tensor) -> tuple[Tensor, float]:
    """Tokens [n, C] of the same pictures in two spaces -> (M [C, C] with old ~ new M, share of old's energy explained).

    Errors: ValueError where the shapes differ.
    """
    if old.shape != new.shape:
        raise ValueError(f"latent_map: old tokens {tuple(old.shape)}, new {tuple(new.shape)}; expected equal shapes")
    solution = torch.linalg.lstsq(new.double(), old.double()).solution
    rest = (old.double() - new.double() @ solution).pow(2).sum() / old.double().pow(2).sum()
    return solution.float(), 1 - rest.item()


@torch.no_grad()
def rebase(transformer: nn.Module, m: Tensor) -> None:
    """Fold z_old = z_new M into the first and last layer: W_in <- W_in M^T; velocities <- velocities M^-1."""
    inverse = torch.linalg.inv(m.double())
    image, out = transformer.image_in, transformer.image_out
    image.weight.copy_(image.weight.double() @ m.double().T)
    out.weight.copy_(inverse.T @ out.weight.double())
    out.bias.copy_(out.bias.double() @ inverse)


@torch.no_grad()
def rebase_latents(transformer: nn.Module, source: Path, latents: Latents, world: World, side: int) -> float:
    """Carry a generator of the checkpoint folder `source` over to the space of `latents`; returns the share explained."""
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2.from_pretrained(source / "vae", torch_dtype=torch.float32).eval()
    codec = PixelCodec(vae)
    _, pixels = world.batch(list(range(SCENES)), side, side)
    old = torch.cat([codec.encode(picture) for picture in to_model(pixels).permute(0, 2, 3, 1)])
    m, share = latent_map(old, latents.encode(pixels).flatten(0, 1))
    rebase(transformer, m)
    return share
