from itertools import pairwise

import pytest
import torch

from lens import ops
from tests.ops import harness
from tests.ops.harness import LENGTHS, Inputs, Maker, compiled, offsets_of, same_bits

OP = "guidance_step"


def inputs(lengths: list[int], channels: int, guidance: float = 5.0, both: bool = True) -> Inputs:
    make, rows = Maker(), sum(lengths)
    x, delta = make(rows, channels, grad=False), make(len(lengths), grad=False)
    velocity = {"cond": make(rows, channels), "uncond": make(rows, channels) if both else None}
    return {"x": x, **velocity, "delta": delta, "guidance": guidance, "offsets": offsets_of(lengths)}


def cast(made: Inputs, dtype: torch.dtype) -> Inputs:
    """Velocities in dtype, latents and steps in its arithmetic dtype; nothing carries a gradient."""
    made = harness.cast(made, dtype)
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in made.items()}


@harness.every_isa_and_dtype
@pytest.mark.parametrize(("guidance", "both"), [(5.0, True), (0.3, True), (1.0, False)])
@pytest.mark.parametrize("channels", [128, 7])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_against_spec(lengths, channels, guidance, both, dtype, isa):
    made = cast(inputs(lengths, channels, guidance, both), dtype)
    exact = ops.reference.guidance_step(**cast(made, torch.float64))
    spec = ops.reference.guidance_step(**made)
    with compiled(isa):
        got = ops.guidance_step(**made)
    assert got.dtype == spec.dtype == made["x"].dtype
    assert got.shape == spec.shape
    scale = exact.abs().max().item() if exact.numel() else 0.0
    rounding = torch.finfo(got.dtype).eps * scale * (32 if dtype == torch.float64 else 1)
    assert harness.error(got, exact) <= 2 * harness.error(spec, exact) + rounding


@pytest.mark.parametrize("isa", harness.ISAS)
def test_a_row_without_velocity(isa):
    """|comb| = 0 leaves the factor at 1; |c| = 0 stops the row. Neither makes a NaN."""
    cond = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 4.0]])
    uncond = torch.tensor([[0.0, 0.0], [1.0, 2.0], [3.0, 4.0]])
    x = torch.ones(3, 2)
    with compiled(isa):
        got = ops.guidance_step(x, cond, uncond, torch.tensor([-0.5]), 2.0, offsets_of([3]))
    assert got.tolist() == [[1, 1], [1, 1], [-0.5, -1.0]]


def test_hand_computed():
    """u = (1, 0), c = (0, 2), g = 3: comb = (-2, 6), |comb| = sqrt(40), |c| = 2."""
    x, cond, uncond = torch.tensor([[10.0, 20.0]]), torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    expected = [[10 - 2 * 2 / 40**0.5 * 0.5, 20 + 6 * 2 / 40**0.5 * 0.5]]
    for choice in ("compiled", "reference"):
        with ops.backend.use(choice):
            got = ops.guidance_step(x, cond, uncond, torch.tensor([0.5]), 3.0, offsets_of([1]))
        torch.testing.assert_close(got, torch.tensor(expected), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_a_row_does_not_see_its_batch(dtype):
    lengths = LENGTHS["ragged"]
    made = cast(inputs(lengths, 128), dtype)
    offsets = made["offsets"].tolist()
    with compiled():
        whole = ops.guidance_step(**made)
        for b, (start, stop) in enumerate(pairwise(offsets)):
            alone = {name: made[name][start:stop].clone() for name in ("x", "cond", "uncond")}
            alone.update(delta=made["delta"][b : b + 1], guidance=5.0, offsets=offsets_of([stop - start]))
            assert same_bits(ops.guidance_step(**alone), whole[start:stop])


def test_threads_and_contracts():
    before = torch.get_num_threads()
    made = cast(inputs([700, 33], 128), torch.float32)
    with compiled():
        expected = ops.guidance_step(**made)
        try:
            torch.set_num_threads(3)
            assert same_bits(ops.guidance_step(**made), expected)
        finally:
            torch.set_num_threads(before)
        spread = {**made, "cond": made["cond"].T.contiguous().T, "x": made["x"].repeat(1, 2)[:, :128]}
        assert same_bits(ops.guidance_step(**spread), expected)
    order = ("x", "cond", "uncond", "delta", "guidance", "offsets")
    torch.library.opcheck(torch.ops.lens.guidance_step.default, tuple(made[name] for name in order))


def test_refuses_a_gradient():
    made = harness.cast(inputs([3], 4), torch.float32)
    with compiled():
        out = ops.guidance_step(**made)
    with pytest.raises(RuntimeError):
        out.sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(14)}, "x must be [R, C], got [14]"),
        ({"x": torch.zeros(14, 0)}, "C must be at least 1, got 0"),
        ({"x": torch.zeros(14, 8).double()}, "x must be float32, got float64"),
        ({"cond": torch.zeros(14, 8).half()}, "cond must be float32, bfloat16 or float64, got float16"),
        ({"cond": torch.zeros(13, 8)}, "cond must be [R, C] = [14, 8], got [13, 8]"),
        ({"uncond": torch.zeros(14, 7)}, "uncond must be [R, C] = [14, 8], got [14, 7]"),
        ({"uncond": torch.zeros(14, 8).bfloat16()}, "uncond must be float32, got bfloat16"),
        ({"delta": torch.zeros(3)}, "delta must be [B] = [2], got [3]"),
        ({"delta": torch.zeros(2).double()}, "delta must be float32, got float64"),
        ({"offsets": torch.zeros(3)}, "offsets must be int32, got float32"),
    ],
)
def test_refusals(changes, message):
    harness.refuses(OP, inputs([5, 9], 8), changes, message)


def test_refuses_offsets():
    made = cast(inputs([5, 9], 8), torch.float32)
    with compiled(), pytest.raises(ValueError, match=r"lens.guidance_step: offsets must rise from 0 to R = 14"):
        ops.guidance_step(**{**made, "offsets": torch.tensor([0, 5, 15], dtype=torch.int32)})
