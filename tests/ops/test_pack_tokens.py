import pytest
import torch

from lens import ops
from tests.ops import harness
from tests.ops.harness import Inputs, Maker, compiled, same_bits

# valid tokens per sample, padded length, channels
CASES = {
    "production": ([415, 100], 415, 1536),
    "ragged": ([3, 0, 5, 1], 6, 7),
    "nothing valid": ([0, 0], 4, 3),
    "no padding": ([4, 4], 4, 32),
    "no samples": ([], 4, 3),
    "one token": ([1], 1, 1),
}


def rows_of(lengths: list[int], length: int) -> torch.Tensor:
    rows = [b * length + j for b, valid in enumerate(lengths) for j in range(valid)]
    return torch.tensor(rows, dtype=torch.int64)


def padded(lengths: list[int], length: int, channels: int) -> Inputs:
    return {"x": Maker()(len(lengths), length, channels), "rows": rows_of(lengths, length)}


def packed(lengths: list[int], length: int, channels: int) -> Inputs:
    made = {"packed": Maker()(sum(lengths), channels), "rows": rows_of(lengths, length)}
    return {**made, "batch": len(lengths), "length": length}


@harness.every_isa_and_dtype
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_spec(case, dtype, isa):
    harness.against_spec("pack_tokens", padded(*case), dtype, isa)
    harness.against_spec("unpack_tokens", packed(*case), dtype, isa)


@harness.every_isa_and_dtype
def test_there_and_back(dtype, isa):
    lengths, length, channels = CASES["ragged"]
    made = harness.cast(padded(lengths, length, channels), dtype)
    with compiled(isa), torch.no_grad():
        rows = ops.pack_tokens(**made)
        assert same_bits(rows, torch.cat([made["x"][b, :valid] for b, valid in enumerate(lengths)]))
        back = ops.unpack_tokens(rows, made["rows"], len(lengths), length)
        for b, valid in enumerate(lengths):
            assert same_bits(back[b, :valid], made["x"][b, :valid])
            assert (back[b, valid:] == 0).all()


def test_any_order_of_rows():
    rows = torch.tensor([5, 0, 3])
    x = torch.arange(12.0).view(2, 3, 2)
    with compiled():
        assert ops.pack_tokens(x, rows).tolist() == [[10, 11], [0, 1], [6, 7]]
        assert same_bits(ops.unpack_tokens(ops.pack_tokens(x, rows), rows, 2, 3).view(6, 2)[rows], x.view(6, 2)[rows])


def test_threads_strides_gradients_and_contracts():
    harness.whatever_the_threads("pack_tokens", padded([200, 150], 256, 129), torch.float32)
    harness.whatever_the_threads("unpack_tokens", packed([200, 150], 256, 129), torch.float32)
    harness.contiguous_or_not("pack_tokens", padded([3, 0, 2], 4, 5))
    harness.contiguous_or_not("unpack_tokens", packed([3, 0, 2], 4, 5))
    harness.gradcheck("pack_tokens", padded([3, 0, 2], 4, 2))
    harness.gradcheck("unpack_tokens", packed([3, 0, 2], 4, 2))
    made = harness.cast(padded([3, 0, 2], 4, 5), torch.float32)
    torch.library.opcheck(torch.ops.lens.pack_tokens.default, tuple(made.values()))
    made = harness.cast(packed([3, 0, 2], 4, 5), torch.float32)
    torch.library.opcheck(torch.ops.lens.unpack_tokens.default, tuple(made.values()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(12, 5)}, "x must be [B, L, C], got [12, 5]"),
        ({"x": torch.zeros(3, 4, 5, dtype=torch.int64)}, "x must be float32, bfloat16 or float64, got int64"),
        ({"x": torch.zeros(3, 4, 0)}, "C must be at least 1, got 0"),
        ({"rows": torch.zeros(3, 1, dtype=torch.int64)}, "rows must be [R], got [3, 1]"),
        ({"rows": torch.zeros(3, dtype=torch.int32)}, "rows must be int64, got int32"),
        ({"rows": torch.arange(13)}, "rows must name each of B * L = 12 tokens once at most, got R = 13"),
    ],
)
def test_pack_refusals(changes, message):
    harness.refuses("pack_tokens", padded([3, 0, 2], 4, 5), changes, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packed": torch.zeros(5)}, "packed must be [R, C], got [5]"),
        ({"packed": torch.zeros(4, 5)}, "rows must be [R] = [4], got [5]"),
        ({"batch": -1}, "batch and length must not be negative, got -1 and 4"),
        ({"batch": 1}, "rows must name each of B * L = 4 tokens once at most, got R = 5"),
    ],
)
def test_unpack_refusals(changes, message):
    harness.refuses("unpack_tokens", packed([3, 0, 2], 4, 5), changes, message)


@pytest.mark.parametrize("row", [-1, 12])
def test_refuses_rows_outside(row):
    made = harness.cast(padded([3, 0, 2], 4, 5), torch.float32)
    made["rows"][2] = row
    expected = rf"rows must lie in \[0, B \* L\) = \[0, 12\), got rows\[2\] = {row}"
    with compiled():
        with pytest.raises(ValueError, match=rf"lens.pack_tokens: {expected}"):
            ops.pack_tokens(**made)
        with pytest.raises(ValueError, match=rf"lens.unpack_tokens: {expected}"):
            ops.unpack_tokens(torch.zeros(5, 5), made["rows"], 3, 4)


@pytest.mark.parametrize(("rows", "where"), [([0, 0], 1), ([5, 1, 2, 5], 3), ([3, 2, 1, 2], 3)])
def test_refuses_a_token_twice(rows, where):
    """Two threads would write it, and its bits would depend on the later one."""
    made = torch.tensor(rows)
    expected = rf"rows must name no token twice, got rows\[{where}\] = {rows[where]} again"
    with compiled():
        with pytest.raises(ValueError, match=rf"lens.unpack_tokens: {expected}"):
            ops.unpack_tokens(torch.zeros(len(rows), 5), made, 2, 3)
        with pytest.raises(ValueError, match=rf"lens.pack_tokens: {expected}"):
            ops.pack_tokens(torch.zeros(2, 3, 5), made)
