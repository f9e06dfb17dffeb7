"""Joint attention by lens._C on sm_90a: one launch reads the joint layout and writes both streams where they are read.

The kernel knows lengths from the offsets alone, on the device, and is forward only; gradients are a library's that
takes our result and its lse, see backward.py. How large a score can become is known from the weights of the norms
before it, which saves the kernel its row maxima.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakTensorKeyDictionary

from lens.ops import backend, reference
from lens.ops.attention.layout import Samples


class HeadNorms(NamedTuple):
    """Weights [H] of the norms that made q and k."""

    image_q: Tensor
    image_k: Tensor
    text_q: Tensor
    text_k: Tensor


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # by a block's first norm


def score_bound(q_weights: Sequence[Tensor], k_weights: Sequence[Tensor], scale: float | None = None) -> float:
    """H * scale * max over pairs i of (max |w_q| * max |w_k|), with both entries of pair i and every weight given.

    q_weights, k_weights: [H] each, the norms of all streams, H even; scale: H^-0.5 by default

    q is w * n with |n|^2 <= H, by RMSNorm, then turned within the pairs (2i, 2i + 1). With |n_i| the length of pair i,
    |q_i| <= max |w_i| |n_i|, so |q . k| <= sum_i |q_i| |k_i| <= max_i(max |w_q,i| max |w_k,i|) |n| |m|, and |n| |m| <=
    H. Two roundings to bfloat16, 2^-9 each, and the tables' own are in the result.
    """

    def by_pair(weights: Sequence[Tensor]) -> Tensor:
        stacked = torch.stack([w.detach().to("cpu", torch.float64) for w in weights]).abs()
        return stacked.amax(0).view(-1, 2).amax(1)

    head_dim = q_weights[0].shape[0]
    scale = head_dim**-0.5 if scale is None else scale
    return 1.01 * head_dim * scale * float((by_pair(q_weights) * by_pair(k_weights)).max())


def known_bound(norms: HeadNorms, scale: float) -> float | None:
    """The same, remembered until a weight changes; None for weights that do not tell when they change.

    The first call for a block copies its weights to the host. Writes through ``.data`` are not told: `forget` after them.
    """
    if torch.compiler.is_compiling() or any(w.is_inference() for w in norms):
        return None
    state = scale, *((w.data_ptr(), w._version) for w in norms)
    found = _known.get(norms.image_q)
    if found is None or found[0] != state:
        bound = score_bound([norms.image_q, norms.text_q], [norms.image_k, norms.text_k], scale)
        found = _known[norms.image_q] = state, bound
    return float(found[1])


def forget() -> None:
    """Read every block's norms anew: a bound that weights have outgrown lets exponentials overflow."""
    _known.clear()


# ------------------------------------------------------------------------------------------------ the kernel

POLYNOMIAL = 1  # of every four exponentials, how many are polynomials; docs/attention.md


@backend.custom_op("lens::joint_attention_hopper")
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_offsets: Tensor,
    text_offsets: Tensor,
    images: int,
    text_queries: bool,
    scale: float,
    score_bound: float,
    polynomial: int,
    with_lse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """image_out [RI, N * 64], text_out [RT, N * 64] or [0, N * 64], lse float32 [N, RS] or [N, 0].

    lse holds the natural logarithm of every softmax denominator; without text_queries its text columns hold nothing.
    score_bound: |q . k| * scale exceeds it nowhere, see `known_bound`; inf where that is not known
    """
    rows, heads, channels = q.shape
    if scale <= 0:
        raise ValueError(f"lens.joint_attention: scale must be positive for lens-hopper, got {scale}")
    image, text, lse = _outputs(q, images, text_queries, with_lse)
    backend.launch(
        "joint_attention",
        q,
        q=q.contiguous(),
        k=k.contiguous(),
        v=v.contiguous(),
        image_offsets=image_offsets.contiguous(),
        text_offsets=text_offsets.contiguous(),
        image_out=image,
        text_out=text if text_queries else None,
        lse=lse if with_lse else None,
        RI=images,
        RT=rows - images,
        B=image_offsets.shape[0] - 1,
        N=heads,
        H=channels,
        polynomial=polynomial,
        scale=scale,
        score_bound=score_bound,
    )
    return image, text, lse


def _outputs(q: Tensor, images: int, text_queries: bool, with_lse: bool) -> tuple[Tensor, Tensor, Tensor]:
    rows, heads, channels = q.shape
    width = heads * channels
    text = q.new_empty(rows - images if text_queries else 0, width)
    return q.new_empty(images, width), text, q.new_empty(heads, rows if with_lse else 0, dtype=torch.float32)


@forward.register_fake
def _fake(q: Tensor, k: Tensor, v: Tensor, image_offsets: Tensor, text_offsets: Tensor, images: int, *rest: Any) -> Any:
    text_queries, _, _, _, with_lse = rest
    return _outputs(q, images, text_queries, with_lse)


class _Recorded(torch.autograd.Function):
    """Our forward pass with the gradients of a library, which sees the query rows in the order of the joint layout."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        image_offsets: Tensor,
        text_offsets: Tensor,
        images: int,
        longest: int,
        text_queries: bool,
        scale: float,
        gradients: Callable[..., Any],
    ) -> tuple[Tensor, Tensor]:
        layout = image_offsets, text_offsets, images
        image, text, lse = forward(q, k, v, *layout, text_queries, scale, float("inf"), POLYNOMIAL, True)
        ctx.save_for_backward(q, k, v, image, text, lse, image_offsets, text_offsets)
        ctx.plan = longest, scale, gradients
        return image, text

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dimage: Tensor, dtext: Tensor) -> Any:
        q, k, v, image_out, text_out, lse, image_offsets, text_offsets = ctx.saved_tensors
        longest, scale, gradients = ctx.plan
        images, texts = image_out.shape[0], text_out.shape[0]
        rows = reference.joint_rows(image_offsets, text_offsets, images, q.shape[0] - images)[: images + texts]
        whole = images + texts == q.shape[0]  # otherwise the text rows asked nothing

        def asking(image: Tensor, text: Tensor) -> Tensor:
            if not whole:
                return image.reshape(images, *q.shape[1:])
            joint = torch.empty_like(q, memory_format=torch.contiguous_format)
            return joint.index_copy_(0, rows, torch.cat([image, text]).view_as(joint))

        joint_offsets = image_offsets + text_offsets
        samples = Samples(joint_offsets if whole else image_offsets, joint_offsets, longest, longest, scale)
        queries = (q, lse) if whole else (q.index_select(0, rows), lse.index_select(1, rows))
        dout, out = asking(dimage, dtext), asking(image_out, text_out)
        dq, dk, dv = gradients(dout, queries[0], k, v, out, queries[1], samples)
        if not whole:
            dq = torch.zeros_like(q, memory_format=torch.contiguous_format).index_copy_(0, rows, dq)
        return dq, dk, dv, *[None] * 7


def streams(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_offsets: Tensor,
    text_offsets: Tensor,
    images: int,
    longest: int,
    text_queries: bool,
    scale: float,
    norms: HeadNorms | None,
    gradients: Callable[..., Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """image_out [RI, N * 64] and text_out [RT, N * 64], or [0, N * 64] without text_queries.

    longest: at least the rows of every sample; for the backward pass alone
    gradients: an adapter of backward.py with its module, where a gradient is recorded
    """
    if gradients is not None:
        layout = image_offsets, text_offsets, images, longest
        made: tuple[Tensor, Tensor] = _Recorded.apply(q, k, v, *layout, text_queries, scale, gradients)
        return made
    known = None if norms is None else known_bound(norms, scale)
    bound = float("inf") if known is None else known
    image, text, _ = forward(
        q, k, v, image_offsets, text_offsets, images, text_queries, scale, bound, POLYNOMIAL, False
    )
    return image, text
