"""The MMDiT as it is trained: every block a unit of its own, for sharding, for recomputation, for rounded weights.

The numbers are those of `lens.model` (test: the same bits forward). There a block ends with the norm of the next one; here
a block begins with the residual that the one before left pending, so that all weights a block reads are its own. The
parameters and their names are the same, too.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lens import ops
from lens.config import LensConfig
from lens.model import BLOCK_EPS, IMAGE, TEXT, Block, LensTransformer2DModel, Stream
from lens.modulation import MODULATION_ORDER, Modulation
from lens.packing import Packing

RECOMPUTE = ("none", "block", "selective")
Carried = tuple[
    tuple[Tensor, ...], tuple[Tensor, ...]
]  # per stream (x,), or (x, y, gate) of a residual still to be added


def _keep(width: int) -> Any:
    """What "selective" keeps: attention, and the products of at most 3 D columns (qkv, out, w2; not w13, half of all rows)."""

    def policy(context: Any, op: Any, *arguments: Any, **_: Any) -> CheckpointPolicy:
        name = str(op)
        product = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        small = product and arguments[-1].shape[-1] <= 3 * width
        return (
            CheckpointPolicy.MUST_SAVE
            if small or "attention" in name or "attn" in name
            else CheckpointPolicy.PREFER_RECOMPUTE
        )

    return functools.partial(create_selective_checkpoint_contexts, policy)


def rounded_call(module: nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype, *arguments: Any) -> Any:
    """`module(*arguments)` with these of its weights rounded to `dtype`; their gradients come back in their own dtype."""
    cast = {name: p.to(dtype) for name, p in weights.items() if p.dtype != dtype}
    return functional_call(module, cast, arguments)


class TrainedBlock(Block):
    """`Block` with a forward pass: x += gate1 * attention(norm1(x)); x += gate2 * swiglu(norm2(x)), the last add pending."""

    def __init__(self, config: LensConfig, recompute: str):
        super().__init__(config)
        self.recompute, self.width = recompute, config.inner_dim

    def forward(self, carried: Carried, temb: Tensor, packing: Packing, last: bool, inside: bool = False) -> Carried:
        """carried of both streams, temb [B, D] -> carried; after the last block the finished image rows alone."""
        if inside:
            return self._run(carried, temb, packing, last)
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._rounded(carried, temb, packing, last)
        context = {"context_fn": _keep(self.width)} if self.recompute == "selective" else {}
        return checkpoint(
            self._rounded, carried, temb, packing, last, use_reentrant=False, preserve_rng_state=False, **context
        )

    def _rounded(self, carried: Carried, temb: Tensor, packing: Packing, last: bool) -> Carried:
        weights = dict(self.named_parameters())
        if all(p.dtype == temb.dtype for p in weights.values()):
            return self._run(carried, temb, packing, last)
        return rounded_call(self, weights, temb.dtype, carried, temb, packing, last, True)

    def _run(self, carried: Carried, temb: Tensor, packing: Packing, last: bool) -> Carried:
        offsets, lengths = (packing.image_offsets, packing.text_offsets), (packing.image_lengths, packing.text_lengths)
        tables = [s.modulation(temb).view(len(temb), len(MODULATION_ORDER), -1).unbind(1) for s in self.streams()]
        x, normed = [], []
        for stream, table, (rows, *pending), place in zip(self.streams(), tables, carried, offsets):
            if pending:
                y, gate = pending
                rows, a = ops.gated_residual_norm_modulate(
                    rows, y, gate, stream.norm1, table[1], table[0], place, BLOCK_EPS
                )
            else:
                a = ops.rms_norm_modulate(rows, stream.norm1, table[1], table[0], place, BLOCK_EPS)
            x.append(rows)
            normed.append(a)
        q, k, v = ops.qk_norm_rope(
            self.image.qkv(normed[IMAGE]),
            self.text.qkv(normed[TEXT]),
            self.image.q_norm,
            self.image.k_norm,
            self.text.q_norm,
            self.text.k_norm,
            packing.cos,
            packing.sin,
            *offsets,
            BLOCK_EPS,
        ).unbind(0)
        attention = ops.joint_attention(q, k, v, *lengths, *offsets, text_queries=not last)
        image = self._rest(self.image, x[IMAGE], attention[IMAGE], tables[IMAGE], offsets[IMAGE])
        if last:
            x_image, y, gate = image
            return (ops.gated_residual(x_image, y, gate, offsets[IMAGE]),), ()
        return image, self._rest(self.text, x[TEXT], attention[TEXT], tables[TEXT], offsets[TEXT])

    @staticmethod
    def _rest(
        stream: Stream, x: Tensor, attention: Tensor, table: tuple[Tensor, ...], offsets: Tensor
    ) -> tuple[Tensor, ...]:
        _, _, gate1, shift2, scale2, gate2 = table
        x, a = ops.gated_residual_norm_modulate(
            x, stream.out(attention), gate1, stream.norm2, scale2, shift2, offsets, BLOCK_EPS
        )
        return x, stream.w2(ops.swiglu(stream.w13(a))), gate2.clone()  # FSDP2 warns of views among a block's results


class Denoiser(LensTransformer2DModel):
    """`LensTransformer2DModel` for training. compute: dtype of activations and of the weights as they are used.

    recompute: what the backward pass computes again instead of keeping it. "none"; "block", everything but what passes
    between blocks; "selective", everything but attention and the smaller products. What nothing reads, the end of the last
    block's text stream, is not trained.
    Errors: ValueError for another `recompute`.
    """

    def __init__(self, config: LensConfig, compute: torch.dtype = torch.float32, recompute: str = "none"):
        if recompute not in RECOMPUTE:
            raise ValueError(f"Denoiser: recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
        super().__init__(config)
        self.blocks = nn.ModuleList(TrainedBlock(config, recompute) for _ in range(config.num_layers))
        self.compute = compute
        dead = self.layers()[-1].text
        for module in (dead.out, dead.w13, dead.w2):
            module.requires_grad_(False)
        dead.norm2.requires_grad_(False)

    def forward(  # type: ignore[override]
        self, image_rows: Tensor, features: Tensor, time: Tensor, packing: Packing, inside: bool = False
    ) -> Tensor:
        """image rows [RI, C], text features [RT, F, E], time float32 [B] in [0, 1] -> velocity [RI, C] in `compute`."""
        if inside:
            return self._run(image_rows, features, time, packing)
        own = {name: p for name, p in self.named_parameters() if not name.startswith("blocks.")}
        if all(p.dtype == self.compute for p in own.values()):
            return self._run(image_rows, features, time, packing)
        return rounded_call(self, own, self.compute, image_rows, features, time, packing, True)

    def _run(self, image_rows: Tensor, features: Tensor, time: Tensor, packing: Packing) -> Tensor:
        # the time stays float32 up to its sinusoid: rounded to bfloat16 it would move by up to 0.4 %
        temb = F.silu(self.time_embedding(time)).float()  # every block rounds its own copy: gradients meet in float32
        text = self.project_text(list(features.to(self.compute).unbind(1)), packing.text_lengths)
        carried: Carried = (self.image_in(image_rows.to(self.compute)),), (text,)
        for index, block in enumerate(self.blocks):
            carried = block(carried, temb.to(self.compute), packing, index + 1 == len(self.blocks))
        final = self.final_modulation(temb.to(self.compute)).view(len(time), 2, -1)
        return self.image_out(self._final_norm(carried[IMAGE][0], Modulation(final, final), packing))
