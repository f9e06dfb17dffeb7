from itertools import pairwise

import pytest
import torch

from lens import ops
from tests.ops import harness
from tests.ops.harness import LENGTHS, Inputs, Maker, compiled, offsets_of, same_bits

OP = "gated_residual_norm_modulate"
WIDTHS = [1536, 341, 7]


def inputs(lengths: list[int], width: int, seed: int = 0) -> Inputs:
    make = Maker(seed)
    gate, scale, shift = make.modulation(len(lengths), width, 3)
    x, y, weight = make(sum(lengths), width), make(sum(lengths), width), make(width)
    rows = {"x": x, "y": y, "gate": gate, "weight": weight, "scale": scale, "shift": shift}
    return {**rows, "offsets": offsets_of(lengths)}


@harness.every_isa_and_dtype
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_against_spec(lengths, width, dtype, isa):
    harness.against_spec(OP, inputs(lengths, width), dtype, isa)


@harness.every_isa_and_dtype
def test_equals_the_two_ops_in_a_row(dtype, isa):
    made = harness.cast(inputs(LENGTHS["ragged"], 341), dtype)
    with compiled(isa), torch.no_grad():
        x_new, normed = ops.gated_residual_norm_modulate(**made)
        assert same_bits(x_new, ops.gated_residual(made["x"], made["y"], made["gate"], made["offsets"]))
        again = ops.rms_norm_modulate(x_new, made["weight"], made["scale"], made["shift"], made["offsets"])
        assert same_bits(normed, again)


@pytest.mark.parametrize("used", [0, 1])
def test_gradient_of_one_output(used):
    """The other output's gradient is absent, not zero, when autograd calls."""
    made = harness.cast(inputs([5, 9], 24), torch.float64)
    leaves = [value for value in made.values() if value.requires_grad]
    gradients = []
    for op in (ops.gated_residual_norm_modulate, ops.reference.gated_residual_norm_modulate):
        found = torch.autograd.grad(op(**made)[used].square().sum(), leaves, allow_unused=True)
        gradients.append([torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_a_sample_does_not_see_its_batch(dtype):
    made = harness.cast(inputs(LENGTHS["ragged"], 341), dtype)
    offsets = made["offsets"].tolist()
    with compiled():
        whole = harness.results(ops.gated_residual_norm_modulate, made)
        for b, (start, stop) in enumerate(pairwise(offsets)):
            poisoned = {name: value.detach().clone() for name, value in made.items()}
            for name in ("gate", "scale", "shift"):
                poisoned[name][torch.arange(len(offsets) - 1) != b] = float("nan")
            poisoned["x"][:start] = poisoned["y"][stop:] = float("nan")
            alone = {name: poisoned[name][start:stop].clone() for name in ("x", "y")}
            alone.update({name: poisoned[name][b : b + 1] for name in ("gate", "scale", "shift")})
            alone.update(weight=poisoned["weight"], offsets=offsets_of([stop - start]))
            for i, expected in enumerate((whole["output 0"], whole["output 1"])):
                assert same_bits(ops.gated_residual_norm_modulate(**poisoned)[i][start:stop], expected[start:stop])
                assert same_bits(ops.gated_residual_norm_modulate(**alone)[i], expected[start:stop])


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_threads_and_alignment(dtype):
    harness.whatever_the_threads(OP, inputs([700, 0, 333], 96), dtype)
    harness.wherever_it_lies(OP, inputs([5, 9], 341), dtype)


def test_strides_gradients_and_contracts():
    harness.contiguous_or_not(OP, inputs([5, 9], 24))
    harness.gradcheck(OP, inputs([2, 0, 3], 5))
    made = harness.cast(inputs([5, 9], 24), torch.float32)
    torch.library.opcheck(torch.ops.lens.gated_residual_norm_modulate.default, (*made.values(), 1e-6))
    made = {name: value.detach() for name, value in made.items()}
    rows = [made["x"] * 2, made["y"] * 2, made["x"], made["y"]]
    arguments = (*rows, made["gate"], made["weight"], made["scale"], made["offsets"], 1e-6)
    torch.library.opcheck(torch.ops.lens.gated_residual_norm_modulate_backward.default, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(14)}, "x must be [R, D], got [14]"),
        ({"y": torch.zeros(14, 23)}, "y must be [R, D] = [14, 24], got [14, 23]"),
        ({"gate": torch.zeros(2, 23)}, "gate must be [B, D] = [2, 24], got [2, 23]"),
        ({"weight": torch.zeros(1, 24)}, "weight must be [D] = [24], got [1, 24]"),
        ({"scale": torch.zeros(1, 24)}, "scale must be [B, D] = [2, 24], got [1, 24]"),
        ({"shift": torch.zeros(2, 24).double()}, "shift must be float32, got float64"),
        ({"offsets": torch.zeros(3)}, "offsets must be int32, got float32"),
    ],
)
def test_refusals(changes, message):
    harness.refuses(OP, inputs([5, 9], 24), changes, message)


def test_refuses_offsets():
    made = harness.cast(inputs([5, 9], 24), torch.float32)
    expected = "lens.gated_residual_norm_modulate: offsets must rise from 0 to R = 14"
    with compiled(), pytest.raises(ValueError, match=expected):
        ops.gated_residual_norm_modulate(**{**made, "offsets": torch.tensor([0, 5, 15], dtype=torch.int32)})
