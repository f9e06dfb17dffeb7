"""Joint attention by every library that is installed: attention/<lengths>/<dtype>/<way>.

Lengths are those of the joint sequences, "8x512" or "4511,4096". Ways: forward; training, the forward pass that writes
lse; backward, both passes, by one library where it can; gradients, the backward pass alone from a result and
lse that are given. Ours is what `lens.ops.attention.choice` chooses; its candidates, those in no order too,
are forced one by one, each on the same call. None gets a mask but the reference's way of doing it, which pads to the
longest and adds one. What cannot serve a call here is left out with its own reason. The first case has lens-hopper in all
its modes beside each other, chosen by the launcher's arguments.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lens import ops
from lens.cost import attention_flops
from lens.ops.attention import choice as attention_choice
from lens.ops.attention import hopper
from lens.ops.attention.hopper import HeadNorms, score_bound
from lens.ops.attention.layout import Samples

from ..case import OURS, Case, Subject, Work, generator, wider
from ..roofline import moved
from ..work.scale import Scale

MASKED = "sdpa_masked"
SUBJECTS = (OURS, *(c.name for c in attention_choice.CANDIDATES), MASKED)
OWN = "lens-hopper"
MODES = {  # of it: whether the scores' bound is known, which saves the running maximum; polynomials of four exponentials
    f"{OWN}-{shift}{'-polynomial' * polynomial}": (shift == "fixed", polynomial)
    for shift in ("fixed", "running")
    for polynomial in (0, 1)
}
GRADIENTS = (OURS, *(c.name for c in attention_choice.BACKWARDS))
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


def graphless(call: Attend, way: str) -> Callable[..., Any]:
    """The forward call, recorded or not, or the gradients of q, k and v for the output as its own gradient."""
    if way == "forward":
        return lambda q, k, v: call(q, k, v)
    if way == "training":
        return lambda q, k, v: call(*(t.detach().requires_grad_() for t in (q, k, v))).detach()

    def both(q: Tensor, k: Tensor, v: Tensor) -> Any:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out = call(*leaves)
        return torch.autograd.grad(out, leaves, out.detach())

    return both


def prepare(scale: Scale, lengths: Sequence[tuple[int, int]], way: str, device: torch.device) -> Work:
    """lengths: (image, text) tokens of every sample."""
    backward, recorded = way == "backward", way != "forward"
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

    def joined(image: Tensor, text: Tensor) -> Tensor:
        parts = zip(image.split(images), text.split(texts))
        return torch.cat([p for pair in parts for p in pair]).unflatten(-1, heads)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return joined(*ops.joint_attention(q, k, v, images, texts, image_offsets, text_offsets, norms=norms))

    def in_mode(fixed: bool, polynomial: int) -> Attend:
        bound = score_bound([norms.image_q], [norms.image_k]) if fixed else float("inf")
        layout = image_offsets, text_offsets, sum(images)

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            made = hopper.forward(q, k, v, *layout, True, heads[1] ** -0.5, bound, polynomial, False)
            return joined(*made[:2])

        return call

    def forced(name: str) -> Attend:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with attention_choice.use(name):
                return ours(q, k, v)

        return call

    call, left_out = attention_choice.attention_call(device, dtype, heads[1], max(joint), backward=recorded), {}
    if way == "gradients":
        return of_gradients(scale, joint, inputs, call)
    subjects = {OURS: Subject(graphless(ours, way), grad=recorded)}
    subjects[MASKED] = Subject(graphless(masked(joint), way), grad=recorded)
    for candidate in attention_choice.CANDIDATES:
        if why := candidate.why_unsupported(call):
            left_out[candidate.name] = why
        else:
            subjects[candidate.name] = Subject(graphless(forced(candidate.name), way), grad=recorded)
    for name, mode in MODES.items() if way == "forward" else ():
        if OWN in left_out:
            left_out[name] = left_out[OWN]
        else:
            subjects[name] = Subject(in_mode(*mode))
    exact = per_sample(joint)

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Any:
        with torch.enable_grad():
            return graphless(exact, way)(*(t.to(wider(dtype)) for t in (q, k, v)))

    flops = sum(attention_flops(n, n, c.inner_dim) for n in joint)
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


def of_gradients(
    scale: Scale, joint: Sequence[int], inputs: list[Triple], call: attention_choice.AttentionCall
) -> Work:
    """Every library's backward pass from the same result, which is its own gradient, and the same lse."""
    channels, dtype, device = scale.config.attention_head_dim, inputs[0][0].dtype, inputs[0][0].device
    offsets = torch.tensor([0, *joint]).cumsum(0).to(device, torch.int32)
    samples = Samples(offsets, offsets, max(joint), max(joint), channels**-0.5, joint, joint)

    def lse_of(q: Tensor, k: Tensor) -> Tensor:
        parts = zip(q.split(list(joint)), k.split(list(joint)), strict=True)
        return torch.cat([head_lse(a, b, samples.scale) for a, b in parts], 1)

    given = [(*x, per_sample(joint)(*x), lse_of(*x[:2])) for x in inputs]

    def by(name: str, *given: Tensor) -> Any:
        q, k, v, out, lse = given
        library = next(b for b in attention_choice.BACKWARDS if b.name == name)
        assert library.adapter is not None
        return library.adapter(library.load(True), out, q, k, v, out, lse, samples)

    subjects = {OURS: Subject(lambda *given: by(attention_choice.choose(call).gradients, *given))}
    left_out = {}
    for library in attention_choice.BACKWARDS:
        if why := library.why_unsupported(dataclasses.replace(call, backward=False)):
            left_out[library.name] = why
        else:
            subjects[library.name] = Subject(functools.partial(by, library.name))

    def oracle(q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> Any:
        with torch.enable_grad():
            leaves = [t.to(wider(dtype)).requires_grad_() for t in (q, k, v)]
            return torch.autograd.grad(per_sample(joint)(*leaves), leaves, out.to(wider(dtype)))

    return Work(
        inputs=given,
        subjects=subjects,
        oracle=oracle,
        bound=2 * BOUND[dtype],
        flops=2.5 * sum(attention_flops(n, n, scale.config.inner_dim) for n in joint),
        bytes=8 * moved(inputs[0]) // 3,
        left_out=left_out,
        note="the backward pass alone, as 2.5 forwards",
    )


def head_lse(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """float32 [N, rows], head by head: a product of all of them would not fit."""
    heads = zip(q.unbind(1), k.unbind(1), strict=True)
    return torch.stack([((a.double() @ b.double().T) * scale).logsumexp(-1).float() for a, b in heads])


def cases(scale: Scale, gpu: bool) -> list[Case]:
    """A guided pair at the main size with every text, both with text, mixed sizes, the large size; then training."""
    if not gpu and not scale.tiny:
        return []
    main, large, least = scale.tokens(scale.main), scale.tokens(scale.large), min(scale.tokens(s) for s in scale.sizes)
    longest = scale.texts[-1]
    wanted: list[list[tuple[int, int]]] = [[(main, t), (main, 0)] for t in reversed(scale.texts)]
    wanted += [[(main, 0)] * 2, [(main, longest)] * 2, [(main, longest)]]
    wanted += [[(least, scale.texts[0]), (main, longest), (large, scale.texts[-2]), (least, longest)]]
    short = [(3 * least // 4, scale.texts[-2])] * (8 if not scale.tiny else 3)  # of the orders
    wanted += [short]
    wanted += [[(large, longest), (large, 0)], [(least, scale.texts[-2])] * (24 if not scale.tiny else 3)]
    kinds = [(lengths, "forward") for lengths in wanted] + [(wanted[0], "backward"), (wanted[-1], "backward")]
    ways = ("training", "gradients") if gpu else ("training",)  # a CPU's gradients have no choice
    kinds += [(lengths, way) for way in ways for lengths in (wanted[0], short)]
    found = []
    for lengths, way in kinds:

        def make(device: torch.device, lengths: Any = lengths, way: str = way) -> Work:
            return prepare(scale, lengths, way, device)

        joint = [i + t for i, t in lengths]
        label = f"{len(joint)}x{joint[0]}" if len(set(joint)) == 1 else ",".join(map(str, joint))
        subjects = GRADIENTS if way == "gradients" else SUBJECTS
        if way == "forward" and lengths is wanted[0]:
            subjects += tuple(MODES)
        found.append(Case(f"{scale.prefix}attention/{label}/{scale.dtype_name}/{way}", subjects, make))
    return found
