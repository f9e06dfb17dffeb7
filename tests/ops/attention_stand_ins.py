"""What stands in for attention libraries on a CPU: their signatures and defaults, the true result."""

from __future__ import annotations

import inspect
import types

import torch
from torch import Tensor

from lens import ops
from lens.ops import backend
from lens.ops.attention import backward, forward
from lens.ops.attention import choice as attention_choice
from lens.ops.attention.choice import BACKWARDS, CANDIDATES, Candidate
from tests.recorded_graph import candidates

BY_NAME = {c.name: c for c in CANDIDATES}


def true_attention(q, k, v, query_offsets: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """softmax(q k^T scale) v per sample in float32, told by offsets."""
    parts = []
    for (a, b), (c, d) in zip(
        zip(query_offsets.tolist(), query_offsets.tolist()[1:]), zip(offsets.tolist(), offsets.tolist()[1:])
    ):
        logits = torch.einsum("qnh,knh->nqk", q[a:b].float(), k[c:d].float()) * scale
        parts.append(torch.einsum("nqk,knh->qnh", logits.softmax(-1), v[c:d].float()))
    return torch.cat(parts).to(q.dtype)


def true_lse(q, k, query_offsets: Tensor, offsets: Tensor, scale: float) -> Tensor:
    """[N, RQ]"""
    ends = query_offsets.tolist(), offsets.tolist()
    parts = [
        (torch.einsum("qnh,knh->nqk", q[a:b].double(), k[c:d].double()) * scale).logsumexp(-1)
        for a, b, c, d in zip(ends[0], ends[0][1:], ends[1], ends[1][1:])
    ]
    return torch.cat(parts, 1)


def true_gradients(dout, q, k, v, out, lse, query_offsets: Tensor, offsets: Tensor, scale: float) -> list[Tensor]:
    """From the lse that is given, as every library does, in float64."""
    assert lse.shape == (q.shape[1], q.shape[0])
    assert lse.is_contiguous()
    assert dout.shape == out.shape == q.shape
    made = [torch.zeros(x.shape, dtype=torch.float64) for x in (q, k, v)]
    ends = query_offsets.tolist(), offsets.tolist()
    for a, b, c, d in zip(ends[0], ends[0][1:], ends[1], ends[1][1:]):
        go, qs, ks, vs, o = (x.double() for x in (dout[a:b], q[a:b], k[c:d], v[c:d], out[a:b]))
        p = torch.exp(torch.einsum("qnh,knh->nqk", qs, ks) * scale - lse[:, a:b, None].double())
        ds = p * (torch.einsum("qnh,knh->nqk", go, vs) - (go * o).sum(-1).T[..., None]) * scale
        made[0][a:b] = torch.einsum("nqk,knh->qnh", ds, ks)
        made[1][c:d] = torch.einsum("nqk,qnh->knh", ds, qs)
        made[2][c:d] = torch.einsum("nqk,qnh->knh", p, go)
    return [x.to(q.dtype) for x in made]


def filled(given: list[Tensor], made: list[Tensor]) -> None:
    for x, y in zip(given, made, strict=True):
        assert x.is_contiguous()
        x.copy_(y)


def checked(query_offsets, offsets, longest_query, longest) -> None:
    """What kernels do with wrong bounds is to leave rows out, silently."""
    assert query_offsets.dtype == offsets.dtype == torch.int32
    assert longest_query >= query_offsets.diff().max()
    assert longest >= offsets.diff().max()


class Fake2(types.SimpleNamespace):
    """flash-attn 2: its order of arguments and its defaults."""

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size, softcap, alibi_slopes) == (0.0, False, (-1, -1), 0.0, None)
        assert deterministic
        checked(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        out = true_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale)
        return (out, true_lse(q, k, cu_seqlens_q, cu_seqlens_k, scale), None) if return_attn_probs else out

    @staticmethod
    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p,
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        assert (alibi_slopes, deterministic, rng_state, zero_tensors) == (None, True, None, False)
        checked(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        places = cu_seqlens_q, cu_seqlens_k, softmax_scale
        filled([dq, dk, dv], true_gradients(dout, q, k, v, out, softmax_lse, *places))


class Fake3(types.SimpleNamespace):
    """flash-attn 3: seqused before the scale, no dropout; early releases return the denominators, too."""

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        assert (seqused_q, seqused_k, causal, qv, num_splits, deterministic) == (None, None, False, None, 1, True)
        checked(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
        lse = true_lse(q, k, cu_seqlens_q, cu_seqlens_k, scale)
        return true_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, scale), lse

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, cu_seqlens_k=None, sequed_q=None, sequed_k=None,
        max_seqlen_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None, is_causal=False,
        window_size_left=-1, window_size_right=-1, softcap=0.0, deterministic=False, sm_margin=0,
    ):  # fmt: skip
        assert (sequed_q, sequed_k, is_causal, window_size_left, window_size_right) == (None, None, False, -1, -1)
        assert (softcap, deterministic, sm_margin) == (0.0, True, 0)
        checked(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        places = cu_seqlens_q, cu_seqlens_k, softmax_scale
        filled([dq, dk, dv], true_gradients(dout, q, k, v, out, softmax_lse, *places))


class Fake4(types.SimpleNamespace):
    """flash-attn 4: lengths after the offsets by name, seqused and a page table between, always a pair."""

    @staticmethod
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None,
        seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, return_lse=False,
    ):  # fmt: skip
        assert (seqused_q, seqused_k, page_table, causal, learnable_sink) == (None, None, None, False, None)
        assert (num_splits, deterministic) == (1, True)
        checked(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        lse = true_lse(q, k, cu_seqlens_q, cu_seqlens_k, softmax_scale) if return_lse else None
        return true_attention(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale), lse

    @staticmethod
    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2,
        num_stages_dO=2, SdP_swapAB=False, dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2,
        AtomLayoutMdQ=2, V_in_regs=False, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        assert (causal, softcap, window_size_left, window_size_right) == (False, 0.0, None, None)
        assert (m_block_size, pack_gqa, seqused_q, seqused_k, deterministic, dq) == (64, False, None, None, True, None)
        checked(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        return *true_gradients(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, softmax_scale), None


class FakeVarlen(types.SimpleNamespace):
    """torch's own variable-length call, as the oldest supported torch has it: no `scale`."""

    @staticmethod
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None, scale=None):
        assert not is_causal
        checked(cu_seq_q, cu_seq_k, max_q, max_k)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        return true_attention(query, key, value, cu_seq_q, cu_seq_k, scale)


FAKES = {"flash-attn-2": Fake2, "flash-attn-3": Fake3, "flash-attn-4": Fake4, "torch-varlen": FakeVarlen}
IMAGES, TEXTS = [5, 0, 9, 4], [3, 2, 0, 6]


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def inputs(dtype=torch.float32, grad=False):
    g = torch.Generator().manual_seed(3)
    rows = sum(IMAGES) + sum(TEXTS)
    return [torch.randn(rows, 2, 8, generator=g).to(dtype).requires_grad_(grad) for _ in range(3)]


def launch(kernel, like, dtype=None, *, q, k, v, image_out, text_out, lse, scale, score_bound, **sizes) -> None:
    """The attention kernel: what csrc/params.h says of it."""
    assert kernel == "joint_attention"
    places = [sizes[name] for name in ("image_offsets", "text_offsets")]
    assert (sizes["RI"], sizes["RT"]) == tuple(p[-1].item() for p in places)
    assert (sizes["B"], sizes["N"], sizes["H"]) == (len(places[0]) - 1, *q.shape[1:])
    lengths = [p.diff().tolist() for p in places]
    image, text = ops.reference.joint_attention(q, k, v, *lengths, *places, text_out is not None, scale)
    image_out.copy_(image)
    if text_out is not None:
        text_out.copy_(text)
    if lse is not None:
        start = 0
        for rows in map(sum, zip(*lengths)):
            own = slice(start, start + rows)
            lse[:, own] = (torch.einsum("qnh,knh->nqk", q[own], k[own]) * scale).logsumexp(-1)
            start += rows


def torch_flash_forward(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask, *, scale=None
):
    assert (dropout_p, is_causal, return_debug_mask) == (0.0, False, False)
    checked(cum_seq_q, cum_seq_k, max_q, max_k)
    lse = true_lse(query, key, cum_seq_q, cum_seq_k, scale)
    return true_attention(query, key, value, cum_seq_q, cum_seq_k, scale), lse, None, None, None


def torch_flash_backward(
    grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, rng_state,
    unused, *, scale=None,
):  # fmt: skip
    assert (dropout_p, is_causal, rng_state.dtype) == (0.0, False, torch.uint64)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "a warning leaves the atomics in"
    assert not torch.utils.deterministic.fill_uninitialized_memory
    checked(cum_seq_q, cum_seq_k, max_q, max_k)
    return true_gradients(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, scale)


def packed(batch: Tensor) -> Tensor:
    """[B, N, S, H] -> [B * S, N, H]"""
    return batch.transpose(1, 2).flatten(0, 1)


def unpacked(rows: Tensor, like: Tensor) -> Tensor:
    return rows.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)


def of_equal_lengths(query: Tensor, key: Tensor) -> list[Tensor]:
    return [offsets_of([x.shape[2]] * x.shape[0]) for x in (query, key)]


def torch_cudnn_forward(
    query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, return_debug_mask=False, *,
    scale=None,
):  # fmt: skip
    assert (attn_bias, compute_log_sumexp, dropout_p, is_causal) == (None, True, 0.0, False)
    places, rows = of_equal_lengths(query, key), [packed(x) for x in (query, key, value)]
    lse = unpacked(true_lse(*rows[:2], *places, scale).T[..., None], query)
    return unpacked(true_attention(*rows, *places, scale), query), lse, *[None] * 7


def torch_cudnn_backward(
    grad_out, query, key, value, out, logsumexp, philox_seed, philox_offset, attn_bias, cum_seq_q, cum_seq_k, max_q,
    max_k, dropout_p, is_causal, *, scale=None,
):  # fmt: skip
    assert (attn_bias, cum_seq_q, cum_seq_k, dropout_p, is_causal) == (None, None, None, 0.0, False)
    assert philox_seed.dtype == philox_offset.dtype == torch.int64
    assert logsumexp.shape == (*query.shape[:3], 1)
    assert logsumexp.is_contiguous()
    assert (max_q, max_k) == (query.shape[2], key.shape[2])
    places, rows = of_equal_lengths(query, key), [packed(x) for x in (grad_out, query, key, value, out)]
    made = true_gradients(*rows, packed(logsumexp).squeeze(-1).T.contiguous(), *places, scale)
    return [unpacked(x, like) for x, like in zip(made, (query, key, value), strict=True)]


TORCH = {
    (forward, "torch_flash_forward"): torch_flash_forward,
    (forward, "torch_cudnn_forward"): torch_cudnn_forward,
    (backward, "torch_flash_backward"): torch_flash_backward,
    (backward, "torch_cudnn_backward"): torch_cudnn_backward,
}


def runs_here(real: Candidate) -> Candidate:
    changes = {f: getattr(real, f) for f in inspect.signature(Candidate).parameters}
    changes |= dict(device="cpu", arch=((0, 0), (0, 0)), forward_modules=(), backward_modules=None, also_requires=())
    changes |= dict(dtypes=(torch.float32, torch.float64), function="")
    if real.kernel:
        changes |= dict(kernel="", head_dim=(1, 64))
    return Candidate(**changes)


def on_cpu(monkeypatch, name: str) -> None:
    """Candidate `name`, with its stand-in for a module, serves calls on the CPU and nothing else does."""
    monkeypatch.setattr(Candidate, "load", lambda self, backward: FAKES.get(self.name))
    monkeypatch.setattr(backend, "launch", launch)
    for (module, op), stand_in in TORCH.items():
        monkeypatch.setattr(module, op, stand_in)
    gradients = {op: stand_in for (module, op), stand_in in TORCH.items() if module is backward}
    assert set(gradients) <= set(vars(backward)), "the adapters call what is replaced"
    monkeypatch.setattr(attention_choice, "BACKWARDS", [runs_here(b) for b in BACKWARDS])
    candidates(monkeypatch, runs_here(BY_NAME[name]))
