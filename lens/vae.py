"""8. Latents <-> pixels: FLUX.2's autoencoder, its patchify and its BatchNorm around diffusers' AutoencoderKLFlux2;
on a CPU its decoder is our own (`engine/decode.py`).

A token's channels are (c p1 p2): 2x2 latent pixels of c channels; BatchNorm statistics act on the token's own channels.
Shapes: h x w grid in tokens, C = 4c channels of a token, pictures [H, W, 3] with H = 16 h.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .engine.decode import Decoder, why_unserved

if TYPE_CHECKING:
    from PIL.Image import Image


def unpatchify(rows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Token rows [B, h*w, C] -> latents [B, C/4, 2h, 2w]."""
    (h, w), b, c = grid, rows.shape[0], rows.shape[2] // 4
    return rows.view(b, h, w, c, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c, 2 * h, 2 * w)


def patchify(latents: Tensor) -> Tensor:
    """Latents [B, c, 2h, 2w] -> token rows [B, h*w, 4c], channels in the order (c p1 p2)."""
    b, c, height, width = latents.shape
    h, w = height // 2, width // 2
    return latents.view(b, c, h, 2, w, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w, 4 * c)


class PixelCodec:
    """Decode and encode one picture at a time, so that a picture's bits do not depend on its batch."""

    def __init__(self, vae: Any):
        self.vae = vae
        self.channels = 4 * int(vae.config.latent_channels)  # of a token
        self._mean = vae.bn.running_mean
        self._own = Decoder(vae)

    @property
    def _std(self) -> Tensor:  # made when needed: the statistics may have moved since
        return torch.sqrt(self.vae.bn.running_var + self.vae.config.batch_norm_eps)

    @torch.no_grad()
    def decode(self, rows: Tensor, grid: tuple[int, int]) -> Tensor:
        """Normalised token rows [h*w, C] -> picture [H, W, 3] in [-1, 1], float32."""
        rows = rows.to(self._mean.device, self._mean.dtype)
        latents = unpatchify((rows * self._std + self._mean)[None], grid)
        return self.decoded(latents)[0].float().clamp(-1, 1).permute(1, 2, 0)

    @torch.no_grad()
    def decoded(self, latents: Tensor) -> Tensor:
        """`vae.decode`: latents [1, c, 2h, 2w] -> pixels [1, 3, H, W], not clamped, in the weights' dtype."""
        return self.vae.decode(latents, return_dict=False)[0] if why_unserved(self.vae) else self._own(latents)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Picture [H, W, 3] in [-1, 1] -> token rows [h*w, C]: posterior mode, patchify, (z - mean) / std."""
        pixels = image.to(self._mean.device, self._mean.dtype).permute(2, 0, 1)[None]
        return (patchify(self.vae.encode(pixels).latent_dist.mode())[0] - self._mean) / self._std


def to_numpy(image: Tensor) -> np.ndarray:
    """[-1, 1] -> float32 [H, W, 3] in [0, 1]."""
    return ((image.cpu() + 1) / 2).numpy()


def to_uint8(image: Tensor) -> np.ndarray:
    """[-1, 1] -> uint8 [H, W, 3], truncated as the reference does, not rounded."""
    return ((image.cpu() + 1) * 127.5).to(torch.uint8).numpy()


def to_pil(image: Tensor) -> Image:
    """[-1, 1] -> an 8-bit RGB picture."""
    from PIL.Image import fromarray

    return fromarray(to_uint8(image))
