"""Causal attention with sinks against its specification, and the specification against the definition."""

import math

import pytest
import torch

from lens import ops
from lens.ops import backend, reference
from tests.ops import harness
from tests.ops.harness import compiled, same_bits

OP = "sink_attention"
ISAS = [*harness.ISAS, "avx512bf16", "amx"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
# queries, tokens, heads, key heads, channels, window: tasks and tiles that are not full, more tokens than a block of the
# specification has, one query, none, channels below and beyond a tile
SHAPES = [
    (7, 7, 4, 2, 16, None),
    (150, 183, 6, 3, 64, None),
    (150, 183, 8, 1, 32, 40),
    (1, 50, 6, 3, 34, 7),
    (45, 77, 5, 5, 10, 1),
    (33, 33, 2, 2, 72, 33),
    (0, 5, 2, 1, 8, None),
]


def inputs(length, there, heads, shared, channels, window, dtype=torch.float64, seed=0):
    """Of values that bfloat16 holds, sinks as large as the largest scores; tables of the arithmetic dtype."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=g, dtype=torch.float64) * scale).bfloat16().to(dtype)

    angle = torch.randn(length, channels // 2, generator=g, dtype=torch.float64) * 3
    wide = reference.arithmetic_dtype(dtype)
    return {
        "q": normal(length, heads, channels, scale=2.0),
        "k": normal(there, shared, channels),
        "v": normal(there, shared, channels),
        "sinks": normal(heads, scale=3.0),
        "cos": angle.cos().to(wide),
        "sin": angle.sin().to(wide),
        "window": window,
        "scale": channels**-0.5,
    }


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_spec(shape, dtype, isa):
    given = inputs(*shape, DTYPES[dtype])
    with compiled(isa):
        got = {"output 0": ops.sink_attention(**given)}
    # the shares that AMX rounds are one more rounding than the specification has
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    exact, spec = reference.sink_attention(**wide), reference.sink_attention(**given)
    assert got["output 0"].dtype == DTYPES[dtype]
    assert got["output 0"].shape == exact.shape
    scale = exact.abs().max().item() if exact.numel() else 0.0
    rounding = torch.finfo(DTYPES[dtype]).eps * scale * (32 if dtype == "fp64" else 1)
    assert harness.error(got["output 0"], exact) <= 2 * harness.error(spec, exact) + rounding


@pytest.mark.parametrize("window", [None, 1, 50, 128, 200])
def test_the_specification_against_the_definition(window):
    """With a whole mask and every key head repeated, for queries that follow earlier keys, over edges of blocks."""
    given = inputs(261, 294, 6, 3, 8, window)
    q, k, v, sinks, cos, sin = (given[name] for name in ("q", "k", "v", "sinks", "cos", "sin"))
    turned = torch.view_as_complex(torch.stack(q.chunk(2, -1), -1)) * torch.complex(cos, sin)[:, None]
    turned = torch.cat([turned.real, turned.imag], -1)
    at, key = torch.arange(33, 294)[:, None], torch.arange(294)
    seen = (key <= at) & (key > at - (window or 10**6))
    scores = torch.einsum("qnh,knh->nqk", turned, k.repeat_interleave(2, 1)) * given["scale"]
    scores = scores.masked_fill(~seen, -torch.inf)
    whole = torch.cat([scores, sinks.view(6, 1, 1).expand(-1, 261, 1)], -1).softmax(-1)[..., :-1]
    exact = torch.einsum("nqk,knh->qnh", whole, v.repeat_interleave(2, 1))
    torch.testing.assert_close(reference.sink_attention(**given), exact, atol=1e-13, rtol=1e-11)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("window", [None, 21])
def test_a_query_is_the_same_alone_and_in_company(window, dtype, isa):
    """Whichever queries are asked with it, with one thread or three."""
    given = inputs(90, 130, 6, 2, 32, window, DTYPES[dtype])
    before = torch.get_num_threads()
    with compiled(isa):
        whole = ops.sink_attention(**given)
        try:
            torch.set_num_threads(3)
            assert same_bits(ops.sink_attention(**given), whole)
            for begin, end in ((0, 1), (41, 42), (5, 90), (0, 77)):
                part = {name: given[name][begin:end] for name in ("q", "cos", "sin")}
                part |= {name: given[name][: 40 + end] for name in ("k", "v")}
                assert same_bits(ops.sink_attention(**{**given, **part}), whole[begin:end])
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_a_query_does_not_see(dtype, isa):
    """A key that is NaN spoils the queries that see it, a query that is NaN itself; no other bit changes."""
    given = inputs(60, 60, 4, 2, 32, 10, DTYPES[dtype])
    with compiled(isa):
        clean = ops.sink_attention(**given)
        given["k"][20, 1, 3] = math.nan
        given["q"][50, 0, 5] = math.nan
        got = ops.sink_attention(**given)
    spoilt = torch.zeros(60, 4, dtype=torch.bool)
    spoilt[20:30, 2:] = True
    spoilt[50, 0] = True
    assert got[spoilt].isnan().all()
    assert same_bits(got[~spoilt], clean[~spoilt])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_sinks_take_all_or_nothing(dtype, isa):
    kind = DTYPES[dtype]
    given = inputs(40, 40, 2, 1, 16, None, kind)
    with compiled(isa):
        given["sinks"] = torch.tensor([3e4, -3e4], dtype=kind)
        got = ops.sink_attention(**given)
        given["v"] = torch.ones_like(given["v"])
        whole = ops.sink_attention(**given)
    assert (got[:, 0] == 0).all()
    torch.testing.assert_close(whole[:, 1].double(), torch.ones(40, 16).double(), atol=4e-3, rtol=0)
    assert torch.equal(got[0, 1], inputs(40, 40, 2, 1, 16, None, kind)["v"][0, 0])  # the first query sees itself alone


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_wherever_its_arguments_lie(dtype):
    given = inputs(20, 50, 4, 2, 32, None, DTYPES[dtype])
    with compiled():
        expected = ops.sink_attention(**given)
        assert same_bits(ops.sink_attention(**harness.shifted(given)), expected)
        spread = {
            k: v.repeat_interleave(2, -1)[..., ::2] if isinstance(v, torch.Tensor) else v for k, v in given.items()
        }
        assert same_bits(ops.sink_attention(**spread), expected)


def test_a_window_longer_than_all_tokens_is_none():
    given = inputs(20, 50, 4, 2, 8, None, torch.float32)
    with compiled():
        assert same_bits(ops.sink_attention(**{**given, "window": 10**12}), ops.sink_attention(**given))


def test_operator_contract():
    given = inputs(5, 9, 4, 2, 8, 3, torch.float32)
    with compiled():
        torch.library.opcheck(torch.ops.lens.sink_attention.default, tuple(given.values()))
        with pytest.raises(RuntimeError):
            ops.sink_attention(**{**given, "q": given["q"].requires_grad_()}).sum().backward()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(5, 3, 8)}, "N must be a multiple of M = 2, got 3"),
        ({"q": torch.zeros(5, 4, 7)}, "H must be even, got 7"),
        ({"k": torch.zeros(4, 2, 8)}, "S must be at least T = 5, got 4"),
        ({"k": torch.zeros(9, 2, 6)}, "k must be [S, M, H] = [9, 2, 8], got [9, 2, 6]"),
        ({"v": torch.zeros(8, 2, 8)}, "v must be [S, M, H] = [9, 2, 8], got [8, 2, 8]"),
        ({"sinks": torch.zeros(4).double()}, "sinks must be float32, got float64"),
        ({"cos": torch.zeros(5, 8)}, "cos must be [T, H / 2] = [5, 4], got [5, 8]"),
        ({"window": 0}, "window must be a whole number from 1 on, or None, got 0"),
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(changes, message):
    harness.refuses(OP, inputs(5, 9, 4, 2, 8, 3, torch.float32), changes, message)


def test_the_kernel_checks_its_sizes():
    whole = torch.zeros(4096)
    arrays = dict.fromkeys(("q", "k", "v", "sinks", "cos", "sin", "out", "keys", "values", "rooms"), whole)
    sizes = {"T": 2, "S": 1, "N": 1, "M": 1, "H": 2, "W": 1, "window": 0, "causal": 1}
    with pytest.raises(ValueError, match=r"lens\.sink_attention: S must be at least T, got 1"):
        backend.launch(OP, whole, **arrays, **sizes, scale=1.0)
