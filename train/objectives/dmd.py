"""Distribution matching for a student of few steps, in the two halves of decoupled DMD: pure functions of tensors.

Sources: DMD2 (arXiv 2405.14867, sections 3 and 4), decoupled DMD (arXiv 2511.22677: CA and DM), SenseFlow (arXiv 2506.00523,
section 3: IDA), put together as in arXiv 2605.21573 (Lens-Turbo). Clock: t = 0 clean, t = 1 noise, x_t = (1 - t) x0 + t eps,
v = eps - x0, so x0 = x_t - t v. Decoupled DMD's own clock runs the other way: its tau > t is tau < t here.

The student's picture x = x_tk - t_k v_theta is noised anew, x_tau = (1 - tau) x + tau eps; teacher and fake score answer there:

    DM  g = (x0_fake - x0_c) / N           = tau (v_c - v_fake) / N               any tau: towards the teacher's distribution
    CA  g = -(w - 1) (x0_c - x0_u) / N     = (w - 1) tau (v_c - v_u) / N          tau < t_k: what guidance w would add
    N = max(mean |x - x0_c|, floor), per sample, at the tau of its own term

A gradient is subtracted from x through the proxy loss. With one tau, one noise and one N their sum is DMD2's gradient with a
guided teacher, (x0_fake - x0_w) / N, x0_w = x0_u + w (x0_c - x0_u). Everything is float32; v are [B, I, C], tau and t are [B].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .flow_matching import shift

LOW, HIGH = 0.02, 0.98  # of the times before the shift: at the ends a score says nothing, or everything is noise
CfgMode = Literal["plain", "token_norm"]


def clean(x: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """x0 = x_t - t v: [B, I, C] of x_t, v [B, I, C] and t [B]."""
    return x.float() - t.float()[:, None, None] * v.float()


def dm_times(u: Tensor, mu: float) -> Tensor:
    """tau of DM, float32 [B], of quantiles u in [0, 1): U(LOW, HIGH), shifted by the training's mu of the size."""
    return shift(LOW + u.float() * (HIGH - LOW), mu)


def ca_times(u: Tensor, mu: float, t: float) -> Tensor:
    """tau of CA, float32 [B], each below the student's time t: U(LOW, min(HIGH, unshift(t))), shifted by mu.

    What the student sees at t is settled already; CA may speak of what is not (decoupled DMD, section 4). Where t is so small
    that its quantile lies below 2 LOW, the lower end is half of it.
    """
    end = min(HIGH, float(shift(torch.tensor(float(t), dtype=torch.float64), -mu)))
    start = min(LOW, end / 2)
    tau = shift((start + u.double() * (end - start)), mu).float()
    return tau.clamp(max=float(torch.nextafter(torch.tensor(float(t)), torch.tensor(0.0))))


def normaliser(student: Tensor, teacher: Tensor, floor: float) -> Tensor:
    """N = max(mean |x - x0_c|, floor) of each sample, float32 [B, 1, 1] (DMD2, equation 8, by the unguided prediction).

    At small tau the teacher repeats what it was given: N goes to zero, and CA, whose difference does not, grows loud there.
    """
    return (student.float() - teacher.float()).abs().mean((1, 2), keepdim=True).clamp_min(floor)


def dm_gradient(conditional: Tensor, fake: Tensor, tau: Tensor, n: Tensor) -> Tensor:
    """tau (v_c - v_fake) / N, float32 [B, I, C]."""
    return tau.float()[:, None, None] * (conditional.float() - fake.float()) / n


def guided(conditional: Tensor, unconditional: Tensor, guidance: float, mode: CfgMode) -> Tensor:
    """v_w = v_u + w (v_c - v_u); "token_norm": each token's with the norm of v_c, as the released sampler draws.

    Errors: ValueError for another mode.
    """
    c, u = conditional.float(), unconditional.float()
    v = u + guidance * (c - u)
    if mode == "plain":
        return v
    if mode == "token_norm":
        return v * (c.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True).clamp_min(1e-12))
    raise ValueError(f"CFG_MODE: {mode!r}, expected 'plain' or 'token_norm'")


def ca_gradient(
    conditional: Tensor, unconditional: Tensor, tau: Tensor, n: Tensor, guidance: float, mode: CfgMode = "plain"
) -> Tensor:
    """tau (v_w - v_c) / N, float32 [B, I, C]: plain, it is (w - 1) tau (v_c - v_u) / N."""
    added = guided(conditional, unconditional, guidance, mode) - conditional.float()
    return tau.float()[:, None, None] * added / n


def proxy_loss(student: Tensor, gradient: Tensor) -> Tensor:
    """1/2 mean |x - sg(x - g)|^2 of each sample, [B]: the gradient of its mean over B with respect to x is g / numel."""
    x = student.float()
    return 0.5 * (x - (x - gradient).detach()).pow(2).mean((1, 2))


def fake_loss(velocity: Tensor, picture: Tensor, noise: Tensor) -> Tensor:
    """|v_fake(x_t, t) - (eps - x)|^2, mean of each sample, [B]: the fake score learns what the student draws, unguided."""
    target = noise.float() - picture.float()
    return (velocity.float() - target).pow(2).mean((1, 2))


@torch.no_grad()
def align_(fake: Sequence[Tensor], student: Sequence[Tensor], weight: float) -> None:
    """IDA: fake <- (1 - weight) fake + weight student, in place, after a student step; optimiser states stay."""
    torch._foreach_lerp_(list(fake), list(student), weight)
