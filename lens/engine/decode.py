"""The pixel decoder on a CPU: diffusers' AutoencoderKLFlux2.decode on channels-last rows and our op, from its own weights.

Each map is a buffer of (H + 2) x W x C with a row of zeros above and below, so that a convolution of any run of rows
reads a view of it. GroupNorm and SiLU are one op, a shortcut and the residual are added to the rows while they are in the
cache, and an upsampling is folded into its convolution: on every pixel doubled both ways, 3 x 3 taps meet 2 x 2 pixels, so
four kernels of 2 x 2 summed taps on the small map, one for each parity of the output's row and column, are the same
function with 4/9 of the arithmetic.

Everything runs in fixed blocks of one thread each (`fixed_blocks`): a picture's bits do not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import group_norm_silu
from . import fixed_blocks
from .content import glance

_BLOCK_FLOPS = 5 * 2**30  # of one thread's piece of a convolution: tens of milliseconds of work
_BLOCK_CHANNELS = 128  # of its output: few rows with all channels would lay all weights out anew for each piece
_BLOCK_ROWS = 512  # of one thread's piece of a GEMM or of attention


def why_unserved(vae: Any) -> str:
    """Why diffusers' own decode serves an autoencoder, or ""."""
    config = getattr(vae, "config", None)
    if not isinstance(getattr(vae, "decoder", None), nn.Module) or config is None:
        return "it has no decoder of AutoencoderKLFlux2"
    if next(vae.decoder.parameters()).device.type != "cpu":
        return "its weights are not on a CPU"
    if config.act_fn != "silu" or set(config.up_block_types) != {"UpDecoderBlock2D"}:
        return (
            f"its decoder has the activation {config.act_fn} and blocks {', '.join(sorted(set(config.up_block_types)))}"
        )
    if getattr(vae, "use_tiling", False):
        return "its tiling is on, which gives another image"
    if any(module._forward_hooks or module._forward_pre_hooks for module in vae.decoder.modules()):
        return "a module of its decoder has a forward hook"
    return ""


class Map:
    """A picture's channels-last map: pixels [H * W, C] between two rows of zeros."""

    def __init__(self, storage: Tensor, height: int, width: int, channels: int):
        self.height, self.width, self.channels = height, width, channels
        self.padded = storage[: (height + 2) * width * channels].view(height + 2, width, channels)
        self.padded[0].zero_()
        self.padded[-1].zero_()
        self.rows = self.padded[1:-1].view(height * width, channels)

    def window(self, begin: int, end: int) -> Tensor:
        """Rows begin - 1 .. end of the picture as a channels-last image [1, C, end - begin + 2, W]."""
        w, c = self.width, self.channels
        rows = self.padded[begin : end + 2]
        # by hand: a view would give the batch of one a stride by which the library does not know it for channels-last
        return rows.as_strided((1, c, end - begin + 2, w), (rows.numel(), 1, w * c, c))


class Decoder:
    """`vae.decode` for one picture on a CPU. Weights are laid out when first used, and again where they have changed."""

    def __init__(self, vae: Any):
        self.vae = vae
        self._seen: Hashable = None
        self._weights: dict[int, Tensor] = {}  # by the module's id

    def __call__(self, latents: Tensor) -> Tensor:
        """Latents [1, c, h, w] -> pixels [1, 3, 8 h, 8 w], in the weights' dtype."""
        self._refresh()
        decoder, post = self.vae.decoder, self.vae.post_quant_conv
        height, width = latents.shape[2:]
        room = self._room(height, width)
        x, spare, normed = (torch.empty(size, dtype=latents.dtype) for size in room)
        z = Map(normed, height, width, latents.shape[1])
        z.rows.copy_(latents[0].permute(1, 2, 0).reshape(z.rows.shape))
        if post is not None:
            _in_blocks(
                lambda a, b: z.rows[a:b].copy_(F.linear(z.rows[a:b], post.weight.flatten(1), post.bias)), len(z.rows)
            )
        carried = Map(x, height, width, decoder.conv_in.out_channels)
        self._convolve(z, decoder.conv_in, carried)

        def residual(block: Any) -> None:
            """carried += conv2(act(norm2(conv1(act(norm1(carried)))))), the first term through a shortcut where it has one."""
            nonlocal carried, x, spare
            out = block.conv1.out_channels
            hidden = Map(spare, carried.height, carried.width, out)
            self._convolve(self._normed(carried, block.norm1, normed), block.conv1, hidden)
            between = self._normed(hidden, block.norm2, normed)
            if block.conv_shortcut is None:
                self._convolve(between, block.conv2, carried, lambda a, b, c, d: carried.rows[a:b, c:d])
                return
            matrix, bias, before = block.conv_shortcut.weight.flatten(1), block.conv_shortcut.bias, carried
            shortcut = lambda a, b, c, d: F.linear(before.rows[a:b], matrix[c:d], bias[c:d])  # noqa: E731
            self._convolve(between, block.conv2, hidden, shortcut)
            carried, x, spare = hidden, spare, x

        middle = decoder.mid_block
        residual(middle.resnets[0])
        for attention, block in zip(middle.attentions, middle.resnets[1:], strict=True):
            if attention is not None:
                self._attend(carried, attention, normed)
            residual(block)
        for level in decoder.up_blocks:
            for block in level.resnets:
                residual(block)
            for upsampler in level.upsamplers or ():
                larger = Map(spare, 2 * carried.height, 2 * carried.width, upsampler.conv.out_channels)
                self._convolve_doubled(carried, upsampler.conv, larger)
                carried, x, spare = larger, spare, x
        image = Map(spare, carried.height, carried.width, decoder.conv_out.out_channels)
        self._convolve(self._normed(carried, decoder.conv_norm_out, normed), decoder.conv_out, image)
        return image.padded[1:-1].permute(2, 0, 1)[None].clone()

    # ------------------------------------------------------------------------------------------------ layers

    def _normed(self, source: Map, norm: Any, storage: Tensor, activate: bool = True) -> Map:
        made = Map(storage, source.height, source.width, source.channels)
        offsets = torch.tensor([0, len(source.rows)], dtype=torch.int32)
        group_norm_silu(
            source.rows, norm.weight, norm.bias, offsets, norm.num_groups, norm.eps, activate, out=made.rows
        )
        return made

    def _convolve(
        self, source: Map, conv: Any, target: Map, plus: Callable[[int, int, int, int], Tensor] | None = None
    ) -> None:
        """3 x 3, padding 1; ``plus(begin, end, first, last)``: rows and channels that are added, perhaps the
        target's own."""
        weight, width = self._weights[id(conv)], source.width

        def block(begin: int, end: int, first: int, last: int) -> None:
            made = F.conv2d(source.window(begin, end), weight[first:last], conv.bias[first:last], padding=(0, 1))
            rows = made.permute(0, 2, 3, 1).reshape((end - begin) * width, -1)
            into = target.rows[begin * width : end * width, first:last]
            if plus is None:
                into.copy_(rows)
            else:
                into.copy_(rows.add_(plus(begin * width, end * width, first, last)))

        _convolution_blocks(block, source.height, 18 * width * source.channels, target.channels)

    def _convolve_doubled(self, source: Map, conv: Any, target: Map) -> None:
        """3 x 3, padding 1, of the source with every pixel doubled both ways."""
        kernels = self._weights[id(conv)]
        height, width, channels = source.height, source.width, target.channels
        # [H, row's parity, W, column's parity, C]
        out = target.padded[1:-1].view(height, 2, width, 2, channels)

        def block(begin: int, end: int, first: int, last: int) -> None:
            for down in (0, 1):
                window = source.window(begin + down, end + down - 1)
                for right in (0, 1):
                    made = F.conv2d(window, kernels[down, right, first:last], conv.bias[first:last], padding=(0, 1))
                    out[begin:end, down, :, right, first:last] = made[0].permute(1, 2, 0)[:, right : right + width]

        _convolution_blocks(block, height, 32 * width * source.channels, channels)

    def _attend(self, carried: Map, attention: Any, storage: Tensor) -> None:
        """carried += out(softmax(q k^T) v), of one norm of it."""
        normed = self._normed(carried, attention.group_norm, storage, activate=False).rows
        heads, rows = attention.heads, len(normed)
        projected = [
            normed.new_empty(rows, layer.out_features) for layer in (attention.to_q, attention.to_k, attention.to_v)
        ]

        def project(begin: int, end: int) -> None:
            for layer, made in zip((attention.to_q, attention.to_k, attention.to_v), projected, strict=True):
                made[begin:end] = layer(normed[begin:end])

        _in_blocks(project, rows)
        q, k, v = (p.view(1, rows, heads, -1).transpose(1, 2) for p in projected)

        def attend(begin: int, end: int) -> None:
            seen = F.scaled_dot_product_attention(q[:, :, begin:end], k, v)
            carried.rows[begin:end] += attention.to_out[0](seen.transpose(1, 2).reshape(end - begin, -1))

        _in_blocks(attend, rows)

    # ------------------------------------------------------------------------------------------------ weights, memory

    def _refresh(self) -> None:
        convolutions = [m for m in self.vae.decoder.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        seen = glance(conv.weight for conv in convolutions)
        if seen == self._seen:
            return
        doubled = {id(u.conv) for level in self.vae.decoder.up_blocks for u in level.upsamplers or ()}
        self._weights = {
            id(conv): (folded if id(conv) in doubled else channels_last)(conv.weight.detach()) for conv in convolutions
        }
        self._seen = seen

    def _room(self, height: int, width: int) -> list[int]:
        """Elements of the residual stream, of a second map that changes places with it, and of the normed one."""
        decoder = self.vae.decoder
        most = (height + 2) * width * max(decoder.conv_in.out_channels, decoder.conv_in.in_channels)
        for level in decoder.up_blocks:
            widest = max(max(block.conv1.in_channels, block.conv1.out_channels) for block in level.resnets)
            most = max(most, (height + 2) * width * widest)
            for upsampler in level.upsamplers or ():
                height, width = 2 * height, 2 * width
                most = max(most, (height + 2) * width * upsampler.conv.out_channels)
        return [most] * 3


def channels_last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last)


def folded(weight: Tensor) -> Tensor:
    """Taps [N, K, 3, 3] -> [2, 2, N, K, 2, 2]: by the parity of the output's row and column, what its pixels of the small
    map are multiplied with. Summed in float32 (float64), rounded once."""
    wide = weight.double() if weight.dtype == torch.float64 else weight.float()

    def pairs(taps: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        first, second, third = taps.unbind(dim)
        return torch.stack([first, second + third], dim), torch.stack([first + second, third], dim)

    kernels = [[channels_last(k.to(weight.dtype)) for k in pairs(rows, 3)] for rows in pairs(wide, 2)]
    made = torch.empty(2, 2, *kernels[0][0].permute(0, 2, 3, 1).shape, dtype=weight.dtype)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        made[down, right] = kernels[down][right].permute(0, 2, 3, 1)
    return made.permute(0, 1, 2, 5, 3, 4)


def _in_blocks(work: Callable[[int, int], Any], rows: int) -> None:
    """work(begin, end) over all rows, `_BLOCK_ROWS` at a time."""
    fixed_blocks.each([partial(work, a, min(a + _BLOCK_ROWS, rows)) for a in range(0, rows, _BLOCK_ROWS)])


def _convolution_blocks(work: Callable[[int, int, int, int], None], height: int, flops: int, channels: int) -> None:
    """work(begin, end, first, last) over rows and output channels; ``flops``: of one channel of one row."""
    step = min(channels, _BLOCK_CHANNELS)
    run = max(1, _BLOCK_FLOPS // (flops * step))
    run = -(-height // -(-height // run))  # no small piece at the end
    pieces = [
        (a, min(a + run, height), c, min(c + step, channels))
        for a in range(0, height, run)
        for c in range(0, channels, step)
    ]
    fixed_blocks.each([partial(work, *piece) for piece in pieces])
