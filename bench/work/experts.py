"""The mixture of experts of one GPT-OSS layer: ours on MXFP4, transformers' on the same experts expanded to bfloat16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lens import ops
from lens.cost import gemm_flops
from lens.ops import reference

from ..case import OURS, Subject, Work, generator, wider
from ..roofline import moved

SUBJECTS = (OURS, "transformers")
BOUND = 5e-2  # transformers rounds gate, up and every product by itself: 3.1e-2 at the released size, ours 0.2e-2


@dataclass(frozen=True)
class Size:
    rows: int
    width: int
    experts: int
    inputs: int = 1  # that take turns


RELEASED = {
    "prompt": Size(rows=160, width=2880, experts=32),  # its preamble among them
    "token": Size(rows=1, width=2880, experts=32, inputs=16),  # of the reasoner's; the next chooses other experts
}
SMALL = {"prompt": Size(rows=9, width=64, experts=8), "token": Size(rows=1, width=64, experts=8, inputs=2)}
TOP = 4  # experts of a row


def arguments(size: Size, device: torch.device) -> tuple[Tensor, ...]:
    """What `ops.moe_mxfp4` takes, bfloat16, experts of about unit gain."""
    g, e, d = generator(device, "experts"), size.experts, size.width

    def normal(*shape: int, by: float = 1.0) -> Tensor:
        return (by * torch.randn(shape, generator=g, device=device)).bfloat16()

    def packed(outputs: int) -> tuple[Tensor, Tensor]:
        blocks = torch.randint(0, 256, (e, outputs, d // 32, 16), generator=g, device=device, dtype=torch.uint8)
        scales = torch.randint(119, 121, (e, outputs, d // 32), generator=g, device=device, dtype=torch.uint8)
        return blocks, scales

    return (
        normal(size.rows, d), normal(e, d, by=d**-0.5), normal(e, by=0.02),
        *packed(2 * d), normal(e, 2 * d, by=0.02), *packed(d), normal(e, d, by=0.02),
    )  # fmt: skip


def bfloat16(blocks: Tensor, scales: Tensor) -> Tensor:
    """MXFP4 [E, N, K / 32, 16], [E, N, K / 32] -> [E, K, N], by transformers; an expert at a time, for each takes it a
    multiple of its own size."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    return torch.cat([convert_moe_packed_tensors(*pair) for pair in zip(blocks.split(1), scales.split(1))])


def expanded(arguments: tuple[Tensor, ...]) -> Any:
    """transformers' module of the same weights."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    x, router, router_bias, up, up_scales, up_bias, down, down_scales, down_bias = arguments
    config = GptOssConfig(
        hidden_size=x.shape[1], intermediate_size=x.shape[1], num_local_experts=len(router), num_experts_per_tok=TOP
    )
    with torch.device("meta"):
        module = GptOssMLP(config).eval()
    values = {
        "router.weight": router, "router.bias": router_bias, "experts.gate_up_proj_bias": up_bias,
        "experts.down_proj_bias": down_bias,
        "experts.gate_up_proj": bfloat16(up, up_scales),
        "experts.down_proj": bfloat16(down, down_scales),
    }  # fmt: skip
    module.load_state_dict(values, assign=True)
    return module


def prepare(size: Size, device: torch.device) -> Work:
    """Inputs that share the weights; all of one layer's weights, or the experts of all inputs, exceed a cache."""
    first = arguments(size, device)
    g = generator(device, "experts", "inputs")
    others = [torch.randn(first[0].shape, generator=g, device=device).bfloat16() for _ in range(size.inputs - 1)]
    inputs = [first, *((x, *first[1:]) for x in others)]
    theirs = expanded(first)

    @torch.no_grad()
    def by_transformers(x: Tensor, *_: Tensor) -> Tensor:
        found = theirs(x[None])
        return (found[0] if isinstance(found, tuple) else found).view_as(x)

    def oracle(*given: Tensor) -> Tensor:
        wide = [t.to(wider(torch.bfloat16)) if t.is_floating_point() else t for t in given]
        settings: tuple[Any, ...] = (*wide, TOP, 1.702, 7.0)
        return reference.moe_mxfp4(*settings)

    d, rows = size.width, size.rows
    hit = sum(len(reference.route(x, first[1], first[2], TOP)[0].unique()) for x, *_ in inputs) / len(inputs)
    flops = gemm_flops(rows, d, size.experts) + TOP * rows * (gemm_flops(1, d, 2 * d) + gemm_flops(1, d, d))
    return Work(
        inputs=inputs,
        # it asks the device which experts are hit: no graph holds it
        subjects={OURS: Subject(ops.moe_mxfp4), "transformers": Subject(by_transformers, mode="stream")},
        oracle=oracle,
        bound=BOUND,
        flops=flops,
        bytes=2 * moved(first[0]) + moved(first[1:3]) + hit / size.experts * moved(first[3:]),
        note=f"{hit:g} of {size.experts} experts hit",
    )
