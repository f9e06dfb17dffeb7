"""The attention of one GPT-OSS layer behind a read preamble: ours, and transformers' eager one with its mask and rotation."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lens import ops
from lens.ops import reference

from ..case import OURS, Subject, Work, generator, wider
from ..roofline import moved

SUBJECTS = (OURS, "transformers")
BOUND = 2e-2  # transformers rounds scores and shares to bfloat16


@dataclass(frozen=True)
class Size:
    rows: int
    before: int
    heads: int = 64
    shared: int = 8
    channels: int = 64
    window: int | None = None


RELEASED = {"prompt": Size(301, 97), "window": Size(301, 97, window=128)}
SMALL = {"prompt": Size(9, 4, 4, 2, 16), "window": Size(9, 4, 4, 2, 16, window=5)}


def prepare(size: Size, device: torch.device) -> Work:
    from transformers.models.gpt_oss.modeling_gpt_oss import apply_rotary_pos_emb, eager_attention_forward

    g, there, scale = generator(device, "sinks"), size.before + size.rows, size.channels**-0.5

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, device=device).bfloat16()

    angle = torch.arange(size.before, there, device=device).float()[:, None] / torch.logspace(
        0, 4, size.channels // 2, device=device
    )
    q, k, v = (normal(n, heads, size.channels) for n, heads in ((size.rows, size.heads), *((there, size.shared),) * 2))
    given = (q, k, v, normal(size.heads), angle.cos(), angle.sin())
    place = torch.arange(there, device=device)
    seen = (place <= place[size.before :, None]) & (place > place[size.before :, None] - (size.window or there + 1))
    mask = torch.zeros(size.rows, there, dtype=q.dtype, device=device).masked_fill(~seen, torch.finfo(q.dtype).min)
    module: Any = SimpleNamespace(sinks=given[3], num_key_value_groups=size.heads // size.shared, training=False)

    def by_transformers(q: Tensor, k: Tensor, v: Tensor, _: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        turned, _k = apply_rotary_pos_emb(q.transpose(0, 1)[None], q[:, :1].transpose(0, 1)[None], cos[None], sin[None])
        keys, values = (x.transpose(0, 1)[None] for x in (k, v))
        return eager_attention_forward(module, turned.to(q.dtype), keys, values, mask[None, None], scale)[0][0]

    def ours(*given: Tensor) -> Tensor:
        settings: tuple[Any, ...] = (*given, size.window, scale)
        return ops.sink_attention(*settings)

    def oracle(*given: Tensor) -> Tensor:
        settings: tuple[Any, ...] = (*(t.to(wider(torch.bfloat16)) for t in given), size.window, scale)
        return reference.sink_attention(*settings)

    return Work(
        inputs=[given],
        subjects={OURS: Subject(ours), "transformers": Subject(by_transformers, mode="stream")},
        oracle=oracle,
        bound=BOUND,
        flops=4 * int(seen.sum()) * size.heads * size.channels,
        bytes=2 * moved((q,)) + moved(given[1:]),
    )
