"""The transformer as one call, every kernel of it emulated, against the model in float64 and op by op."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lens import LensConfig, LensTransformer2DModel
from lens.modulation import Modulation
from lens.ops import backend
from lens.ops.denoise_step import DenoiseStep
from lens.packing import Packing, plan

# heads of 64, columns in multiples of 64 (512 hidden), two blocks: one whose text goes on, one whose text ends
CONFIG = LensConfig(num_layers=2, num_attention_heads=3, enc_hidden_dim=64, selected_layer_index=(0,))
SAMPLES = {
    "unequal text": ([(5, 7), (4, 4)], [9, 70]),
    "one half without": ([(5, 7), (5, 7)], [0, 33]),
    "no text": ([(3, 5), (8, 9)], [0, 0]),
}


def model(dtype: torch.dtype = torch.bfloat16) -> LensTransformer2DModel:
    """Random weights whose branches matter: norms and biases away from 1 and 0."""
    made = LensTransformer2DModel(CONFIG).eval().requires_grad_(False)
    g = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        fresh = torch.randn(parameter.shape, generator=g)
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
        parameter.copy_(fresh * scale + (1.0 if parameter.dim() == 1 and bool((parameter == 1).all()) else 0.0))
    return made.bfloat16().to(dtype)


@dataclasses.dataclass
class Inputs:
    packing: Packing
    image: Tensor
    text: Tensor
    modulation: Modulation

    def to(self, dtype: torch.dtype) -> Inputs:
        p, angle = self.packing, torch.float64 if dtype == torch.float64 else torch.float32
        packing = dataclasses.replace(p, cos=p.cos.to(angle), sin=p.sin.to(angle))
        modulation = Modulation(self.modulation.blocks.to(dtype), self.modulation.final.to(dtype))
        return Inputs(packing, self.image.to(dtype), self.text.to(dtype), modulation)


def inputs(case: str) -> Inputs:
    grids, texts = SAMPLES[case]
    g = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g).bfloat16()

    packing, width = plan(grids, texts, CONFIG.axes_dims_rope), CONFIG.inner_dim
    table = Modulation(normal(len(grids), CONFIG.num_layers, 2, 6, width) * 0.5, normal(len(grids), 2, width) * 0.5)
    rows = sum(packing.image_lengths), sum(packing.text_lengths)
    return Inputs(packing, normal(rows[0], CONFIG.in_channels), normal(rows[1], width), table)


def plainly(model: LensTransformer2DModel, given: Inputs) -> Tensor:
    with backend.use("reference"):
        return model.denoise(given.image, given.text, given.modulation, given.packing)


@contextlib.contextmanager
def on_device(model: LensTransformer2DModel, library: ctypes.CDLL) -> Iterator[None]:
    """The blocks' weights, which the call knows by address alone, lie in guarded buffers; none is written or left."""
    held = []
    for name, parameter in model.blocks.named_parameters():
        count = parameter.numel()
        address = library.lens_emulation_allocate(name.encode(), 2 * count, 0)
        there = torch.frombuffer((ctypes.c_uint8 * (2 * count)).from_address(address), dtype=torch.bfloat16)
        held.append((address, there, parameter, parameter.data))
        parameter.data = there.view(parameter.shape).copy_(parameter.data)
    try:
        yield
    finally:
        for address, there, parameter, before in held:
            assert torch.equal(there, before.flatten())
            parameter.data = before
            assert not library.lens_emulation_free(address)


def whole(model: LensTransformer2DModel, given: Inputs) -> Tensor:
    """By the one call, from memory that holds NaN."""
    step = DenoiseStep(model, given.packing, 1e-6)
    for buffer in (step.workspace, step.image_rows, step.modulation, step.final_modulation):
        buffer.fill_(torch.nan)
    samples = torch.arange(len(given.packing.grids))
    step.take(given.image.float(), given.modulation, samples - 1, torch.ones(1, dtype=torch.int64))
    velocity = torch.full_like(given.image, torch.nan)
    step.run(given.text, velocity)
    return velocity


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("case", SAMPLES)
def test_the_whole_transformer(emulated, case):
    """Error against float64 at most twice that of the model run op by op in bfloat16."""
    emulated.seed = 3
    given = inputs(case)
    with torch.no_grad():
        exact, own = plainly(model(torch.float64), given.to(torch.float64)), plainly(model(), given)
        ours = model()
        with on_device(ours, emulated.library):
            got = whole(ours, given)
    assert emulated.calls == ["denoise_step"]
    assert relative(own, exact) > 1e-4
    assert relative(got, exact) <= 2 * relative(own, exact)
