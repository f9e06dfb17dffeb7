"""Every adapter's call, forward and backward, against a stand-in that computes the true result; our kernel's bound."""

from __future__ import annotations

import inspect
import types

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from lens import ops
from lens.ops import backend
from lens.ops.attention import backward, forward, hopper
from lens.ops.attention import choice as attention_choice
from lens.ops.attention.choice import BACKWARDS, CANDIDATES, Candidate, Choice, choose, use
from lens.ops.attention.hopper import HeadNorms, known_bound, score_bound
from lens.ops.attention.layout import DeviceLayout, Samples, with_deterministic_backward
from tests.ops.attention_stand_ins import (
    BY_NAME,
    IMAGES,
    TEXTS,
    TORCH,
    checked,
    inputs,
    launch,
    offsets_of,
    on_cpu,
    torch_cudnn_backward,
    true_attention,
    true_gradients,
    true_lse,
)
from train.networks.denoiser import _keep


@pytest.fixture
def cudnn_op(monkeypatch):
    """torch's private cuDNN op: its order of arguments, the true result."""

    def forward(
        query, key, value, bias, cu_q, cu_k, max_q, max_k, lse, dropout=0.0, causal=False, debug=False, *, scale=None
    ):
        assert (bias, lse, dropout, causal, debug) == (None, True, 0.0, False, False)
        checked(cu_q, cu_k, max_q, max_k)
        return true_attention(query, key, value, cu_q, cu_k, scale), None

    monkeypatch.setattr(torch.ops.aten, "_cudnn_attention_forward", forward)


@pytest.mark.parametrize("text_queries", [True, False])
@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize("name", BY_NAME)
def test_adapters_against_the_spec(monkeypatch, cudnn_op, name, scale, text_queries):
    on_cpu(monkeypatch, name)
    if name == "torch-cudnn":  # here torch has no cuDNN to be restricted to; the GPU tests run it unpatched
        asked = []
        monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda kind: asked.append(kind) or torch.no_grad())
    monkeypatch.setattr(backend, "choose", lambda op, x: "cuda")
    q, k, v = inputs()
    arguments = (q, k, v, IMAGES, TEXTS, offsets_of(IMAGES), offsets_of(TEXTS), text_queries, scale)
    with torch.no_grad():
        got = ops.joint_attention(*arguments)
        expected = ops.reference.joint_attention(*arguments)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    if name == "torch-cudnn":
        assert asked == [torch.nn.attention.SDPBackend.CUDNN_ATTENTION]
    choose.cache_clear()


@pytest.mark.parametrize("name", [n for n, c in BY_NAME.items() if c.device_lengths])
def test_device_lengths(monkeypatch, cudnn_op, name):
    """With places the host's lengths are read for their totals alone: lengths of another batch do no harm."""
    on_cpu(monkeypatch, name)
    q, k, v = inputs()
    rows = ops.reference.joint_rows(offsets_of(IMAGES), offsets_of(TEXTS), sum(IMAGES), sum(TEXTS))
    joint = offsets_of([i + t for i, t in zip(IMAGES, TEXTS)])
    places = DeviceLayout(rows[: sum(IMAGES)], rows[sum(IMAGES) :], 18, 18, joint)
    other = [0, 0, sum(IMAGES), 0], [sum(TEXTS), 0, 0, 0]
    offsets = offsets_of(IMAGES), offsets_of(TEXTS)
    for text_queries in (True, False):
        with torch.no_grad():
            got = ops.joint_attention(q, k, v, *other, *offsets, text_queries, layout=places)
            expected = ops.reference.joint_attention(q, k, v, IMAGES, TEXTS, *offsets, text_queries)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    choose.cache_clear()


PAIRS = [(c.name, "") for c in CANDIDATES if c.backward and c.adapter is not None and c.name != "torch-cudnn"]
PAIRS += [(c.name, b.name) for c in CANDIDATES for b in BACKWARDS if c.gives_lse and b.name != Choice(c).gradients]


@pytest.mark.parametrize("text_queries", [True, False])
@pytest.mark.parametrize(("name", "gradients_of"), PAIRS)
def test_gradients_of_every_library_for_every_forward_pass(monkeypatch, name, gradients_of, text_queries):
    on_cpu(monkeypatch, name)
    monkeypatch.setattr(backend, "choose", lambda op, x: "cuda")
    tensors = inputs(torch.float64, grad=True)
    arguments = (*tensors, IMAGES, TEXTS, offsets_of(IMAGES), offsets_of(TEXTS), text_queries, 0.2)
    weight = torch.linspace(-1, 1, 14 * 16, dtype=torch.float64).view(14, 16)

    def gradients(op):
        image, text = op(*arguments)
        return torch.autograd.grad((image[:14] * weight).sum() + text.square().sum(), tensors)

    with use(name), attention_choice.use_backward(gradients_of or None):
        chosen = choose(attention_choice.call_of(*tensors, 10, False))
        assert (chosen.name, chosen.gradients) == (name, gradients_of or chosen.gradients)
        assert (chosen.backward is not None) == bool(gradients_of)
        found = gradients(ops.joint_attention)
    for got, expected in zip(found, gradients(ops.reference.joint_attention), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)
    choose.cache_clear()


def test_no_gradient_of_a_gradient(monkeypatch):
    """Libraries have none; without a word they would be left out."""
    monkeypatch.setattr(backend, "choose", lambda op, x: "cuda")
    for name in ("flash-attn-4", "lens-hopper"):
        on_cpu(monkeypatch, name)
        q, k, v = inputs(torch.float64, grad=True)
        with use(name), attention_choice.use_backward("flash-attn-2"):
            out = torch.cat(ops.joint_attention(q, k, v, IMAGES, TEXTS, offsets_of(IMAGES), offsets_of(TEXTS)))
            (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
            with pytest.raises(RuntimeError, match="once_differentiable"):
                dq.sum().backward()
    choose.cache_clear()


def test_libraries_get_channels_side_by_side(monkeypatch):
    seen = []

    def attend(q, k, v, samples, module):
        seen.extend(x.stride(-1) for x in (q, k, v))
        return q * k + v

    real = [x.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs(torch.float64)]
    assert {x.stride(-1) for x in real} == {2}
    monkeypatch.setattr(attention_choice, "choose", lambda call: Choice(Candidate("any", attend)))
    joint = offsets_of([i + t for i, t in zip(IMAGES, TEXTS)])
    out = attention_choice.run(*real, Samples(joint, joint, 10, 10, 0.3))
    assert seen == [1, 1, 1]
    torch.testing.assert_close(torch.autograd.grad(out.sum(), real), (real[1], real[0], torch.ones_like(out)))


@pytest.mark.parametrize("invariant", [True, False])
@pytest.mark.parametrize("replaced", [None, "FA3"])
def test_what_stands_in_for_torchs_flash_splits_no_keys_under_batch_invariance(monkeypatch, replaced, invariant):
    """torch's own never does; one that a process put in its place may, by the longest sample of the call."""
    given = []
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: replaced)

    def varlen_attn(*arguments, num_splits=None, **options):
        given.append(num_splits)
        return torch.zeros(1)

    module = types.SimpleNamespace(varlen_attn=varlen_attn)
    joint = offsets_of([i + t for i, t in zip(IMAGES, TEXTS)])
    samples = Samples(joint, joint, 10, 10, 8**-0.5, batch_invariant=invariant)
    forward.torch_varlen(*inputs(), samples, module)
    assert given == [1 if replaced and invariant else None]

    # torch 2.11: there is no such argument, so that no such promise can be kept
    module = types.SimpleNamespace(varlen_attn=lambda *_, scale=None: torch.zeros(1))
    candidate = next(c for c in attention_choice.CANDIDATES if c.name == "torch-varlen")
    monkeypatch.setattr(attention_choice, "installed", lambda name: True)
    monkeypatch.setattr(attention_choice.importlib, "import_module", lambda name: module)
    need = attention_choice.AttentionCall("cuda", (9, 0), torch.bfloat16, 64, False, False, 4096, invariant)
    if replaced and invariant:
        assert "FA3, which this process put in the place of torch's flash attention" in candidate.why_unsupported(need)
        with pytest.raises(RuntimeError, match="takes no num_splits to forbid it"):
            forward.torch_varlen(*inputs(), samples, module)
    else:
        assert candidate.why_unsupported(need) == ""
        forward.torch_varlen(*inputs(), samples, module)


@pytest.mark.parametrize("gives", [True, False])
def test_releases_of_flash_attn_3_without_an_argument_for_the_lse(gives):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, num_splits,
        deterministic,
    ):  # fmt: skip
        made = true_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)
        return (made, true_lse(q, k, cu_seqlens_q, cu_seqlens_k, softmax_scale)) if gives else made

    module = types.SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func, __name__="flash_attn_interface")
    q, k, v = inputs()
    joint = offsets_of([i + t for i, t in zip(IMAGES, TEXTS)])
    samples = Samples(joint, joint, 10, 10, 0.3)
    plain = forward.flash_attn_3(q, k, v, samples, module)
    torch.testing.assert_close(plain, true_attention(q, k, v, joint, joint, 0.3))
    if gives:
        out, lse = forward.flash_attn_3(q, k, v, samples, module, with_lse=True)
        assert torch.equal(out, plain)
        torch.testing.assert_close(lse, true_lse(q, k, joint, joint, 0.3))
    else:
        with pytest.raises(RuntimeError, match="this release of flash_attn_interface gives no lse"):
            forward.flash_attn_3(q, k, v, samples, module, with_lse=True)


@pytest.mark.parametrize("grad", [True, False])
def test_one_call_per_sample_records_no_gradient_of_cudnn(monkeypatch, grad):
    """Which torch prefers on Hopper and Blackwell, and whose backward pass is nondeterministic."""
    seen, real = [], torch.nn.functional.scaled_dot_product_attention

    def attend(*given, **more):
        cuda = torch.backends.cuda
        seen.append((cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.math_sdp_enabled()))
        return real(*given, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attend)
    lengths = [i + t for i, t in zip(IMAGES, TEXTS)]
    samples = Samples(offsets_of(lengths), offsets_of(lengths), 10, 10, 0.3, lengths, lengths)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    forward.torch_sdpa(*inputs(grad=grad), samples, None)
    assert seen == [(before and not grad, True, True)] * len(lengths)
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_selective_recomputation_keeps_what_our_forward_pass_made(monkeypatch):
    """It knows attention by the name of its op, also within a function of two libraries."""
    on_cpu(monkeypatch, "lens-hopper")
    monkeypatch.setattr(backend, "choose", lambda op, x: "cuda")
    calls = []
    monkeypatch.setattr(backend, "launch", lambda *a, **k: calls.append(a[0]) or launch(*a, **k))
    tensors = inputs(grad=True)
    places = IMAGES, TEXTS, offsets_of(IMAGES), offsets_of(TEXTS)

    def block(q, k, v):
        return torch.cat(ops.joint_attention(q * 2, k, v, *places)).square().sum()

    with use("lens-hopper"):
        out = checkpoint(block, *tensors, use_reentrant=False, context_fn=_keep(64))
        got = torch.autograd.grad(out, tensors)
        assert calls == ["joint_attention"]
        for a, b in zip(got, torch.autograd.grad(block(*tensors), tensors), strict=True):
            torch.testing.assert_close(a, b)
    choose.cache_clear()


@pytest.mark.parametrize("stand_in", TORCH.values(), ids=[op for _, op in TORCH])
def test_the_stand_ins_take_what_torch_takes(stand_in):
    (module,) = (module for module, op in TORCH if op == stand_in.__name__)
    real = [a.name for a in getattr(module, stand_in.__name__).default._schema.arguments]
    taken = list(inspect.signature(stand_in).parameters)
    assert taken[:-1] == real[: len(taken) - 1]
    assert taken[-1] == "scale"
    assert "scale" in real


def test_equal_samples_share_a_call_of_cudnn_and_lengths_come_from_the_device_where_need_be(monkeypatch):
    lengths, calls = [4, 2, 4, 4], []
    monkeypatch.setattr(
        backward,
        "torch_cudnn_backward",
        lambda *given, **more: calls.append(given[0].shape[0]) or torch_cudnn_backward(*given, **more),
    )
    q, k, v, dout = (torch.randn(14, 2, 8, dtype=torch.float64) for _ in range(4))
    offsets = offsets_of(lengths)
    lse, out = true_lse(q, k, offsets, offsets, 0.3), true_attention(q, k, v, offsets, offsets, 0.3)
    expected = true_gradients(dout, q, k, v, out, lse, offsets, offsets, 0.3)
    for known in (lengths, None):
        got = backward.torch_cudnn(None, dout, q, k, v, out, lse, Samples(offsets, offsets, 4, 4, 0.3, known, known))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert calls == [3, 1, 3, 1]


# ------------------------------------------------------------------------------------------------ our kernel's bound


def test_no_score_exceeds_the_bound_and_one_comes_close():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(64, generator=generator, dtype=torch.float64) * 2 - 0.5 for _ in range(4)]
    bound = score_bound(weights[:2], weights[2:])
    most = 0.0
    pair = torch.stack(weights).abs().view(2, 2, 32, 2).amax(1).amax(-1).prod(0).argmax()
    for q_weight in weights[:2]:
        for k_weight in weights[2:]:
            raw = torch.randn(2, 500, 64, generator=generator, dtype=torch.float64)
            # and rows that lie in the worst pair alone, in either direction, turned by any angle
            raw[:, 250:] = 0
            raw[:, 250:, 2 * pair : 2 * pair + 2] = torch.eye(2, dtype=torch.float64)[torch.arange(250) % 2]
            rows = torch.nn.functional.rms_norm(raw, (64,), eps=1e-6) * torch.stack([q_weight, k_weight])[:, None]
            angles = torch.rand(2, 500, 32, generator=generator, dtype=torch.float64) * 6.3
            turned = torch.view_as_complex(rows.view(2, 500, 32, 2)) * torch.polar(torch.ones_like(angles), angles)
            q, k = torch.view_as_real(turned).flatten(2).bfloat16().double()
            most = max(most, float((q @ k.T).abs().max()) / 8)
    assert 0.97 * bound < most <= bound
    assert score_bound(weights[:2], weights[2:], 0.25) == pytest.approx(2 * bound)


def test_the_bound_is_remembered_until_a_weight_changes(monkeypatch):
    norms = HeadNorms(*(torch.ones(64) for _ in range(4)))
    assert known_bound(norms, 0.125) == pytest.approx(8.08)
    monkeypatch.setattr(hopper.known_bound.__globals__["torch"], "stack", None)  # nothing is computed again
    assert known_bound(norms, 0.125) == pytest.approx(8.08)
    monkeypatch.undo()
    norms.text_k[3] = 2.0
    assert known_bound(norms, 0.125) == pytest.approx(16.16)
    assert known_bound(norms, 0.25) == pytest.approx(32.32)
    assert known_bound(norms._replace(image_k=3 * torch.ones(64)), 0.125) == pytest.approx(24.24)
    with torch.inference_mode():
        assert known_bound(HeadNorms(*(torch.ones(64) for _ in range(4))), 0.125) is None


def test_the_bound_reaches_the_kernel(monkeypatch):
    """In inference by the norms; with a gradient, or without norms, no bound is known."""
    on_cpu(monkeypatch, "lens-hopper")
    monkeypatch.setattr(backend, "choose", lambda op, x: "cuda")
    bounds = []
    monkeypatch.setattr(backend, "launch", lambda *a, score_bound, **k: bounds.append(score_bound))
    norms = HeadNorms(*(torch.full((8,), 1.5) for _ in range(4)))
    arguments = (*inputs(), IMAGES, TEXTS, offsets_of(IMAGES), offsets_of(TEXTS))
    with torch.no_grad():
        ops.joint_attention(*arguments, norms=norms)
        ops.joint_attention(*arguments)
    with use("lens-hopper"):
        ops.joint_attention(*inputs(grad=True), *arguments[3:], norms=norms)
    assert bounds == [pytest.approx(1.01 * 8**0.5 * 2.25), float("inf"), float("inf")]
    choose.cache_clear()


@pytest.mark.parametrize("text_queries", [True, False])
def test_contracts_of_our_op(monkeypatch, text_queries):
    monkeypatch.setattr(backend, "launch", launch)
    q, k, v = inputs()
    places = offsets_of(IMAGES), offsets_of(TEXTS)
    arguments = (q, k, v, *places, sum(IMAGES), text_queries, 0.3, float("inf"), 0, True)
    torch.library.opcheck(torch.ops.lens.joint_attention_hopper.default, arguments)
    with pytest.raises(ValueError, match=r"scale must be positive for lens-hopper, got -0.1"):
        hopper.forward(q, k, v, *places, sum(IMAGES), text_queries, -0.1, float("inf"), 0, True)


def test_torch_kernels_are_asked_to_be_deterministic():
    """Their backward passes add with atomics unless the global switch is on, for more than a warning: it is on there, and
    nowhere else."""
    seen = []

    class WatchedAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dout):
            seen.append(torch.are_deterministic_algorithms_enabled())
            seen.append(torch.is_deterministic_algorithms_warn_only_enabled())
            return dout * 2

    class Product(WatchedAttention):
        pass

    x, fill = torch.ones(3, requires_grad=True), torch.utils.deterministic.fill_uninitialized_memory
    with_deterministic_backward(WatchedAttention.apply(x)).sum().backward()
    WatchedAttention.apply(x).sum().backward()
    with_deterministic_backward(Product.apply(x)).sum().backward()
    assert seen == [True, False, False, False, False, False], "a product wants a setting of cuBLAS there"
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory == fill
    for name in (
        "ScaledDotProductFlashAttentionForCpuBackward0",
        "GeneratedBackwardFor_torch_attn__varlen_attn_default",
    ):
        assert any(word in name for word in ("Attention", "attn"))
