"""Sheets of fixed prompts and seeds, drawn during a training by all its processes together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor, nn

from lens import sampler
from lens.config import LensConfig
from lens.resolution import bucket_size

from ..data import encoders
from ..data.contact_sheet import contact_sheet
from ..objectives import flow_matching
from ..objectives.velocity import velocity
from .ranks import Ranks


class Sheets:
    """Fixed prompts with seeds 0, 1, ... drawn with guidance; the ranks share them, the main one writes the file."""

    def __init__(
        self,
        recipe: ModuleType,
        group: Ranks,
        model: nn.Module,
        shape: LensConfig,
        text: encoders.TextEncoder,
        ids: Sequence[list[int]],
        decode: Callable[[Tensor, tuple[int, int]], np.ndarray],
    ):
        self.recipe, self.group, self.model, self.shape, self.text, self.decode = (
            recipe,
            group,
            model,
            shape,
            text,
            decode,
        )
        count = -(-len(ids) // group.world)  # alike on every rank, since all must call the model equally often
        places = [min(group.rank * count + i, len(ids) - 1) for i in range(count)]
        self.places, self.ids = places, [ids[p] for p in places]

    @torch.no_grad()
    def __call__(self, path: Path) -> None:
        sheet, axes, count = self.recipe.SHEET, self.shape.axes_dims_rope, len(self.ids)
        height, width = bucket_size(int(sheet["base"]), "1:1")
        grid = height // 16, width // 16
        tokens, steps = grid[0] * grid[1], int(sheet["steps"])
        device = self.group.device
        draws = [
            torch.randn(tokens, self.shape.in_channels, generator=torch.Generator().manual_seed(p)) for p in self.places
        ]
        x, features = torch.stack(draws).to(device), self.text.encode(self.ids)
        lengths = [len(ids) for ids in self.ids]
        mu = flow_matching.mu_of(self.recipe.MU, tokens)
        sigmas = torch.cat([flow_matching.shift(torch.linspace(1, 1 / steps, steps), mu), torch.zeros(1)]).to(device)

        def velocities(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
            """With text and without, in one call."""
            both = velocity(
                self.model, x.repeat(2, 1, 1), features, t.repeat(2), [*lengths, *[0] * count], grid, axes
            ).float()
            c, u = both.chunk(2)
            return c, u

        x = sampler.walk(velocities, x, sigmas, float(sheet["guidance"]))
        pictures = dict(pair for own in self.group.gather(list(zip(self.places, self.decode(x, grid)))) for pair in own)
        if self.group.main:
            contact_sheet([pictures[p] for p in sorted(pictures)], list(self.recipe.PROMPTS), path, columns=4)


def released_decoder(codec: encoders.ReleasedLatents) -> Callable[[Tensor, tuple[int, int]], np.ndarray]:
    from lens.vae import to_uint8

    return lambda tokens, grid: np.stack([to_uint8(codec.codec.decode(rows, grid)) for rows in tokens])
