"""DiffusionNFT (arXiv 2509.16117) as pure functions: a policy learns from its own samples and their rewards, forward process alone.

With x0 drawn by the old policy, x_t = (1 - t) x0 + t eps, v = eps - x0, d = v_theta - v_old and r in [0, 1]:

    v+ = v_old + beta d      v- = v_old - beta d                       (the implicit positive and negative policies)
    loss = E[ r |v+ - v|^2 + (1 - r) |v- - v|^2 ]

Its pointwise optimum is d* = E[(2r - 1)(v - v_old) | x_t] / beta, which is (2 / beta) Cov(r, v | x_t) where v_old is exact for its own
samples; at d = 0 its gradient is 2 beta E[(2r - 1)(v_old - v)], so there beta is a mere scale. Rows are packed: samples of
several sizes back to back, `lengths` rows each. Differences are made in float32: a small d is below bfloat16's rounding of
v. `beta` mixes policies and is no weight of the KL term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EPSILON = 1e-4  # added to a standard deviation
LEAST = 1e-5  # of the mean |x0 error| that the adaptive loss divides by


def implicit(v_theta: Tensor, v_old: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(v+, v-) = v_old +- beta (v_theta - v_old), float32, shapes of the inputs; their mean is v_old."""
    old = v_old.float()
    change = beta * (v_theta.float() - old)
    return old + change, old - change


def _means(rows: Tensor, lengths: Sequence[int]) -> Tensor:
    """[R, C] -> the mean over each sample's rows and channels [B]; each by itself, so that neighbours change no bit."""
    return torch.stack([part.mean() for part in rows.split(list(lengths))])


def losses(
    v_theta: Tensor,
    v_old: Tensor,
    v: Tensor,
    r: Tensor,
    t: Tensor,
    lengths: Sequence[int],
    beta: float = 1.0,
    adaptive: bool = False,
) -> Tensor:
    """The loss of every sample, float32 [B]: a = r |v+ - v|^2 w+ + (1 - r) |v- - v|^2 w-, means over rows and channels.

    v_theta, v_old, v: [R, C] of any dtype; r, t: [B]; lengths: rows of each sample. Plain: w = 1. Adaptive: of each branch
    w = t^2 / max(t mean|v+- - v|, LEAST) without a gradient, which is |x0_hat - x0|^2 / mean|x0_hat - x0|, x0_hat = x_t - t v+-.
    Errors: ValueError where an r lies outside [0, 1] or lengths do not add up.
    """
    if sum(lengths) != len(v_theta) or len(lengths) != len(r):
        raise ValueError(
            f"nft.losses: {len(v_theta)} rows of {len(r)} samples, expected lengths {list(lengths)[:8]} to add up"
        )
    if not bool(((r >= 0) & (r <= 1)).all()):
        raise ValueError(f"nft.losses: r from {r.min().item()} to {r.max().item()}, expected [0, 1]")
    branches = []
    for branch in implicit(v_theta, v_old.detach(), beta):
        error = branch - v.float()
        value = _means(error.square(), lengths)
        if adaptive:
            size = (t * _means(error.detach().abs(), lengths)).clamp_min(LEAST)
            value = value * t.square() / size
        branches.append(value)
    return r * branches[0] + (1 - r) * branches[1]


def squared_distance(v_theta: Tensor, other: Tensor, lengths: Sequence[int]) -> Tensor:
    """mean |v_theta - other|^2 of every sample, float32 [B]: against v_ref the KL term, against v_old how far a step has gone."""
    return _means((v_theta.float() - other.detach().float()).square(), lengths)


@dataclass(frozen=True)
class Optimality:
    """r float32 [N] in [0, 1], 1/2 where nothing is known; valid bool [N], which samples teach; numbers for the log."""

    r: Tensor
    valid: Tensor
    numbers: dict[str, float]


def optimality(
    rewards: Tensor,
    groups: Tensor,
    valid: Tensor,
    z_scale: float = 5.0,
    recentre: bool = False,
    mask_degenerate: bool = False,
) -> Optimality:
    """r = 1/2 + 1/2 clip((R - mean of its group) / (z_scale (sd of all rewards + EPSILON)), -1, 1).

    rewards: [N]; groups: int64 [N], which prompt each belongs to; valid: bool [N], False for a failed judgement, which enters no
    mean. z_scale: 5 as in the official code, 1 as the paper's formula has it, which cuts a third of all samples. recentre:
    the c with mean over the group of clip(a - c, -1, 1) = 0 is taken off before the clip, so that what is cut does not bias
    the policy. mask_degenerate: groups whose rewards are all equal, whose r = 1/2 pulls theta towards old, teach nothing, unless all are.
    Statistics are float64. Errors: ValueError where nothing is valid or z_scale is not positive.
    """
    if z_scale <= 0:
        raise ValueError(f"nft.optimality: z_scale {z_scale}, expected a positive number")
    if not bool(valid.any()):
        raise ValueError(f"nft.optimality: none of {len(rewards)} rewards is valid")
    known = torch.where(valid, rewards.double(), 0.0)  # an invalid reward is NaN
    _, index = groups.unique(return_inverse=True)
    count = int(index.max()) + 1

    def group_sum(values: Tensor) -> Tensor:
        return torch.zeros(count, dtype=torch.float64).index_add_(0, index, values * valid)

    sizes = group_sum(torch.ones_like(known))
    means = group_sum(known) / sizes.clamp_min(1)
    centred = known - means[index]
    spread = (group_sum(centred.square()) / sizes.clamp_min(1)).sqrt()
    deviation = known[valid].std(correction=0)
    a = centred / (z_scale * (deviation + EPSILON))
    if recentre:  # bisection: the mean of the clipped falls with c
        low, high = torch.full((count,), float(a.min())), torch.full((count,), float(a.max()))
        low, high = low.double(), high.double()
        for _ in range(60):
            middle = (low + high) / 2
            above = group_sum((a - middle[index]).clamp(-1, 1)) > 0
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        a = a - ((low + high) / 2)[index]
    degenerate = (spread < 1e-9) & (sizes > 0)
    teaches = valid & ~degenerate[index] if mask_degenerate else valid
    teaches = teaches if bool(teaches.any()) else valid
    r = torch.where(valid, (1 + a.clamp(-1, 1)) / 2, 0.5)
    return Optimality(
        r.float(),
        teaches,
        {
            "reward": known[valid].mean().item(),
            "reward_sd": deviation.item(),
            "reward_sd_in_group": spread[sizes > 0].mean().item(),
            "advantage_bias": (2 * r[valid] - 1).mean().item(),
            "clipped_share": (a[valid].abs() >= 1).double().mean().item(),
            "zero_variance_groups": degenerate[sizes > 0].double().mean().item(),
            "invalid_share": 1 - valid.double().mean().item(),
        },
    )


def old_decay(rule: str | float, updates: int) -> float:
    """eta of old <- eta old + (1 - eta) theta after so many optimiser steps, this one counted: "nft" min(.001 i, .5), or a number."""
    return min(0.001 * updates, 0.5) if rule == "nft" else float(rule)
