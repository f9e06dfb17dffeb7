"""Shapes of the model as frozen data. The defaults are the released Lens (arXiv 2605.21573, section 3)."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any

from . import notices
from .arguments import shortened


@dataclass(frozen=True)
class LensConfig:
    """The MMDiT's shape.

    ``selected_layer_index`` are the zero-based decoder layers of the text encoder whose raw residual stream is read.
    """

    num_layers: int = 48  # L, two-stream blocks
    num_attention_heads: int = 24  # N
    attention_head_dim: int = 64  # H
    in_channels: int = 128  # C, channels of one image token
    out_channels: int = 32  # latent channels; one token is patch_size^2 latent pixels
    patch_size: int = 2
    enc_hidden_dim: int = 2880  # E, width of the text encoder
    selected_layer_index: tuple[int, ...] = (5, 11, 17, 23)  # F layers
    axes_dims_rope: tuple[int, int, int] = (8, 28, 28)  # channels of a head for frame, row, column

    def __post_init__(self) -> None:
        for name in ("selected_layer_index", "axes_dims_rope"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple) or not all(type(v) is int for v in values):
                raise ValueError(f"LensConfig: {name} must be a list of integers, got {values!r}")
            object.__setattr__(self, name, tuple(values))
        for name in (
            "num_layers",
            "num_attention_heads",
            "attention_head_dim",
            "in_channels",
            "out_channels",
            "patch_size",
            "enc_hidden_dim",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"LensConfig: {name} must be a positive integer, got {value!r}")
        if len(self.axes_dims_rope) != 3 or sum(self.axes_dims_rope) != self.attention_head_dim:
            raise ValueError(
                "LensConfig: axes_dims_rope must be three even numbers that sum to "
                f"attention_head_dim = {self.attention_head_dim}, got {self.axes_dims_rope}"
            )
        if any(d % 2 or d < 0 for d in self.axes_dims_rope):
            raise ValueError(f"LensConfig: axes_dims_rope must be even and not negative, got {self.axes_dims_rope}")
        if self.patch_size**2 * self.out_channels != self.in_channels:
            raise ValueError(
                "LensConfig: in_channels must be patch_size^2 * out_channels = "
                f"{self.patch_size**2 * self.out_channels}, got {self.in_channels}"
            )
        layers = self.selected_layer_index
        if not layers or min(layers) < 0:
            raise ValueError(f"LensConfig: selected_layer_index must name at least one decoder layer, got {layers}")

    @property
    def inner_dim(self) -> int:
        """D, the width of both streams."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def mlp_hidden_dim(self) -> int:
        """Hidden width of the SwiGLU: int(D / 3 * 8) (4096 at 1536, 341 at 128)."""
        return int(self.inner_dim / 3 * 8)

    @property
    def block_gemms(self) -> dict[str, tuple[int, int]]:
        """(input, output) columns of every GEMM of a stream in a block."""
        d, f = self.inner_dim, self.mlp_hidden_dim
        return {"qkv": (d, 3 * d), "w13": (d, 2 * f), "out": (d, d), "w2": (f, d)}

    @classmethod
    def tiny(cls) -> LensConfig:
        """Three blocks of width 128: the shape of the golden test checkpoint."""
        return cls(num_layers=3, num_attention_heads=2, enc_hidden_dim=64, selected_layer_index=(0, 1, 2, 3))

    @classmethod
    def mini(cls) -> LensConfig:
        """Lens-Mini, the small Lens shipped inside the package: 32 channels per token instead of 128."""
        return cls(
            num_layers=6,
            num_attention_heads=3,
            in_channels=32,
            out_channels=8,
            enc_hidden_dim=128,
            selected_layer_index=(0, 1, 2, 3),
        )


_LARGEST_SIDE = 1 << 16  # pixels
DEFAULT_CHAT_DATE = "2026-05-23"  # the template prints a date; frozen so that pictures do not drift from day to day
MAX_IMAGES = 100_000  # of a call or a command
MAX_STEPS = 1000  # of a schedule: its modulation table has a row per step, 1.8 MB each of the released model
VARIANTS = {"lens": (20, 5.0), "turbo": (4, 1.0), "base": (50, 5.0)}  # default steps and guidance


@dataclass(frozen=True)
class Distilled:
    """How the student of a distilled checkpoint was trained: "distilled" in the metadata.

    sampler: between its steps, "euler" or "renoise" (the scheduler's stochastic_sampling); steps: of the training; grid:
    "fixed", the scheduler's times for that many steps alone, or "random", any.
    """

    sampler: str = "euler"
    steps: int = 4
    grid: str = "fixed"

    @classmethod
    def read(cls, value: Any, source: str) -> Distilled:
        """Of a metadata entry. Errors: ValueError naming ``source`` and the key."""
        if not isinstance(value, dict) or set(value) != {f.name for f in fields(cls)}:
            raise ValueError(f"{source}: lens.distilled must be an object of sampler, steps, grid, got {value!r}")
        for key, known in (("sampler", ("euler", "renoise")), ("grid", ("fixed", "random"))):
            if value[key] not in known:
                raise ValueError(f"{source}: lens.distilled.{key} must be one of {known}, got {value[key]!r}")
        if type(value["steps"]) is not int or value["steps"] < 1:
            raise ValueError(f"{source}: lens.distilled.steps must be a positive integer, got {value['steps']!r}")
        return cls(**value)


@dataclass(frozen=True)
class Defaults:
    """What a call uses where the caller says nothing; from the checkpoint's metadata or the variant."""

    variant: str
    num_inference_steps: int
    guidance_scale: float
    base_resolution: int = 1024
    max_resolution: int = 1440  # side of the largest square shown to work, trained or not: above it, a warning
    time_dtype: str = "reference"  # how the time is rounded, see lens.sampler.conditioning_time
    distilled: Distilled | None = None  # of a student of few steps, where the metadata says so

    @classmethod
    def choose(cls, variant: str | None, metadata: Any, name: str, source: str = "model_index.json") -> Defaults:
        """The caller's ``variant``, else our ``metadata``'s, else the one ``name`` speaks of, else "lens" (warns).

        metadata: the "lens" entry of ``source``, or None; its other values hold for its own variant. name: hub id or
        folder name, read as words: "Lens-Turbo", "lens_base_bf16", "LensTurbo", but not "database".
        """
        expect_variant(variant)
        own = cls._read(metadata, source)
        said = own.pop("variant", None)
        chosen = variant or said or variant_of_name(name)
        if chosen is None:
            chosen = "lens"
            notices.warn(f"nothing tells which Lens {name!r} is; assuming variant='lens' (20 steps, guidance 5)")
        if variant is not None and variant != said:
            own.pop("num_inference_steps", None)
            own.pop("guidance_scale", None)
            own.pop("distilled", None)
        return replace(cls(chosen, *VARIANTS[chosen]), **own)

    @classmethod
    def _read(cls, metadata: Any, source: str) -> dict[str, Any]:
        if metadata is None:
            return {}
        if not isinstance(metadata, dict):
            raise ValueError(f"{source}: 'lens' must be an object, got {metadata!r}")
        values = {f.name: metadata[f.name] for f in fields(cls) if f.name in metadata}
        if "distilled" in values:
            values["distilled"] = Distilled.read(values["distilled"], source)
        for key, value in values.items():
            if key == "distilled":
                continue
            whole = isinstance(value, int) and not isinstance(value, bool)
            expected: Any
            if key == "num_inference_steps":
                good, expected = whole and 0 < value <= MAX_STEPS, f"an integer from 1 to {MAX_STEPS}"
            elif key in ("base_resolution", "max_resolution"):
                good = whole and value % 16 == 0 and 16 <= value <= _LARGEST_SIDE
                expected = f"a multiple of 16, from 16 to {_LARGEST_SIDE}"
            elif key == "guidance_scale":
                number = isinstance(value, int | float) and not isinstance(value, bool)
                good, expected = number and 0 <= value < float("inf"), "a number >= 0"
            else:
                expected = sorted(VARIANTS) if key == "variant" else ["float32", "reference"]
                good = value in expected
            if not good:
                raise ValueError(f"{source}: lens.{key} must be {expected}, got {value!r}")
        return values


def expect_variant(variant: str | None) -> None:
    """ValueError for what is no variant, such as diffusers' of the weights."""
    if variant is not None and not (isinstance(variant, str) and variant in VARIANTS):
        raise ValueError(
            f"variant must be one of {sorted(VARIANTS)} or None, got {shortened(variant)}; which of several weights are read is "
            "weights_variant"
        )


def variant_of_name(name: str) -> str | None:
    """The variant a hub id's or folder's name speaks of, or None."""
    low = name.lower()
    if match := re.search(r"(?:(?<![a-z])|(?<=lens))(turbo|base)(?![a-z])", low):
        return match[1]
    return "lens" if re.search(r"(?<![a-z])lens(?![a-z])", low) else None
