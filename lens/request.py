"""What one call or one line of a queue asks for: fields, checks, defaults. Every mistake is found here, before any work."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import notices, resolution, sampler
from .arguments import count, finite, shortened
from .config import DEFAULT_CHAT_DATE, MAX_IMAGES, MAX_STEPS, Defaults, Distilled
from .packing import Grid, expect_tensors
from .resolution import TOKEN_PIXELS
from .text_encoder import TRUNCATIONS, negative_list, prompt_list

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True)
class Request:
    """P prompts of ``num_images_per_prompt`` pictures each, B in all; a line of a queue is one of one.

    None: the model's own size, steps, guidance; a seed that is drawn. See ``LensPipeline.__call__`` for every field.
    """

    prompt: str | Sequence[str] | None = None
    negative_prompt: str | Sequence[str] | None = ""
    size: tuple[int, int] | None = None  # (height, width) in pixels, of every prompt
    seed: int | Sequence[int] | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    base_resolution: int | None = None
    aspect_ratio: str | None = None
    sizes: Sequence[tuple[int, int]] | None = None  # one per prompt
    num_images_per_prompt: int = 1
    generator: torch.Generator | Sequence[torch.Generator] | None = None
    latents: Tensor | Sequence[Tensor] | None = None
    prompt_embeds: Sequence[Tensor] | None = None
    prompt_mask: Tensor | None = None
    negative_prompt_embeds: Sequence[Tensor] | None = None
    negative_prompt_mask: Tensor | None = None
    max_sequence_length: int = 512
    truncation: str = "reference"
    chat_date: str | None = DEFAULT_CHAT_DATE
    output_type: str = "pil"
    solver: str = "euler"

    def resolved(self, defaults: Defaults) -> Request:
        """The same with every default filled in and one text and size per prompt. ValueError for every mistake."""
        steps = defaults.num_inference_steps if self.num_inference_steps is None else self.num_inference_steps
        steps = count("num_inference_steps", steps, MAX_STEPS)
        each = count("num_images_per_prompt", self.num_images_per_prompt)
        length = count("max_sequence_length", self.max_sequence_length)
        guidance = finite(
            "guidance_scale", defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale, 0
        )
        sampler.expect_solver(self.solver)
        if self.output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {shortened(self.output_type)}")
        if self.truncation not in TRUNCATIONS:
            raise ValueError(f"truncation must be one of {TRUNCATIONS}, got {shortened(self.truncation)}")
        for name in ("prompt", "negative_prompt"):
            if getattr(self, f"{name}_mask") is not None and getattr(self, f"{name}_embeds") is None:
                raise ValueError(f"{name}_mask belongs to {name}_embeds, which are missing")
        prompts, asked = self._prompts()
        if each * asked > MAX_IMAGES:
            raise ValueError(
                f"num_images_per_prompt times the prompts must be at most {MAX_IMAGES} images, got "
                f"{shortened(each)} times {asked}"
            )
        negatives = negative_list(self.negative_prompt, asked)
        self._notice(guidance, negatives)
        if self.negative_prompt_embeds is not None and any(n is not None for n in negatives):
            raise ValueError("give only one of negative_prompt and negative_prompt_embeds")
        if defaults.distilled is not None or defaults.variant == "turbo":  # the released Turbo has no metadata
            _beside_the_training(defaults.distilled, steps, guidance, self, any(n is not None for n in negatives))
        if self.size is not None and self.sizes is not None:
            raise ValueError("give only one of size and sizes")
        grids = resolution.request_grids(
            asked,
            self.height,
            self.width,
            self.base_resolution,
            self.aspect_ratio,
            self.sizes if self.size is None else [self.size] * asked,
            defaults.base_resolution,
            defaults.max_resolution,
        )
        return replace(
            self,
            prompt=prompts,
            negative_prompt=[n or "" for n in negatives],
            size=None,
            height=None,
            width=None,
            base_resolution=None,
            aspect_ratio=None,
            sizes=[(h * TOKEN_PIXELS, w * TOKEN_PIXELS) for h, w in grids],
            num_inference_steps=steps,
            guidance_scale=guidance,
            num_images_per_prompt=each,
            max_sequence_length=length,
        )

    def _notice(self, guidance: float, negatives: Sequence[str | None]) -> None:
        """Say what is drawn otherwise than it was probably meant."""
        if guidance < 1:
            text = "without the prompt" if guidance == 0 else "partly without the prompt"
            notices.warn(
                f"guidance_scale {guidance:g} is below 1, so images are drawn {text}: 1 draws by the prompt alone, "
                "more pulls towards it"
            )
        if guidance == 1 and (self.negative_prompt_embeds is not None or any(negatives)):
            notices.warn("the negative prompt is not read at guidance_scale 1, only above it")

    def _prompts(self) -> tuple[list[str] | None, int]:
        """(P prompts, or None where features stand in for them, P)."""
        if (self.prompt is None) == (self.prompt_embeds is None):
            raise ValueError("give exactly one of prompt and prompt_embeds")
        if self.prompt_embeds is None:
            prompts = prompt_list("prompt", self.prompt)
            return prompts, len(prompts)
        parts = expect_tensors("prompt_embeds", self.prompt_embeds)
        if not parts or not parts[0].dim() or not len(parts[0]):
            raise ValueError("prompt_embeds must be a list of F tensors [B, T, E] with B >= 1")
        return None, len(parts[0])

    # ------------------------------------------------------------------------------------------------ once resolved

    @property
    def count(self) -> int:
        """P."""
        return len(self.sizes or ())

    @property
    def grids(self) -> list[Grid]:
        """(height, width) of every picture in tokens, B."""
        grids = [(h // TOKEN_PIXELS, w // TOKEN_PIXELS) for h, w in self.sizes or ()]
        return [grid for grid in grids for _ in range(self.num_images_per_prompt)]

    @property
    def guided(self) -> bool:
        return self.guidance_scale != 1.0

    @property
    def encoding(self) -> tuple[int, str, str | None]:
        """The text encoder's arguments besides the prompts."""
        return self.max_sequence_length, self.truncation, self.chat_date

    def texts(self, negative: bool = False) -> list[str | None]:
        """The P texts for the text encoder; None for one that carries no text at all, a blank negative prompt. [] where
        features stand in for them, or where nothing reads them: the negative ones without guidance."""
        if negative:
            read = self.guided and self.negative_prompt_embeds is None
            return [n or None for n in self.negative_prompt or ()] if read else []
        return list(self.prompt or ())

    @property
    def kind(self) -> Hashable:
        """Only requests of one kind can be drawn together."""
        return self.num_inference_steps, self.guidance_scale, self.solver, self.encoding, self.output_type


def joined(requests: Sequence[Request], seeds: Sequence[int]) -> Request:
    """Resolved requests of one kind, a picture of one prompt each, and their seeds -> one request for all."""
    return replace(
        requests[0],
        prompt=[text for r in requests for text in r.prompt or ()],
        negative_prompt=[text for r in requests for text in r.negative_prompt or ()],
        sizes=[size for r in requests for size in r.sizes or ()],
        seed=list(seeds),
    )


def _beside_the_training(
    student: Distilled | None, steps: int, guidance: float, request: Request, negative: bool
) -> None:
    """Warn of what a distilled student was not trained for. It is done all the same."""
    said = []
    if guidance != 1:
        said.append(f"guidance {guidance:g}: it has learned the guided picture, and was trained without")
    if negative or request.negative_prompt_embeds is not None:
        said.append("a negative prompt" + ("" if guidance != 1 else ", which nothing reads at guidance 1"))
    if student is not None and student.grid == "fixed" and steps != student.steps:
        said.append(f"{steps} steps: it was trained on the times of {student.steps}")
    if request.solver != "euler":
        said.append(f"solver {request.solver!r}: it was trained on the steps of 'euler'")
    if said:
        notices.warn(f"this checkpoint is distilled; {'; '.join(said)}")
