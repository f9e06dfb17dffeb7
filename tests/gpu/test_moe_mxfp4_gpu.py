"""The packed mixture of experts on a device, against the specification computed there: every tile size, bits, captures."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lens import ops
from lens.ops import backend, reference
from tests.emulation.test_moe_mxfp4_kernels import SHAPES, every_byte_under_every_scale, made
from tests.ops.harness import Inputs, error, same_bits

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# GPT-OSS-20B's layer on a token, four of them, a prompt and several: tiles of 8, 8, 32 and 64 rows
SANITIZED = ("few, more groups than the ring", "few, experts without rows", "some", "many, odd")
RELEASED = {rows: (rows, 2880, 2880, 32, 4) for rows in (1, 4, 160, 700)}


def on_device(given: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    return {
        name: x.to(DEVICE, dtype if x.is_floating_point() else None) if isinstance(x, Tensor) else x
        for name, x in given.items()
    }


def run(**given: object) -> Tensor:
    with backend.use("compiled"), torch.no_grad():
        return ops.moe_mxfp4(**given)


def held_to_the_spec(given: Inputs) -> Tensor:
    moved = on_device(given)
    exact = reference.moe_mxfp4(**on_device(given, torch.float64))
    spec, got = reference.moe_mxfp4(**moved), run(**moved)
    rounding = 2**-7 * exact.abs().max().item() if exact.numel() else 0.0
    assert got.isfinite().all()
    assert error(got, exact) <= 2 * error(spec, exact) + rounding
    return got


@pytest.mark.parametrize("name", SANITIZED)
def test_narrow(name):
    held_to_the_spec(made(SHAPES[name]))


@pytest.mark.parametrize("name", [name for name in SHAPES if name not in SANITIZED])
def test_ragged(name):
    held_to_the_spec(made(SHAPES[name]))


@pytest.mark.parametrize("rows", RELEASED)
def test_released_layer(rows):
    held_to_the_spec(made(RELEASED[rows]))


@pytest.mark.parametrize("rows", [4, 16, 256], ids=["few", "some", "many"])
def test_every_byte_under_every_scale(rows):
    every_byte_under_every_scale(lambda **given: run(**on_device(given)).cpu(), rows)


def test_a_row_is_the_same_alone_and_in_company_and_run_after_run():
    """In tiles of 64, of 32 and of 8 rows."""
    given = on_device(made(RELEASED[700]))
    whole = run(**given)
    for _ in range(20):
        assert same_bits(run(**given), whole)
    for some in (slice(0, 1), slice(5, 9), slice(100, 260), torch.randperm(700, device=DEVICE)):
        assert same_bits(run(**{**given, "x": given["x"][some].contiguous()}), whole[some])


def test_equal_logits_choose_the_first_experts_and_nan_stays():
    given = on_device(made((3, 64, 64, 5, 3)))
    given["router_weight"].zero_()
    given["router_bias"].copy_(torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0]))
    got = held_to_the_spec(given)
    given["x"][1, 5] = math.nan
    spoilt = run(**given)
    assert same_bits(spoilt[[0, 2]], got[[0, 2]])
    assert spoilt[1].isnan().all()


def test_launches_can_be_captured():
    """A graph replays with other rows, which choose other experts: nothing about them is decided on the host."""
    given = on_device(made(RELEASED[4]))
    run(**given)  # loads the kernels, which capture forbids
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(**given)
    given["x"].copy_(torch.randn_like(given["x"]))
    graph.replay()
    torch.cuda.synchronize()
    assert same_bits(captured, run(**given))
