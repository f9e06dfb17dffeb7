import math

import pytest
import torch

from lens import ops
from lens.ops import backend
from tests.ops import harness
from tests.ops.harness import Inputs, Maker, compiled, same_bits

OP = "swiglu"
SHAPES = [(700, 4096), (45, 341), (3, 7), (1, 1), (5, 64), (0, 341)]


def inputs(rows: int, hidden: int, spread: float = 3.0) -> Inputs:
    h = Maker()(rows, 2 * hidden, grad=False) * spread
    return {"h": h.requires_grad_()}


@harness.every_isa_and_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_spec(shape, dtype, isa):
    harness.against_spec(OP, inputs(*shape), dtype, isa)


@pytest.mark.parametrize("isa", harness.ISAS)
def test_the_whole_range_of_the_exponential(isa):
    """silu over every magnitude: the relative error of e^x stays at rounding level, the ends are exact limits."""
    a = torch.cat([torch.linspace(-87, 88, 20011), torch.linspace(-1, 1, 1001), torch.logspace(-30, 38, 500)])
    h = torch.stack([torch.cat([a, -a]), torch.ones(2 * a.numel())], 1).reshape(-1, 2)
    exact = torch.nn.functional.silu(h[:, 0].double())
    with compiled(isa):
        got = ops.swiglu(h)[:, 0].double()
    normal = exact.abs() > 1e-37
    relative = ((got - exact).abs() / exact.abs().clamp(min=1e-300))[normal]
    assert relative.max() < 6e-7
    assert (got - exact).abs()[~normal].max() < 1e-37

    ends = torch.tensor([[0.0, 1], [-0.0, 1], [1e4, 1], [-1e4, 1], [math.inf, 2], [math.nan, 1], [1, math.nan]])
    with compiled(isa):
        got = ops.swiglu(ends)[:, 0]
    assert got[:5].tolist() == [0.0, 0.0, 1e4, 0.0, math.inf]
    assert got[5:].isnan().all()


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_a_row_does_not_see_its_batch(dtype):
    made = harness.cast(inputs(45, 341), dtype)
    with compiled():
        whole = harness.results(ops.swiglu, made)
        for row in (0, 1, 31, 44):
            poisoned = torch.full_like(made["h"], float("nan"))
            poisoned[row] = made["h"].detach()[row]
            assert same_bits(ops.swiglu(poisoned)[row], whole["output 0"][row])
            assert same_bits(ops.swiglu(poisoned[row : row + 1].clone())[0], whole["output 0"][row])


@pytest.mark.parametrize("isa", harness.ISAS)
@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_a_columns_place_does_not_change_its_bits(dtype, isa):
    """The last columns of a row pass through the same arithmetic as the first ones."""
    column = harness.cast(inputs(64, 1), dtype)["h"].detach()
    if isa in backend.available_isas():
        with compiled(isa):
            expected = ops.swiglu(column)
            for hidden in (2, 5, 16, 37):
                spread = column.repeat_interleave(hidden, dim=1)
                assert same_bits(ops.swiglu(spread), expected.expand(64, hidden))


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_threads_and_alignment(dtype):
    harness.whatever_the_threads(OP, inputs(333, 129), dtype)
    harness.wherever_it_lies(OP, inputs(9, 341), dtype)


def test_strides_gradients_and_contracts():
    harness.contiguous_or_not(OP, inputs(5, 24))
    harness.gradcheck(OP, inputs(3, 5))
    made = harness.cast(inputs(5, 24), torch.float32)
    torch.library.opcheck(torch.ops.lens.swiglu.default, (made["h"],))
    h = made["h"].detach()
    torch.library.opcheck(torch.ops.lens.swiglu_backward.default, (h[:, :24], h))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"h": torch.zeros(48)}, "h must be [R, 2 F], got [48]"),
        ({"h": torch.zeros(5, 47)}, "h must be [R, 2 F] with F at least 1, got [5, 47]"),
        ({"h": torch.zeros(5, 0)}, "h must be [R, 2 F] with F at least 1, got [5, 0]"),
        ({"h": torch.zeros(5, 48).half()}, "h must be float32, bfloat16 or float64, got float16"),
    ],
)
def test_refusals(changes, message):
    harness.refuses(OP, inputs(5, 24), changes, message)
