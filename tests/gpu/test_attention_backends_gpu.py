"""Libraries of attention on a device: lse of each, gradients of each from the lse of every other."""

from __future__ import annotations

import pytest
import torch

from lens import ops
from lens.ops import reference
from lens.ops.attention import choice as attention_choice
from lens.ops.attention.choice import BACKWARDS, CANDIDATES, Choice
from lens.ops.attention.layout import Samples
from tests.ops.harness import error, offsets_of, same_bits

pytestmark = pytest.mark.gpu
IMAGES, TEXTS = [300, 64, 0, 513], [30, 0, 12, 70]
GIVING = [c for c in CANDIDATES if c.gives_lse and c.adapter is not None]
PAIRS = [(c.name, b.name) for c in GIVING for b in BACKWARDS]


def draw(*shape: int, images: list[int] = IMAGES, texts: list[int] = TEXTS) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)
    rows = sum(images) + sum(texts)
    return [torch.randn(rows, *shape, generator=generator, device="cuda").to(torch.bfloat16) for _ in range(3)]


def arguments() -> tuple:
    return IMAGES, TEXTS, offsets_of(IMAGES).cuda(), offsets_of(TEXTS).cuda()


@pytest.mark.parametrize("candidate", GIVING, ids=lambda c: c.name)
def test_lse_is_natural_of_scaled_scores_without_padding(candidate):
    call = attention_choice.released_call()
    if why := candidate.why_unsupported(call):
        pytest.skip(why)
    q, k, v = draw(3, 64)
    lengths = [i + t for i, t in zip(IMAGES, TEXTS, strict=True)]
    offsets = offsets_of(lengths).cuda()
    samples = Samples(offsets, offsets, max(lengths), max(lengths), 0.2, lengths, lengths)
    out, lse = candidate.adapter(q, k, v, samples, candidate.load(False), with_lse=True)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (3, len(q)), torch.float32)
    assert lse.is_contiguous()
    start = 0
    for rows in lengths:
        own = slice(start, start + rows)
        scores = torch.einsum("qnh,knh->nqk", q[own].double(), k[own].double()) * 0.2
        torch.testing.assert_close(lse[:, own].double(), scores.logsumexp(-1), atol=5e-4, rtol=1e-5)
        start += rows


@pytest.mark.parametrize("text_queries", [True, False])
@pytest.mark.parametrize(("forward", "backward"), PAIRS)
def test_gradients_of_any_library_for_any_forward_pass(forward, backward, text_queries):
    with attention_choice.use(forward), attention_choice.use_backward(backward):
        try:
            chosen = attention_choice.choose(attention_choice.released_call(backward=True))
        except RuntimeError as why:
            pytest.skip(str(why))
        assert (chosen.name, chosen.gradients) == (forward, backward)
        leaves = [x.requires_grad_() for x in draw(3, 64)]
        out = torch.cat(ops.joint_attention(*leaves, *arguments(), text_queries, 0.2))
        got = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
        again = torch.autograd.grad(out, leaves, torch.ones_like(out))
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact = torch.cat(reference.joint_attention(*wide, *arguments(), text_queries, 0.2))
    for a, b in zip(got, torch.autograd.grad(exact, wide, torch.ones_like(exact)), strict=True):
        assert error(a, b) <= 0.02 * b.abs().max() + 1e-3
    if next(b for b in BACKWARDS if b.name == backward).deterministic:
        assert all(same_bits(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("name", [None, "torch-sdpa", "torch-varlen"])
def test_what_trains_on_torch_alone_and_unforced_is_the_same_bits_every_time(name):
    """At sizes where atomics show: many blocks of keys add to one row of queries."""
    images, texts = [2048, 2048], [100, 0]
    leaves = [x.requires_grad_() for x in draw(8, 64, images=images, texts=texts)]
    offsets = offsets_of(images).cuda(), offsets_of(texts).cuda()
    with attention_choice.use(name):
        chosen: Choice = attention_choice.choose(attention_choice.released_call(backward=True))
        out = torch.cat(ops.joint_attention(*leaves, images, texts, *offsets))
    weight = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, weight, retain_graph=True)
    for _ in range(20):
        for a, b in zip(torch.autograd.grad(out, leaves, weight, retain_graph=True), first, strict=True):
            assert same_bits(a, b), chosen.gradients
