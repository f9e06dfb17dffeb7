"""Rollouts: pictures of the policy by the inference engine, in packed batches of any sizes, and the velocities it learns from.

The adapter in force is an argument of every call. On a CPU a sample's bits depend neither on its neighbours nor on whether the
engine or a training forward computes its velocity (tests/train/test_rl.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lens import sampler
from lens.engine.job import Job, Text
from lens.engine.run import Engine
from lens.engine.schedule_table import table
from lens.model import LensTransformer2DModel
from lens.modulation import Modulation, concatenate
from lens.packing import Grid, plan

from .loop.ranks import bare

MOST_FEATURES = 2 << 30  # bytes of prompts' features that are kept


class Texts:
    """Features [T, F, E] of prompts, kept: all slots of a step ask for the same prompts, and of a small set every epoch again.

    Those asked for last stay, up to `most` bytes and never fewer than one call's.
    """

    def __init__(self, encode: Callable[[str], Tensor], most: int = MOST_FEATURES):
        self.encode, self.most = encode, most
        self.kept: OrderedDict[str, Tensor] = OrderedDict()
        self.bytes = 0

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> list[Tensor]:
        for prompt in prompts:
            if prompt not in self.kept:
                self.kept[prompt] = self.encode(prompt)
                self.bytes += self.kept[prompt].nbytes
            self.kept.move_to_end(prompt)
        found = [self.kept[prompt] for prompt in prompts]
        while self.bytes > self.most and len(self.kept) > len(set(prompts)):
            self.bytes -= self.kept.popitem(last=False)[1].nbytes
        return found


class Rollouts:
    """Draws with a model that has adapters. scheduler: the checkpoint's own. solver: of `lens.sampler.SOLVERS`."""

    def __init__(
        self, model: LensTransformer2DModel, scheduler: sampler.Scheduler, steps: int, solver: str, time_dtype: str
    ):
        if scheduler.stochastic_sampling:
            raise ValueError(
                "rl: the checkpoint's scheduler adds noise to steps, expected one whose rollouts are an ODE's"
            )
        self.model, self.scheduler, self.steps, self.time_dtype = model, scheduler, steps, time_dtype
        self.solver, self.engine = sampler.expect_solver(solver), Engine()
        self.tables: dict[tuple[int, int], Modulation] = {}  # no adapter touches the modulation

    def sigmas(self, grid: Grid, steps: int | None = None) -> Tensor:
        """float32 [steps + 1]; all but the last are the nodes at which the policy is trained."""
        return self.scheduler.sigmas(grid[0] * grid[1], steps or self.steps)

    def time(self, sigma: Tensor) -> Tensor:
        """What the network is told of a sigma: float32."""
        return sampler.conditioning_time(sigma, self.model.dtype, self.time_dtype)

    @torch.no_grad()
    def __call__(
        self,
        features: Sequence[Tensor],
        grids: Sequence[Grid],
        noise: Sequence[Tensor],
        adapter: str | None,
        steps: int | None = None,
        guidance: float = 1.0,
    ) -> list[Tensor]:
        """Features [T, F, E], grids in tokens and noise [I, C] of B pictures -> normalised latents float32 [I, C]."""
        model, steps = self.model, steps or self.steps
        sizes = sorted({h * w for h, w in grids})
        schedules = {n: self.scheduler.sigmas(n, steps) for n in sizes}
        for n in sizes:
            if (n, steps) not in self.tables:
                self.tables[n, steps] = table(model, self.time(schedules[n][:-1]))
        which = torch.tensor([sizes.index(h * w) for h, w in grids])
        texts = [model.project_text(list(f.to(model.dtype).unbind(1)), [len(f)]) for f in features]
        nothing = Text([t[:0] for t in texts], [torch.arange(0) for _ in texts])
        job = Job(
            grids=list(grids),
            text=Text(texts, [torch.arange(len(t)) for t in texts]),
            negative=None if guidance == 1 else nothing,
            guidance=guidance,
            sigma=torch.stack([schedules[n] for n in sizes])[which],
            first=which * steps,
            table=concatenate([self.tables[n, steps] for n in sizes]),
            x=torch.cat([n.to(model.device) for n in noise]),
            solver=self.solver,
            adapter=adapter,
        )
        run = self.engine.start(model, job)
        try:
            for _ in range(steps):
                run.step()
            return list(run.x.clone().split(job.lengths))
        finally:
            run.close()

    def velocity(
        self,
        model: nn.Module,
        x: Tensor,
        sigma: Tensor,
        features: Sequence[Tensor],
        grids: Sequence[Grid],
        adapter: str | None,
    ) -> Tensor:
        """The training forward of B samples, packed: rows x [RI, C], sigma [B] -> [RI, C]. model: as `ranks.wrap` gave it."""
        axes = bare(model).config.axes_dims_rope
        packing = plan(grids, [len(f) for f in features], axes, x.device)
        return model(x, torch.cat(list(features)), self.time(sigma).to(x.device), packing, adapter)
