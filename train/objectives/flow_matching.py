"""Flow matching (arXiv 2605.21573, section 4): t = 0 clean, t = 1 noise, x_t = (1 - t) x0 + t eps, target v = eps - x0.

Training times are logit-normal, t = sigmoid(mu + z) with z ~ N(0, 1): the same distribution as shifting logit-normal(0, 1)
by the scheduler's exponential shift t' = e^mu / (e^mu + 1/t - 1). No weighting over t.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def shift(t: Tensor, mu: float) -> Tensor:
    """The scheduler's shift, logit t' = logit t + mu."""
    return math.exp(mu) / (math.exp(mu) + 1 / t - 1)


def mu_of(mu: float | Sequence[Sequence[float]], tokens: int) -> float:
    """The recipe's mu for pictures of that many tokens: a number, or two points (tokens, mu) of a line, which is extrapolated.

    The released line runs through (256, 1.0) and (4096, 1.3): 1.06 at 1024 tokens, 1.3106 at 4232.
    """
    if isinstance(mu, (int, float)):
        return float(mu)
    (n0, mu0), (n1, mu1) = mu
    return mu0 + (mu1 - mu0) * (tokens - n0) / (n1 - n0)


def sample_times(
    batch: int, mu: float, generator: torch.Generator, stratified: bool = True, sigma: float = 1.0
) -> Tensor:
    """sigmoid(mu + sigma z), float32 [batch] in (0, 1). Stratified: one draw per quantile of the batch, in random order."""
    u = torch.rand(batch, generator=generator, dtype=torch.float64)
    if stratified:
        u = (torch.randperm(batch, generator=generator) + u) / batch
    return logit_normal(u, mu, sigma)


def logit_normal(u: Tensor, mu: float, sigma: float = 1.0) -> Tensor:
    """sigmoid(mu + sigma z) at the quantiles u of z, float64 in [0, 1] -> float32 in (0, 1)."""
    # torch.rand may give 0, and the largest quantile may round to 1: |z| stays below 8.3, no other draw moves
    return torch.sigmoid(mu + sigma * torch.special.ndtri(u.clamp(2.0**-54, 1 - 2.0**-53))).float()


def noised(clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """clean, noise [B, I, C], t [B] -> (x_t, target velocity), both float32 [B, I, C] whatever the inputs' dtype."""
    clean, noise, time = clean.float(), noise.float(), t.float()[:, None, None]
    return (1 - time) * clean + time * noise, noise - clean


def loss(velocity: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample, float32 [B] (over tokens and channels)."""
    return (velocity.float() - target.float()).pow(2).flatten(1).mean(1)


REDUCTIONS = ("rank_mean", "sample_mean", "token_mean")


def micro_batch_weight(reduction: str, samples: int, tokens: int) -> int:
    """How much a micro-batch's mean over samples weighs in its optimiser step: 1, its samples, or its image tokens in all.

    The step's loss is sum_s w_s mean_i loss_si / sum_s w_s over its micro-batches s, whichever rank has them; `tokens` are
    those of one sample. rank_mean is what averaging gradients over ranks gives; with the paper's batches of 24, 10 and 6 it
    is token_mean within 6 %, and a picture of 4096 tokens then weighs four times one of 1024. Errors: ValueError.
    """
    weights = {"rank_mean": 1, "sample_mean": samples, "token_mean": samples * tokens}
    if reduction not in weights:
        raise ValueError(f"flow_matching: reduction {reduction!r}, expected one of {REDUCTIONS}")
    return weights[reduction]
