"""A denoiser with random weights, its inputs and its subjects: shared by the suites step, e2e and train."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from lens import ops, sampler
from lens.engine import batch_invariance
from lens.engine.job import Job, Text
from lens.engine.run import Engine, Run
from lens.engine.schedule_table import TableCache
from lens.engine.step import State
from lens.model import LensTransformer2DModel
from lens.modulation import Modulation
from lens.ops.attention import choice as attention_choice
from lens.ops.linear import choice as linear_choice
from lens.packing import Packing, plan

from ..case import generator, wider
from . import weights
from .comparators import Exact, Reference, exact_step, reference_step
from .scale import Grid, Scale

# relative L2 distance of a velocity to the same weights in wider arithmetic, after 48 blocks and guidance 5
STEP_BOUND = {torch.bfloat16: 0.15, torch.float32: 1e-3}  # rounding alone, on a CPU at width 128: 0.054; lost text 0.64
DELTA = -1.0  # a step this long, so that the comparison sees the velocity and not mostly the latents it is added to
GUIDANCE = 5.0


def features_of(scale: Scale, tokens: int, device: torch.device, *key: object) -> list[Tensor]:
    """F tensors [T, E] as an encoder gives them: normal, of deviation 30 (raw residual streams are large)."""
    g, config = generator(device, "features", *key), scale.config
    shape = (tokens, config.enc_hidden_dim)
    return [(30 * torch.randn(shape, generator=g, device=device)).to(scale.dtype) for _ in config.selected_layer_index]


@dataclass
class DenoiserSetup:
    """One model, its text, and every way of taking a step; made once per case."""

    scale: Scale
    device: torch.device
    grid: Grid
    text: int
    guided: bool
    steps: int = 20
    batch: int = 1  # pictures of one prompt
    _rotation: Any = None

    @cached_property
    def model(self) -> LensTransformer2DModel:
        return weights.transformer(self.scale.config, self.device, self.scale.dtype)

    @property
    def image(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def images(self) -> list[int]:
        return [self.image] * len(self.texts)

    @property
    def texts(self) -> list[int]:
        return [self.text] * self.batch + [0] * self.batch * self.guided

    @property
    def guidance(self) -> float:
        return GUIDANCE if self.guided else 1.0

    @cached_property
    def packing(self) -> Packing:
        grids = [self.grid] * len(self.texts)
        return plan(grids, list(self.texts), self.scale.config.axes_dims_rope, self.device)

    @cached_property
    def time(self) -> Tensor:
        """Times of the schedule, on the host."""
        return sampler.conditioning_time(sampler.sigmas(self.image, self.steps)[:-1], self.scale.dtype)

    @cached_property
    def table(self) -> Modulation:
        return TableCache().get(self.model, self.time)

    def inputs(self, sets: int) -> list[tuple[Tensor, list[Tensor], Tensor]]:
        """(latents float32 [B I, C], F features [T, E], their projection [T, D]), drawn for every set."""
        made = []
        for k in range(sets):
            g = generator(self.device, "latents", k)
            shape = self.batch * self.image, self.scale.config.in_channels
            x = torch.randn(shape, generator=g, device=self.device)
            features = features_of(self.scale, self.text, self.device, k)
            with torch.no_grad():
                made.append((x, features, self.model.project_text(features, [self.text])))
        return made

    # each subject: (latents, features, projected text) -> latents after one step of length DELTA

    def engine(self, index: int, invariant: bool = False) -> Callable[..., Tensor]:
        """As `LensPipeline` takes it: the captured step on fixed buffers, where there are graphs; op by op elsewhere.

        Latents, text and the step's number are put into the buffers by every call (5 MB a picture, against 30 ms).
        invariant: under batch_invariant.
        """

        @cache
        def begun() -> tuple[Run, State]:
            x, _, text = self.inputs(1)[0]
            nothing = Text([text[:0]] * self.batch, [torch.arange(0)] * self.batch)
            job = Job(
                grids=[self.grid] * self.batch,
                text=Text([text] * self.batch, [torch.arange(self.text)] * self.batch),
                negative=nothing if self.guided else None,
                guidance=self.guidance,
                sigma=-DELTA * torch.arange(self.steps, -1, -1, dtype=torch.float32).repeat(self.batch, 1),
                first=torch.zeros(self.batch, dtype=torch.int64),
                table=self.table,
                x=x,
            )
            with torch.no_grad():
                run = Engine().start(self.model, job)
            return run, run._state  # the engine has no need of a step out of its order; the bench has

        def step(x: Tensor, features: list[Tensor], text: Tensor) -> Tensor:
            before, self.model.batch_invariant = self.model.batch_invariant, invariant
            try:
                run, state = begun()  # by the first call: a capture that fails is this subject's failure alone
                state.index.fill_(index)
                run.x.copy_(x)
                state.text[: self.batch * len(text)].unflatten(0, (self.batch, -1)).copy_(text)
                run.step()
            finally:
                self.model.batch_invariant = before
            return run.x.clone()

        return step

    def fields_of_step(self, invariant: bool) -> Callable[[], dict[str, Any]]:
        """Further fields of a step's row: what was forced, if anything; whether measured orders chose the GEMMs; under
        batch invariance, which kernels computed them."""

        def fields() -> dict[str, Any]:
            forced = {"linear": linear_choice.override.name, "attention": attention_choice.override.name}
            forced["graphs"] = os.environ.get("LENS_GRAPHS")
            why = batch_invariance.why_library_gemm_of_model(self.model) if invariant else ""
            said = {"gemms": f"library, sample by sample: {why}" if why else "ours"} if invariant else {}
            forced = {k: v for k, v in forced.items() if v}
            return {"forced": forced, "by_measured_orders": self.by_measured_orders(), **said}

        return fields

    def by_measured_orders(self) -> bool:
        """Whether a committed result ordered both kernels of every GEMM for this device and the rows of a step."""
        model, rows = self.model, sum(self.images) + sum(self.texts)
        config = model.config
        calls = linear_choice.gemm_calls(config.block_gemms, config.attention_head_dim, model.device, model.dtype, rows)
        return all("fused" in linear_choice.order(call) for call in calls)

    def ours(self, index: int) -> Callable[..., Tensor]:
        """Op by op, the host launching each."""
        rows = torch.full((len(self.texts),), index, device=self.device)
        offsets = self.packing.image_offsets[: self.batch + 1].contiguous()
        delta = torch.tensor([DELTA] * self.batch, device=self.device)

        def step(x: Tensor, features: list[Tensor], text: Tensor) -> Tensor:
            velocity = self.model.denoise(
                x.to(self.model.dtype).repeat(1 + self.guided, 1),
                text.repeat(self.batch, 1),
                self.table.rows(rows),
                self.packing,
            )
            c, u = velocity[: len(x)], velocity[len(x) :] if self.guided else None
            return ops.guidance_step(x, c, u, delta, self.guidance, offsets)

        return step

    def reference(self, index: int, compile: bool = False, wide: bool = False) -> Callable[..., Tensor]:
        """Comparator (a), or (b) with `compile`; with `wide` in the oracle's dtype, on copies of the weights."""
        model = self.model
        if wide:
            model = copy.deepcopy(self.model).to(wider(self.scale.dtype))
        reference = Reference(model, compile)
        time = self.time[index].to(self.device)
        mask = torch.ones(len(self.texts), self.text, dtype=torch.bool, device=self.device)
        mask[self.batch :] = False
        delta = torch.tensor(DELTA, device=self.device)

        def step(x: Tensor, features: list[Tensor], text: Tensor) -> Tensor:
            padded = [torch.stack([f if n else torch.zeros_like(f) for n in self.texts]) for f in features]
            x = x.to(torch.promote_types(x.dtype, model.dtype)).unflatten(0, (self.batch, -1))
            return reference_step(reference, x, padded, mask, time, delta, self.guidance, self.grid).flatten(0, 1)

        return step

    def exact_call(self, exact: Exact, index: int, text: Tensor) -> tuple[Any, ...]:
        """What `Exact.forward` takes after the image rows, at one step of the schedule."""
        table = self.table
        lengths = (tuple(self.images), tuple(self.texts))
        if self._rotation is None:
            self._rotation = exact.tables([self.grid] * len(self.texts), self.texts, self.scale.dtype)
        return (
            text.repeat(self.batch, 1),
            table.blocks[index][..., None, :],
            table.final[index][:, None],
            self._rotation,
            lengths,
        )

    def exact(self, index: int, compile: bool = True) -> Callable[..., Tensor]:
        """Comparator (c)."""
        exact = Exact(self.model, compile)
        delta = torch.tensor(DELTA, device=self.device)

        def step(x: Tensor, features: list[Tensor], text: Tensor) -> Tensor:
            return exact_step(exact, x, self.guidance, delta, *self.exact_call(exact, index, text))

        return step


def checked(inputs: Sequence[Any], model: torch.nn.Module) -> list[Tensor]:
    """What of a case must not be constant: every matrix of the model."""
    return [p for p in model.parameters() if p.dim() > 1]
