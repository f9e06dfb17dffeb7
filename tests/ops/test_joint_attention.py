import sys

import pytest
import torch

from lens import ops
from lens.ops import backend
from lens.ops.attention import layout
from tests.ops import harness
from tests.ops.harness import DTYPES, Inputs, Maker, compiled, offsets_of, same_bits

OP = "joint_attention"
attention = sys.modules["lens.ops.joint_attention"]  # the module behind the function of that name
# image lengths, text lengths, heads, head dim
CASES = {
    "production": ([256, 60], [100, 0], 8, 64),
    "ragged": ([1, 33, 0, 16], [0, 5, 2, 9], 3, 8),
    "equal in a row": ([16, 16, 16], [5, 5, 5], 2, 16),
    "equal but apart": ([16, 4, 16, 4], [5, 3, 5, 3], 2, 16),
    "equal images, other texts": ([9, 9, 9], [5, 0, 5], 2, 12),
    "text alone": ([0, 0], [3, 5], 2, 12),
    "no rows": ([0, 0], [0, 0], 2, 8),
    "no samples": ([], [], 2, 8),
}


def inputs(image: list[int], text: list[int], heads: int, head_dim: int, **options: object) -> Inputs:
    make, rows = Maker(), sum(image) + sum(text)
    qkv = {name: make(rows, heads, head_dim) for name in "qkv"}
    offsets = {"image_offsets": offsets_of(image), "text_offsets": offsets_of(text)}
    return {**qkv, "image_lengths": image, "text_lengths": text, **offsets, **options}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("text_queries", [True, False])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_spec(case, text_queries, dtype):
    harness.against_spec(OP, inputs(*case, text_queries=text_queries), dtype, "base")


@pytest.mark.parametrize("text_queries", [True, False])
@pytest.mark.parametrize("case", ["production", "ragged", "equal but apart"])
def test_bfloat16_against_plain_attention(case, text_queries):
    """torch's kernel rounds the probabilities to bfloat16, the spec does not: held to a spec with rounded steps."""

    def rounded(q, k, v, image_lengths, text_lengths, text_queries, **_):
        images, texts, start = [], [], 0
        for image, text in zip(image_lengths, text_lengths, strict=True):
            rows = slice(start, start + image + text)
            logits = torch.einsum("qnh,knh->nqk", q[rows], k[rows]) * q.shape[-1] ** -0.5
            out = torch.einsum("nqk,knh->qnh", logits.softmax(-1), v[rows]).flatten(1)
            images.append(out[:image])
            texts.append(out[image:] if text_queries else out[:0])
            start += image + text
        return torch.cat(images), torch.cat(texts)

    made = harness.cast(inputs(*CASES[case], text_queries=text_queries), torch.bfloat16)
    exact = harness.results(ops.reference.joint_attention, harness.cast(made, torch.float64))
    plain = harness.results(rounded, made)
    with compiled():
        got = harness.results(ops.joint_attention, made)
    for part, value in got.items():
        floor = torch.finfo(torch.bfloat16).eps * exact[part].abs().max().item() if value.numel() else 0.0
        assert harness.error(value, exact[part]) <= 2 * harness.error(plain[part], exact[part]) + floor, part


@pytest.mark.skipif("amx" not in backend.available_isas(), reason="this CPU has no amx")
@pytest.mark.parametrize("text_queries", [True, False])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_amx_against_float64(case, text_queries):
    """Where nothing is recorded; within twice the error that rounded shares make, and the same bits by three threads."""
    made = harness.cast(inputs(*case, text_queries=text_queries), torch.bfloat16)
    made = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in made.items()}
    wide = {n: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for n, v in made.items()}
    exact, spec = (ops.reference.joint_attention(**given) for given in (wide, made))
    before = torch.get_num_threads()
    try:
        with compiled("amx"):
            got = ops.joint_attention(**made)
            torch.set_num_threads(3)
            again = ops.joint_attention(**made)
        with compiled("avx512"):
            other = ops.joint_attention(**made)
    finally:
        torch.set_num_threads(before)
    for one, same, right, rounded in zip(got, again, exact, spec, strict=True):
        assert one.shape == right.shape
        assert same_bits(one, same)
        floor = torch.finfo(torch.bfloat16).eps * right.abs().max().item() if right.numel() else 0.0
        assert harness.error(one, right) <= 2 * harness.error(rounded, right) + floor
    if case == CASES["production"]:
        assert not same_bits(got[0], other[0])  # it was another kernel


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.25, 0.0, -0.5])
def test_scale(scale, dtype):
    made = harness.cast(inputs([3], [2], 1, 4), dtype)
    with compiled(), torch.no_grad():
        image, _ = ops.joint_attention(**made, scale=scale)
    q, k, v = (made[name].detach().double()[:, 0] for name in "qkv")
    exact = (q[:3] @ k.T * scale).softmax(-1) @ v
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(image.double(), exact, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["production", "ragged", "equal in a row", "equal but apart"])
def test_a_sample_does_not_see_its_batch(case, dtype, threads):
    image, text = CASES[case][:2]
    made = harness.cast(inputs(*CASES[case]), dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with compiled(), torch.no_grad():
            whole = ops.joint_attention(**made)
            joint = offsets_of([i + t for i, t in zip(image, text, strict=True)]).tolist()
            for b in range(len(image)):
                qkv = [made[name][joint[b] : joint[b + 1]].clone() for name in "qkv"]
                lengths = [image[b]], [text[b]]
                out = ops.joint_attention(*qkv, *lengths, *map(offsets_of, lengths))
                for i, name in enumerate(("image_offsets", "text_offsets")):
                    start, stop = made[name][b : b + 2].tolist()
                    assert same_bits(out[i], whole[i][start:stop])
    finally:
        torch.set_num_threads(before)


def test_same_bits_from_run_to_run():
    made = harness.cast(inputs(*CASES["equal but apart"]), torch.float32)
    with compiled():
        first, second = (harness.results(ops.joint_attention, made) for _ in range(2))
    for part, value in first.items():
        assert same_bits(value, second[part]), part


def test_equal_samples_share_a_call(monkeypatch):
    """Two groups of two samples: two calls where a gradient is recorded, four in inference."""
    calls = []
    gather = layout.gather
    monkeypatch.setattr(layout, "gather", lambda x, starts, rows: calls.append(len(starts)) or gather(x, starts, rows))
    made = harness.cast(inputs(*CASES["equal but apart"]), torch.float32)
    with compiled():
        ops.joint_attention(**made)
        assert calls == [2] * 6  # q, k, v of each call
        calls.clear()
        with torch.no_grad():
            ops.joint_attention(**made)
        assert calls == [1] * 12


def test_poison_stays_in_its_sample():
    made = harness.cast(inputs([4, 6], [3, 2], 2, 8), torch.float32)
    made = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in made.items()}
    with compiled():
        clean = ops.joint_attention(**made)
        for name in "qkv":
            made[name] = made[name].clone()
            made[name][7:] = float("nan")
        image, text = ops.joint_attention(**made)
    assert same_bits(image[:4], clean[0][:4])
    assert same_bits(text[:3], clean[1][:3])
    assert image[4:].isnan().all()


@pytest.mark.parametrize("text_queries", [True, False])
def test_strides_gradients_and_contracts(text_queries):
    harness.contiguous_or_not(OP, inputs([5, 9], [2, 3], 2, 8, text_queries=text_queries))
    harness.gradcheck(OP, inputs([2, 0, 2, 2], [1, 2, 0, 1], 2, 4, text_queries=text_queries))
    made = harness.cast(inputs([5, 9], [2, 3], 2, 8), torch.float32)
    qkv, lengths = tuple(made[name] for name in "qkv"), [7, 12]
    queries = lengths if text_queries else [5, 9]
    qkv = (qkv[0].detach()[: sum(queries)].clone().requires_grad_(), *qkv[1:])
    torch.library.opcheck(torch.ops.lens.joint_attention.default, (*qkv, queries, lengths, 0.3, True))
    qkv = tuple(x.detach() for x in qkv)
    out, lse = torch.ops.lens.joint_attention(*qkv, queries, lengths, 0.3, True)
    arguments = (out, *qkv, out, lse, queries, lengths, 0.3, True)
    torch.library.opcheck(torch.ops.lens.joint_attention_backward.default, arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(19, 16)}, "q must be [RI + RT, N, H], got [19, 16]"),
        ({"q": torch.zeros(19, 2, 8).half()}, "q must be float32, bfloat16 or float64, got float16"),
        ({"k": torch.zeros(18, 2, 8)}, "k must be [RI + RT, N, H] = [19, 2, 8], got [18, 2, 8]"),
        ({"v": torch.zeros(19, 2, 8).double()}, "v must be float32, got float64"),
        ({"text_lengths": [2]}, "text_lengths must be B = 2 numbers, got 1"),
        ({"image_lengths": [15, -1]}, "lengths must not be negative, got [15, -1] and [2, 3]"),
        ({"image_lengths": [5, 8]}, "image_lengths and text_lengths must add up to RI + RT = 19, got 13 + 5"),
        ({"image_offsets": offsets_of([5])}, "image_offsets must be [B + 1] = [3], got [2]"),
        ({"image_offsets": offsets_of([6, 8])}, "image_offsets must be [0, 5, 14], got [0, 6, 14]"),
        ({"text_offsets": torch.zeros(3)}, "text_offsets must be int32, got float32"),
    ],
)
def test_refusals(changes, message):
    harness.refuses(OP, inputs([5, 9], [2, 3], 2, 8), changes, message)


def test_streams_gathered_equal_streams_cut():
    """The two ways to take image and text rows out of the joint ones, and their gradients."""
    images, texts = [4, 2, 0, 3], [0, 5, 2, 1]
    offsets = offsets_of(images), offsets_of(texts)
    make = Maker()
    x, weight = make(17, 2, 8).requires_grad_(), make(17, 2, 8)
    found = []
    for streams in (
        attention._split_streams(x, images, texts, *offsets),
        attention._gather_streams(x, sum(images), *offsets),
    ):
        rows = torch.cat(streams)
        found.append((*streams, *torch.autograd.grad((rows * weight).sum(), x)))
    for cut, gathered in zip(*found, strict=True):
        assert torch.equal(cut, gathered)
