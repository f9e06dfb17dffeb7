"""A checkpoint drawn with by ours and by the same pipeline made of others' parts, stage by stage, in turns in one process.

The parts: transformers' GPT-OSS, its experts expanded to bfloat16 as it expands them on a CPU, the whole chat read with every
prompt; the reference's transformer in plain PyTorch (comparators.Reference), which no library has; diffusers' decoder. Both
get the prompts, the schedule and the noise of the other, from the second stage on also what the other's stage made.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens import LensPipeline, sampler
from lens.config import VARIANTS, Defaults
from lens.engine.residency import module_bytes
from lens.formats.gpt_oss import load_gpt_oss
from lens.formats.released import load_scheduler, load_transformer
from lens.formats.text_encoder import load_text_encoder, text_encoder_tensors, vocab_size
from lens.formats.vae import load_vae
from lens.model import LensTransformer2DModel
from lens.text_encoder import DEFAULT_CHAT_DATE, ChatTokenizer, TextEncoder
from lens.vae import PixelCodec, unpatchify

from ..case import OURS, LeftOut, distance
from .comparators import Reference, reference_step

PARTS = "parts"
STAGES = ("prompt", "denoise", "decode")
COLOURS = ("red", "green", "blue", "yellow", "white", "black", "brown", "grey")
PROMPT = "a {} apple beside two keys on a wooden table, a lighthouse at dusk behind them"


@dataclass
class Turns:
    """Seconds of every round, of the wall's clock and of the processor's, by (stage, subject), and how far results differ."""

    wall: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    processor: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    apart: dict[str, float] = field(default_factory=dict)
    encoder_bytes: dict[str, int] = field(default_factory=dict)

    def timed(self, stage: str, subject: str, call: Callable[[Any], Any], given: Any, counts: bool) -> Any:
        used, began = time.process_time(), time.perf_counter()
        made = call(given)
        if counts:
            self.wall.setdefault((stage, subject), []).append(time.perf_counter() - began)
            self.processor.setdefault((stage, subject), []).append(time.process_time() - used)
        return made

    def best(self, subject: str, stages: tuple[str, ...] = STAGES) -> float:
        """The processor's seconds of these stages, each in its best round."""
        return sum(min(self.processor[stage, subject]) for stage in stages)


def expanded_bytes(folder: Path, depth: int) -> int:
    """What transformers' model of these layers takes, experts in bfloat16: two bytes a weight."""
    total = 0
    for name, stored in text_encoder_tensors(folder, depth).items():
        weights = math.prod(stored.shape)
        total += 4 * weights if name.endswith("_blocks") else 0 if name.endswith("_scales") else 2 * weights
        stored.shard.close()
    return total


def token_distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest over layers of the median token's relative L2 distance, of features [1, T, E]: where rounding changes one
    token's experts, of two that are about equally likely, its own says nothing."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, theirs, strict=True)]
    return max(float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median()) for a, b in pairs)


def available_bytes() -> int:
    """Memory that this machine could give now."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) * 1024


@torch.no_grad()
def compare(folder: Path, variant: str, size: tuple[int, int], rounds: int) -> Turns:
    """size: width, height in pixels. LeftOut where the parts do not fit this machine's memory."""
    width, height = size
    grid, dtype, (steps, guidance) = (height // 16, width // 16), torch.bfloat16, VARIANTS[variant]
    transformer = load_transformer(folder / "transformer", dtype, "cpu")
    layers = transformer.config.selected_layer_index
    depth, text = max(layers) + 1, folder / "text_encoder"
    needed, free = expanded_bytes(text, depth), available_bytes()
    if needed > free:
        raise LeftOut(
            f"transformers' text encoder takes {needed / 1e9:.1f} GB with its experts in bfloat16, {free / 1e9:.1f} GB are free"
        )
    chat = ChatTokenizer(folder / "tokenizer", vocab_size(text))
    own, other = load_gpt_oss(text, dtype, "cpu", depth), load_text_encoder(text, dtype, "cpu", depth)
    codec, scheduler = PixelCodec(load_vae(folder / "vae", dtype, "cpu")), load_scheduler(folder / "scheduler")
    pipe: Any = LensPipeline(
        transformer, TextEncoder(chat, own, layers), codec, scheduler, Defaults(variant, steps, guidance)
    )
    ours, theirs = (
        _ours(pipe, size),
        _parts(transformer, TextEncoder(chat, other, layers), codec, scheduler, pipe, grid),
    )
    turns = Turns(encoder_bytes={OURS: module_bytes(own), PARTS: module_bytes(other)})
    for n in range(rounds + 1):  # the first does not count
        given: Any = PROMPT.format(COLOURS[n % len(COLOURS)])
        for stage, mine, of_parts in zip(STAGES, ours, theirs, strict=True):
            both = [(OURS, mine), (PARTS, of_parts)]
            made = {name: turns.timed(stage, name, call, given, n > 0) for name, call in both[:: (-1) ** n]}
            apart = (token_distance if stage == "prompt" else distance)(made[OURS], made[PARTS])
            turns.apart[stage] = max(apart, turns.apart.get(stage, 0.0))
            given = made[OURS]
    return turns


def _ours(pipe: Any, size: tuple[int, int]) -> tuple[Callable[[Any], Any], ...]:
    """Prompt -> F tensors [1, T, E] -> latents [1, I, C] -> pixels [H, W, 3]."""
    width, height = size

    def prompt(text: str) -> list[Tensor]:
        return list(pipe.encode_text([text])[0])

    def denoise(features: list[Tensor]) -> Tensor:
        return pipe(prompt_embeds=features, height=height, width=width, seed=0, output_type="latent").images

    def decode(latents: Tensor) -> Tensor:
        return pipe.codec.decode(latents[0], (height // 16, width // 16))

    return prompt, denoise, decode


def _parts(
    transformer: LensTransformer2DModel,
    encoder: TextEncoder,
    codec: PixelCodec,
    scheduler: Any,
    pipe: Any,
    grid: tuple[int, int],
) -> tuple[Callable[[Any], Any], ...]:
    reference, defaults = Reference(transformer), pipe.defaults
    tokens, channels = grid[0] * grid[1], transformer.config.in_channels

    def prompt(text: str) -> list[Tensor]:
        (features,) = encoder.encode([text], 512, "reference", DEFAULT_CHAT_DATE)
        return [f[None] for f in features]

    def denoise(features: list[Tensor]) -> Tensor:
        x = sampler.start_noise([(tokens, channels)], 0, None, None)[0][0][None]
        sigma = scheduler.sigmas(tokens, defaults.num_inference_steps)
        times = sampler.conditioning_time(sigma[:-1], transformer.dtype)
        mask = torch.ones(features[0].shape[:2], dtype=torch.bool)
        if defaults.guidance_scale != 1.0:
            features = [torch.cat([f, torch.zeros_like(f)]) for f in features]
            mask = torch.cat([mask, torch.zeros_like(mask)])
        for step, at in enumerate(times):
            delta = sigma[step + 1] - sigma[step]
            x = reference_step(reference, x, features, mask, at, delta, defaults.guidance_scale, grid)
        return x

    def decode(latents: Tensor) -> Tensor:
        rows = latents[0].to(codec.vae.dtype)
        std = torch.sqrt(codec.vae.bn.running_var + codec.vae.config.batch_norm_eps)
        maps = unpatchify((rows * std + codec.vae.bn.running_mean)[None], grid)
        return codec.vae.decode(maps, return_dict=False)[0][0].float().clamp(-1, 1).permute(1, 2, 0)

    return prompt, denoise, decode
