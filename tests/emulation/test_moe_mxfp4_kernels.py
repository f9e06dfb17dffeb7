"""The CUDA kernels of the packed mixture of experts under the emulator, against the specification.

bfloat16 alone. The launcher takes tiles of 64 rows for over 24 pairs an expert, of 32 for over 4, else of 8.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lens import ops
from lens.ops import backend, reference
from tests.emulation import emulator
from tests.ops import harness
from tests.ops.harness import Inputs, compiled, same_bits
from tests.ops.test_moe_mxfp4 import cast, inputs, weights_of_one_group

SEED, OTHER_SEED = 20, 21
# rows, D, F, experts, experts of a row: odd counts of experts and of groups, more columns than a tile and less, experts
# without rows, more groups than the ring holds; in tiles of 8, of 32 and of 64 rows
SHAPES = {
    "few": (6, 96, 64, 5, 3),
    "few, one row, one expert": (1, 64, 32, 1, 1),
    "few, experts without rows": (2, 32, 64, 40, 1),
    "few, all experts": (4, 32, 160, 7, 7),
    "few, more groups than the ring": (3, 36 * 32, 32, 3, 2),
    "no rows": (0, 64, 64, 4, 2),
    "some": (20, 160, 32, 2, 1),
    "some, more groups than the ring": (30, 18 * 32, 96, 5, 2),
    "many": (70, 64, 96, 3, 2),
    "many, odd": (67, 160, 32, 1, 1),
    "many, more groups than the ring": (40, 18 * 32, 64, 1, 1),
}


def made(shape: tuple[int, ...], seed: int = 0) -> Inputs:
    return cast(inputs(*shape, seed=seed), torch.bfloat16)


def held_to_the_spec(given: Inputs) -> Tensor:
    with compiled():
        got = ops.moe_mxfp4(**given)
    harness.within_limits("moe_mxfp4", given, torch.bfloat16, {"output 0": got})
    return got


@pytest.mark.parametrize("name", SHAPES)
def test_against_spec(emulated, name):
    given = made(SHAPES[name])
    emulated.seed = SEED
    first = held_to_the_spec(given)
    emulated.seed = OTHER_SEED
    with compiled():
        assert same_bits(ops.moe_mxfp4(**given), first)  # whatever the order of threads and blocks


def test_errors_as_documented_stay_inside_the_limits(emulated):
    for emulated.errors in (1, 2):
        held_to_the_spec(made(SHAPES["few"]))


def every_byte_under_every_scale(call: Callable[..., Tensor], rows: int, columns: int = 256) -> None:
    """A hidden column per scale, a row per input, as large as the scale is small; the gate is constant, so that hidden =
    (weight x + 1) sigmoid(alpha). The second weight sums up 32 hidden columns' ones: exact but for bfloat16. rows: of a
    call; columns: of hidden ones, the first."""
    width, hidden = 32, 256
    scale = torch.tensor([*range(255), 127], dtype=torch.uint8)  # 255: below
    column = torch.arange(hidden)
    byte = torch.arange(256, dtype=torch.uint8).view(16, 16)[(column + column // 16) % 16]
    blocks, exponents = torch.zeros(1, 2 * hidden, 1, 16, dtype=torch.uint8), torch.full((1, 2 * hidden, 1), 127)
    blocks[0, 1::2, 0], exponents[0, 1::2, 0] = byte, scale.long()
    bias = torch.zeros(1, 2 * hidden).bfloat16()
    bias[0, ::2] = 1
    exact = weights_of_one_group(byte, scale)
    power = torch.exp2(127 - scale.double()).clamp(2.0**-120, 2.0**120)
    nothing = torch.zeros(1, width).bfloat16()

    def run(x: Tensor, first: int) -> Tensor:
        down = torch.zeros(1, width, hidden // 32, 16, dtype=torch.uint8)
        for i in range(width):
            down[0, i, first // 32, i // 2] = 2 << 4 * (i % 2)
        ones = torch.full((1, width, hidden // 32), 127, dtype=torch.uint8)
        settings = dict(top_k=1, alpha=1.702, limit=1e4)
        tensors = (x.bfloat16(), nothing, nothing[:, 0], blocks, exponents.byte(), bias, down, ones, nothing)
        return call(**dict(zip(inputs(1, 32, 32, 1, 1), tensors)), **settings)

    for first in range(0, columns, width):
        own, powers = exact[first : first + width], power[first : first + width]
        for input in range(0, 32, 8):  # rows (column, input), of eight inputs
            some = torch.eye(32, dtype=torch.float64)[input : input + 8]
            x = (powers[:, None, None] * some).flatten(0, 1)
            got = torch.cat([run(part, first) for part in x.split(rows)])
            got = got.view(width, 8, width).diagonal(dim1=0, dim2=2).T.double()
            wanted = (own[:, input : input + 8] * powers[:, None] + 1) * torch.sigmoid(torch.tensor(1.702)).double()
            assert ((got - wanted).abs() <= 4 * 2**-7 * wanted.abs()).all(), (first, input)
    exponents[0, 77] = 255
    assert run(torch.ones(1, width), 0).isnan().all()


@pytest.mark.parametrize(("rows", "columns"), [(4, 32), (16, 32), (256, 256)], ids=["few", "some", "many"])
def test_every_byte_under_every_scale(emulated, rows, columns):
    with compiled():
        every_byte_under_every_scale(ops.moe_mxfp4, rows, columns)


@pytest.mark.parametrize("shape", [(53, 64, 96, 3, 2), (11, 96, 64, 4, 3)], ids=["many", "some"])
def test_a_row_is_the_same_alone_and_in_company(emulated, shape):
    """Any number of rows of an expert, in any order, in tiles of either size."""
    given = made(shape)
    with compiled():
        whole = ops.moe_mxfp4(**given)
        rows = shape[0]
        for seed, some in enumerate((slice(0, 1), slice(3, 5), slice(1, 11), slice(2, rows), torch.randperm(rows))):
            emulated.seed = seed
            assert same_bits(ops.moe_mxfp4(**{**given, "x": given["x"][some].contiguous()}), whole[some])


def test_equal_logits_choose_the_first_experts_and_nan_stays(emulated):
    given = made((3, 64, 64, 5, 3))
    given["router_weight"].zero_()
    given["router_bias"] = torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0]).bfloat16()
    assert reference.route(given["x"], given["router_weight"], given["router_bias"], 3)[0].tolist() == [[1, 4, 0]] * 3
    got = held_to_the_spec(given)
    given["x"][1, 5] = math.nan
    with compiled():
        spoilt = ops.moe_mxfp4(**given)
    assert same_bits(spoilt[[0, 2]], got[[0, 2]])
    assert spoilt[1].isnan().all()


@pytest.mark.parametrize("rows", [8, 16, 17])
def test_one_of_many_experts_has_all_rows(emulated, rows):
    """Its tiles are full, all others have none."""
    given = made((rows, 64, 64, 40, 1))
    given["router_weight"].zero_()
    given["router_bias"][7] = 100
    held_to_the_spec(given)


@pytest.mark.parametrize(
    "bias", [[-0.0, 0.0, 0.0, -0.0], [-1.0, -3.0, -2.0, -1.0], [math.inf, 1.0, -math.inf, 2.0]], ids=str
)
def test_order_of_logits(emulated, bias):
    """Zeros of either sign are equal, negative ones in order, infinities at the ends."""
    given = made((2, 32, 32, 4, 3))
    given["router_weight"].zero_()
    given["router_bias"] = torch.tensor(bias).bfloat16()
    with compiled():
        got = ops.moe_mxfp4(**given)
    torch.testing.assert_close(got, reference.moe_mxfp4(**given), rtol=2**-6, atol=2**-6, equal_nan=True)


def test_refusals(emulated):
    """What the kernels do not serve is an error of its own."""
    with compiled(), pytest.raises(emulator.EmulationError, match="801"):
        ops.moe_mxfp4(**cast(inputs(2, 64, 64, 3, 2), torch.float32))
    given = made((2, 64, 64, 3, 2))
    room = torch.empty(given["x"].numel() + 1, dtype=torch.bfloat16)
    given["x"] = room[1:].view(2, 64).copy_(given["x"])  # off its 16 bytes
    with compiled(), pytest.raises(emulator.EmulationError, match="801"):
        ops.moe_mxfp4(**given)


def test_a_gpu_runs_the_kernel_for_bfloat16_alone(monkeypatch):
    monkeypatch.setattr(backend, "_with_cuda", True)
    monkeypatch.setattr(backend, "no_target", lambda index: "")

    class OnGpu:
        device = torch.device("cuda:0")
        dtype = torch.bfloat16

    chosen = OnGpu()
    assert backend.choose("moe_mxfp4", chosen) == "cuda"
    chosen.dtype = torch.float32
    assert backend.choose("moe_mxfp4", chosen) == "reference"
    assert backend.choose("swiglu", chosen) == "cuda"
    with backend.use("cuda"), pytest.raises(RuntimeError, match="multiplies bfloat16 alone"):
        backend.choose("moe_mxfp4", chosen)
