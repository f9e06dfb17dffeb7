from itertools import pairwise

import pytest
import torch

from lens import ops
from tests.ops import harness
from tests.ops.harness import LENGTHS, Inputs, Maker, compiled, offsets_of, same_bits

OP = "gated_residual"
WIDTHS = [1536, 341, 7]


def inputs(lengths: list[int], width: int, seed: int = 0) -> Inputs:
    make = Maker(seed)
    (gate,) = make.modulation(len(lengths), width, 1)
    x, y = make(sum(lengths), width), make(sum(lengths), width)
    return {"x": x, "y": y, "gate": gate, "offsets": offsets_of(lengths)}


@harness.every_isa_and_dtype
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_against_spec(lengths, width, dtype, isa):
    harness.against_spec(OP, inputs(lengths, width), dtype, isa)


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_a_sample_does_not_see_its_batch(dtype):
    made = harness.cast(inputs(LENGTHS["ragged"], 341), dtype)
    offsets = made["offsets"].tolist()
    with compiled():
        whole = harness.results(ops.gated_residual, made)
        for b, (start, stop) in enumerate(pairwise(offsets)):
            alone = {name: made[name].detach()[start:stop].clone().requires_grad_() for name in ("x", "y")}
            alone["gate"] = made["gate"].detach()[b : b + 1].clone().requires_grad_()
            alone["offsets"] = offsets_of([stop - start])
            assert same_bits(ops.gated_residual(**alone), whole["output 0"][start:stop])
            poisoned = {name: value.detach().clone() for name, value in made.items()}
            poisoned["gate"][torch.arange(len(offsets) - 1) != b] = float("nan")
            poisoned["x"][:start] = poisoned["y"][stop:] = float("nan")
            assert same_bits(ops.gated_residual(**poisoned)[start:stop], whole["output 0"][start:stop])


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_threads_and_alignment(dtype):
    harness.whatever_the_threads(OP, inputs([700, 0, 333], 96), dtype)
    harness.wherever_it_lies(OP, inputs([5, 9], 341), dtype)


def test_strides_gradients_and_contracts():
    harness.contiguous_or_not(OP, inputs([5, 9], 24))
    harness.gradcheck(OP, inputs([2, 0, 3], 5))
    made = harness.cast(inputs([5, 9], 24), torch.float32)
    torch.library.opcheck(torch.ops.lens.gated_residual.default, tuple(made.values()))
    made = {name: value.detach() for name, value in made.items()}
    arguments = (made["x"], made["y"], made["gate"], made["offsets"])
    torch.library.opcheck(torch.ops.lens.gated_residual_backward.default, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(14, 2, 12)}, "x must be [R, D], got [14, 2, 12]"),
        ({"x": torch.zeros(14, 24, dtype=torch.int32)}, "x must be float32, bfloat16 or float64, got int32"),
        ({"y": torch.zeros(13, 24)}, "y must be [R, D] = [14, 24], got [13, 24]"),
        ({"y": torch.zeros(14, 24).double()}, "y must be float32, got float64"),
        ({"gate": torch.zeros(24)}, "gate must be [B, D] = [2, 24], got [24]"),
        ({"gate": torch.zeros(2, 24).bfloat16()}, "gate must be float32, got bfloat16"),
        ({"offsets": torch.zeros(2, 2, dtype=torch.int32)}, "offsets must be [B + 1], got [2, 2]"),
    ],
)
def test_refusals(changes, message):
    harness.refuses(OP, inputs([5, 9], 24), changes, message)


def test_refuses_offsets():
    made = harness.cast(inputs([5, 9], 24), torch.float32)
    with compiled(), pytest.raises(ValueError, match=r"lens.gated_residual: offsets must rise from 0 to R = 14"):
        ops.gated_residual(**{**made, "offsets": torch.tensor([0, 5, 15], dtype=torch.int32)})
