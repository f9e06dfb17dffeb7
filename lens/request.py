"""What one call or one line of a queue asks for: fields, checks, defaults. Every mistake is found here, before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lens import resolution, sampler
from lens.callbacks import CALLBACK_TENSORS
from lens.config import Defaults
from lens.packing import Grid, expect_tensors
from lens.text_encoder import TRUNCATIONS, negative_list, prompt_list


@dataclass(frozen=True)
class Request:
    """One picture. None: the model's own size, steps, guidance; a seed that is drawn."""

    prompt: str
    negative_prompt: str = ""
    size: tuple[int, int] | None = None  # (height, width) in pixels
    seed: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None


OUTPUT_TYPES = ("pil", "np", "latent")


@dataclass(frozen=True)
class Embeds:
    """Text that the caller brings: F tensors [B, T, E], and which of the T are valid (None: all)."""

    name: str  # of the argument
    features: Sequence[Tensor]
    mask: Tensor | None


@dataclass(frozen=True)
class Arguments:
    """P prompts of ``each`` pictures: B = P * each."""

    text: list[str] | Embeds  # P prompts
    negative: list[str | None] | Embeds | None  # P, None in it: no text at all; None: no guidance
    count: int  # P
    each: int
    steps: int
    guidance: float
    grids: list[Grid]  # B
    encoding: tuple[int, str, str | None]  # max_sequence_length, truncation, chat_date
    output_type: str
    shown: tuple[str, ...]  # tensors a callback gets

    @property
    def written(self) -> bool:
        """Whether any text is left for the text encoder to read."""
        texts = [text for text in (self.text, self.negative) if isinstance(text, list)]
        return any(prompt is not None for prompts in texts for prompt in prompts)


def resolve(
    defaults: Defaults,
    prompt: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    prompt_embeds: Sequence[Tensor] | None,
    prompt_mask: Tensor | None,
    negative_prompt_embeds: Sequence[Tensor] | None,
    negative_prompt_mask: Tensor | None,
    size: tuple[Any, Any, Any, Any, Any],
    num_inference_steps: int | None,
    guidance_scale: float | None,
    num_images_per_prompt: int,
    encoding: tuple[int, str, str | None],
    output_type: str,
    shown: Sequence[str],
) -> Arguments:
    """The arguments of ``LensPipeline.__call__``; size: height, width, base_resolution, aspect_ratio, sizes."""
    steps = defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
    steps = sampler.count("num_inference_steps", steps)
    each = sampler.count("num_images_per_prompt", num_images_per_prompt)
    length = sampler.count("max_sequence_length", encoding[0])
    guidance = _guidance(defaults.guidance_scale if guidance_scale is None else guidance_scale)
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
    if encoding[1] not in TRUNCATIONS:
        raise ValueError(f"truncation must be one of {TRUNCATIONS}, got {encoding[1]!r}")
    if not isinstance(shown, Sequence) or not all(name in CALLBACK_TENSORS for name in shown):
        raise ValueError(f"callback_on_step_end_tensor_inputs must be among {CALLBACK_TENSORS}, got {shown!r}")
    embeds = _embeds("prompt", prompt_embeds, prompt_mask)
    unwanted = _embeds("negative_prompt", negative_prompt_embeds, negative_prompt_mask)
    count = _prompt_count(prompt, embeds)
    negatives = negative_list(negative_prompt, count)
    if unwanted is not None and any(n is not None for n in negatives):
        raise ValueError("give only one of negative_prompt and negative_prompt_embeds")
    per_prompt = resolution.request_grids(count, *size, defaults.base_resolution, defaults.max_resolution)
    return Arguments(
        text=prompt_list("prompt", prompt) if embeds is None else embeds,
        negative=None if guidance == 1.0 else unwanted or negatives,
        count=count,
        each=each,
        steps=steps,
        guidance=guidance,
        grids=[grid for grid in per_prompt for _ in range(each)],
        encoding=(length, *encoding[1:]),
        output_type=output_type,
        shown=tuple(shown),
    )


def _embeds(name: str, features: Sequence[Tensor] | None, mask: Tensor | None) -> Embeds | None:
    if features is not None:
        return Embeds(f"{name}_embeds", features, mask)
    if mask is not None:
        raise ValueError(f"{name}_mask belongs to {name}_embeds, which are missing")
    return None


def _prompt_count(prompt: str | Sequence[str] | None, embeds: Embeds | None) -> int:
    if (prompt is None) == (embeds is None):
        raise ValueError("give exactly one of prompt and prompt_embeds")
    if embeds is None:
        return len(prompt_list("prompt", prompt))
    parts = expect_tensors("prompt_embeds", embeds.features)
    if not parts or not parts[0].dim() or not len(parts[0]):
        raise ValueError("prompt_embeds must be a list of F tensors [B, T, E] with B >= 1")
    return len(parts[0])


def _guidance(value: Any) -> float:
    try:
        guidance = float(value)
    except (TypeError, ValueError):
        guidance = math.nan
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance_scale must be a finite number >= 0, got {value!r}")
    return guidance
