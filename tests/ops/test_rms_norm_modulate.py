from itertools import pairwise

import pytest
import torch

from lens import ops
from tests.ops import harness
from tests.ops.harness import LENGTHS, Inputs, Maker, compiled, offsets_of, same_bits

OP = "rms_norm_modulate"
WIDTHS = [1536, 341, 7]


def inputs(lengths: list[int], width: int, seed: int = 0) -> Inputs:
    make, batch = Maker(seed), len(lengths)
    scale, shift = make.modulation(batch, width, 2)
    x, weight = make(sum(lengths), width), make(width)
    return {"x": x, "weight": weight, "scale": scale, "shift": shift, "offsets": offsets_of(lengths)}


@harness.every_isa_and_dtype
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_against_spec(lengths, width, dtype, isa):
    harness.against_spec(OP, inputs(lengths, width), dtype, isa)


@pytest.mark.parametrize("eps", [1e-6, 1e-5, 0.5])
def test_eps_is_used(eps):
    with compiled():
        made = inputs([4], 16)
        got = ops.rms_norm_modulate(**made, eps=eps)
    x = made["x"]
    expected = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * made["weight"]
    torch.testing.assert_close(got, expected * (1 + made["scale"]) + made["shift"], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_a_sample_does_not_see_its_batch(dtype):
    lengths = LENGTHS["ragged"]
    made = harness.cast(inputs(lengths, 341), dtype)
    offsets = made["offsets"].tolist()
    with compiled():
        whole = harness.results(ops.rms_norm_modulate, made)
        for b, (start, stop) in enumerate(pairwise(offsets)):
            alone = {
                "x": made["x"].detach()[start:stop].clone(),
                "weight": made["weight"].detach(),
                "scale": made["scale"].detach()[b : b + 1].clone(),
                "shift": made["shift"].detach()[b : b + 1].clone(),
                "offsets": offsets_of([stop - start]),
            }
            assert same_bits(ops.rms_norm_modulate(**alone), whole["output 0"][start:stop])
            poisoned = {name: value.detach().clone() for name, value in made.items()}
            for name in ("scale", "shift"):
                poisoned[name][torch.arange(len(lengths)) != b] = float("nan")
            poisoned["x"][:start] = float("nan")
            poisoned["x"][stop:] = float("inf")
            assert same_bits(ops.rms_norm_modulate(**poisoned)[start:stop], whole["output 0"][start:stop])


def test_a_samples_sums_do_not_see_its_batch():
    """The chunks of the column sums follow the sample, not the batch."""
    lengths = [70, 1, 100]
    make = Maker()
    x, weight, scale = make(171, 24).float(), make(24).float(), make(3, 24).float()
    shift, dy = make(3, 24).float(), make(171, 24).float()
    found = []
    for b, (start, stop) in enumerate([(0, 70), (70, 71), (71, 171)]):
        leaves = [t[b : b + 1].detach().requires_grad_() for t in (scale, shift)]
        with compiled():
            y = ops.rms_norm_modulate(x[start:stop], weight, *leaves, offsets_of([stop - start]))
            found.append(torch.autograd.grad(y, leaves, dy[start:stop]))
    leaves = [t.detach().requires_grad_() for t in (scale, shift)]
    with compiled():
        whole = torch.autograd.grad(ops.rms_norm_modulate(x, weight, *leaves, offsets_of(lengths)), leaves, dy)
    for i in range(2):
        assert same_bits(whole[i], torch.cat([gradient[i] for gradient in found]))


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_threads_and_alignment(dtype):
    harness.whatever_the_threads(OP, inputs([700, 0, 333], 96), dtype)
    harness.wherever_it_lies(OP, inputs([5, 9], 341), dtype)


def test_strides_gradients_and_contracts():
    harness.contiguous_or_not(OP, inputs([5, 9], 24))
    harness.gradcheck(OP, inputs([2, 0, 3], 5))
    made = harness.cast(inputs([5, 9], 24), torch.float32)
    torch.library.opcheck(torch.ops.lens.rms_norm_modulate.default, (*made.values(), 1e-6))
    made = {name: value.detach() for name, value in made.items()}
    arguments = (made["x"] * 2, made["x"], made["weight"], made["scale"], made["offsets"], 1e-6)
    torch.library.opcheck(torch.ops.lens.rms_norm_modulate_backward.default, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3)}, "x must be [R, D], got [3]"),
        ({"x": torch.zeros(14, 24, dtype=torch.float16)}, "x must be float32, bfloat16 or float64, got float16"),
        ({"x": torch.zeros(14, 0)}, "x must be [R, D] with at least one channel, got [14, 0]"),
        ({"weight": torch.zeros(23)}, "weight must be [D] = [24], got [23]"),
        ({"weight": torch.zeros(24).double()}, "weight must be float32, got float64"),
        ({"scale": torch.zeros(2, 12)}, "scale must be [B, D] = [2, 24], got [2, 12]"),
        ({"shift": torch.zeros(3, 24)}, "shift must be [B, D] = [2, 24], got [3, 24]"),
        ({"shift": torch.zeros(2, 24).bfloat16()}, "shift must be float32, got bfloat16"),
        ({"scale": torch.zeros(2, 24, device="meta")}, "scale must be on cpu, got meta"),
        ({"offsets": torch.tensor([0, 5, 14])}, "offsets must be int32, got int64"),
        ({"offsets": torch.zeros(0, dtype=torch.int32)}, "offsets must be [B + 1], got [0]"),
        ({"offsets": torch.zeros(1, dtype=torch.int32)}, "offsets must name a sample for R = 14 rows, got B = 0"),
    ],
)
def test_refusals(changes, message):
    harness.refuses(OP, inputs([5, 9], 24), changes, message)


@pytest.mark.parametrize(
    ("offsets", "message"),
    [
        ([1, 5, 14], "offsets must rise from 0 to R = 14, got offsets[0] = 1"),
        ([0, 15, 14], "offsets must rise from 0 to R = 14 without falling, got 15 before 14 at 1"),
        ([0, 5, 13], "offsets must rise from 0 to R = 14, got an end of 13"),
    ],
)
def test_refuses_offsets(offsets, message):
    made = harness.cast(inputs([5, 9], 24), torch.float32)
    with compiled(), pytest.raises(ValueError, match=r"lens.rms_norm_modulate: ") as refusal:
        ops.rms_norm_modulate(**{**made, "offsets": torch.tensor(offsets, dtype=torch.int32)})
    assert message in str(refusal.value)
