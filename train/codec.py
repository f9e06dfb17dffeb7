"""The latent space of Mini: an overlapped linear transform of pixels, whitened, and the statistics of its tokens.

z = (W * x + b - mean) / std at stride 8, learned in a minute together with its transposed inverse (stage "vae"); a token is
2x2 of these with channels in the order (c p1 p2), normalised by statistics measured once. See train/vae.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from lens.vae import patchify, unpatchify

from .checkpointing import load_state


def to_model(pixels: np.ndarray) -> torch.Tensor:
    """uint8 [n, H, W, 3] -> float32 [n, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def psnr(output: torch.Tensor, target: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], over all pixels together."""
    return -10 * math.log10(((output.clamp(-1, 1) - target) / 2).pow(2).mean().item())


class LinearCodec(nn.Module):
    """z = (W * x + b - mean) / std at stride 8 with overlapping windows; x' = transposed convolution of z."""

    def __init__(self, channels: int, encode_kernel: int, decode_kernel: int):
        super().__init__()
        self.encode_filter = nn.Conv2d(3, channels, encode_kernel, 8, (encode_kernel - 8) // 2)
        self.decode_filter = nn.ConvTranspose2d(channels, 3, decode_kernel, 8, (decode_kernel - 8) // 2)
        self.whiten = nn.BatchNorm2d(channels, affine=False, momentum=0.02)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """[n, 3, 8h, 8w] -> [n, channels, h, w]."""
        return self.whiten(self.encode_filter(x))

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return self.decode_filter(z)

    @torch.no_grad()
    def start_from_principal_components(self, x: torch.Tensor) -> None:
        """Centre both kernels on the leading components of 8x8 patches of x [n, 3, H, W]."""
        channels = self.encode_filter.out_channels
        patches = F.unfold(x, 8, stride=8).transpose(1, 2).reshape(-1, 192)
        mean = patches.mean(0)
        centred = (patches - mean).double()
        values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        basis, std = vectors[:, -channels:].float(), values[-channels:].sqrt().float()
        for filters, weight in ((self.encode_filter, basis / std), (self.decode_filter, basis * std)):
            margin = (filters.kernel_size[0] - 8) // 2
            filters.weight.mul_(0.02)
            filters.weight[:, :, margin : margin + 8, margin : margin + 8] = weight.T.view(channels, 3, 8, 8)
        self.encode_filter.bias.copy_(-(mean @ basis) / std)
        self.decode_filter.bias.copy_(mean.view(3, 64).mean(1))


class Latents:
    """The frozen latent space: pixels -> normalised tokens, as the released VAE's mode would give them."""

    EPS = 1e-4  # batch_norm_eps of the released layout

    def __init__(self, folder: Path):
        state = load_state(folder / "codec.pt", "vae codec")
        self.codec = LinearCodec(*state["shape"])
        self.codec.load_state_dict(state["model"])
        self.codec.eval().requires_grad_(False)
        self.mean, self.var = state["mean"], state["var"]

    @torch.no_grad()
    def encode(self, pixels: np.ndarray) -> torch.Tensor:
        """uint8 [n, H, W, 3] -> normalised tokens float32 [n, H/16 * W/16, 32]."""
        return (patchify(self.codec.encode(to_model(pixels))) - self.mean) / torch.sqrt(self.var + self.EPS)

    def denormalise(self, tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """Normalised tokens of a height x width token grid -> latents [n, 8, 2 height, 2 width] for the decoder."""
        return unpatchify(tokens * torch.sqrt(self.var + self.EPS) + self.mean, (height, width))
