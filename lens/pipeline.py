"""The only file that knows all the others: a prompt becomes tokens, latents, a picture.

The loop below runs on packed rows. Each picture keeps its own schedule (mu depends on its size), its own seed and its
own text; nothing depends on its neighbours.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint, ops, resolution, sampler, vae
from .model import LensTransformer2DModel
from .modulation import Modulation, table
from .packing import Packing, plan
from .sampler import Scheduler
from .text_encoder import DEFAULT_CHAT_DATE, ChatTokenizer, TextEncoder

VARIANTS = {"lens": (20, 5.0), "turbo": (4, 1.0), "base": (50, 5.0)}  # default steps and guidance
_CALLBACK_TENSORS = ("latents", "prompt_embeds", "negative_prompt_embeds", "noise_pred")


@dataclass(frozen=True)
class LensPipelineOutput:
    """``images``: see ``output_type``; ``seeds``: one per picture, None where noise came from a generator or from latents."""

    images: Any
    seeds: list[int | None]


@dataclass(frozen=True)
class Defaults:
    """What a call uses where the caller says nothing; from the checkpoint's metadata or the variant."""

    variant: str
    num_inference_steps: int
    guidance_scale: float
    base_resolution: int = 1024
    max_resolution: int = 1440
    time_dtype: str = "reference"


@dataclass
class _Text:
    """Text of B samples, packed by sample: ``rows[b]`` [T_b, D] projected, ``index[b]`` positions of its valid tokens."""

    embeds: list[list[Tensor]]  # B lists of F tensors [T_b, E]
    index: list[Tensor]
    rows: list[Tensor]


class LensPipeline:
    """``LensPipeline.from_pretrained("mini")("a red apple").images[0]``"""

    def __init__(
        self,
        transformer: LensTransformer2DModel,
        text_encoder: TextEncoder,
        codec: vae.PixelCodec,
        scheduler: Scheduler,
        defaults: Defaults,
        fingerprint: str | None = None,
    ):
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.codec = codec
        self.scheduler = scheduler
        self.defaults = defaults
        self.fingerprint = fingerprint
        self._tables: dict[tuple[Any, ...], Modulation] = {}
        self._lock = threading.Lock()

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] = "mini",
        variant: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> LensPipeline:
        """Load a checkpoint: "mini", "mini-base", "mini-rl", "mini-turbo", a folder in the released layout, or a hub id.

        variant: "lens" | "turbo" | "base" sets default steps and guidance; None reads our metadata, else the id's or
        folder's name. device, dtype: None means cuda and bfloat16 where usable, else cpu and float32.
        """
        root = checkpoint.resolve(source)
        index = checkpoint.read_index(root)
        defaults = _defaults(os.fspath(source), variant, index.get("lens") or {}, root)
        device, dtype = _placement(device, dtype)
        scheduler_path = root / "scheduler" / "scheduler_config.json"
        transformer = checkpoint.load_transformer(root / "transformer", dtype, device)
        layers = transformer.config.selected_layer_index
        encoder = TextEncoder(
            ChatTokenizer(root / "tokenizer"),
            checkpoint.load_text_encoder(root / "text_encoder", dtype, device, max(layers) + 1),
            layers,
        )
        if encoder.width != transformer.config.enc_hidden_dim:
            raise checkpoint.CheckpointError(
                f"{root / 'transformer' / 'config.json'}: enc_hidden_dim must be the text encoder's width {encoder.width}, "
                f"got {transformer.config.enc_hidden_dim}"
            )
        model_vae = checkpoint.load_vae(root / "vae", dtype, device)
        if model_vae.config.latent_channels != transformer.config.out_channels:
            raise checkpoint.CheckpointError(
                f"{root / 'vae' / 'config.json'}: latent_channels must be the transformer's out_channels "
                f"{transformer.config.out_channels}, got {model_vae.config.latent_channels}"
            )
        try:
            scheduler = Scheduler.from_dict(checkpoint.read_json(scheduler_path), str(scheduler_path))
        except checkpoint.CheckpointError:
            raise
        except ValueError as error:
            raise checkpoint.CheckpointError(str(error)) from None
        return cls(transformer, encoder, vae.PixelCodec(model_vae), scheduler, defaults, checkpoint.fingerprint(root))

    # ------------------------------------------------------------------------------------------------ text

    def tokenize(
        self,
        prompts: str | Sequence[str],
        max_sequence_length: int = 512,
        truncation: str = "reference",
        chat_date: str | None = DEFAULT_CHAT_DATE,
    ) -> tuple[Tensor, Tensor]:
        """Whole rendered sequences: ids int64 [B, S], right padded, and mask bool [B, S]."""
        return self.text_encoder.tokenize(_strings("prompt", prompts), max_sequence_length, truncation, chat_date)

    def encode_text(
        self,
        prompts: str | Sequence[str],
        max_sequence_length: int = 512,
        truncation: str = "reference",
        chat_date: str | None = DEFAULT_CHAT_DATE,
    ) -> tuple[list[Tensor], Tensor]:
        """F tensors [B, T, E] (first 97 positions dropped, zero padded on the right) and mask bool [B, T]."""
        samples = self._encode(_strings("prompt", prompts), max_sequence_length, truncation, chat_date)
        return _pad(samples)

    def _encode(
        self, prompts: Sequence[str], max_length: int, truncation: str, chat_date: str | None
    ) -> list[list[Tensor]]:
        """Per prompt F tensors [T, E]; equal prompts are encoded once."""
        cache: dict[str, list[Tensor]] = {}
        for prompt in prompts:
            if prompt not in cache:
                ids = self.text_encoder.tokenizer.encode(prompt, max_length, truncation, chat_date)
                cache[prompt] = self.text_encoder.features(ids)
        return [cache[prompt] for prompt in prompts]

    def _text(self, embeds: list[list[Tensor]], index: list[Tensor]) -> _Text:
        """Project each distinct prompt's features once."""
        rows: dict[int, Tensor] = {}
        for sample in embeds:
            if id(sample) not in rows:
                features = [f.to(self.device, self.dtype) for f in sample]
                rows[id(sample)] = self.transformer.project_text(features, [len(features[0])])
        return _Text(embeds, index, [rows[id(sample)] for sample in embeds])

    def _no_text(self, batch: int) -> _Text:
        """A blank negative carries no text at all: its image tokens would not read it."""
        config = self.transformer.config
        empty = [torch.zeros(0, config.enc_hidden_dim, device=self.device, dtype=self.dtype)] * len(
            config.selected_layer_index
        )
        rows = torch.zeros(0, config.inner_dim, device=self.device, dtype=self.dtype)
        return _Text([empty] * batch, [torch.arange(0)] * batch, [rows] * batch)

    def _given_text(self, name: str, embeds: Sequence[Tensor], mask: Tensor | None, prompts: int, repeat: int) -> _Text:
        """The caller's own features (F tensors [B, T, E], mask bool [B, T]) -> text of B * repeat samples."""
        config = self.transformer.config
        if isinstance(embeds, Tensor) or len(embeds) != len(config.selected_layer_index):
            raise ValueError(f"{name} must be a list of F = {len(config.selected_layer_index)} tensors [B, T, E]")
        for tensor in embeds:
            expected = [prompts, embeds[0].shape[1] if embeds[0].dim() == 3 else "T", config.enc_hidden_dim]
            if list(tensor.shape) != expected:
                raise ValueError(f"{name} must be tensors of shape [B, T, E] = {expected}, got {list(tensor.shape)}")
            _finite(name, tensor)
        if mask is None:
            mask = torch.ones(embeds[0].shape[:2], dtype=torch.bool)
        if tuple(mask.shape) != tuple(embeds[0].shape[:2]):
            raise ValueError(f"{name} mask must be [B, T] = {list(embeds[0].shape[:2])}, got {list(mask.shape)}")
        valid = [row.bool().cpu().nonzero().squeeze(1) for row in mask]
        samples = [[f[b][valid[b].to(f.device)] for f in embeds] for b in range(prompts)]
        return self._text(_repeat(samples, repeat), _repeat(valid, repeat))

    # ------------------------------------------------------------------------------------------------ call

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] = "",
        height: int | None = None,
        width: int | None = None,
        base_resolution: int | None = None,
        aspect_ratio: str | None = None,
        sizes: Sequence[tuple[int, int]] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        latents: Tensor | Sequence[Tensor] | None = None,
        prompt_embeds: Sequence[Tensor] | None = None,
        prompt_mask: Tensor | None = None,
        negative_prompt_embeds: Sequence[Tensor] | None = None,
        negative_prompt_mask: Tensor | None = None,
        max_sequence_length: int = 512,
        truncation: str = "reference",
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[LensPipeline, int, Tensor, dict[str, Any]], dict[str, Any] | None]
        | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        chat_date: str | None = DEFAULT_CHAT_DATE,
    ) -> LensPipelineOutput | tuple[Any]:
        """Draw pictures. Order is prompt-major: [p0, p0, p1, p1] for two images per prompt; B pictures in all.

        Sizes are pixels, multiples of 16: ``sizes`` one (height, width) per prompt, or height and width, or
        base_resolution and "W:H" aspect_ratio; default the model's base, square. seed: int (picture k gets seed + k) or B
        ints; generator: one per picture, or one for a single draw of [B, I, C]; latents: [B, I, C], or a list of [I, C].
        output_type: "pil", "np" (float32 [B, H, W, 3] in [0, 1]) or "latent" (float32 [B, I, C]); mixed sizes give lists.
        callback_on_step_end(pipe, i, t, tensors) may return replacements for the tensors it named.
        """
        steps = self.defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
        guidance = float(self.defaults.guidance_scale if guidance_scale is None else guidance_scale)
        _check_call(
            num_images_per_prompt,
            guidance,
            output_type,
            callback_on_step_end_tensor_inputs,
            max_sequence_length,
        )
        encode_args = (max_sequence_length, truncation, chat_date)
        count = _prompt_count(prompt, prompt_embeds)
        per_prompt = num_images_per_prompt
        defaults = self.defaults
        size_args = (height, width, base_resolution, aspect_ratio, sizes)
        grids = resolution.request_grids(count, *size_args, defaults.base_resolution, defaults.max_resolution)
        grids = _repeat(grids, per_prompt)
        shapes = [(h * w, self.transformer.config.in_channels) for h, w in grids]
        noise, seeds = sampler.start_noise(shapes, seed, generator, latents)

        if prompt_embeds is not None:
            text = self._given_text("prompt_embeds", prompt_embeds, prompt_mask, count, per_prompt)
        else:
            samples = self._encode(_strings("prompt", prompt), *encode_args)
            text = self._text(
                _repeat(samples, per_prompt), [torch.arange(len(s[0])) for s in _repeat(samples, per_prompt)]
            )
        negative = None
        if guidance != 1.0:
            negative = self._negative(
                negative_prompt, negative_prompt_embeds, negative_prompt_mask, count, per_prompt, encode_args
            )

        final = self._denoise(
            noise,
            grids,
            text,
            negative,
            steps,
            guidance,
            seeds,
            callback_on_step_end,
            tuple(callback_on_step_end_tensor_inputs),
        )
        images = self._finish(final, grids, output_type)
        return LensPipelineOutput(images, seeds) if return_dict else (images,)

    def _negative(
        self,
        prompt: str | Sequence[str] | None,
        embeds: Sequence[Tensor] | None,
        mask: Tensor | None,
        count: int,
        per_prompt: int,
        encode_args: tuple[int, str, str | None],
    ) -> _Text:
        if embeds is not None:
            return self._given_text("negative_prompt_embeds", embeds, mask, count, per_prompt)
        prompts = _strings("negative_prompt", prompt or "")
        if len(prompts) == 1:
            prompts = prompts * count
        if len(prompts) != count:
            raise ValueError(f"negative_prompt must be one string or one per prompt ({count}), got {len(prompts)}")
        written = [p for p in prompts if p.strip()]
        encoded = dict(zip(written, self._encode(written, *encode_args)))
        blank = self._no_text(1).embeds[0]
        samples = _repeat([encoded[p] if p.strip() else blank for p in prompts], per_prompt)
        return self._text(samples, [torch.arange(len(s[0])) for s in samples])

    # ------------------------------------------------------------------------------------------------ denoise

    def _schedule_table(self, tokens: Sequence[int], steps: int) -> tuple[Tensor, Modulation]:
        """Schedules of the distinct token counts: sigmas float32 [K, steps + 1] and one modulation table [K * steps]."""
        schedules = torch.stack([self.scheduler.sigmas(n, steps) for n in tokens])
        parts = []
        for sigmas in schedules:
            key = (
                self.scheduler,
                tuple(sigmas.tolist()),
                self.dtype,
                str(self.device),
                self.defaults.time_dtype,
            )
            with self._lock:
                made = self._tables.get(key)
            if made is None:
                made = table(
                    self.transformer,
                    sampler.conditioning_time(sigmas[:-1], self.dtype, self.defaults.time_dtype),
                )
                with self._lock:
                    while len(self._tables) >= 8:
                        self._tables.pop(next(iter(self._tables)))
                    self._tables[key] = made
            parts.append(made)
        if len(parts) == 1:
            return schedules, parts[0]
        return schedules, Modulation(torch.cat([p.blocks for p in parts]), torch.cat([p.final for p in parts]))

    def prepare(self, image_tokens: int, num_inference_steps: int) -> None:
        """Make and keep the modulation table of one schedule, so that ``lens.modulation.evict`` may drop its weights."""
        self._schedule_table([image_tokens], num_inference_steps)

    def _denoise(
        self,
        noise: list[Tensor],
        grids: list[tuple[int, int]],
        text: _Text,
        negative: _Text | None,
        steps: int,
        guidance: float,
        seeds: list[int | None],
        callback: Callable[..., dict[str, Any] | None] | None,
        wanted: tuple[str, ...],
    ) -> list[Tensor]:
        batch, device = len(grids), self.device
        tokens = sorted({h * w for h, w in grids})
        schedules, modulation_table = self._schedule_table(tokens, steps)
        schedule = torch.tensor([tokens.index(h * w) for h, w in grids])
        sigma = schedules[schedule]  # float32 [B, steps + 1], on the host
        lengths = [h * w for h, w in grids]
        pair = 1 if negative is None else 2
        packing, text_rows = self._pack(grids, text, negative)
        offsets = packing.image_offsets[: batch + 1]
        x = torch.cat([n.to(device) for n in noise])
        for i in range(steps):
            rows = (schedule * steps + i).repeat(pair).to(device)
            inputs = x.to(self.dtype)
            velocity = self.transformer.denoise(
                inputs if negative is None else torch.cat([inputs, inputs]),
                text_rows,
                modulation_table.rows(rows),
                packing,
            )
            conditional, unconditional = velocity[: len(x)], None if negative is None else velocity[len(x) :]
            if self.scheduler.stochastic_sampling:
                x = self._stochastic(x, conditional, unconditional, guidance, offsets, sigma, i, lengths, seeds)
            else:
                delta = (sigma[:, i + 1] - sigma[:, i]).to(device)
                x = ops.guidance_step(x, conditional, unconditional, delta, guidance, offsets)
            if callback is not None:
                x, changed = self._call_back(
                    callback,
                    wanted,
                    i,
                    1000 * sigma[:, i],
                    x,
                    conditional,
                    unconditional,
                    guidance,
                    offsets,
                    lengths,
                    text,
                    negative,
                )
                if changed is not None:
                    text, negative = changed
                    packing, text_rows = self._pack(grids, text, negative)
        return list(x.split(lengths))

    def _pack(self, grids: list[tuple[int, int]], text: _Text, negative: _Text | None) -> tuple[Packing, Tensor]:
        """Packed batch of all conditional samples, then all unconditional ones."""
        index = text.index + (negative.index if negative else [])
        rows = text.rows + (negative.rows if negative else [])
        packing = plan(grids * (2 if negative else 1), index, self.transformer.config.axes_dims_rope, self.device)
        return packing, torch.cat(rows)

    @staticmethod
    def _guided(x: Tensor, c: Tensor, u: Tensor | None, guidance: float, offsets: Tensor) -> Tensor:
        """The guided velocity [R, C] by itself: one Euler step of length 1 from zero."""
        one = torch.ones(len(offsets) - 1, device=x.device)
        return ops.guidance_step(torch.zeros_like(x), c, u, one, guidance, offsets)

    def _stochastic(
        self,
        x: Tensor,
        c: Tensor,
        u: Tensor | None,
        guidance: float,
        offsets: Tensor,
        sigma: Tensor,
        step: int,
        lengths: list[int],
        seeds: list[int | None],
    ) -> Tensor:
        """x' = (1 - s_next)(x - s v) + s_next noise; the noise is keyed by (seed, step)."""
        velocity = self._guided(x, c, u, guidance, offsets)
        noise = [
            sampler.step_noise(seeds[k] if seeds[k] is not None else k, step, n, x.shape[1])
            for k, n in enumerate(lengths)
        ]
        repeats = torch.tensor(lengths)
        s, s_next = (sigma[:, j].repeat_interleave(repeats)[:, None].to(x.device) for j in (step, step + 1))
        return sampler.stochastic_step(x, velocity, s, s_next, torch.cat(noise).to(x.device))

    def _call_back(
        self,
        callback: Callable[..., dict[str, Any] | None],
        wanted: tuple[str, ...],
        step: int,
        t: Tensor,
        x: Tensor,
        c: Tensor,
        u: Tensor | None,
        guidance: float,
        offsets: Tensor,
        lengths: list[int],
        text: _Text,
        negative: _Text | None,
    ) -> tuple[Tensor, tuple[_Text, _Text | None] | None]:
        """Show the step to the caller and take back what it replaced. t is 1000 sigma: a scalar, or [B] for mixed sizes."""
        same = len(set(lengths)) == 1

        def shaped(rows: Tensor) -> Any:
            return torch.stack(rows.split(lengths)) if same else list(rows.split(lengths))

        tensors: dict[str, Any] = {}
        for name in wanted:
            if name == "latents":
                tensors[name] = shaped(x)
            elif name == "noise_pred":
                tensors[name] = shaped(self._guided(x, c, u, guidance, offsets))
            elif name == "prompt_embeds":
                tensors[name] = _pad(text.embeds)[0]
            else:
                tensors[name] = None if negative is None else _pad(negative.embeds)[0]
        given = callback(self, step, t[0] if same else t, dict(tensors)) or {}
        unknown = set(given) - set(wanted)
        if unknown:
            raise ValueError(f"callback_on_step_end returned {sorted(unknown)}, expected only {list(wanted)}")
        if given.get("latents") is not None and given["latents"] is not tensors.get("latents"):
            parts = [p.to(x.device, torch.float32) for p in given["latents"]]
            if [tuple(p.shape) for p in parts] != [(n, x.shape[1]) for n in lengths]:
                raise ValueError("callback_on_step_end returned latents of another shape")
            x = torch.cat(parts)
        new_text = self._replaced(given, tensors, "prompt_embeds", text)
        new_negative = self._replaced(given, tensors, "negative_prompt_embeds", negative)
        changed = (new_text, new_negative) if new_text is not text or new_negative is not negative else None
        return x, changed  # type: ignore[return-value]

    def _replaced(self, given: dict[str, Any], shown: dict[str, Any], name: str, text: _Text | None) -> _Text | None:
        value = given.get(name)
        if value is None or text is None or value is shown.get(name):
            return text
        samples = [[f[b][: len(text.index[b])] for f in value] for b in range(len(text.index))]
        return self._text(samples, text.index)

    # ------------------------------------------------------------------------------------------------ pixels

    def _finish(self, rows: list[Tensor], grids: list[tuple[int, int]], output_type: str) -> Any:
        for k, r in enumerate(rows):
            if not torch.isfinite(r).all():
                raise FloatingPointError(f"picture {k}: the final latents hold NaN or infinity")
        same = len(set(grids)) == 1
        if output_type == "latent":
            return torch.stack(rows) if same else rows
        pictures = [self.codec.decode(r, grid) for r, grid in zip(rows, grids)]
        if output_type == "np":
            import numpy as np

            arrays = [vae.to_numpy(p) for p in pictures]
            return np.stack(arrays) if same else arrays
        from PIL import Image

        return [Image.fromarray(vae.to_uint8(p)) for p in pictures]


# ---------------------------------------------------------------------------------------------------- helpers


def _defaults(source: str, variant: str | None, metadata: dict[str, Any], root: Path) -> Defaults:
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"variant must be one of {sorted(VARIANTS)} or None, got {variant!r}")
    chosen = variant or metadata.get("variant")
    if chosen is None:
        name = Path(source).name.lower()
        chosen = next((v for v in ("turbo", "base") if v in name), "lens" if "lens" in name else None)
    if chosen is None:
        chosen = "lens"
        warnings.warn(
            f"nothing tells which Lens {root} is; assuming variant='lens' (20 steps, guidance 5)",
            stacklevel=3,
        )
    if chosen not in VARIANTS:
        raise checkpoint.CheckpointError(
            f"{root / 'model_index.json'}: lens.variant must be one of {sorted(VARIANTS)}, got {chosen!r}"
        )
    steps, guidance = VARIANTS[chosen]
    result = Defaults(chosen, steps, guidance)
    own = ("num_inference_steps", "guidance_scale", "base_resolution", "max_resolution", "time_dtype")
    values = {k: metadata[k] for k in own if k in metadata}
    if variant is not None and variant != metadata.get("variant"):
        values.pop("num_inference_steps", None)
        values.pop("guidance_scale", None)
    return replace(result, **values)


def _placement(device: str | torch.device | None, dtype: torch.dtype | None) -> tuple[torch.device, torch.dtype]:
    chosen = (
        torch.device(device) if device is not None else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", torch.cuda.current_device())
    if dtype is None:
        dtype = torch.bfloat16 if chosen.type == "cuda" else torch.float32
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"dtype must be torch.float32 or torch.bfloat16 (float16 overflows in this model), got {dtype}"
        )
    return chosen, dtype


def _strings(name: str, value: str | Sequence[str] | None) -> list[str]:
    values = [value] if isinstance(value, str) else list(value) if value is not None else []
    if not values or not all(isinstance(v, str) for v in values):
        raise ValueError(f"{name} must be a string or a non-empty list of strings, got {value!r}")
    return values


def _prompt_count(prompt: str | Sequence[str] | None, embeds: Sequence[Tensor] | None) -> int:
    if (prompt is None) == (embeds is None):
        raise ValueError("give exactly one of prompt and prompt_embeds")
    return len(_strings("prompt", prompt)) if embeds is None else int(embeds[0].shape[0])


def _check_call(per_prompt: int, guidance: float, output_type: str, wanted: Sequence[str], max_length: int) -> None:
    if not isinstance(per_prompt, int) or isinstance(per_prompt, bool) or per_prompt < 1:
        raise ValueError(f"num_images_per_prompt must be a positive integer, got {per_prompt!r}")
    if not (guidance >= 0 and guidance < float("inf")):
        raise ValueError(f"guidance_scale must be a finite number >= 0, got {guidance!r}")
    if output_type not in ("pil", "np", "latent"):
        raise ValueError(f"output_type must be 'pil', 'np' or 'latent', got {output_type!r}")
    if set(wanted) - set(_CALLBACK_TENSORS):
        raise ValueError(f"callback_on_step_end_tensor_inputs must be among {_CALLBACK_TENSORS}, got {tuple(wanted)}")
    if not isinstance(max_length, int) or max_length < 1:
        raise ValueError(f"max_sequence_length must be a positive integer, got {max_length!r}")


def _finite(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{name} holds NaN or infinity")


def _repeat(items: Sequence[Any], times: int) -> list[Any]:
    return [item for item in items for _ in range(times)]


def _pad(samples: list[list[Tensor]]) -> tuple[list[Tensor], Tensor]:
    """B lists of F tensors [T_b, E] -> F tensors [B, T, E] and mask bool [B, T]."""
    lengths = torch.tensor([len(s[0]) for s in samples])
    features = [
        torch.nn.utils.rnn.pad_sequence([s[f] for s in samples], batch_first=True) for f in range(len(samples[0]))
    ]
    return features, torch.arange(int(lengths.max()))[None] < lengths[:, None]
