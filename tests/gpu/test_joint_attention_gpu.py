"""lens-hopper on a device: one tile first, then every shape, against attention in float64; its bits; its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lens import ops
from lens.ops import reference
from lens.ops.attention import choice as attention_choice
from lens.ops.attention import hopper
from tests.ops.harness import error, offsets_of, same_bits

DEVICE = "cuda"
INFINITE = float("inf")
MODES = {
    "running": (INFINITE, 0),
    "running, polynomial": (INFINITE, 1),
    "fixed": (40.0, 0),
    "fixed, polynomial": (40.0, 1),
}
# image rows, text rows of every sample, heads
SHAPES = {
    "one tile": ([128], [0], 1),
    "one row, odd": ([1], [0], 1),
    "odd 63": ([63], [0], 2),
    "narrow 65": ([64], [1], 2),
    "ragged": ([1, 333, 0, 64, 2], [5, 0, 130, 100, 1], 3),
    "many ragged": ([17] * 300, [3, 0] * 150, 1),
    "released pair": ([4096, 4096], [415, 0], 24),
    "large": ([8100], [415], 24),
}


pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def on_hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the device is no sm_90")
    with attention_choice.use("lens-hopper"):
        try:
            attention_choice.choose(attention_choice.released_call())
        except RuntimeError as error:
            pytest.fail(str(error))


def draw(images: list[int], texts: list[int], heads: int) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(1)
    shape = 3, sum(images) + sum(texts), heads, 64
    return list(torch.randn(shape, generator=generator, device=DEVICE).to(torch.bfloat16))


def attend(qkv, images, texts, bound=INFINITE, polynomial=0, text_queries=True):
    places = offsets_of(images).to(DEVICE), offsets_of(texts).to(DEVICE), sum(images)
    with torch.no_grad():
        return hopper.forward(*qkv, *places, text_queries, 0.125, bound, polynomial, True)


def expected(qkv, images, texts, rounded=False):
    """image, text, lse in float64, head by head; `rounded`: probabilities in bfloat16, as any fast kernel has them."""
    q, k, v = qkv
    image, text, lse, start = [], [], [], 0
    for i, t in zip(images, texts, strict=True):
        rows, heads, sums = slice(start, start + i + t), [], []
        for head in range(q.shape[1]):
            logits = q[rows, head].double() @ k[rows, head].double().T / 8
            total = logits.logsumexp(-1, keepdim=True)
            p = (logits - total).exp()
            p = p.bfloat16().double() if rounded else p
            heads.append(p @ v[rows, head].double())
            sums.append(total.squeeze(-1))
        out = torch.cat(heads, -1)
        image.append(out[:i])
        text.append(out[i:])
        lse.append(torch.stack(sums))
        start += i + t
    return torch.cat(image), torch.cat(text), torch.cat(lse, -1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("text_queries", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape, text_queries, mode):
    images, texts, heads = SHAPES[shape]
    if shape == "many ragged" and (not text_queries or "fixed" in mode):
        pytest.skip("its 300 samples in float64 once")
    qkv = draw(images, texts, heads)
    got = attend(qkv, images, texts, *MODES[mode], text_queries)
    exact, plain = expected(qkv, images, texts), expected(qkv, images, texts, rounded=True)
    for part in (0, 1) if text_queries else (0,):
        if exact[part].numel():
            floor = torch.finfo(torch.bfloat16).eps * exact[part].abs().max().item()
            assert error(got[part], exact[part]) <= 2 * error(plain[part], exact[part]) + floor
    if text_queries:
        torch.testing.assert_close(got[2].double(), exact[2], atol=5e-5, rtol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_poison_stays_in_its_ragged_sample(mode):
    images, texts = [5, 129, 60], [3, 1, 70]
    qkv = draw(images, texts, 2)
    clean = attend(qkv, images, texts, *MODES[mode])
    poisoned = [torch.full_like(x, float("nan")) for x in qkv]
    for x, y in zip(poisoned, qkv, strict=True):
        x[8:138] = y[8:138]
    got = attend(poisoned, images, texts, *MODES[mode])
    assert same_bits(got[0][5:134], clean[0][5:134])
    assert same_bits(got[1][3:4], clean[1][3:4])
    assert got[0][134:].isnan().all()


@pytest.mark.parametrize("mode", MODES)
def test_same_bits_in_a_hundred_runs_and_in_any_batch(mode):
    images, texts, heads = SHAPES["released pair"]
    qkv = draw(images, texts, heads)
    first = attend(qkv, images, texts, *MODES[mode])
    for _ in range(100):
        for a, b in zip(attend(qkv, images, texts, *MODES[mode]), first, strict=True):
            assert same_bits(a, b)
    alone = attend([x[:4511] for x in qkv], [4096], [415], *MODES[mode])
    assert same_bits(alone[0], first[0][:4096])
    assert same_bits(alone[1], first[1])


def test_one_graph_serves_other_lengths():
    """Captured once, replayed for offsets of the same total that the host never saw."""
    qkv = draw([512], [200], 4)
    images, texts = offsets_of([300, 212]).cuda(), offsets_of([200, 0]).cuda()
    arguments = (512, True, 0.125, INFINITE, 1, False)
    with torch.no_grad():
        hopper.forward(*qkv, images, texts, *arguments)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            image, text, _ = hopper.forward(*qkv, images, texts, *arguments)
    for lengths in (([300, 212], [200, 0]), ([1, 511], [63, 137]), ([512, 0], [0, 200])):
        for held, new in zip((images, texts), lengths, strict=True):
            held.copy_(offsets_of(new))
        graph.replay()
        again = attend(qkv, *lengths, INFINITE, 1)
        assert same_bits(image, again[0])
        assert same_bits(text, again[1])


@pytest.mark.parametrize("text_queries", [True, False])
@pytest.mark.parametrize("gradients", [b.name for b in attention_choice.BACKWARDS])
def test_gradients_by_attention_library_against_float64(gradients, text_queries):
    images, texts, heads = SHAPES["ragged"]
    leaves = [x.requires_grad_() for x in draw(images, texts, heads)]
    offsets = offsets_of(images).cuda(), offsets_of(texts).cuda()
    with attention_choice.use("lens-hopper"), attention_choice.use_backward(served(gradients)):
        out = torch.cat(ops.joint_attention(*leaves, images, texts, *offsets, text_queries))
        got = torch.autograd.grad(out, leaves, torch.ones_like(out))
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = torch.cat(reference.joint_attention(*wide, images, texts, *offsets, text_queries))
    for a, b in zip(got, torch.autograd.grad(exact, wide, torch.ones_like(exact)), strict=True):
        assert error(a, b) <= 0.02 * b.abs().max() + 1e-3


def served(gradients: str) -> str:
    """The name where it can run after ours; otherwise the test is left out with the reason."""
    with attention_choice.use_backward(gradients):
        try:
            chosen = attention_choice.choose(attention_choice.released_call(backward=True))
        except RuntimeError as error:
            if gradients == "torch-flash":
                raise
            pytest.skip(str(error))
    assert (chosen.name, chosen.gradients) == ("lens-hopper", gradients)
    return gradients


@pytest.mark.parametrize("gradients", [b.name for b in attention_choice.BACKWARDS if b.deterministic])
def test_gradients_by_attention_library_are_the_same_bits_every_time(gradients):
    images, texts, heads = [2048, 2048], [100, 0], 8
    leaves = [x.requires_grad_() for x in draw(images, texts, heads)]
    offsets = offsets_of(images).cuda(), offsets_of(texts).cuda()
    with attention_choice.use("lens-hopper"), attention_choice.use_backward(served(gradients)):
        out = torch.cat(ops.joint_attention(*leaves, images, texts, *offsets))
        weight = torch.randn_like(out)
        first = torch.autograd.grad(out, leaves, weight, retain_graph=True)
        for _ in range(20):
            for a, b in zip(torch.autograd.grad(out, leaves, weight, retain_graph=True), first, strict=True):
                assert same_bits(a, b)
