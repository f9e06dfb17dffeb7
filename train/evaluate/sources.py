"""What a benchmark draws with: a checkpoint through the pipeline, or a training state through the training code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

Pictures = list[np.ndarray]  # uint8 [H, W, 3]


@dataclass
class Source:
    """`draw(prompts, seeds, guidance)` and `reconstruct(pictures)` give pictures of side x side pixels.

    `classes` is what the model was trained on (None where it does not say), `validation` its last measured losses.
    """

    name: str
    side: int
    draw: Callable[[Sequence[str], Sequence[int], float], Pictures]
    reconstruct: Callable[[Pictures], Pictures]
    classes: tuple[str, ...] | None = None
    validation: dict[str, float] = field(default_factory=dict)


def from_pipeline(model: str, steps: int) -> Source:
    """What LensPipeline loads: "mini", a folder in the released layout, ..."""
    from lens import LensPipeline, checkpoint
    from lens.vae import to_uint8

    root = checkpoint.resolve(model)
    about = checkpoint.read_index(root).get("lens", {})
    pipe = LensPipeline.from_pretrained(model)

    def draw(prompts: Sequence[str], seeds: Sequence[int], guidance: float) -> Pictures:
        out = pipe(list(prompts), seed=list(seeds), num_inference_steps=steps, guidance_scale=guidance)
        return [np.asarray(image) for image in out.images]

    def reconstruct(pictures: Pictures) -> Pictures:
        out = []
        for picture in pictures:
            x = torch.from_numpy(picture).float().div_(127.5).sub_(1)
            grid = (picture.shape[0] // 16, picture.shape[1] // 16)
            out.append(to_uint8(pipe.codec.decode(pipe.codec.encode(x), grid)))
        return out

    classes = tuple(about["classes"]) if "classes" in about else None
    return Source(model, pipe.defaults.base_resolution, draw, reconstruct, classes, about.get("validation", {}))


def from_state(state: Path, recipe: str, vae: Path, steps: int, mu: float | None) -> Source:
    """The averaged weights of a pretrain state and the decoder of a VAE stage folder; mu None: the recipe's time shift."""
    from .. import configs, encoder, generator, pretrain

    config = configs.load(recipe, "pretrain")
    mu = config.SHEET["mu"] if mu is None else mu
    model = pretrain.load_trained(config, recipe, state).eval()
    model.transformer.batch_invariant = False
    painter = generator.Painter(vae, recipe)
    tokenizer = encoder.tokenizer_of(configs.load(recipe, "encoder").TOKENIZER)

    def draw(prompts: Sequence[str], seeds: Sequence[int], guidance: float) -> Pictures:
        tokens = [tokenizer.encode(p)[0] for p in prompts]
        latents = generator.sample(model, tokens, tokenizer.prefix, seeds, steps, guidance, mu)
        return list(painter(latents, model.grid))

    def reconstruct(pictures: Pictures) -> Pictures:
        tokens = painter.latents.encode(np.stack(pictures))
        grid = (pictures[0].shape[0] // 16, pictures[0].shape[1] // 16)
        return [picture for part in tokens.split(16) for picture in painter(part, grid)]

    return Source(str(state), config.SIDE, draw, reconstruct, configs.world(recipe).classes)
