"""The adversarial part of few-step distillation: logits of heads on a frozen teacher's features, pure functions.

Sources: DMD2 (arXiv 2405.14867, section 4.3), SenseFlow (arXiv 2506.00523), approximate R1 of Seaweed-APT (arXiv 2501.08316,
section 3.4), put together as in arXiv 2605.21573. Real and drawn pictures are noised to the same time, x_t = (1 - t) x + t eps, and the
discriminator d looks at the teacher's inside there; one logit a head, all weighed alike, at all times alike:

    L_d = mean softplus(-d(real_t)) + mean softplus(d(drawn_t)) + gamma/2 mean |d(real_t) - d(real_t + alpha e)|^2
    L_g = mean softplus(-d(drawn_t))

The last term of L_d is gamma alpha^2 / 2 |grad d|^2 + O(alpha^4) in expectation over e ~ N(0, 1): R1 by differences, without a
second derivative. It is taken at the noised real picture. Logits are [B, H]; every result is float32 [B], a mean over heads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def discriminator_loss(real: Tensor, drawn: Tensor) -> Tensor:
    """softplus(-d(real)) + softplus(d(drawn)), [B]; 2 log 2 = 1.386 where the heads know nothing."""
    return (F.softplus(-real.float()) + F.softplus(drawn.float())).mean(1)


def generator_loss(drawn: Tensor) -> Tensor:
    """softplus(-d(drawn)), [B]: not saturating."""
    return F.softplus(-drawn.float()).mean(1)


def perturbed(noised: Tensor, noise: Tensor, alpha: float) -> Tensor:
    """x_t + alpha e, float32, e in `noise`."""
    return noised.float() + alpha * noise.float()


def approximate_r1(real: Tensor, beside: Tensor, gamma: float) -> Tensor:
    """gamma / 2 |d(x_t) - d(x_t + alpha e)|^2, [B]."""
    return 0.5 * gamma * (real.float() - beside.float()).pow(2).mean(1)


def accuracy(real: Tensor, drawn: Tensor) -> Tensor:
    """The share of logits on the right side of zero, a number; 1/2 where the heads know nothing."""
    return ((real > 0).float().mean() + (drawn < 0).float().mean()) / 2
