"""The self-test of lens doctor: every op against its specification, and one small picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .. import ops
from ..ops import reference
from .findings import BROKEN, NOTE, OK, Finding

if TYPE_CHECKING:
    from ..pipeline import LensPipelineOutput


def op_cases(seed: int = 0) -> dict[str, list[Any]]:
    """Per op, float64 arguments of one ragged call: three samples, one without text, odd widths.

    Named as in reference.py; the caller chooses dtype and device. Index and length arguments are integers already.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    def packed(experts: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=g, dtype=torch.uint8)
        return blocks, torch.randint(119, 123, (experts, outputs, inputs // 32), generator=g, dtype=torch.uint8)

    images, texts = [20, 6, 16], [7, 0, 12]
    samples, heads, channels, hidden = len(images), 2, 64, 341
    rows, text_rows, width = sum(images), sum(texts), heads * channels
    offsets, text_offsets = (
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32) for n in (images, texts)
    )
    table = normal(samples, 6 * width)  # one modulation table: its slices have a row stride of 6 D
    gate, scale, shift = (table[:, i * width : (i + 1) * width] for i in (0, 2, 5))
    angle = normal(rows + text_rows, channels // 2)
    index = torch.tensor([0, 2, 3, 9, 10, 19, 21])
    x, y, weight = normal(rows, width), normal(rows, width), normal(width)
    qkv, sunk = normal(3, rows + text_rows, heads, channels), normal(19, 8)
    return {
        "pack_tokens": [normal(2, 11, 64), index],
        "unpack_tokens": [normal(len(index), 64), index, 2, 11],
        "rms_norm_modulate": [x, weight, scale, shift, offsets],
        "qk_norm_rope": [
            normal(rows, 3 * width), normal(text_rows, 3 * width), *(normal(channels) for _ in range(4)),
            angle.cos(), angle.sin(), offsets, text_offsets,
        ],
        "joint_attention": [*qkv, images, texts, offsets, text_offsets],
        "gated_residual": [x, y, gate, offsets],
        "gated_residual_norm_modulate": [x, y, gate, weight, scale, shift, offsets],
        "swiglu": [normal(rows, 2 * hidden)],
        "group_norm_silu": [x, weight, normal(width), offsets, 32],
        "moe_mxfp4": [
            normal(20, 64), normal(5, 64), normal(5), *packed(5, 192, 64), normal(5, 192), *packed(5, 64, 96), normal(5, 64), 3,
        ],
        "sink_attention": [
            normal(19, heads, 16), normal(30, 1, 16), normal(30, 1, 16), normal(heads), sunk.cos(), sunk.sin(), 12, 0.25,
        ],
        "guidance_step": [x, normal(rows, width), normal(rows, width), normal(samples), 5.0, offsets],
    }  # fmt: skip


def compare(op: str, arguments: Sequence[Any], dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Relative L2 error of the op, and of the specification itself, both run in ``dtype``, against float64."""

    def cast(i: int, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value.to(device) if isinstance(value, Tensor) else value
        # the rotary table, the latents and the step lengths are float32 whatever the model's dtype is
        wide = i in {"qk_norm_rope": (6, 7), "sink_attention": (4, 5), "guidance_step": (0, 3)}.get(op, ())
        return _like(value, torch.float32 if wide else dtype, device)

    given = [cast(i, value) for i, value in enumerate(arguments)]
    exact = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in given]
    spec: Callable[..., Any] = getattr(reference, op)
    truth = _flat(spec(*exact))
    return tuple(float((_flat(f(*given)) - truth).norm() / truth.norm()) for f in (getattr(ops, op), spec))  # type: ignore[return-value]


def _like(value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy in ``dtype`` that keeps the strides of a slice."""
    if value.is_contiguous():
        return value.to(device, dtype)
    whole = torch.empty(value.shape[0], value.stride(0), dtype=dtype, device=device)
    return whole[:, : value.shape[1]].copy_(value)


def _flat(result: Any) -> Tensor:
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([p.double().flatten() for p in parts])


def run_ops(device: torch.device) -> list[Finding]:
    """Every op against its specification: error at most twice what the specification itself makes in that dtype."""
    section = f"Self-test on {device}"
    found = []
    for op, arguments in op_cases().items():
        words, status = [], OK
        for dtype, floor in ((torch.float32, 5e-7), (torch.bfloat16, 1e-5)):
            name = str(dtype).removeprefix("torch.")
            try:
                error, allowed = compare(op, arguments, dtype, device)
            except Exception as failure:
                # whatever an op raises is this report's content
                words.append(f"{name} raised {type(failure).__name__}: {str(failure).splitlines()[0]}")
                status = BROKEN
                continue
            limit = 2 * allowed + floor
            words.append(f"{name} error {error:.1e} (limit {limit:.1e})")
            if not error <= limit:  # a NaN is broken, too
                status = BROKEN
        found.append(Finding(section, op, status, ", ".join(words)))
    return found


def draw_image(model: str, device: torch.device) -> list[Finding]:
    """One small picture, alone and beside another: finite, repeatable, and whether its bits depend on its neighbour."""
    from ..pipeline import LensPipeline

    section = f"Self-test on {device}"
    red, seed, full = "a red apple", 1, (64, 64)
    began = time.perf_counter()
    try:
        pipe = LensPipeline.from_pretrained(model, device=device)
        loaded = time.perf_counter()

        def draw(prompts: list[str], sizes: list[tuple[int, int]], seeds: list[int]) -> Tensor:
            """The last picture, float32 [H, W, 3]."""
            small: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
            output = cast("LensPipelineOutput", pipe(prompts, sizes=sizes, seed=seeds, **small))
            return torch.from_numpy(output.images[-1])

        alone = draw([red], [full], [seed])
        seconds = time.perf_counter() - loaded
        again = draw([red], [full], [seed])
        together = draw(["two blue keys", red], [(32, 48), full], [5, seed])
    except Exception as failure:
        # whatever loading or drawing raises is this report's content
        detail = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else 'no message'}"
        return [Finding(section, f"picture ({model})", BROKEN, detail)]
    found = [
        Finding(
            section,
            f"picture ({model})",
            OK if torch.isfinite(alone).all() and alone.std() > 0 else BROKEN,
            f"64x64, 2 steps: {seconds:.2f} s; loading {loaded - began:.1f} s",
        ),
        Finding(
            section,
            "same bits again",
            OK if torch.equal(alone, again) else BROKEN,
            "yes" if torch.equal(alone, again) else f"no, differs by up to {float((alone - again).abs().max()):.1e}",
        ),
    ]
    difference = float((alone - together).abs().max())
    invariant = difference == 0
    # promised bit for bit, or else up to rounding, which bfloat16 makes visible
    status = OK if invariant else BROKEN if pipe.transformer.invariant or difference > 0.1 else NOTE
    detail = "yes" if invariant else f"no, a neighbour changes values by up to {difference:.1e} of 1"
    return [*found, Finding(section, "same bits in a batch", status, detail)]
