"""Flow matching (arXiv 2605.21573, Method): the velocity of a straight path from data to noise.

    x_t = (1 - t) x0 + t eps,   v = dx_t/dt = eps - x0,   t in [0, 1], t = 0 clean, t = 1 noise
    L = mean |v_theta(x_t, t, c) - v|^2,   no weighting over t
    t = sigmoid(mu + z), z ~ N(0, 1)
"""

from __future__ import annotations

import torch
from torch import Tensor


def sample_times(count: int, mu: float, generator: torch.Generator, stratified: bool) -> Tensor:
    """float32 [count] logit-normal times. ``stratified``: one quantile of the law per sample, in random order."""
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    if stratified:
        u = (torch.randperm(count, generator=generator) + u) / count
    z = torch.special.ndtri(u.clamp(1e-9, 1 - 1e-9))
    return torch.sigmoid(mu + z).float()


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t of rows: x0 and noise [R, C] float32, t [R, 1]."""
    return torch.lerp(x0, noise, t)


def loss(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error against eps - x0 over all rows and channels, in float32."""
    return (velocity.float() - (noise - x0)).square().mean()
