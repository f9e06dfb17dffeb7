"""What a callback sees of a step, and what its answer changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import sampler
from .arguments import shortened
from .packing import expect_tensors, pad_features

if TYPE_CHECKING:
    from .engine.job import Job
    from .engine.run import Run

CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds", "noise_pred")


def check_names(names: Any) -> tuple[str, ...]:
    """The tensors a callback asks for; ValueError for one that there is not."""
    if not isinstance(names, Sequence) or not all(name in CALLBACK_TENSORS for name in names):
        raise ValueError(f"callback_on_step_end_tensor_inputs must be among {CALLBACK_TENSORS}, got {shortened(names)}")
    return tuple(names)


def shown(name: str, job: Job, run: Run, offsets: Tensor) -> Any:
    """The tensor ``name`` of the step that ``run`` just took, as callbacks see it."""
    if name == "latents":
        return job.shaped(run.x)
    if name == "noise_pred":
        return job.shaped(sampler.guided(*run.velocities, job.guidance, offsets))
    text = job.text if name == "prompt_embeds" else job.negative
    return None if text is None else pad_features(text.features)[0]


def copied(value: Any) -> Any:
    """A callback may write into what it gets."""
    if isinstance(value, Tensor):
        return value.clone()
    return None if value is None else [v.clone() for v in value]


def replaced(returned: Any, shown: dict[str, Any]) -> dict[str, Any]:
    """What a callback's answer changes; returning what was shown, as it was, changes nothing."""
    if not isinstance(returned, dict | None) or set(returned or {}) - set(CALLBACK_TENSORS):
        raise ValueError(
            f"callback_on_step_end must return a dict of {CALLBACK_TENSORS} or None, got {shortened(returned)}"
        )
    return {k: v for k, v in (returned or {}).items() if v is not None and not _same(shown.get(k), v)}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b.to(a.device))
    if isinstance(a, list) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return False


def packed(name: str, value: Any, job: Job, like: Tensor) -> Tensor:
    """What a callback returned, [B, I, C] or a list, checked -> packed rows [R, C]."""
    name = f"callback_on_step_end: {name}"
    parts = [part.to(like.device, like.dtype) for part in expect_tensors(name, value)]
    expected, got = [(n, like.shape[1]) for n in job.lengths], [tuple(part.shape) for part in parts]
    if got != expected:
        raise ValueError(f"{name} must have shapes {expected}, got {got}")
    rows = torch.cat(parts)
    if not torch.isfinite(rows).all():
        raise ValueError(f"{name} holds NaN or infinity")
    return rows
