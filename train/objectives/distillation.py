"""The losses of a distillation's micro-batch: backward simulation, the fake score's step, the heads', the student's.

Formulas stand in dmd.py and adversarial.py. Every draw is keyed by (seed, purpose, step, picture), the student's place k by
(seed, step) alone: all processes and all slots of a step take as many student steps, as sharded weights ask, without a broadcast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn

from lens import sampler
from lens.config import LensConfig
from lens.sampler import Scheduler

from ..data.buckets import Bucket
from ..data.loader import STRIDE
from ..loop.keys import keyed
from ..loop.method import Losses
from . import adversarial, dmd, flow_matching
from .velocity import packing_for, velocity

SAMPLERS, GRIDS = ("euler", "renoise"), ("fixed", "random")


class Batch(Protocol):
    """A micro-batch of the stream: real pictures of one bucket and their captions, which the student draws, too."""

    step: int
    slot: int
    bucket: Bucket

    @property
    def lengths(self) -> Sequence[int]: ...

    @property
    def encoded(self) -> tuple[Tensor, Tensor]:
        """Latents [B, I, C], text features [RT, F, E]."""


@dataclass(frozen=True)
class Given:
    """What a call of a network is told besides latents and time."""

    features: Tensor
    lengths: Sequence[int]
    grid: tuple[int, int]
    axes: tuple[int, ...]

    def velocity(self, network: nn.Module, x: Tensor, t: Tensor) -> Tensor:
        """float32 [B, I, C] of x [B, I, C] at t [B]."""
        return velocity(network, x, self.features, t, self.lengths, self.grid, self.axes).float()

    def without_text(self) -> Given:
        return Given(self.features[:0], [0] * len(self.lengths), self.grid, self.axes)

    def repeated(self, times: int) -> Given:
        return Given(self.features.repeat(times, 1, 1), list(self.lengths) * times, self.grid, self.axes)

    def streams(self, teacher: nn.Module, x: Tensor, t: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """Image rows [B I, D] of the teacher behind each tapped block."""
        packing = packing_for(x, self.lengths, self.grid, self.axes)
        return teacher(x.flatten(0, 1), self.features, t, packing, taps=tuple(taps))


class Distillation:
    """recipe: see configs/released/distill.py. scheduler, time_dtype: of the checkpoint, as its pipeline samples.

    Errors: ValueError for a GRID or STUDENT_SAMPLER there is not.
    """

    def __init__(
        self, recipe: ModuleType, shape: LensConfig, scheduler: Scheduler, time_dtype: str, dtype: torch.dtype
    ):
        for name, known in (("STUDENT_SAMPLER", SAMPLERS), ("GRID", GRIDS)):
            if getattr(recipe, name) not in known:
                raise ValueError(f"{name}: {getattr(recipe, name)!r}, expected one of {', '.join(known)}")
        self.recipe, self.shape, self.scheduler = recipe, shape, scheduler
        self.time_dtype, self.dtype = time_dtype, dtype

    # -------------------------------------------------------------------------------------------- draws

    def normal(self, purpose: str, batch: Batch, like: Tensor) -> Tensor:
        """Noise of every picture, from a key of its own, [B, I, C] like `like`."""
        first = batch.slot * STRIDE
        return torch.stack(
            [
                torch.randn(
                    like.shape[1:],
                    generator=keyed(self.recipe.SEED, purpose, batch.step, first + i, like.device),
                    device=like.device,
                )
                for i in range(len(like))
            ]
        )

    def uniform(self, purpose: str, batch: Batch, count: int) -> Tensor:
        """float64 [count] in [0, 1)."""
        first = batch.slot * STRIDE
        keys = [keyed(self.recipe.SEED, purpose, batch.step, first + i) for i in range(count)]
        return torch.cat([torch.rand(1, generator=key, dtype=torch.float64) for key in keys])

    def mu(self, batch: Batch) -> float:
        return flow_matching.mu_of(self.recipe.MU, batch.bucket.tokens)

    def times(self, purpose: str, batch: Batch, count: int, mu: float | None = None) -> Tensor:
        """Logit-normal times of the fake score and of the heads, float32 [count]; mu: that of the training unless given."""
        return flow_matching.logit_normal(self.uniform(purpose, batch, count), self.mu(batch) if mu is None else mu)

    # -------------------------------------------------------------------------------------------- the student

    def place(self, step: int) -> int:
        """k: at which of its times the student is trained in this step."""
        generator = keyed(self.recipe.SEED, "place", step)
        return int(torch.randint(self.recipe.STUDENT_STEPS, (), generator=generator))

    def sigmas(self, tokens: int, step: int) -> Tensor:
        """The student's times, float32 [steps + 1], from 1 to 0: the scheduler's own for a picture of so many tokens.

        GRID "random": the first is 1 still, the others lie anywhere on the scheduler's line: linear between its nodes at
        places drawn, sorted, by (seed, step). For students that shall serve other numbers of steps, too.
        """
        count = self.recipe.STUDENT_STEPS
        grid = self.scheduler.sigmas(tokens, count)
        if self.recipe.GRID == "fixed":
            return grid
        generator = keyed(self.recipe.SEED, "grid", step)
        places = torch.rand(count - 1, generator=generator, dtype=torch.float64).sort().values * count
        low = places.long().clamp(max=count - 1)
        between = grid[low].double() + (places - low) * (grid[low + 1] - grid[low]).double()
        return torch.cat([grid[:1], between.float(), grid[-1:]])

    def told(self, sigma: Tensor) -> Tensor:
        """The time the student is told: that of the pipeline."""
        return sampler.conditioning_time(sigma, self.dtype, self.time_dtype)

    @torch.no_grad()
    def simulate(
        self, student: nn.Module, given: Given, x: Tensor, sigmas: Tensor, k: int, noises: Sequence[Tensor] = ()
    ) -> Tensor:
        """Noise x [B, I, C] -> what the student's first k steps make of it, float32, by the sampler's own steps.

        noises: what each of them adds where the student re-noises; none where it walks on by Euler.
        """
        shape, count = x.shape, len(x)
        offsets = torch.arange(count + 1, device=x.device, dtype=torch.int32) * shape[1]
        for j in range(k):
            now, following = (s.to(x.device).expand(count) for s in (sigmas[j], sigmas[j + 1]))
            v = given.velocity(student, x, self.told(now))
            noise = noises[j].flatten(0, 1) if noises else None
            x = sampler.step(x.flatten(0, 1), v.flatten(0, 1), None, now, following, 1.0, offsets, noise).view(shape)
        return x

    def picture(self, student: nn.Module, given: Given, x: Tensor, sigma: Tensor) -> Tensor:
        """x_tk - t_k v_theta, [B, I, C]: with a gradient where the student learns."""
        t = sigma.to(x.device).expand(len(x))
        return dmd.clean(x, given.velocity(student, x, self.told(t)), t)

    def reached(self, student: nn.Module, given: Given, batch: Batch, like: Tensor) -> tuple[Tensor, Tensor]:
        """(x_tk [B, I, C], t_k) of this step: where the student's own steps lead, without a gradient."""
        k, sigmas = self.place(batch.step), self.sigmas(batch.bucket.tokens, batch.step)
        renoise = self.recipe.STUDENT_SAMPLER == "renoise"
        noises = [self.normal(f"renoise {j}", batch, like) for j in range(k)] if renoise else []
        return self.simulate(student, given, self.normal("start", batch, like), sigmas, k, noises), sigmas[k]

    def drawn(self, student: nn.Module, given: Given, batch: Batch, like: Tensor) -> tuple[Tensor, Tensor]:
        """(picture [B, I, C], t_k) of this step."""
        x, t_k = self.reached(student, given, batch, like)
        return self.picture(student, given, x, t_k), t_k

    def given(self, batch: Batch) -> tuple[Tensor, Given]:
        """The batch's latents, float32, and what its networks are told."""
        latents, features = batch.encoded
        return latents.float(), Given(features, list(batch.lengths), batch.bucket.grid, self.shape.axes_dims_rope)

    # -------------------------------------------------------------------------------------------- losses

    def fake_and_heads(self, networks: Mapping[str, nn.Module], teacher: nn.Module, batch: Batch) -> dict[str, Losses]:
        """Of the fake score, on the student's pictures; and, where there are heads, of these, real against drawn."""
        recipe, (real, given) = self.recipe, self.given(batch)
        with torch.no_grad():
            picture, _ = self.drawn(networks["student"], given, batch, real)
        t = self.times("fake time", batch, len(real)).to(real.device)
        noise = self.normal("fake noise", batch, real)
        x_t, _ = flow_matching.noised(picture, noise, t)
        values = dmd.fake_loss(given.velocity(networks["fake"], x_t, t), picture, noise)
        losses = {"fake": Losses(values, times=t, terms={"fake": values.mean()})}
        if "heads" in networks:
            if recipe.HEADS_MU is not None:  # times of their own, at the same noise
                t = self.times("heads time", batch, len(real), recipe.HEADS_MU).to(real.device)
                x_t, _ = flow_matching.noised(picture, noise, t)
            real_t, _ = flow_matching.noised(real, self.normal("real noise", batch, real), t)
            seen = [real_t, x_t]
            if recipe.R1_GAMMA:
                seen.append(adversarial.perturbed(real_t, self.normal("r1", batch, real), recipe.R1_ALPHA))
            with torch.no_grad():
                streams = given.repeated(len(seen)).streams(teacher, torch.cat(seen), t.repeat(len(seen)), recipe.TAPS)
            logits = networks["heads"](streams, given.grid).chunk(len(seen))
            own = adversarial.discriminator_loss(logits[0], logits[1])
            terms = {"heads_accuracy": adversarial.accuracy(logits[0], logits[1])}
            terms |= {"logit_real": logits[0].mean(), "logit_drawn": logits[1].mean()}
            if recipe.R1_GAMMA:
                penalty = adversarial.approximate_r1(logits[0], logits[2], recipe.R1_GAMMA)
                own, terms["r1"] = own + penalty, penalty.mean()
            losses["heads"] = Losses(own, times=t, terms=terms)
        return losses

    def guided(self, networks: Mapping[str, nn.Module], teacher: nn.Module, batch: Batch) -> dict[str, Losses]:
        """Of the student before all turns: mean |v_theta - v_w|^2 at the state x_tk of its own steps, where v_w leads to where the
        guided teacher's GUIDED_SUBSTEPS Euler steps from there lead, (x_tk - x_tk+1) / (t_k - t_k+1). Guidance distillation
        (arXiv 2210.03142, section 3.1) and, of more than one step, progressive distillation (arXiv 2202.00512, section 3) at once,
        on the grid of the student: its minimum draws in STUDENT_STEPS unguided steps what the teacher draws in GUIDED_SUBSTEPS
        times as many guided ones."""
        real, given = self.given(batch)
        x, t_k = self.reached(networks["student"], given, batch, real)
        t = self.told(t_k.to(x.device).expand(len(x)))
        with torch.no_grad():
            c, w = self.teachers(teacher, given, x, t_k, self.sigmas(batch.bucket.tokens, batch.step))
        apart = (given.velocity(networks["student"], x, t) - w).square().mean((1, 2))
        terms = {"from_guided": apart.detach().mean(), "guided_from_c": (c - w).square().mean()}
        return {"student": Losses(apart, times=t, terms=terms)}

    def teachers(
        self, teacher: nn.Module, given: Given, x: Tensor, t_k: Tensor, sigmas: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(the teacher's velocity at x_tk with the text, the mean one of its guided way from t_k to the student's next time)."""
        following = sigmas[sigmas < t_k].max()
        own: list[Tensor] = []

        def velocities(y: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
            time = self.told(sigma)
            own.append(given.velocity(teacher, y, time))
            return own[-1], given.without_text().velocity(teacher, y, time)

        between = torch.linspace(0, 1, self.recipe.GUIDED_SUBSTEPS + 1, dtype=torch.float64)
        way = torch.lerp(t_k.double().cpu(), following.double().cpu(), between).float()
        after = sampler.walk(velocities, x, way, self.recipe.TEACHER_GUIDANCE)
        return own[0], (x - after) / (t_k - following).to(x.device)

    @torch.no_grad()
    def gradient(
        self, fake: nn.Module, teacher: nn.Module, batch: Batch, given: Given, picture: Tensor, t_k: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """DM_WEIGHT DM + CA_WEIGHT CA of the pictures, [B, I, C], and their sizes: `applied_ca`, `applied_dm` are root mean
        squares with their weights."""
        recipe, count, mu = self.recipe, len(picture), self.mu(batch)
        tau = dmd.dm_times(self.uniform("dm time", batch, count), mu).to(picture.device)
        x, _ = flow_matching.noised(picture, self.normal("dm noise", batch, picture), tau)
        v_c = given.velocity(teacher, x, tau)
        n_dm = dmd.normaliser(picture, dmd.clean(x, v_c, tau), recipe.NORMALISER_FLOOR)
        g_dm = recipe.DM_WEIGHT * dmd.dm_gradient(v_c, given.velocity(fake, x, tau), tau, n_dm)
        tau = dmd.ca_times(self.uniform("ca time", batch, count), mu, t_k).to(picture.device)
        x, _ = flow_matching.noised(picture, self.normal("ca noise", batch, picture), tau)
        v_c, v_u = given.velocity(teacher, x, tau), given.without_text().velocity(teacher, x, tau)
        n_ca = dmd.normaliser(picture, dmd.clean(x, v_c, tau), recipe.NORMALISER_FLOOR)
        g_ca = recipe.CA_WEIGHT * dmd.ca_gradient(v_c, v_u, tau, n_ca, recipe.GUIDANCE, recipe.CFG_MODE)
        sizes = {"applied_dm": g_dm.square().mean().sqrt(), "applied_ca": g_ca.square().mean().sqrt()}
        return g_dm + g_ca, sizes | {"n_dm": n_dm.mean(), "n_ca": n_ca.mean()}

    def student(self, networks: Mapping[str, nn.Module], teacher: nn.Module, batch: Batch) -> dict[str, Losses]:
        """LAMBDA_D times the proxy loss, with LAMBDA_G times the generator's loss beside it where there are heads.

        The generator's gradient passes the frozen teacher up to its deepest tap.
        """
        recipe, (real, given) = self.recipe, self.given(batch)
        picture, t_k = self.drawn(networks["student"], given, batch, real)
        gradient, terms = self.gradient(networks["fake"], teacher, batch, given, picture.detach(), float(t_k))
        values = recipe.LAMBDA_D * dmd.proxy_loss(picture, gradient)
        deviations = [x.detach().flatten(0, 1).std(0) for x in (picture, real)]
        terms["deviation"] = (deviations[0] / deviations[1]).mean()
        beside = None
        if "heads" in networks:
            t = self.times("generator time", batch, len(real), recipe.HEADS_MU).to(real.device)
            x_t, _ = flow_matching.noised(picture, self.normal("generator noise", batch, real), t)
            logits = networks["heads"](given.streams(teacher, x_t, t, recipe.TAPS), given.grid)
            terms["generator"] = adversarial.generator_loss(logits).mean()
            beside = recipe.LAMBDA_G * terms["generator"]
        return {"student": Losses(values, beside=beside, terms=terms)}
