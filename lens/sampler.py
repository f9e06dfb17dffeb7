"""7. Sigmas, guidance, solvers: the schedule a picture walks from noise (sigma 1) to latents (sigma 0).

The velocity is d x / d sigma, so an Euler step is x += (sigma_next - sigma) * v. Latents stay float32 between steps. These
formulas stand only here: the pipeline, training's sample sheets and rollouts call them.
"""

from __future__ import annotations

import hashlib
import math
import operator
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import ops
from .arguments import count, shortened
from .packing import expect_tensors

# Empirical fit of the released scheduler: mu is linear in the tokens at 10 and at 200 steps, interpolated in between.
_SLOPE_10, _OFFSET_10 = 8.73809524e-5, 1.89833333
_SLOPE_200, _OFFSET_200 = 1.6927e-4, 0.45666666
_LARGE = 4300  # tokens above which only the 200-step line holds

MIN_SEED, MAX_SEED = -(2**63), 2**64 - 1  # as torch.manual_seed takes them; -1 is 2^64 - 1
SOLVERS = ("euler", "dpm2m")  # first order, and second order for as many velocities


def mu(image_tokens: int, steps: int) -> float:
    """Shift of the time axis for a picture of ``image_tokens`` drawn in ``steps`` (2.198 at 4096 tokens, 20 steps)."""
    m200 = _SLOPE_200 * image_tokens + _OFFSET_200
    if image_tokens > _LARGE:
        return m200
    m10 = _SLOPE_10 * image_tokens + _OFFSET_10
    slope = (m200 - m10) / 190.0
    return slope * steps + (m200 - 200.0 * slope)


@dataclass(frozen=True)
class Scheduler:
    """How the sigmas of a call are spaced, and whether a step adds noise."""

    use_dynamic_shifting: bool = True  # shift by mu of the picture's size, else by ``shift``
    shift: float = 3.0
    stochastic_sampling: bool = False

    def sigmas(self, image_tokens: int, steps: int) -> Tensor:
        """float32 [steps + 1], from 1 down to the terminal 0.

        s = linspace(1, 1/n, n); dynamic: s' = e^mu / (e^mu + 1/s - 1); static: s' = shift s / (1 + (shift - 1) s).
        """
        steps = count("num_inference_steps", steps)
        s: Any = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
        if self.use_dynamic_shifting:
            e = math.exp(mu(image_tokens, steps))
            s = e / (e + (1 / s - 1))
        else:
            s = self.shift * s / (1 + (self.shift - 1) * s)
        return torch.from_numpy(np.append(s, 0.0).astype(np.float32))


def sigmas(image_tokens: int, steps: int) -> Tensor:
    """The released schedule (dynamic shifting): float32 [steps + 1]."""
    return Scheduler().sigmas(image_tokens, steps)


def conditioning_time(sigma: Tensor, dtype: torch.dtype, time_dtype: str = "reference") -> Tensor:
    """sigma (float32) -> the network's timestep input, float32 in [0, 1].

    "reference" rounds twice in the model's dtype, round(round(1000 sigma) / 1000), as the released code does; "float32"
    keeps the exact sigma.
    """
    if time_dtype == "float32":
        return sigma.float()
    if time_dtype != "reference":
        raise ValueError(f"time_dtype must be 'reference' or 'float32', got {shortened(time_dtype)}")
    return ((1000.0 * sigma.float()).to(dtype) / 1000).float()


def guided(c: Tensor, u: Tensor | None, guidance: float, offsets: Tensor) -> Tensor:
    """The guided velocity float32 [R, C] of packed rows by itself: one Euler step of length 1 from zero."""
    one = torch.ones(len(offsets) - 1, device=c.device)
    return ops.guidance_step(torch.zeros_like(c, dtype=torch.float32), c, u, one, guidance, offsets)


def step(
    x: Tensor,
    c: Tensor,
    u: Tensor | None,
    sigma: Tensor,
    sigma_next: Tensor,
    guidance: float,
    offsets: Tensor,
    noise: Tensor | None = None,
) -> Tensor:
    """One step of packed latents x float32 [R, C] along velocities c, u [R, C]; sigma, sigma_next float32 [B].

    Euler: x + (sigma_next - sigma) v; with noise [R, C], stochastic: (1 - sigma_next) (x - sigma v) + sigma_next noise.
    """
    if noise is None:
        return ops.guidance_step(x, c, u, (sigma_next - sigma).to(x.device), guidance, offsets)
    velocity, rows = guided(c, u, guidance, offsets), offsets.diff().long()
    s, s_next = (v.to(x.device).repeat_interleave(rows, output_size=len(x))[:, None] for v in (sigma, sigma_next))
    return (1 - s_next) * (x - s * velocity) + s_next * noise.to(x.device)


def second_order(sigmas: Tensor) -> Tensor:
    """c_i of DPM-Solver++(2M), see `Multistep`, for times [n + 1, ...]: float64 [n, ...]; all are finite."""
    t = sigmas.double()
    if len(t) < 2 or not ((t[1:] < t[:-1]) & (t[1:] >= 0) & (t[:-1] <= 1)).all():
        raise ValueError(f"Multistep: sigmas must fall from at most 1 to at least 0, got {sigmas.tolist()}")
    h = (torch.log1p(-t) - torch.log(t)).diff(dim=0)
    weights = torch.zeros_like(h)
    weights[1:-1] = (1 - t[2:-1] / t[1:-2]) * h[1:-1] / (2 * h[:-2])
    return weights


def multistep(
    x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor, weight: Tensor, before: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of DPM-Solver++(2M) along the guided velocity v: (x after it, this step's x0). before: x0 of the step
    before. sigma, sigma_next, weight broadcast to x."""
    clean = x - sigma * v
    return x + (sigma_next - sigma) * v + weight * (clean - before), clean


class Multistep:
    """DPM-Solver++(2M) (arXiv 2211.01095) in flow form, x_t = (1 - t) x0 + t eps, lambda = log((1 - t) / t): second order
    where Euler is first, for as many velocities. The released models are sampled by Euler.

    x0_i = x - t_i v;  x += (t_i+1 - t_i) v + c_i (x0_i - x0_i-1);  c_i = (1 - t_i+1 / t_i) h_i / (2 h_i-1), h_i = lambda_i+1 - lambda_i.
    The first step and the last are Euler's (c = 0), and so is the one behind t = 1, whose h_i-1 is infinite: all are finite.

    sigmas: the times t_0 > ... > t_n in [0, 1], [n + 1], or [n + 1, ...] that broadcasts to x. Errors: ValueError.
    """

    def __init__(self, sigmas: Tensor):
        self.weights, self.sigmas = second_order(sigmas), sigmas.double()
        self.before: Tensor | None = None  # x0 of the step before

    def step(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        """Step i of latents x along the velocity v, in order from 0; the dtype of x, sums in its own precision."""
        now, following, weight = (
            u.to(x.device, x.dtype) for u in (self.sigmas[i], self.sigmas[i + 1], self.weights[i])
        )
        before = x if self.before is None or i == 0 else self.before  # without one the weight is zero
        x, self.before = multistep(x, v, now, following, weight, before)
        return x


def walk(
    velocities: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]],
    x: Tensor,
    sigmas: Tensor,
    guidance: float = 1.0,
    solver: str = "euler",
) -> Tensor:
    """Noise x [B, I, C] -> latents float32 [B, I, C], along guided velocities, by a loop in plain Python: for trainings.

    velocities: (x, t [B]) -> (with the text, without it or None), [B, I, C] each; sigmas [n + 1], of all samples
    """
    expect_solver(solver)
    shape, x = x.shape, x.float().flatten(0, 1)
    offsets = torch.arange(shape[0] + 1, device=x.device, dtype=torch.int32) * shape[1]
    second = Multistep(sigmas) if solver == "dpm2m" else None
    for i, (now, following) in enumerate(pairwise(sigmas.to(x.device))):
        with_text, without = velocities(x.view(shape), now.expand(shape[0]))
        c, u = with_text.flatten(0, 1), None if without is None else without.flatten(0, 1)
        if second is None:
            x = step(x, c, u, now.expand(shape[0]), following.expand(shape[0]), guidance, offsets)
        else:
            x = second.step(i, x, guided(c, u, guidance, offsets))
    return x.view(shape)


def expect_solver(name: Any) -> str:
    """One of SOLVERS; else ValueError."""
    if name not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {shortened(name)}")
    return str(name)


def step_noise(seed: int, step: int, rows: int, channels: int) -> Tensor:
    """The noise a stochastic step adds to one picture, float32 [rows, channels], keyed by (seed, purpose, step)."""
    key = hashlib.sha256(f"lens step noise {seed} {step}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.randn((rows, channels), generator=generator)


def noise_key(noise: Tensor) -> int:
    """A seed for the step noise of a picture that started from given noise: from its bytes, not from its place."""
    digest = hashlib.sha256(noise.float().cpu().contiguous().numpy().tobytes()).digest()
    return int.from_bytes(digest[:8], "little")


def start_noise(
    shapes: Sequence[tuple[int, int]],
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    latents: Tensor | Sequence[Tensor] | None,
) -> tuple[list[Tensor], list[int | None]]:
    """What ``plan_noise`` plans, drawn."""
    draw, seeds = plan_noise(shapes, seed, generator, latents)
    return draw(), seeds


def plan_noise(
    shapes: Sequence[tuple[int, int]],
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    latents: Tensor | Sequence[Tensor] | None,
) -> tuple[Callable[[], list[Tensor]], list[int | None]]:
    """The starting noise of B images of ``shapes`` [I, C], float32, and their seeds (None where not from a seed).

    The arguments are checked here and a generator of the caller's is drawn from; what comes from seeds is drawn when
    asked for, by any thread.

    seed: int s gives picture k its own CPU generator seeded s + k, so a seed gives one picture on any device and in any
    batch; B ints; None draws one. generator: one per picture, or one for a single draw of [B, I, C]. latents: given.
    """
    batch = len(shapes)
    if sum(x is not None for x in (seed, generator, latents)) > 1:
        raise ValueError("seed, generator and latents exclude each other")
    unseeded: list[int | None] = [None] * batch
    if latents is not None:
        given = expect_tensors("latents", latents)
        got = [tuple(x.shape) for x in given]
        if got != list(shapes):
            raise ValueError(f"latents must be {batch} tensors of shapes [I, C] = {list(shapes)}, got {got}")
        if not all(torch.isfinite(x).all() for x in given):
            raise ValueError("latents holds NaN or infinity")
        own = [x.float() for x in given]  # by the caller's thread, on the caller's stream
        return lambda: own, unseeded
    if isinstance(generator, torch.Generator):
        if len(set(shapes)) > 1:
            raise ValueError("one generator draws [B, I, C] at once, so all sizes must be equal; pass one per picture")
        together = torch.randn((batch, *shapes[0]), generator=generator, device=generator.device)
        return lambda: list(together), unseeded
    if generator is not None:
        generators = list(generator) if isinstance(generator, Sequence) else []
        if len(generators) != batch or not all(isinstance(g, torch.Generator) for g in generators):
            what = generator if len(generators) in (0, batch) else len(generators)
            raise ValueError(
                f"generator must be one torch.Generator or one per picture ({batch}), got {shortened(what)}"
            )
        each = [_draw(s, g) for s, g in zip(shapes, generators)]
        return lambda: each, unseeded
    seeds = _seeds(secrets.randbelow(2**31) if seed is None else seed, batch)
    return lambda: [_draw(s, torch.Generator("cpu").manual_seed(k)) for s, k in zip(shapes, seeds)], list(seeds)


def _draw(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.randn((1, *shape), generator=generator, device=generator.device)[0]


def _seeds(seed: int | Sequence[int], batch: int) -> list[int]:
    """One int counts up from picture to picture; B ints stand as they are."""
    try:
        seeds = [] if isinstance(seed, bool) else [operator.index(seed) + k for k in range(batch)]  # type: ignore[arg-type]
    except TypeError:
        try:
            seeds = [operator.index(s) for s in seed]  # type: ignore[union-attr]
        except TypeError:
            seeds = []
    if len(seeds) != batch or not all(MIN_SEED <= s <= MAX_SEED for s in seeds):
        raise ValueError(f"seed must be an int or one per picture ({batch}), each of 64 bits, got {shortened(seed)}")
    return seeds
