"""What a benchmark draws with: a checkpoint through the pipeline, or a training state through the training code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from lens.formats.hub import resolve
from lens.formats.released import read_index

if TYPE_CHECKING:
    from lens.pipeline import LensPipelineOutput

Images = list[np.ndarray]  # uint8 [H, W, 3]
Size = tuple[int, int]  # (height, width) in pixels


@dataclass
class Source:
    """`draw(prompts, seeds, guidance, (height, width))` and `reconstruct(pictures)` give pictures; `side` is the model's own.

    `classes` is what the model was trained on (None where it does not say), `validation` its last measured losses.
    """

    name: str
    side: int
    draw: Callable[[Sequence[str], Sequence[int], float, Size], Images]
    reconstruct: Callable[[Images], Images]
    classes: tuple[str, ...] | None = None
    validation: dict[str, float] = field(default_factory=dict)


def from_pipeline(model: str, steps: int) -> Source:
    """What LensPipeline loads: "mini", a folder in the released layout, ..."""
    from lens import LensPipeline
    from lens.vae import to_uint8

    root = resolve(model)
    about = read_index(root).get("lens", {})
    pipe = LensPipeline.from_pretrained(model)

    def draw(prompts: Sequence[str], seeds: Sequence[int], guidance: float, size: Size) -> Images:
        height, width = size
        out = pipe(
            list(prompts),
            seed=list(seeds),
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height,
            width=width,
        )
        return [np.asarray(image) for image in cast("LensPipelineOutput", out).images]  # a tuple only where asked for

    def reconstruct(pictures: Images) -> Images:
        out = []
        for picture in pictures:
            x = torch.from_numpy(picture).float().div_(127.5).sub_(1)
            grid = (picture.shape[0] // 16, picture.shape[1] // 16)
            out.append(to_uint8(pipe.codec.decode(pipe.codec.encode(x), grid)))
        return out

    classes = tuple(about["classes"]) if "classes" in about else None
    return Source(model, pipe.defaults.base_resolution, draw, reconstruct, classes, about.get("validation", {}))


def enlarged(source: Source, side: int) -> Source:
    """The pictures that the source draws as squares of that side, enlarged (bicubic): what more tokens are held against."""
    from PIL import Image

    def draw(prompts: Sequence[str], seeds: Sequence[int], guidance: float, size: Size) -> Images:
        height, width = size
        if height != width or height < side:
            raise ValueError(f"--enlarge {side}: expected squares of at least {side} pixels, got {height}x{width}")
        small = source.draw(prompts, seeds, guidance, (side, side))
        return [np.asarray(Image.fromarray(p).resize((width, height), Image.Resampling.BICUBIC)) for p in small]

    return replace(source, name=f"{source.name}, enlarged from {side}", draw=draw)


def from_state(state: Path, recipe: str, vae: Path, steps: int, mu: float | None) -> Source:
    """The averaged weights of a state, pretrain.pt or mixed_resolution.pt (its name is its stage's), and the decoder of a VAE stage folder
    (or a released one); mu None: the recipe's time shift."""
    from .. import configs
    from ..networks import generator, text_path

    stage = state.stem
    config = configs.load(recipe, stage)
    mu = config.SHEET["mu"] if mu is None else mu
    model = generator.load_trained(config, recipe, state, stage).eval()
    model.transformer.batch_invariant = False
    painter = generator.Painter(vae, recipe)
    tokenizer = text_path.tokenizer_of(configs.beside(recipe, "encoder").TOKENIZER)

    def draw(prompts: Sequence[str], seeds: Sequence[int], guidance: float, size: Size) -> Images:
        tokens, grid = [tokenizer.encode(p)[0] for p in prompts], (size[0] // 16, size[1] // 16)
        latents = generator.sample(model, tokens, tokenizer.prefix, seeds, steps, guidance, mu, grid)
        return list(painter(latents, grid))

    def reconstruct(pictures: Images) -> Images:
        tokens = painter.latents.encode(np.stack(pictures))
        grid = (pictures[0].shape[0] // 16, pictures[0].shape[1] // 16)
        return [picture for part in tokens.split(16) for picture in painter(part, grid)]

    return Source(str(state), config.SIDE, draw, reconstruct, configs.world(recipe).classes)
