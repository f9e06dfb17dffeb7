"""The packed mixture of experts against its specification, and the specification against the format's definition."""

import math

import pytest
import torch

from lens import ops
from lens.ops import backend, reference
from tests.ops import harness
from tests.ops.harness import compiled, same_bits

OP = "moe_mxfp4"
ISAS = [*harness.ISAS, "avx512bf16", "amx"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
# rows, D, F, experts, experts of a row: odd counts of experts, tiles that are not full, more rows than a block holds
SHAPES = [(7, 96, 64, 5, 3), (1, 64, 32, 1, 1), (45, 32, 160, 7, 7), (0, 64, 64, 4, 2), (230, 288, 160, 3, 2)]
PACKED = ("gate_up_blocks", "gate_up_scales", "down_blocks", "down_scales")
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def inputs(rows, width, hidden, experts, top_k, seed=0):
    """In float64, of values that bfloat16 holds; scales as in a trained checkpoint, about 1 / sqrt(width)."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).bfloat16().double()

    def packed(outputs, inputs):
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=g, dtype=torch.uint8)
        low = 127 - round(math.log2(3 * inputs**0.5))
        scales = torch.randint(low - 2, low + 2, (experts, outputs, inputs // 32), generator=g, dtype=torch.uint8)
        return blocks, scales

    gate_up_blocks, gate_up_scales = packed(2 * hidden, width)
    down_blocks, down_scales = packed(width, hidden)
    return {
        "x": normal(rows, width, scale=3.0),
        "router_weight": normal(experts, width, scale=width**-0.5),
        "router_bias": normal(experts),
        "gate_up_blocks": gate_up_blocks,
        "gate_up_scales": gate_up_scales,
        "gate_up_bias": normal(experts, 2 * hidden),
        "down_blocks": down_blocks,
        "down_scales": down_scales,
        "down_bias": normal(experts, width),
        "top_k": top_k,
        "alpha": 1.702,
        "limit": 7.0,
    }


def cast(given, dtype):
    return {
        k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()
    }  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_spec(shape, dtype, isa):
    given = cast(inputs(*shape), DTYPES[dtype])
    with compiled(isa):
        got = {"output 0": ops.moe_mxfp4(**given)}
    harness.within_limits(OP, given, DTYPES[dtype], got, conditioned=True)


def weights_of_one_group(blocks, scales):
    """[G, 32] float64, value by value from the definition of the format."""
    out = torch.empty(len(blocks), 32, dtype=torch.float64)
    for g, (row, scale) in enumerate(zip(blocks.tolist(), scales.tolist())):
        for i in range(32):
            bits = row[i // 2] >> 4 * (i % 2) & 15
            value = (-1) ** (bits >> 3) * E2M1[bits & 7]
            out[g, i] = math.nan if scale == 255 else value * 2.0 ** (scale - 127)
    return out


def test_the_specification_decodes_every_byte_under_every_scale():
    blocks = torch.arange(256, dtype=torch.uint8).view(16, 16).repeat(16, 1)
    scales = torch.arange(256, dtype=torch.uint8)
    for turn in range(16):  # each row of bytes meets each scale
        turned = blocks.roll(turn, 0)
        exact = weights_of_one_group(turned, scales)
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            expected = exact.to(dtype)  # exact but beyond the largest number
            got = reference.mxfp4(turned[:, None], scales[:, None], dtype)
            assert same_bits(got, expected)
            assert (got[:253].double() == exact[:253]).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scales", [range(256), range(64, 191)], ids=["all", "ordinary"])
def test_the_kernels_decode_every_byte_under_every_scale(scales, dtype, isa):
    """One hidden column per scale, and a row for each of its 32 inputs, as large as the scale is small.

    The gate is constant (no weights, its bias 1), so hidden = (weight * x + 1) sigmoid(alpha); a second weight of ones
    and zeros reads 32 hidden columns a call.
    """
    kind, width, hidden = DTYPES[dtype], 32, 256
    scale = torch.tensor([*scales][:255] + [127] * (hidden - len([*scales][:255])), dtype=torch.uint8)  # 255: below
    column = torch.arange(hidden)
    byte = torch.arange(256, dtype=torch.uint8).view(16, 16)[(column + column // 16) % 16]
    blocks, exponents = torch.zeros(1, 2 * hidden, 1, 16, dtype=torch.uint8), torch.full((1, 2 * hidden, 1), 127)
    blocks[0, 1::2, 0], exponents[0, 1::2, 0] = byte, scale.long()
    bias = torch.zeros(1, 2 * hidden, dtype=kind)
    bias[0, ::2] = 1
    exact = weights_of_one_group(byte, scale)
    power = torch.exp2(127 - scale.double()).clamp(2.0**-120, 2.0**120)

    def run(x, first):
        down = torch.zeros(1, width, hidden // 32, 16, dtype=torch.uint8)
        for i in range(width):
            down[0, i, first // 32, i // 2] = 2 << 4 * (i % 2)
        ones = torch.full((1, width, hidden // 32), 127, dtype=torch.uint8)
        nothing = torch.zeros(1, width, dtype=kind)
        with compiled(isa):
            return ops.moe_mxfp4(
                x.to(kind), nothing, nothing[:, 0], blocks, exponents.byte(), bias, down, ones, nothing, 1, 1.702, 1e4
            )

    for first in range(0, hidden, width):
        own, inputs = exact[first : first + width], power[first : first + width]
        x = torch.diag_embed(inputs[:, None].expand(width, 32)).flatten(0, 1)  # row (column, input)
        got = run(x, first).view(width, 32, width).diagonal(dim1=0, dim2=2).T.double()
        wanted = (own * inputs[:, None] + 1) * torch.sigmoid(torch.tensor(1.702, dtype=torch.float64))
        assert ((got - wanted).abs() <= 4 * torch.finfo(kind).eps * wanted.abs()).all(), first
    exponents[0, 77] = 255
    assert run(torch.ones(1, width), 0).isnan().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_row_is_the_same_alone_and_in_company(dtype, isa):
    """Any number of rows of an expert, in any order, with one thread or three."""
    given = cast(inputs(53, 64, 96, 3, 2), DTYPES[dtype])
    before = torch.get_num_threads()
    with compiled(isa):
        whole = ops.moe_mxfp4(**given)
        try:
            torch.set_num_threads(3)
            for rows in (slice(0, 1), slice(7, 9), slice(20, 53), torch.randperm(53)):
                assert same_bits(ops.moe_mxfp4(**{**given, "x": given["x"][rows]}), whole[rows])
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
def test_equal_logits_choose_the_first_experts_and_nan_stays(isa):
    given = cast(inputs(3, 64, 64, 5, 3), torch.float32)
    given["router_weight"].zero_()
    given["router_bias"] = torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0])
    experts, _ = reference.route(given["x"], given["router_weight"], given["router_bias"], 3)
    assert experts.tolist() == [[1, 4, 0]] * 3
    with compiled(isa):
        got = ops.moe_mxfp4(**given)
        torch.testing.assert_close(got, reference.moe_mxfp4(**given))
        given["x"][1, 5] = math.nan
        spoilt = ops.moe_mxfp4(**given)
    assert same_bits(spoilt[[0, 2]], got[[0, 2]])
    assert spoilt[1].isnan().all()


def test_operator_contract():
    given = cast(inputs(4, 64, 64, 3, 2), torch.float32)
    with compiled():
        torch.library.opcheck(torch.ops.lens.moe_mxfp4.default, tuple(given.values()))
        with pytest.raises(RuntimeError):
            ops.moe_mxfp4(**{**given, "x": given["x"].requires_grad_()}).sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 48)}, "D must be a multiple of 32, got 48"),
        ({"top_k": 4}, "top_k must be a whole number from 1 to E = 3, got 4"),
        ({"gate_up_bias": torch.zeros(3, 100)}, "F must be a multiple of 32, got 50"),
        ({"down_scales": torch.zeros(3, 64, 3, dtype=torch.uint8)}, "down_scales must be [E, D, F / 32] = [3, 64, 2]"),
        ({"gate_up_blocks": torch.zeros(3, 128, 2, 16)}, "gate_up_blocks must be uint8, got float32"),
        ({"down_bias": torch.zeros(3, 64).double()}, "down_bias must be float32, got float64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(changes, message):
    given = cast(inputs(2, 64, 64, 3, 2), torch.float32)
    for choice in ("compiled", "reference"):
        with backend.use(choice), pytest.raises(ValueError) as refusal:
            ops.moe_mxfp4(**{**given, **changes})
        assert str(refusal.value).startswith("lens.moe_mxfp4: ")
        assert message in str(refusal.value)
