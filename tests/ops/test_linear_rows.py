"""The GEMM of CPUs with AMX against float64, and which calls it serves."""

import math

import pytest
import torch
from torch import nn

from lens import ops
from lens.ops import backend, linear_rows, reference
from lens.ops.linear import choice as linear_choice
from lens.ops.linear import fused
from lens.ops.linear_rows import panels_of
from tests.ops import harness
from tests.ops.harness import compiled, same_bits

needs_amx = pytest.mark.skipif("amx" not in backend.available_isas(), reason="this CPU has no amx")
# rows, inputs, outputs: tiles, panels and groups of panels that are not full, single ones, odd numbers
SHAPES = [(1, 1, 1), (3, 31, 33), (16, 32, 32), (47, 100, 50), (49, 64, 700), (200, 384, 1100), (64, 7, 9), (0, 40, 3)]


def inputs(rows, width, outputs, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = [torch.randn(*shape, generator=g) for shape in ((rows, width), (outputs, width), (outputs,))]
    return [made[0].bfloat16(), (made[1] * width**-0.5).bfloat16(), made[2].bfloat16()]


@needs_amx
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, biased):
    x, weight, bias = inputs(*shape)
    given = (x, weight, bias if biased else None)
    exact = reference.linear(*(None if t is None else t.double() for t in given))
    with compiled("amx"):
        got = linear_rows(*given)
    assert got.dtype == torch.bfloat16
    assert got.shape == exact.shape
    scale = exact.abs().max().item() if exact.numel() else 0.0
    spec = harness.error(reference.linear(*given).bfloat16(), exact)
    assert harness.error(got, exact) <= 2 * spec + torch.finfo(torch.bfloat16).eps * scale / 64


@needs_amx
def test_a_row_is_the_same_alone_and_in_company():
    """In any number of rows at any place, by one thread or three, whatever panels a thread takes."""
    x, weight, bias = inputs(131, 200, 900)
    before = torch.get_num_threads()
    with compiled("amx"):
        whole = linear_rows(x, weight, bias)
        try:
            for threads in (1, 3):
                torch.set_num_threads(threads)
                for rows in (slice(0, 1), slice(40, 95), slice(5, 131), torch.randperm(131)):
                    assert same_bits(linear_rows(x[rows], weight, bias), whole[rows])
                assert same_bits(linear_rows(x, weight[100:300], bias[100:300]), whole[:, 100:300])
        finally:
            torch.set_num_threads(before)
    assert panels_of(900, 200, 1) > panels_of(900, 200, 3)


@needs_amx
def test_nan_and_infinity_stay_in_their_rows():
    x, weight, bias = inputs(40, 96, 64)
    with compiled("amx"):
        clean = linear_rows(x, weight, bias)
        x[7, 3], x[9, 5] = math.nan, math.inf
        got = linear_rows(x, weight, bias)
    assert got[7].isnan().all()
    assert not got[9].isfinite().any()
    others = torch.ones(40, dtype=torch.bool)
    others[[7, 9]] = False
    assert same_bits(got[others], clean[others])


@needs_amx
def test_arguments_that_lie_anywhere():
    x, weight, bias = inputs(20, 64, 40)
    with compiled("amx"):
        expected = linear_rows(x, weight, bias)
        room = torch.empty(weight.numel() + 4, dtype=torch.bfloat16)
        for shift in (1, 4):  # weights of a mapped file lie on 8 bytes
            moved = room[shift : shift + weight.numel()].view(weight.shape).copy_(weight)
            assert same_bits(linear_rows(x, moved, bias), expected)
        spread = [t.repeat_interleave(2, -1)[..., ::2] for t in (x, weight, bias)]
        assert same_bits(linear_rows(*spread), expected)


@needs_amx
def test_which_calls_it_serves(monkeypatch):
    """bfloat16 rows of plain layers, where nothing is recorded, forced or hooked; a sample has its bits in any batch."""
    x, weight, bias = inputs(50, 64, 96)
    layer = nn.Linear(64, 96).bfloat16().requires_grad_(False)
    layer.weight.copy_(weight)
    layer.bias.copy_(bias)
    served = []
    monkeypatch.setattr(fused, "linear_rows", lambda *given: served.append(1) or linear_rows(*given))

    def count(call):
        served.clear()
        call()
        return len(served)

    with compiled("amx"):
        assert same_bits(fused.linear(layer, x, [20, 30])[20:], fused.linear(layer, x[20:]))
        assert count(lambda: fused.linear(layer, x)) == 1
        assert count(lambda: fused.linear(layer.float(), x.float())) == 0
        layer.bfloat16()
        assert count(lambda: fused.linear(lambda rows: layer(rows), x)) == 0
        with linear_choice.override.use("library"):
            assert count(lambda: fused.linear(layer, x)) == 0
        assert count(lambda: fused.linear(layer, x.clone().requires_grad_())) == 0
        with torch.no_grad():
            assert count(lambda: fused.linear(layer, x.clone().requires_grad_())) == 1
        handle = layer.register_forward_hook(lambda *_: None)
        assert count(lambda: fused.linear(layer, x)) == 0
        handle.remove()
    with compiled("avx512"):
        assert count(lambda: fused.linear(layer, x)) == 0
    with backend.use("reference"):
        assert count(lambda: fused.linear(layer, x)) == 0


def test_without_amx_it_says_so():
    x, weight, bias = inputs(2, 8, 4)
    with backend.use_isa("base"), pytest.raises(RuntimeError, match=r"lens\.linear_rows: needs a CPU with AMX"):
        linear_rows(x, weight, bias)
    with backend.use("reference"):
        assert same_bits(linear_rows(x, weight, bias), reference.linear(x, weight, bias).bfloat16())


@needs_amx
def test_operator_contract():
    given = inputs(5, 40, 9)
    with compiled("amx"):
        torch.library.opcheck(torch.ops.lens.linear_rows.default, tuple(given))
        with pytest.raises(RuntimeError):
            linear_rows(given[0].requires_grad_(), *given[1:]).sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 7).bfloat16()}, "weight must be [N, K] = [4, 7], got [4, 8]"),
        ({"x": torch.zeros(2, 8)}, "x must be bfloat16 on the CPU, got float32 on cpu"),
        ({"weight": torch.zeros(4, 8)}, "weight must be bfloat16, got float32"),
        ({"weight": torch.zeros(0, 8).bfloat16()}, "weight must have at least one output, got none"),
        ({"bias": torch.zeros(5).bfloat16()}, "bias must be [N] = [4], got [5]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(changes, message):
    given = dict(zip(("x", "weight", "bias"), inputs(2, 8, 4), strict=True))
    with pytest.raises(ValueError) as refusal:
        ops.linear_rows(**{**given, **changes})
    assert str(refusal.value).startswith("lens.linear_rows: ")
    assert message in str(refusal.value)
