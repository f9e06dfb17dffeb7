"""Flow matching (arXiv 2605.21573, section 4): t = 0 clean, t = 1 noise, x_t = (1 - t) x0 + t eps, target v = eps - x0.

Training times are logit-normal, t = sigmoid(mu + z) with z ~ N(0, 1): the same distribution as shifting logit-normal(0, 1)
by the scheduler's exponential shift t' = e^mu / (e^mu + 1/t - 1). No weighting over t.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def shift(t: Tensor, mu: float) -> Tensor:
    """The scheduler's shift, logit t' = logit t + mu."""
    return math.exp(mu) / (math.exp(mu) + 1 / t - 1)


def sample_times(batch: int, mu: float, generator: torch.Generator, stratified: bool = True) -> Tensor:
    """float32 [batch] in (0, 1). Stratified: one draw per quantile of the batch, in random order."""
    u = torch.rand(batch, generator=generator, dtype=torch.float64)
    if stratified:
        u = (torch.randperm(batch, generator=generator) + u) / batch
    return torch.sigmoid(mu + torch.special.ndtri(u.clamp(1e-7, 1 - 1e-7))).float()


def noised(clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """clean, noise [B, I, C], t [B] -> (x_t, target velocity), both [B, I, C]."""
    time = t[:, None, None]
    return (1 - time) * clean + time * noise, noise - clean


def loss(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample, float32 [B] (over tokens and channels)."""
    return (velocity.float() - target.float()).pow(2).flatten(1).mean(1)
