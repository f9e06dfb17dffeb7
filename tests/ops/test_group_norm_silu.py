import pytest
import torch
from torch import Tensor

from lens import ops
from tests.ops import harness
from tests.ops.harness import LENGTHS, Inputs, Maker, compiled, offsets_of, same_bits

OP = "group_norm_silu"
CASES = [(128, 32, True), (21, 3, False), (7, 7, True)]  # channels, groups, silu


def inputs(lengths: list[int], width: int, groups: int, shift: float = 0.0, activate: bool = True) -> Inputs:
    make = Maker()
    x = make(sum(lengths), width, grad=False) + shift
    made = {"x": x, "weight": make(width, grad=False), "bias": make(width, grad=False)}
    return {**made, "offsets": offsets_of(lengths), "groups": groups, "activate": activate}


def cast(made: Inputs, dtype: torch.dtype) -> Inputs:
    return {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in made.items()}


def held_to_the_spec(made: Inputs, dtype: torch.dtype, isa: str | None) -> None:
    made = cast(made, dtype)
    with compiled(isa):
        got = {"output 0": ops.group_norm_silu(**made)}
    harness.within_limits(OP, made, dtype, got, conditioned=True)  # two rows of one channel may lie close to each other


@harness.every_isa_and_dtype
@pytest.mark.parametrize(("width", "groups", "activate"), CASES)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_against_spec(lengths, width, groups, activate, dtype, isa):
    held_to_the_spec(inputs(lengths, width, groups, activate=activate), dtype, isa)


@pytest.mark.parametrize("isa", harness.ISAS)
def test_a_large_mean_cancels_nothing(isa):
    """Values 1000 to 1003 in float32: sums of squares would leave no digit of the variance."""
    made = cast(inputs([700, 33], 16, 4, shift=1000.0), torch.float32)
    exact = ops.reference.group_norm_silu(**cast(made, torch.float64))
    with compiled(isa):
        got = ops.group_norm_silu(**made)
    assert harness.error(got, exact) < 2e-4  # of which the inputs' own rounding is 6e-5


def test_the_specification_is_torchs_group_norm():
    made = inputs([35, 12], 24, 4)
    expected = [
        torch.nn.functional.silu(torch.nn.functional.group_norm(x.T[None], 4, made["weight"], made["bias"], 1e-6))
        for x in made["x"].split([35, 12])
    ]
    assert harness.error(ops.reference.group_norm_silu(**made), torch.cat([x[0].T for x in expected])) < 1e-13


def test_hand_computed():
    """Two groups of one channel: mean 2 and 0, deviation 1 and 3."""
    x = torch.tensor([[1.0, 3.0], [3.0, -3.0]])
    weight, bias = torch.tensor([2.0, 1.0]), torch.tensor([0.5, 0.0])
    got = ops.group_norm_silu(x, weight, bias, offsets_of([2]), 2, eps=0.0, activate=False)
    torch.testing.assert_close(got, torch.tensor([[-1.5, 1.0], [2.5, -1.0]]))


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_a_sample_does_not_see_its_batch(dtype):
    lengths = [33, 5, 64]
    made = cast(inputs(lengths, 21, 3), dtype)
    with compiled():
        whole = ops.group_norm_silu(**made).split(lengths)
        for b, x in enumerate(made["x"].split(lengths)):
            poisoned = [torch.full_like(y, float("nan")) for y in made["x"].split(lengths)]
            poisoned[b] = x
            together = ops.group_norm_silu(**{**made, "x": torch.cat(poisoned)}).split(lengths)
            alone = ops.group_norm_silu(**{**made, "x": x.clone(), "offsets": offsets_of([lengths[b]])})
            assert same_bits(together[b], whole[b])
            assert same_bits(alone, whole[b])
            assert all(y.isnan().all() for k, y in enumerate(together) if k != b)


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_threads_places_and_strides(dtype):
    made = inputs([700, 333], 129, 3)
    harness.whatever_the_threads(OP, made, dtype)
    harness.wherever_it_lies(OP, inputs([9], 21, 3), dtype)
    harness.contiguous_or_not(OP, inputs([5, 3], 24, 4))


@pytest.mark.parametrize("choice", ["compiled", "reference"])
def test_into_a_place_of_the_callers(choice):
    made = cast(inputs([40, 9], 16, 4), torch.float32)
    with ops.backend.use(choice):
        expected = ops.group_norm_silu(**made)
        room = torch.full((51, 16), 7.0)
        given = ops.group_norm_silu(**made, out=room[1:50])
        assert given.data_ptr() == room[1:50].data_ptr()
        assert same_bits(room[1:50], expected)
        assert (room[[0, 50]] == 7).all()
        assert same_bits(ops.group_norm_silu(**made, out=made["x"]), expected)


def test_contracts():
    made = cast(inputs([5], 24, 4), torch.float32)
    x = made["x"]
    arguments = (x, made["weight"], made["bias"], made["offsets"], 4, 1e-6, True, torch.empty_like(x))
    torch.library.opcheck(torch.ops.lens.group_norm_silu.default, arguments)
    with compiled(), pytest.raises(RuntimeError):
        ops.group_norm_silu(**{**made, "x": x.requires_grad_()}).sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(24)}, "x must be [R, D], got [24]"),
        ({"x": torch.zeros(5, 24).half()}, "x must be float32, bfloat16 or float64, got float16"),
        ({"weight": torch.zeros(23)}, "weight must be [D] = [24], got [23]"),
        ({"bias": torch.zeros(24).double()}, "bias must be float32, got float64"),
        ({"groups": 5}, "groups must divide D = 24, got 5"),
        ({"groups": 0}, "groups must divide D = 24, got 0"),
        ({"offsets": torch.tensor([0], dtype=torch.int32)}, "offsets must name a sample for R = 5 rows, got B = 0"),
        ({"out": torch.zeros(4, 24)}, "out must be [R, D] = [5, 24], got [4, 24]"),
        ({"out": torch.zeros(24, 5).T}, "out must be dense, got the strides [1, 5]"),
    ],
)
def test_refusals(changes, message):
    harness.refuses(OP, inputs([5], 24, 4), changes, message)
