"""6. The MMDiT on one page (arXiv 2605.21573, section 3): two token streams, joint attention, calls lens.ops only.

Shapes: B samples, RI image rows, RT text rows (packed, see packing.py), D width, N heads, H head dim, C channels of an
image token, E encoder width, F encoder layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .config import LensConfig
from .modulation import Modulation, TimeEmbedding, concatenate
from .ops.linear import fused as linear_fused
from .ops.linear.fused import ON_DEVICE, Layer, Residual, linear, linear_residual, residual_norm_modulate
from .packing import Packing, expect_tensors, plan, valid_rows

BLOCK_EPS = 1e-6  # RMSNorm of the blocks, of q and k, and the final LayerNorm
TEXT_EPS = 1e-5  # RMSNorm of the encoder's features
IMAGE, TEXT = 0, 1


class StreamWeights(nn.Module):
    """The weights of one stream (image or text) in a block."""

    def __init__(self, config: LensConfig):
        super().__init__()
        width, head, hidden = config.inner_dim, config.attention_head_dim, config.mlp_hidden_dim
        self.modulation = nn.Linear(width, 6 * width)
        self.norm1 = nn.Parameter(torch.ones(width))
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.Parameter(torch.ones(head))
        self.k_norm = nn.Parameter(torch.ones(head))
        self.out = nn.Linear(width, width)
        self.norm2 = nn.Parameter(torch.ones(width))
        self.w13 = nn.Linear(width, 2 * hidden, bias=False)  # rows of w1, then rows of w3
        self.w2 = nn.Linear(hidden, width, bias=False)


class Block(nn.Module):
    """One two-stream block: x += gate1 * attention(norm1(x)); x += gate2 * swiglu(norm2(x)); joint attention."""

    def __init__(self, config: LensConfig):
        super().__init__()
        self.image = StreamWeights(config)
        self.text = StreamWeights(config)

    def streams(self) -> tuple[StreamWeights, StreamWeights]:
        return self.image, self.text

    def norms(self) -> ops.HeadNorms:
        return ops.HeadNorms(self.image.q_norm, self.image.k_norm, self.text.q_norm, self.text.k_norm)

    def forward(
        self,
        carried: Sequence[Residual],
        modulation: Tensor,
        packing: Packing,
        last: bool = False,
        adapter: str | None = None,
        groups: linear_fused.Lengths = (None, None),
        around: Callable[..., Any] | None = None,
    ) -> Sequence[Residual]:
        """Both residual streams, image first -> both, the last sum of each perhaps still to be made, see `Residual`.

        carried: a list is emptied, so that its tensors are freed where they are used up; a tuple is left as it is
        modulation: [B, 2, 6, D], this block's rows of a table; or temb [B, D], which the block projects itself
        last: nothing reads the text behind this block: its queries, attention and MLP are left out, and only the
        image stream is returned, summed up
        adapter: the one in force, of layers that hold several (train/loop/lora.py); recorded where the call is
        groups: rows of every sample of each stream, where a sample's bits must not depend on its batch
        around: runs the block in its place, called with it and the arguments; a training's recomputation and rounding
        """
        if around is not None:
            return cast("Sequence[Residual]", around(self, carried, modulation, packing, last, adapter, groups))
        both, offsets = self.streams(), (packing.image_offsets, packing.text_offsets)
        if modulation.dim() == 2:
            alone = [1] * len(modulation) if groups[IMAGE] is not None else None
            tables = [linear(s.modulation, modulation, alone).view(len(modulation), 6, -1).unbind(1) for s in both]
        else:
            tables = [modulation[:, s].unbind(1) for s in (IMAGE, TEXT)]
        shift1, scale1, gate1, shift2, scale2, gate2 = zip(*tables)

        # queries, keys and values of both streams, each normalised and turned, in the joint layout
        residuals = list(carried)
        if isinstance(carried, list):
            carried.clear()
        x, normed = residual_norm_modulate(residuals, [s.norm1 for s in both], scale1, shift1, offsets, BLOCK_EPS)
        del residuals
        q, k, v = linear_fused.linear_qkv_norm_rope(
            normed,
            [adapted(s.qkv, adapter) for s in both],
            [s.q_norm for s in both],
            [s.k_norm for s in both],
            packing.cos,
            packing.sin,
            *offsets,
            BLOCK_EPS,
            groups,
        ).unbind(0)

        # attention of every sample over its own [image | text]
        attention = ops.joint_attention(
            q,
            k,
            v,
            packing.image_lengths,
            packing.text_lengths,
            *offsets,
            text_queries=not last,
            layout=packing.layout,
            norms=None if self.training else self.norms(),
            batch_invariant=groups[IMAGE] is not None,
        )
        del q, k, v  # three rows of the width for every token, while the MLP needs the most
        live = both[:1] if last else both
        gate1, shift2, scale2, gate2 = (rows[: len(live)] for rows in (gate1, shift2, scale2, gate2))
        x, out = x[: len(live)], [adapted(s.out, adapter) for s in live]
        residuals = linear_residual(x, attention[: len(live)], out, gate1, offsets, groups)
        del attention

        # the MLP of each stream
        x, normed = residual_norm_modulate(residuals, [s.norm2 for s in live], scale2, shift2, offsets, BLOCK_EPS)
        del residuals
        hidden = linear_fused.linear_swiglu(normed, [adapted(s.w13, adapter) for s in live], groups)
        w2 = [adapted(s.w2, adapter) for s in live]
        if last:
            return [(linear_fused.linear_gated_residual(x, hidden, w2, gate2, offsets, groups, "w2")[IMAGE],)]
        return linear_residual(x, hidden, w2, gate2, offsets, groups, "w2")


def adapted(layer: Layer, adapter: str | None) -> Layer:
    """The layer with one of its adapters in force, for the rows of one call; None: as it is when it is called."""
    bound = getattr(layer, "bound", None)
    return layer if bound is None else cast("Layer", bound(adapter))


def summed(carried: Sequence[Residual], packing: Packing) -> list[Tensor]:
    """The rows of the residual streams behind a block: image [RI, D], text [RT, D]."""
    offsets = packing.image_offsets, packing.text_offsets
    return [r[0] if len(r) == 1 else ops.gated_residual(*r, o) for r, o in zip(carried, offsets)]


@torch.no_grad()
def init_parameter(name: str, parameter: Tensor, generator: torch.Generator, std: float = 0.02) -> None:
    """Truncated normals; modulation and output zero, so that every block starts as identity."""
    if parameter.dim() == 1:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    elif "modulation" in name or name.startswith("image_out"):
        parameter.zero_()
    else:
        nn.init.trunc_normal_(parameter, std=std, a=-3 * std, b=3 * std, generator=generator)


class LensTransformer2DModel(nn.Module):
    """Velocity of image tokens under a prompt.

    ``batch_invariant``: outside training a sample's bits do not depend on its neighbours. True for a model made on a CPU;
    a pipeline decides for its device, see ``engine/batch_invariance.py``. Row kernels never look at neighbours, nor do
    our GEMMs; the library's GEMMs then run sample by sample.
    """

    def __init__(self, config: LensConfig):
        super().__init__()
        width, features = config.inner_dim, len(config.selected_layer_index)
        self.config = config
        self.image_in = nn.Linear(config.in_channels, width)
        self.text_norms = nn.ParameterList(torch.ones(config.enc_hidden_dim) for _ in range(features))
        self.text_in = nn.Linear(features * config.enc_hidden_dim, width)
        self.time_embedding = TimeEmbedding(width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_modulation = nn.Linear(width, 2 * width)
        self.image_out = nn.Linear(width, config.in_channels)
        self.batch_invariant = self.device.type == "cpu"
        # weight and bias of a block's stream, where they stay in the files: see `formats.released.load_transformer`
        self.stored_modulation: Callable[[int, int], tuple[Tensor, Tensor]] | None = None

    def layers(self) -> list[Block]:
        """The blocks in order."""
        return cast("list[Block]", list(self.blocks))

    @property
    def device(self) -> torch.device:
        return self.image_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.image_in.weight.dtype

    @property
    def invariant(self) -> bool:
        """``batch_invariant``, and not in training."""
        return self.batch_invariant and not self.training

    def _groups(self, packing: Packing) -> linear_fused.Lengths:
        """Of each stream: rows of every sample, where a sample's bits must not depend on its batch, or None."""
        if not self.invariant:
            return None, None
        # a captured step serves texts of other lengths, on pictures of one size
        return packing.image_lengths, packing.text_lengths if packing.layout is None else ON_DEVICE

    def init_weights(self, generator: torch.Generator, std: float = 0.02) -> None:
        """Fresh weights for training, one parameter after another; see ``init_parameter``."""
        for name, parameter in self.named_parameters():
            init_parameter(name, parameter, generator, std)

    def project_text(self, features: Sequence[Tensor], lengths: list[int]) -> Tensor:
        """F packed features [RT, E] -> text rows [RT, D]: RMSNorm each, concatenate, project. Once per prompt."""

        def project(rows: Tensor) -> Tensor:
            layers = zip(rows.chunk(len(self.text_norms), dim=-1), self.text_norms, strict=True)
            return self.text_in(torch.cat([F.rms_norm(x, (x.shape[-1],), w, TEXT_EPS) for x, w in layers], dim=-1))

        return linear(project, torch.cat(list(features), dim=-1), lengths if self.invariant else None)

    def modulate(self, timestep: Tensor, alone: bool = False) -> Modulation:
        """timestep [K] in [0, 1] -> Modulation of K rows, differentiable; one GEMM per block and stream for all rows, or
        one for each where a row is to be ``alone``: its bits then do not depend on the others."""
        k, config = len(timestep), self.config
        temb = torch.cat([F.silu(self.time_embedding(t)) for t in (timestep.split(1) if alone else [timestep])])
        each = [1] * k if alone else None
        blocks = [self._modulation(index, s, temb, each) for index in range(config.num_layers) for s in (IMAGE, TEXT)]
        final = linear(self.final_modulation, temb, each).view(k, 2, config.inner_dim)
        return Modulation(torch.stack(blocks, 1).view(k, config.num_layers, 2, 6, config.inner_dim), final)

    def _modulation(self, index: int, stream: int, temb: Tensor, each: list[int] | None) -> Tensor:
        """Of one stream of one block; its weights are read once for all rows."""
        layer = self.layers()[index].streams()[stream].modulation
        if layer.weight.is_meta:
            if self.stored_modulation is None:
                raise RuntimeError(
                    "lens.modulation: the modulation weights were dropped by evict(..., 'meta'): only schedules prepared "
                    "before can be drawn; reload the transformer for a new one"
                )
            weight, bias = (w.to(temb) for w in self.stored_modulation(index, stream))
            return linear_fused.linear_of(weight, bias, temb, each)
        return linear(layer, temb.to(layer.weight.device), each).to(temb.device)

    def denoise(
        self,
        image_rows: Tensor,
        text_rows: Tensor,
        modulation: Modulation,
        packing: Packing,
        blocks_out: list[tuple[Tensor, Tensor]] | None = None,
        adapter: str | None = None,
    ) -> Tensor:
        """Packed forward: image rows [RI, C], projected text rows [RT, D], modulation of B samples -> velocity [RI, C].

        ``adapter``: the one in force, see `Block.forward`. ``blocks_out`` receives (image [RI, D], text [RT, D]) after each
        block. Without it the last block's text branch, which nothing reads, is skipped.
        """
        groups, layers = self._groups(packing), self.layers()
        carried: Sequence[Residual] = [(linear(self.image_in, image_rows, groups[IMAGE]),), (text_rows,)]
        for index, block in enumerate(layers):
            last = blocks_out is None and index + 1 == len(layers)
            carried = block(carried, modulation.blocks[:, index], packing, last, adapter, groups)
            if blocks_out is not None:
                image, text = summed(carried, packing)
                blocks_out.append((image, text))
                carried = [(image,), (text,)]
        image = carried[IMAGE][0]
        return linear(self.image_out, self._final_norm(image, modulation, packing), groups[IMAGE])

    def _final_norm(self, x: Tensor, modulation: Modulation, packing: Packing) -> Tensor:
        """LayerNorm without weights, then scale (first) and shift: once per step, so plain torch."""
        sample = torch.repeat_interleave(
            torch.arange(packing.batch_size, device=x.device),
            packing.image_offsets.diff().long(),
            output_size=x.shape[0],
        )
        scale, shift = modulation.final[sample].unbind(1)
        return F.layer_norm(x, (x.shape[-1],), eps=BLOCK_EPS) * (1 + scale) + shift

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Sequence[Tensor],
        encoder_hidden_states_mask: Tensor | None,
        timestep: Tensor,
        img_shapes: Sequence[tuple[int, int, int]],
        blocks_out: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """The reference's padded call. Packs, runs ``denoise``, unpacks.

        hidden_states [B, I, C]; encoder_hidden_states F tensors [B, T, E]; mask bool [B, T], True = valid (None: all);
        timestep [B] in [0, 1]; img_shapes one (1, h, w) for all samples or one each, in tokens (a smaller picture uses
        its first h*w tokens) -> velocity [B, I, C], zero beyond a picture's own tokens.
        """
        batch, length = self._check(hidden_states, encoder_hidden_states, encoder_hidden_states_mask, timestep)
        shapes = list(img_shapes) * batch if len(img_shapes) == 1 else list(img_shapes)
        fitting = [
            isinstance(s, Sequence) and len(s) == 3 and s[0] == 1 and min(s) > 0 and s[1] * s[2] <= length
            for s in shapes
        ]
        if len(shapes) != batch or not all(fitting):
            raise ValueError(
                f"lens.transformer: img_shapes must be one or B = {batch} tuples (1, h, w) with h * w <= I = {length}, "
                f"got {list(img_shapes)}"
            )
        mask = encoder_hidden_states_mask
        if mask is None:
            mask = torch.ones(encoder_hidden_states[0].shape[:2], dtype=torch.bool)
        host_mask = mask.bool().cpu()
        packing = plan(
            [(h, w) for _, h, w in shapes],
            [row.nonzero().squeeze(1) for row in host_mask],
            self.config.axes_dims_rope,
            hidden_states.device,
        )
        device = hidden_states.device
        image_index = valid_rows(packing.image_lengths, length).to(device)
        text_index = valid_rows(host_mask, host_mask.shape[1]).to(device)
        image_rows = ops.pack_tokens(hidden_states.to(self.dtype), image_index)
        features = [ops.pack_tokens(f.to(self.dtype), text_index) for f in encoder_hidden_states]
        text_rows = self.project_text(features, packing.text_lengths)
        each = timestep.split(1) if self.invariant else [timestep]
        modulation = concatenate([self.modulate(t) for t in each])
        velocity = self.denoise(image_rows, text_rows, modulation, packing, blocks_out)
        return ops.unpack_tokens(velocity, image_index, batch, length)

    def _check(
        self, hidden_states: Tensor, features: Sequence[Tensor], mask: Tensor | None, timestep: Tensor
    ) -> tuple[int, int]:
        config, layers = self.config, len(self.config.selected_layer_index)

        def refuse(name: str, expected: object, got: object) -> None:
            raise ValueError(f"lens.transformer: {name} must be {expected}, got {got}")

        expect_tensors("lens.transformer: hidden_states", [hidden_states])
        expect_tensors("lens.transformer: encoder_hidden_states", features)
        for name, value in (("encoder_hidden_states_mask", mask), ("timestep", timestep)):
            if not isinstance(value, Tensor | None):
                refuse(name, "a tensor", type(value).__name__)
        if hidden_states.dim() != 3 or hidden_states.shape[2] != config.in_channels:
            refuse("hidden_states", f"[B, I, C = {config.in_channels}]", list(hidden_states.shape))
        batch, length = hidden_states.shape[:2]
        if isinstance(features, Tensor) or len(features) != layers:
            got = "one tensor" if isinstance(features, Tensor) else f"{len(features)} tensors"
            refuse("encoder_hidden_states", f"F = {layers} tensors", got)
        expected = [batch, features[0].shape[1] if features[0].dim() == 3 else "T", config.enc_hidden_dim]
        for i, f in enumerate(features):
            if list(f.shape) != expected:
                refuse(f"encoder_hidden_states[{i}]", f"[B, T, E] = {expected}", list(f.shape))
        if mask is not None and list(mask.shape) != expected[:2]:
            refuse("encoder_hidden_states_mask", f"[B, T] = {expected[:2]}", list(mask.shape))
        if timestep is None or list(timestep.shape) != [batch]:
            refuse("timestep", f"[B] = [{batch}]", timestep if timestep is None else list(timestep.shape))
        return batch, length
