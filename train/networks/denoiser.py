"""The MMDiT as it is trained: every block a unit of its own, for sharding, for recomputation, for rounded weights.

The blocks are those of `lens.model`: a block begins with the sum that the one before left to be made, so that all weights
it reads are its own. Recomputation and rounding wrap its call; which adapter is in force is an argument of it, so that
the backward pass computes again under the adapter of the forward pass.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lens.config import LensConfig
from lens.model import IMAGE, Block, LensTransformer2DModel, summed
from lens.modulation import Modulation
from lens.ops.linear.fused import Residual, linear
from lens.packing import Packing

RECOMPUTE = ("none", "block", "selective")


def _keep(width: int) -> Any:
    """What "selective" keeps: attention, and the GEMMs of at most 3 D columns (qkv, out, w2; not w13, half of all rows)."""

    def policy(context: Any, op: Any, *arguments: Any, **_: Any) -> CheckpointPolicy:
        name = str(op)
        gemm = op in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        small = gemm and arguments[-1].shape[-1] <= 3 * width
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


class Denoiser(LensTransformer2DModel):
    """`LensTransformer2DModel` for training. compute: dtype of activations and of the weights as they are used.

    recompute: what the backward pass computes again instead of keeping it. "none"; "block", everything but what passes
    between blocks; "selective", everything but attention and the smaller GEMMs. What nothing reads, the end of the last
    block's text stream, is not trained.
    Errors: ValueError for another `recompute`.
    """

    def __init__(self, config: LensConfig, compute: torch.dtype = torch.float32, recompute: str = "none"):
        if recompute not in RECOMPUTE:
            raise ValueError(f"Denoiser: recompute must be one of {', '.join(RECOMPUTE)}, got {recompute!r}")
        super().__init__(config)
        self.compute, self.recompute = compute, recompute
        dead = self.layers()[-1].text
        for module in (dead.out, dead.w13, dead.w2):
            module.requires_grad_(False)
        dead.norm2.requires_grad_(False)

    def forward(  # type: ignore[override]
        self,
        image_rows: Tensor,
        features: Tensor,
        time: Tensor,
        packing: Packing,
        adapter: str | None = None,
        blocks_out: list[tuple[Tensor, Tensor]] | None = None,
        taps: Sequence[int] = (),
        inside: bool = False,
    ) -> Any:
        """image rows [RI, C], text features [RT, F, E], time float32 [B] in [0, 1] -> velocity [RI, C] in `compute`.

        adapter: the one in force in this call and in what its backward pass computes again, see `train.loop.lora`;
        blocks_out: receives (image [RI, D], text [RT, D]) after each block but the last, whose text nothing computes;
        taps: numbers of blocks, from 1, rising: the image streams [RI, D] behind them are returned in the velocity's place,
        and nothing behind the last one is computed
        """
        if inside:
            return self._run(image_rows, features, time, packing, adapter, blocks_out, taps)
        own = {name: p for name, p in self.named_parameters() if not name.startswith("blocks.")}
        if all(p.dtype == self.compute for p in own.values()):
            return self._run(image_rows, features, time, packing, adapter, blocks_out, taps)
        arguments = image_rows, features, time, packing, adapter, blocks_out, taps
        return rounded_call(self, own, self.compute, *arguments, True)

    def _run(
        self,
        image_rows: Tensor,
        features: Tensor,
        time: Tensor,
        packing: Packing,
        adapter: str | None,
        blocks_out: list[tuple[Tensor, Tensor]] | None,
        taps: Sequence[int],
    ) -> Tensor | list[Tensor]:
        # the time stays float32 up to its sinusoid: rounded to bfloat16 it would move by up to 0.4 %
        groups = self._groups(packing)
        alone = [1] * len(time) if groups[IMAGE] is not None else None
        # every block rounds its own copy: gradients meet in float32
        temb = F.silu(linear(self.time_embedding, time, alone)).float()
        text = self.project_text(list(features.to(self.compute).unbind(1)), packing.text_lengths)
        carried: Sequence[Residual] = (linear(self.image_in, image_rows.to(self.compute), groups[IMAGE]),), (text,)
        tapped: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            last = index + 1 == len(self.blocks)
            carried = block(carried, temb.to(self.compute), packing, last, adapter, groups, self._around)
            if blocks_out is not None and not last:
                image, text = summed(carried, packing)
                blocks_out.append((image, text))
                carried = (image,), (text,)
            if index + 1 in taps:
                tapped.append(carried[IMAGE][0] if last else summed(carried, packing)[IMAGE])
                if len(tapped) == len(taps):
                    return tapped
        final = linear(self.final_modulation, temb.to(self.compute), alone).view(len(time), 2, -1)
        rows = self._final_norm(carried[IMAGE][0], Modulation(final, final), packing)
        return linear(self.image_out, rows, groups[IMAGE])

    def _around(self, block: Block, *arguments: Any) -> Any:
        """A block as it is trained: what it computes again in the backward pass, with the weights it was called with."""
        if self.recompute == "none" or not torch.is_grad_enabled():
            return self._rounded(block, *arguments)
        context = {"context_fn": _keep(self.config.inner_dim)} if self.recompute == "selective" else {}
        return checkpoint(self._rounded, block, *arguments, use_reentrant=False, preserve_rng_state=False, **context)

    def _rounded(self, block: Block, carried: Any, temb: Tensor, *rest: Any) -> tuple[tuple[Tensor, ...], ...]:
        """A block on weights rounded to the dtype of its activations."""
        weights = dict(block.named_parameters())
        if all(p.dtype == temb.dtype for p in weights.values()):
            done = Block.forward(block, carried, temb, *rest)
        else:
            done = rounded_call(block, weights, temb.dtype, carried, temb, *rest)
        # FSDP2 warns of views among a block's results, which a gate is
        return tuple(r if len(r) == 1 else (*r[:2], r[2].clone()) for r in done)
