"""Joint attention by every library that is installed: attention/<lengths>/<dtype>/<forward | backward>.

Lengths are those of the joint sequences, "8x512" or "4511,4096". Ours is what `lens.ops.attention_backends` chooses; its
candidates, those without a rate too, are forced one by one, each on the same call. None gets a mask but the
reference's way of doing it, which pads to the longest and adds one. What cannot serve a call here is left out with its
own reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lens import ops
from lens.ops import attention_backends
from lens.ops._attention_bound import HeadNorms

from ..case import OURS, Case, Subject, Work, generator, wider
from ..roofline import attention, moved
from .scale import Scale

MASKED = "sdpa_masked"
SUBJECTS = (OURS, *(c.name for c in attention_backends.CANDIDATES), MASKED)
BOUND = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
Triple = tuple[Tensor, Tensor, Tensor]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def per_sample(lengths: Sequence[int]) -> Attend:
    """Torch's scaled_dot_product_attention sample by sample: the oracle."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = zip(*(t.split(list(lengths)) for t in (q, k, v)))
        heads = ([t.transpose(0, 1)[None] for t in part] for part in parts)
        return torch.cat([F.scaled_dot_product_attention(*h)[0].transpose(0, 1) for h in heads])

    return attend


def masked(lengths: Sequence[int]) -> Attend:
    """The reference's way: padded to the longest, an additive mask; the padding is made anew, as its batch is."""
    longest = max(lengths)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def padded(t: Tensor) -> Tensor:
            parts = [F.pad(p, (0, 0, 0, 0, 0, longest - len(p))) for p in t.split(list(lengths))]
            return torch.stack(parts).transpose(1, 2)

        position = torch.arange(longest, device=q.device)
        valid = torch.stack([position < n for n in lengths])[:, None, None]
        bias = torch.zeros(valid.shape, dtype=q.dtype, device=q.device).masked_fill(~valid, float("-inf"))
        out = F.scaled_dot_product_attention(padded(q), padded(k), padded(v), attn_mask=bias).transpose(1, 2)
        return torch.cat([sample[:n] for sample, n in zip(out, lengths)])

    return attend


def graphless(call: Attend, backward: bool) -> Callable[..., Any]:
    """The forward call, or the gradients of q, k and v for the output as its own gradient."""
    if not backward:
        return lambda q, k, v: call(q, k, v)

    def both(q: Tensor, k: Tensor, v: Tensor) -> Any:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = call(*leaves)
        return torch.autograd.grad(out, leaves, out.detach())

    return both


def prepare(scale: Scale, lengths: Sequence[tuple[int, int]], backward: bool, device: torch.device) -> Work:
    """lengths: (image, text) tokens of every sample."""
    c, dtype = scale.config, scale.dtype
    joint = [i + t for i, t in lengths]
    g = generator(device, "attention", *joint)
    heads = (c.num_attention_heads, c.attention_head_dim)
    weight = 1 + 0.1 * torch.randn(heads[1], generator=g, device=device)
    norms = HeadNorms(*[weight.to(dtype)] * 4)  # q and k are as the model makes them, which bounds their scores

    def normal(normed: bool) -> Tensor:
        x = torch.randn((sum(joint), *heads), generator=g, device=device)
        return (F.rms_norm(x, heads[1:]) * norms.image_q.float() if normed else x).to(dtype)

    inputs = [(normal(True), normal(True), normal(False)) for _ in range(2)]
    images, texts = [i for i, _ in lengths], [t for _, t in lengths]
    image_offsets, text_offsets = (torch.tensor([0, *n]).cumsum(0).to(device, torch.int32) for n in (images, texts))

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        image, text = ops.joint_attention(q, k, v, images, texts, image_offsets, text_offsets, norms=norms)
        parts = zip(image.split(images), text.split(texts))
        return torch.cat([p for pair in parts for p in pair]).unflatten(-1, heads)

    def forced(name: str) -> Attend:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with attention_backends.use(name):
                return ours(q, k, v)

        return call

    subjects = {OURS: Subject(graphless(ours, backward), grad=backward)}
    subjects[MASKED] = Subject(graphless(masked(joint), backward), grad=backward)
    need, left_out = attention_backends.need_of(device, dtype, heads[1], max(joint), backward=backward), {}
    for candidate in attention_backends.CANDIDATES:
        if why := candidate.missing(need):
            left_out[candidate.name] = why
        else:
            subjects[candidate.name] = Subject(graphless(forced(candidate.name), backward), grad=backward)
    exact = per_sample(joint)

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with torch.enable_grad():
            return graphless(exact, backward)(*(t.to(wider(dtype)) for t in (q, k, v)))

    flops = sum(attention(n, n, c.inner_dim) for n in joint)
    rows = moved(inputs[0]) // 3
    return Work(
        inputs=inputs,
        subjects=subjects,
        oracle=oracle,
        bound=BOUND[dtype] * (2 if backward else 1),
        flops=3.5 * flops if backward else flops,
        bytes=(12 if backward else 4) * rows,
        left_out=left_out,
        note="forward and backward, backward as 2.5 forwards" if backward else "",
    )


def cases(scale: Scale, gpu: bool) -> list[Case]:
    """A guided pair at the main size with every text, both with text, mixed sizes, the large size; then backward."""
    if not gpu and not scale.tiny:
        return []
    main, large, least = scale.tokens(scale.main), scale.tokens(scale.large), min(scale.tokens(s) for s in scale.sizes)
    longest = scale.texts[-1]
    wanted: list[list[tuple[int, int]]] = [[(main, t), (main, 0)] for t in reversed(scale.texts)]
    wanted += [[(main, 0)] * 2, [(main, longest)] * 2, [(main, longest)]]
    wanted += [[(least, scale.texts[0]), (main, longest), (large, scale.texts[-2]), (least, longest)]]
    wanted += [[(3 * least // 4, scale.texts[-2])] * (8 if not scale.tiny else 3)]  # the table's "short"
    wanted += [[(large, longest), (large, 0)], [(least, scale.texts[-2])] * (24 if not scale.tiny else 3)]
    kinds = [(lengths, False) for lengths in wanted] + [(wanted[0], True), (wanted[-1], True)]
    found = []
    for lengths, backward in kinds:

        def make(device: torch.device, lengths: Any = lengths, backward: bool = backward) -> Work:
            return prepare(scale, lengths, backward, device)

        joint = [i + t for i, t in lengths]
        label = f"{len(joint)}x{joint[0]}" if len(set(joint)) == 1 else ",".join(map(str, joint))
        way = "backward" if backward else "forward"
        found.append(Case(f"{scale.prefix}attention/{label}/{scale.dtype_name}/{way}", SUBJECTS, make))
    return found
