"""Images of a benchmark's prompts in the benchmark's own layout: drawn in packed batches, resumed where some are there already.

`drawn.json` beside them says what they were drawn with; a folder of other weights, settings or prompts is not gone on with. An
image is written under a temporary name and renamed, so that one that is there is whole.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from lens import cost as flops
from lens.config import Defaults, LensConfig
from lens.formats.files import read_json, write_atomic, write_json
from lens.formats.hub import EMBEDDED, resolve, variant_hint
from lens.formats.released import read_defaults, transformer_config

from ...cost import GPUS, vae_flops

BATCH_TOKENS, BATCH_IMAGES = 65_536, 64  # image tokens and images that are drawn in one call
MFU = 0.4  # assumed by the estimate
REFUSED = ""  # as what is drawn: a reasoner refused, and nothing is


@dataclass(frozen=True)
class Ask:
    """One prompt: what is judged by (`prompt`), what is drawn (`drawn`), and for each image its file in the folder and its seed."""

    id: str
    task: str
    prompt: str
    drawn: str
    files: tuple[str, ...]
    seeds: tuple[int, ...]


Draw = Callable[[Sequence[str], Sequence[int]], list[np.ndarray]]  # prompts, seeds -> uint8 [H, W, 3]


@dataclass
class Model:
    """What draws. settings: everything besides prompts and seeds that decides an image."""

    name: str
    settings: dict[str, Any]
    batch: int
    draw: Draw


def model_of(options: argparse.Namespace) -> Model:
    """`--model` with `--steps`, `--guidance`, `--size` and `--device`, as the pipeline loads it."""
    from lens import LensPipeline

    pipe = LensPipeline.from_pretrained(options.model, device=options.device)
    height, width = options.size or (pipe.defaults.base_resolution,) * 2
    steps = pipe.defaults.num_inference_steps if options.steps is None else options.steps
    guidance = pipe.defaults.guidance_scale if options.guidance is None else options.guidance
    settings = {"weights": pipe.fingerprint, "dtype": str(pipe.dtype), "steps": steps, "guidance": guidance}

    def draw(prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        out: Any = pipe(
            list(prompts),
            seed=list(seeds),
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=height,
            width=width,
        )
        return [np.asarray(image.convert("RGB")) for image in out.images]

    batch = max(1, min(BATCH_IMAGES, BATCH_TOKENS // (height * width // 256)))
    return Model(options.model, {**settings, "size": [height, width]}, batch, draw)


def write_image(image: np.ndarray, path: Path) -> None:
    """uint8 [H, W, 3] as PNG or WebP, by the name's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {".png": "PNG", ".webp": "WEBP"}[path.suffix]
    more = {"lossless": True} if kind == "WEBP" else {}

    def write(temporary: Path) -> None:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, kind, **more)
        temporary.write_bytes(buffer.getvalue())

    write_atomic(path, write)


def read_image(path: Path) -> np.ndarray | None:
    """uint8 [H, W, 3] upright; None where there is no such file. Errors: ValueError naming one that is no image."""
    if not path.is_file():
        return None
    from PIL import ImageOps

    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"{path}: not an image ({error})") from None


def drawn(model: Model, asks: Sequence[Ask], folder: Path, tell: Callable[[str], None] = print) -> int:
    """Draw what is missing; returns how many images that were. Errors: ValueError where the folder is of something else."""
    told = json.dumps([[ask.id, ask.drawn, ask.files, ask.seeds] for ask in asks], ensure_ascii=False)
    about = {**model.settings, "prompts": hashlib.sha256(told.encode()).hexdigest()}
    path = folder / "drawn.json"
    if path.is_file() and (before := read_json(path)) != about:
        other = ", ".join(f"{k} {before.get(k)!r}, now {about.get(k)!r}" for k in about if before.get(k) != about[k])
        raise ValueError(f"{path}: these images are of {other or 'other settings'}; give another --out, or delete them")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, about)
    pairs = [(a.drawn, seed, folder / file) for a in asks for seed, file in zip(a.seeds, a.files) if a.drawn != REFUSED]
    todo = [one for one in pairs if not one[2].is_file()]
    start = time.perf_counter()
    for k in range(0, len(todo), model.batch):
        part = todo[k : k + model.batch]
        images = model.draw([prompt for prompt, _, _ in part], [seed for _, seed, _ in part])
        for image, (_, _, file) in zip(images, part, strict=True):
            write_image(image, file)
        done = k + len(part)
        left = (time.perf_counter() - start) / done * (len(todo) - done)
        tell(f"drawn {done} of {len(todo)} images, {left:.0f} s left")
    return len(todo)


# ------------------------------------------------------------------------------------------------ what it will take


def described(model: str) -> tuple[LensConfig, Defaults]:
    """MMDiT and defaults of a folder or an embedded model; the released one's for a hub id, which a dry run does not download."""
    root = resolve(model) if model in EMBEDDED or Path(model).is_dir() else None
    defaults = read_defaults(root, None, variant_hint(model))
    if root is None:
        return LensConfig(), defaults
    path = root / "transformer" / "config.json"
    return transformer_config(read_json(path), str(path)), defaults


def image_flops(config: LensConfig, size: tuple[int, int], steps: int, guidance: float, text: int) -> float:
    """Of one image: steps with or without guidance, and the decoder, taken as costly as the VAE's encoder."""
    tokens = size[0] * size[1] // 256
    call = sum(flops.step_flops(config, [tokens], [text]).values())
    without = sum(flops.step_flops(config, [tokens], [0]).values()) if guidance != 1 else 0
    return steps * (call + without) + vae_flops(size[0] * size[1])


@dataclass(frozen=True)
class Calls:
    """Calls of a run, of a judge or of a reasoner. tokens: (read, written) of one, where it goes to a server."""

    judge: str
    number: int
    tokens: tuple[int, int] | None = None
    what: str = "judgements"


def estimate(
    images: int,
    flops_an_image: float,
    calls: Sequence[Calls],
    gpu: str,
    price: float | None,
    prices: tuple[float, float] | None,
) -> str:
    """The table of `--dry-run`. price: USD a GPU hour; prices: USD per million tokens read and written."""
    peak, _ = GPUS[gpu]
    hours = images * flops_an_image / (peak * MFU) / 3600
    lines = [f"images               {images:10,d}", f"FLOPs an image       {flops_an_image / 1e12:10.3g} e12"]
    lines.append(
        f"drawing              {hours:10.3g} hours of one {gpu} at {MFU:.0%} of its bfloat16 peak, an assumption"
    )
    spent = None if price is None else hours * price
    for call in calls:
        told = ""
        if call.tokens is not None:
            read, written = (call.number * n for n in call.tokens)
            told = f", {read / 1e6:.1f} and {written / 1e6:.1f} million tokens read and written"
            if prices is not None and call.what == Calls.what:  # a judge's, not a reasoner's
                spent = (spent or 0.0) + (read * prices[0] + written * prices[1]) / 1e6
        lines.append(f"{call.judge:20} {call.number:10,d} {call.what}{told}")
    lines.append("judges' own time     not estimated: none was measured on a GPU")
    without = ", without the reasoner's" if any(c.tokens for c in calls if c.what != Calls.what) else ""
    lines.append(
        "money                "
        + ("not known: give --gpu-price or --judge-prices" if spent is None else f"{spent:10.2f} USD{without}")
    )
    return "\n".join(lines)
