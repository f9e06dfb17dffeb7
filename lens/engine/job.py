"""What is drawn together: the pictures of one call, projected texts, schedules and latents, ready for the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import sampler
from ..modulation import Modulation
from ..packing import Grid


@dataclass(frozen=True, eq=False)
class Text:
    """Text of B samples, each by itself."""

    rows: list[Tensor]  # B of projected rows [T_b, D]
    index: list[Tensor]  # B of int64 [T_b], the rows' positions in their own padded sequence
    features: Sequence[list[Tensor]] = ()  # B lists of F tensors [T_b, E], as callbacks see them


@dataclass(frozen=True, eq=False)
class Job:
    """B pictures, each with its schedule and text; with guidance, a second text each."""

    grids: list[Grid]  # B
    text: Text
    negative: Text | None  # None: no guidance
    guidance: float
    sigma: Tensor  # float32 [B, K + 1], host
    first: Tensor  # int64 [B], row of the table where a picture's schedule begins, host
    table: Modulation  # rows of the distinct schedules, K each
    x: Tensor  # float32 [R, C], packed latents on the device
    noise_keys: list[int] | None = None  # B seeds of the noise of stochastic steps; None: no step adds noise
    step: int = 0  # where the run begins
    solver: str = "euler"  # of sampler.SOLVERS
    clean: Tensor | None = None  # float32 [R, C], x0 of the step before the first, where the solver remembers it
    adapter: str | None = None  # of layers that hold several; None: the one in force when nothing is said

    @property
    def steps(self) -> int:
        return self.sigma.shape[1] - 1

    @property
    def stochastic(self) -> bool:
        return self.noise_keys is not None

    @property
    def halves(self) -> int:
        return 1 if self.negative is None else 2

    @property
    def lengths(self) -> list[int]:
        return [h * w for h, w in self.grids]

    @property
    def same_size(self) -> bool:
        return len(set(self.grids)) == 1

    @property
    def all_grids(self) -> list[Grid]:
        return self.grids * self.halves

    # the unconditional half comes first: where it carries no text, each stream's rows then lie in one piece
    @property
    def all_texts(self) -> list[Tensor]:
        return [*(self.negative.rows if self.negative else []), *self.text.rows]

    @property
    def all_indices(self) -> list[Tensor]:
        return [*(self.negative.index if self.negative else []), *self.text.index]

    def shaped(self, rows: Tensor) -> Any:
        """Packed rows [R, C] -> [B, I, C], or a list of [I, C] where sizes are mixed. Always a copy."""
        parts = [part.clone() for part in rows.split(self.lengths)]
        return torch.stack(parts) if self.same_size else parts

    @property
    def second_order(self) -> Tensor | None:
        """Weights of the multistep solver's memory, float32 [K, B] on the host; None for Euler."""
        if self.solver == "euler":
            return None
        weights = sampler.second_order(self.sigma.T)
        if self.clean is None:
            weights[self.step] = 0  # nothing to remember yet
        return weights.float()

    def resumed(self, x: Tensor, step: int, clean: Tensor | None) -> Job:
        """The same from ``step`` on, at latents ``x``; clean: x0 of the step before, where the solver remembers it."""
        return replace(self, x=x.clone(), step=step, clean=None if clean is None else clean.clone())
