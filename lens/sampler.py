"""7. Sigmas, guidance, Euler: the schedule a picture walks from noise (sigma 1) to latents (sigma 0).

The velocity is d x / d sigma, so a step is x += (sigma_next - sigma) * v. Latents stay float32 between steps.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Empirical fit of the released scheduler: mu is linear in the token count at 10 and at 200 steps, interpolated in steps.
_SLOPE_10, _OFFSET_10 = 8.73809524e-5, 1.89833333
_SLOPE_200, _OFFSET_200 = 1.6927e-4, 0.45666666
_LARGE = 4300  # tokens above which only the 200-step line holds
_REFUSED = ("use_karras_sigmas", "use_beta_sigmas", "use_exponential_sigmas", "invert_sigmas")


def mu(image_tokens: int, steps: int) -> float:
    """Shift of the time axis for a picture of ``image_tokens`` sampled in ``steps`` (2.198 at 4096 tokens, 20 steps)."""
    m200 = _SLOPE_200 * image_tokens + _OFFSET_200
    if image_tokens > _LARGE:
        return m200
    m10 = _SLOPE_10 * image_tokens + _OFFSET_10
    slope = (m200 - m10) / 190.0
    return slope * steps + (m200 - 200.0 * slope)


@dataclass(frozen=True)
class Scheduler:
    """The part of ``scheduler_config.json`` that Lens honours; anything else that would change a picture is refused."""

    use_dynamic_shifting: bool = True
    shift: float = 3.0
    stochastic_sampling: bool = False

    @classmethod
    def from_dict(cls, config: dict[str, Any], source: str = "scheduler_config.json") -> Scheduler:
        name = config.get("_class_name", "FlowMatchEulerDiscreteScheduler")
        if name != "FlowMatchEulerDiscreteScheduler":
            raise ValueError(f"{source}: _class_name must be FlowMatchEulerDiscreteScheduler, got {name!r}")
        for key in _REFUSED:
            if config.get(key):
                raise ValueError(f"{source}: {key} is not supported, expected false")
        if config.get("shift_terminal"):
            raise ValueError(
                f"{source}: shift_terminal is not supported, expected null, got {config['shift_terminal']!r}"
            )
        if config.get("time_shift_type", "exponential") != "exponential":
            raise ValueError(f"{source}: time_shift_type must be 'exponential', got {config['time_shift_type']!r}")
        if config.get("num_train_timesteps", 1000) != 1000:
            raise ValueError(f"{source}: num_train_timesteps must be 1000, got {config['num_train_timesteps']!r}")
        return cls(
            use_dynamic_shifting=bool(config.get("use_dynamic_shifting", False)),
            shift=float(config.get("shift", 1.0)),
            stochastic_sampling=bool(config.get("stochastic_sampling", False)),
        )

    def sigmas(self, image_tokens: int, steps: int) -> Tensor:
        """float32 [steps + 1], from 1 down to the terminal 0.

        s = linspace(1, 1/n, n); dynamic: s' = e^mu / (e^mu + 1/s - 1); static: s' = shift s / (1 + (shift - 1) s).
        """
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"num_inference_steps must be a positive integer, got {steps!r}")
        s = np.linspace(1.0, 1.0 / steps, steps).astype(np.float32)
        if self.use_dynamic_shifting:
            e = math.exp(mu(image_tokens, steps))
            s = e / (e + (1 / s - 1))
        else:
            s = self.shift * s / (1 + (self.shift - 1) * s)
        return torch.from_numpy(np.append(s.astype(np.float32), np.float32(0)))


def sigmas(image_tokens: int, steps: int) -> Tensor:
    """The released schedule (dynamic shifting): float32 [steps + 1]."""
    return Scheduler().sigmas(image_tokens, steps)


def conditioning_time(sigma: Tensor, dtype: torch.dtype, time_dtype: str = "reference") -> Tensor:
    """sigma (float32) -> the time the network is told, float32 in [0, 1].

    "reference" rounds twice in the model's dtype, round(round(1000 sigma) / 1000), as the released code does; "float32"
    keeps the exact sigma.
    """
    if time_dtype == "float32":
        return sigma.float()
    if time_dtype != "reference":
        raise ValueError(f"time_dtype must be 'reference' or 'float32', got {time_dtype!r}")
    return ((1000.0 * sigma.float()).to(dtype) / 1000).float()


def stochastic_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise: Tensor) -> Tensor:
    """x' = (1 - sigma_next) (x - sigma v) + sigma_next noise, all float32 [R, C], sigma and sigma_next [R, 1]."""
    return (1 - sigma_next) * (x - sigma * velocity) + sigma_next * noise


def step_noise(seed: int, step: int, rows: int, channels: int) -> Tensor:
    """The noise a stochastic step adds to one picture, float32 [rows, channels], keyed by (seed, step)."""
    generator = torch.Generator("cpu").manual_seed((seed * 1_000_003 + step + 1) % 2**63)
    return torch.randn((rows, channels), generator=generator)


def start_noise(
    shapes: Sequence[tuple[int, int]],
    seed: int | Sequence[int] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    latents: Tensor | Sequence[Tensor] | None,
) -> tuple[list[Tensor], list[int | None]]:
    """The starting noise of B pictures of ``shapes`` [I, C], float32, and their seeds (None where not from a seed).

    seed: int s gives picture k its own CPU generator seeded s + k, so a seed gives one picture on any device and in any
    batch; B ints; None draws one. generator: one per picture, or one for a single draw of [B, I, C]. latents: given.
    """
    batch = len(shapes)
    if sum(x is not None for x in (seed, generator, latents)) > 1:
        raise ValueError("seed, generator and latents exclude each other")
    unseeded: list[int | None] = [None] * batch
    if latents is not None:
        given = list(latents)
        if [tuple(x.shape) for x in given] != list(shapes):
            got = [tuple(x.shape) for x in given]
            raise ValueError(f"latents must be {batch} tensors of shapes [I, C] = {list(shapes)}, got {got}")
        if not all(torch.isfinite(x).all() for x in given):
            raise ValueError("latents holds NaN or infinity")
        return [x.float() for x in given], unseeded
    if isinstance(generator, torch.Generator):
        if len(set(shapes)) > 1:
            raise ValueError("one generator draws [B, I, C] at once, so all sizes must be equal; pass one per picture")
        return list(torch.randn((batch, *shapes[0]), generator=generator, device=generator.device)), unseeded
    seeds = unseeded
    if generator is not None:
        generators = list(generator)
        if len(generators) != batch:
            raise ValueError(f"generator must be one or one per picture ({batch}), got {len(generators)}")
    else:
        first = secrets.randbelow(2**31) if seed is None else seed
        listed = [first + k for k in range(batch)] if isinstance(first, int) else [int(s) for s in first]
        if len(listed) != batch:
            raise ValueError(f"seed must be an int or one per picture ({batch}), got {len(listed)}")
        generators = [torch.Generator("cpu").manual_seed(s) for s in listed]
        seeds = list(listed)
    return [torch.randn((1, *s), generator=g, device=g.device)[0] for s, g in zip(shapes, generators)], seeds
