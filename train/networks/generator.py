"""The networks of Mini side by side, as training sees them: text encoder, MMDiT, sampling, pictures, sheets."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lens import sampler
from lens.config import LensConfig
from lens.formats.files import read_json
from lens.formats.released import transformer_config
from lens.model import LensTransformer2DModel
from lens.ops import reference
from lens.packing import Packing, offsets_of, plan

from .. import configs
from ..data.contact_sheet import contact_sheet
from ..data.small_world.batches import Step
from ..loop.checkpoints import load_state
from ..loop.keys import keyed
from ..loop.lora import attach_lora, lora_of_training, merge_lora, save_lora
from ..objectives import flow_matching
from .codec import Half, Latents, autoencoder
from .text_path import CaptionTokenizer, build, encode_batch, residuals

Past = list[tuple[Tensor, Tensor]]  # keys and values of every encoder layer


@functools.lru_cache(maxsize=1024)
def _plan_of_one(grid: tuple[int, int], text_length: int, axes: tuple[int, ...]) -> Packing:
    return plan([grid], [text_length], axes)


@functools.lru_cache(maxsize=8)
def _tables(
    grid: tuple[int, int], text_length: int, axes: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    one = _plan_of_one(grid, text_length, axes)
    return one.cos.to(device), one.sin.to(device)


def packing_on(
    grid: tuple[int, int], text_lengths: Sequence[int], axes: tuple[int, ...], device: torch.device
) -> Packing:
    """The plan of a batch of one grid, made on the device: rotary rows are gathered from one sample's table."""
    image, count, rows = grid[0] * grid[1], len(text_lengths), sum(text_lengths)
    cos, sin = _tables(grid, -(-max(text_lengths, default=0) // 128) * 128, axes, device)
    image_offsets = torch.arange(count + 1, device=device, dtype=torch.int32) * image
    text_offsets = offsets_of(text_lengths).to(device, non_blocking=True)
    starts, total = image_offsets + text_offsets, count * image + rows
    inside = torch.arange(total, device=device) - torch.repeat_interleave(starts[:-1], starts.diff(), output_size=total)
    return Packing(
        grids=(grid,) * count,
        image_lengths=[image] * count,
        text_lengths=list(text_lengths),
        image_offsets=image_offsets,
        text_offsets=text_offsets,
        cos=cos[inside],
        sin=sin[inside],
    )


@functools.lru_cache(maxsize=256)
def packing_of(grid: tuple[int, int], text_lengths: tuple[int, ...], axes: tuple[int, ...]) -> Packing:
    """The same on the CPU, joined from the plans of its samples, which are kept."""
    parts = [_plan_of_one(grid, length, axes) for length in text_lengths]
    image_lengths = [grid[0] * grid[1]] * len(parts)
    return Packing(
        grids=(grid,) * len(parts),
        image_lengths=image_lengths,
        text_lengths=list(text_lengths),
        image_offsets=offsets_of(image_lengths),
        text_offsets=offsets_of(text_lengths),
        cos=torch.cat([part.cos for part in parts]),
        sin=torch.cat([part.sin for part in parts]),
    )


ROW_OPS = ("rms_norm_modulate", "qk_norm_rope", "gated_residual", "gated_residual_norm_modulate", "swiglu")


@contextlib.contextmanager
def fused_rows(compiler: str = "inductor") -> Iterator[None]:
    """Inside the block the row ops that run in plain PyTorch (no compiled kernels for the device) are compiled by torch.

    One graph per op for all lengths. Sums over a sample's rows then use float atomics: faster, and not the same bits twice.
    """
    plain = {name: getattr(reference, name) for name in ROW_OPS}
    try:
        for name, function in plain.items():
            setattr(reference, name, torch.compile(function, dynamic=True, fullgraph=True, backend=compiler))
        yield
    finally:
        for name, function in plain.items():
            setattr(reference, name, function)


def shape_of(config: ModuleType, encoder_config: ModuleType) -> LensConfig:
    """The MMDiT of a recipe: its own MODEL, reading the layers and the width of the recipe's encoder."""
    width = encoder_config.MODEL["hidden_size"]
    return LensConfig(**config.MODEL, enc_hidden_dim=width, selected_layer_index=encoder_config.LAYERS)


def row_index(lengths: Sequence[int], longest: int) -> Tensor:
    """Rows of the valid tokens of a padded [B, longest, ...] tensor seen as [B * longest, ...]: int64 [R]."""
    count = torch.tensor(lengths)
    valid = torch.arange(longest)[None] < count[:, None]
    return valid.flatten().nonzero().squeeze(1)


class Mini(nn.Module):
    """The two networks trained together: MMDiT and text encoder."""

    def __init__(self, config: ModuleType, encoder_config: ModuleType, encoder: nn.Module):
        super().__init__()
        self.shape = shape_of(config, encoder_config)
        self.transformer = LensTransformer2DModel(self.shape)
        self.transformer.init_weights(keyed(config.SEED, "transformer init"))
        self.encoder: Any = encoder  # a GptOssForCausalLM: transformers has no types
        self.layers = encoder_config.LAYERS
        self.grid = (config.SIDE // 16, config.SIDE // 16)

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    def text(self, tokens: Sequence[Sequence[int]], prefix: Sequence[int]) -> list[Tensor]:
        """Per sample features [T, F, E] (T = 0 for an empty list of ids)."""
        present = [ids for ids in tokens if ids]
        found = iter(encode_batch(self.encoder, present, prefix, self.layers) if present else [])
        empty = torch.zeros(0, len(self.layers), self.shape.enc_hidden_dim, device=self.device)
        return [next(found) if ids else empty for ids in tokens]

    @torch.no_grad()
    def past(self, prefix: Sequence[int]) -> Past:
        """Keys and values of the constant prefix, without gradient: made once per set of weights and shared by all samples."""
        return residuals(self.encoder, torch.tensor([list(prefix)], device=self.device))[1]

    def packed_text(self, ids: Tensor, lengths: Sequence[int], past: Past) -> tuple[Tensor, Tensor]:
        """ids [n, T] padded on the right -> features [RT, F, E] of the valid tokens, and the last layer's [RT, E].

        One call for all: attention is causal, so what pads the right is read by nobody.
        """
        if not len(ids):
            empty = torch.zeros(0, len(self.layers), self.shape.enc_hidden_dim, device=self.device)
            return empty, empty[:, 0]
        states, _ = residuals(self.encoder, ids, past)
        rows = row_index(lengths[: len(ids)], ids.shape[1]).to(ids.device, non_blocking=True)
        stacked = torch.stack([*(states[layer] for layer in self.layers), states[-1]], 2).flatten(0, 1)
        packed = stacked if len(rows) == len(stacked) else stacked.index_select(0, rows)
        return packed[:, :-1], packed[:, -1]

    def next_token(self, last: Tensor, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Mean cross-entropy of each caption's following token, from the last layer's rows [RT, E]; 0 without captions."""
        if not len(ids):
            return last.sum()
        lengths = lengths[: len(ids)]
        flat = ids.flatten()[row_index(lengths, ids.shape[1]).to(ids.device)]
        ends = torch.cumsum(torch.tensor(lengths), 0) - 1
        follows = torch.ones(len(flat), dtype=torch.bool)
        follows[ends] = False
        rows = follows.nonzero().squeeze(1).to(ids.device)
        logits = self.encoder.lm_head(self.encoder.model.norm(last[rows]))
        return F.cross_entropy(logits.float(), flat[rows + 1])

    def flow(
        self, x: Tensor, t: Tensor, packed: Tensor, lengths: Sequence[int], grid: tuple[int, int] | None = None
    ) -> Tensor:
        """x [B, I, C], t [B], features of all samples [RT, F, E], text lengths of the samples -> velocity [B, I, C].

        `grid`: rows and columns of the I tokens; the recipe's square unless given.
        """
        grid = grid or self.grid
        model, axes = self.transformer, self.shape.axes_dims_rope
        dtype, device = model.dtype, x.device
        packing = (
            packing_of(grid, tuple(lengths), axes) if device.type == "cpu" else packing_on(grid, lengths, axes, device)
        )
        rows = model.project_text(list(packed.to(dtype).unbind(1)), packing.text_lengths)
        out = model.denoise(x.flatten(0, 1).to(dtype), rows, model.modulate(t), packing)
        return out.view_as(x)

    def velocity(self, x: Tensor, t: Tensor, features: Sequence[Tensor], grid: tuple[int, int] | None = None) -> Tensor:
        """The same with features per sample [T, F, E]."""
        return self.flow(x, t, torch.cat(list(features)), [len(f) for f in features], grid)

    def forward(self, step: Step, past: Past, language: bool) -> tuple[Tensor, Tensor]:
        """Flow-matching loss per sample [B]; next-token loss of the captions (0 unless asked for)."""
        packed, last = self.packed_text(step.ids, step.lengths, past)
        flow = flow_matching.loss(self.flow(step.x, step.t, packed, step.lengths, step.grid), step.target)
        return flow, self.next_token(last, step.ids, step.lengths) if language else flow.new_zeros(())

    def rounded(self, step: Step, past: Past, language: bool) -> tuple[Tensor, Tensor]:
        """`forward` with the MMDiT in bfloat16, on a rounded copy of float32 weights, whose gradients are float32 again.

        Its activations and residual streams are bfloat16 as at inference; the small text encoder stays float32.
        """
        weights = {f"transformer.{name}": p.bfloat16() for name, p in self.transformer.named_parameters()}
        return functional_call(self, weights, (step, past, language))


@torch.no_grad()
def sample(
    model: Mini,
    tokens: Sequence[list[int]],
    prefix: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    mu: float,
    grid: tuple[int, int] | None = None,
) -> Tensor:
    """Noise of the seeds -> normalised latents [B, I, C] of a grid (the recipe's), by Euler with guidance."""
    grid = grid or model.grid
    size = (grid[0] * grid[1], model.shape.in_channels)
    x = torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(model.device)
    sigma = torch.cat([flow_matching.shift(torch.linspace(1, 1 / steps, steps), mu), torch.zeros(1)]).to(model.device)
    features = model.text(tokens, prefix)
    nothing = [f[:0] for f in features]

    def velocities(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        return model.velocity(x, t, features, grid), None if guidance == 1 else model.velocity(x, t, nothing, grid)

    return sampler.walk(velocities, x, sigma, guidance)


class Painter:
    """Normalised latents -> pictures, through the best decoder trained so far (the linear codec before there is one)."""

    def __init__(self, folder: Path, recipe: str = "mini"):
        self.latents, self.decoder = Latents(folder), None  # a released folder's decode with its own decoder
        if (folder / "decoder.pt").is_file():
            vae = configs.beside(recipe, "vae")
            self.decoder = Half(autoencoder(vae.MODEL, vae.SEED), "decoder").eval()
            self.decoder.load_state_dict(load_state(folder / "decoder.pt", "vae decoder")["ema"]["average"])

    @torch.no_grad()
    def __call__(self, tokens: Tensor, grid: tuple[int, int]) -> np.ndarray:
        """[B, I, C] -> uint8 [B, H, W, 3]."""
        z = self.latents.denormalise(tokens.to(self.latents.device), *grid)
        x = self.decoder(z) if self.decoder is not None else self.latents.decode(z)
        return ((x.clamp(-1, 1) + 1) * 127.5).byte().permute(0, 2, 3, 1).cpu().numpy()


def shaped(config: ModuleType, state: dict[str, Any] | None, init: Path | None) -> ModuleType:
    """The recipe with the MMDiT that a state was trained with, or that of the folder a training starts from."""
    given = (state or {}).get("settings", {}).get("MODEL")
    if state is None and init is not None and init.is_dir():
        path = init / "transformer" / "config.json"
        values = vars(transformer_config(read_json(path), str(path)))
        given = {name: values[name] for name in config.MODEL}
    return configs.override(config, [f"MODEL={given!r}"]) if given else config


def load_trained(
    config: ModuleType, name: str, path: Path, stage: str = "pretrain", lora_to: Path | None = None
) -> Mini:
    """Averaged weights of a state file, adapters merged; `lora_to`: the folder to write these to, where there are any."""
    encoder_config, state = configs.beside(name, "encoder"), load_state(path, stage)
    model, lora = (
        Mini(shaped(config, state, None), encoder_config, build(encoder_config)),
        lora_of_training(state, None),
    )
    if lora:
        attach_lora(model.transformer, lora)
    model.load_state_dict(state["ema"]["average"], strict=True)
    if lora and lora_to:
        save_lora(model.transformer, lora, lora_to)
    merge_lora(model.transformer)
    return model


def draw_sheet(
    config: ModuleType,
    model: Mini,
    tokenizer: CaptionTokenizer,
    painter: Painter,
    path: Path,
    side: int | None = None,
) -> None:
    """The fixed prompts with seeds 0, 1, ... in a square of that side (the recipe's); no choice is made."""
    tokens, grid = [tokenizer.encode(p)[0] for p in config.PROMPTS], (side // 16, side // 16) if side else model.grid
    latents = sample(model, tokens, tokenizer.prefix, range(len(tokens)), **config.SHEET, grid=grid)
    contact_sheet(list(painter(latents, grid)), list(config.PROMPTS), path, columns=8)
