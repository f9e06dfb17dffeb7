"""What an autoencoder is trained on: colour, edges at three scales, a posterior near the unit Gaussian, tokens that say what they show.

Pictures are [n, 3, H, W] in [-1, 1], latents [n, c, H/8, W/8], a token is 2x2 latent pixels (c p1 p2).
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = (1, 2, 4)


def edge_loss(error: Tensor) -> Tensor:
    """Mean over s in SCALES of mean |dx e_s| + mean |dy e_s|, e_s = s x s block means of the error [n, 3, H, W].

    Differences are linear, so those of the error are the differences between the two pictures' edges.
    """
    total = error.new_zeros(())
    for scale in SCALES:
        e = F.avg_pool2d(error, scale) if scale > 1 else error
        total = total + (e[..., 1:] - e[..., :-1]).abs().mean() + (e[..., 1:, :] - e[..., :-1, :]).abs().mean()
    return total / len(SCALES)


def reconstruction_loss(output: Tensor, target: Tensor, detail: float) -> Tensor:
    """4 MSE + 4 MSE of 8x8 means + detail (0.5 L1 + 0.5 edge_loss).

    Squares first (colour is learned fast), absolute differences later (edges): detail rises from 0 to 1.
    """
    error = output - target
    loss = 4 * error.pow(2).mean() + 4 * F.avg_pool2d(error, 8).pow(2).mean()
    if detail > 0:
        loss = loss + detail * (0.5 * error.abs().mean() + 0.5 * edge_loss(error))
    return loss


def detail_at(step: int, start: int, full: int) -> float:
    """Share of the absolute terms: 0 until `start`, 1 from `full` on, linear between."""
    return min(1.0, max(0.0, (step - start) / max(1, full - start)))


def moments_of(moments: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 2c, h, w] -> mean and log variance, the latter within [-30, 20] as the released layout clamps it."""
    mean, log_variance = moments.chunk(2, 1)
    return mean, log_variance.clamp(-30.0, 20.0)


def kl_loss(mean: Tensor, log_variance: Tensor, values: int) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) summed over latents, per picture and per one of its `values` (3 H W).

    Per pixel value, as the reconstruction terms are: so a weight of 1e-6 has its usual meaning.
    """
    kl = 0.5 * (mean.pow(2) + log_variance.exp() - 1 - log_variance)
    return kl.sum() / (len(mean) * values)


def regression_loss(moments: Tensor, target: Tensor, noise: float) -> Tensor:
    """An encoder onto given latents: squared error of the mean, 0.01 that of the log variance against log(noise^2)."""
    mean, log_variance = moments.chunk(2, 1)
    return (mean - target).pow(2).mean() + 0.01 * (log_variance - 2 * math.log(noise)).pow(2).mean()


def token_grid(latents: Tensor) -> Tensor:
    """[n, c, 2h, 2w] -> [n, 4c, h, w], channels in the order (c p1 p2)."""
    return F.pixel_unshuffle(latents, 2)


class TokenHead(nn.Module):
    """Latents -> class and colour of every token: normalise, 1x1, 3x3, 1x1. It is discarded after training."""

    WIDTH = 64

    def __init__(self, latent_channels: int, sizes: tuple[int, ...], generator: torch.Generator):
        super().__init__()
        self.sizes = sizes
        wide, width = 4 * latent_channels, self.WIDTH
        self.normalise = nn.BatchNorm2d(wide, affine=False)
        self.layers = nn.ModuleList(
            [nn.Conv2d(wide, width, 1), nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, sum(sizes), 1)]
        )
        with torch.no_grad():
            for layer in self.layers:
                assert isinstance(layer, nn.Conv2d)
                assert layer.bias is not None
                layer.weight.normal_(0, layer.weight[0].numel() ** -0.5, generator=generator)
                layer.bias.zero_()

    def forward(self, latents: Tensor) -> tuple[Tensor, ...]:
        """[n, c, 2h, 2w] -> per question logits [n, answers, h, w]."""
        x = self.normalise(token_grid(latents))
        for layer, _ in pairwise(self.layers):
            x = F.silu(layer(x))
        return self.layers[-1](x).split(self.sizes, 1)


def head_loss(logits: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Cross-entropy in nats, mean over tokens, summed over questions; labels int64 [n, h, w, questions]."""
    return torch.stack([F.cross_entropy(x, labels[..., i]) for i, x in enumerate(logits)]).sum()


@torch.no_grad()
def head_accuracy(logits: tuple[Tensor, ...], labels: Tensor) -> tuple[float, ...]:
    """Per question, the share of object tokens (class label above 0) answered rightly."""
    shown = labels[..., 0] > 0
    return tuple((x.argmax(1) == labels[..., i])[shown].float().mean().item() for i, x in enumerate(logits))
