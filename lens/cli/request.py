"""What a line of `lens generate` asks for: options and recipe -> pictures to draw. Mistakes are found here, before a load."""

from __future__ import annotations

import datetime
import errno
import math
import os
import secrets
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import image_file, resolution
from ..request import MAX_IMAGES, Request, shortened
from ..sampler import MAX_SEED, MIN_SEED
from ..text_encoder import DEFAULT_CHAT_DATE, parse_date
from .options import DEFAULT_NAME

_PATH_MAX = 4095  # bytes, on Linux
_BATCH, _BATCH_TOKENS = 8, 8192  # pictures, and image tokens, drawn at once unless --batch-size says otherwise


class UsageError(Exception):
    """The command line cannot be carried out as written: exit code 2."""


def parse(
    prompts: Sequence[str] | None,
    file: str | None,
    negative: str | None,
    recipe: image_file.Recipe | None,
    per_prompt: int | None,
    seed: str | None,
    size_args: tuple[Sequence[str] | None, int | None, int | None, int | None, str | None],
) -> list[Request]:
    """One request per picture, prompt-major; no size where the model's own is meant. Mistakes are found here, before
    anything is loaded."""
    texts = [*(prompts or []), *(_read_prompts(file) if file is not None else [])]
    if len(texts) * (per_prompt or 1) > MAX_IMAGES:
        each = f" times --images-per-prompt {per_prompt}" if per_prompt else ""
        raise UsageError(f"a command draws at most {MAX_IMAGES} pictures, got {len(texts)} prompts{each}")
    if not texts and recipe is not None:
        texts = [recipe.prompt]
    if not texts:
        raise UsageError('nothing to draw: give a prompt, --file or --like, as in: lens generate "a red apple"')
    sizes = _sizes(len(texts), recipe, *size_args)
    seeds = _seeds(seed, recipe)
    if per_prompt is None:
        per_prompt = max(1, len(seeds) // len(texts)) if len(seeds) > 1 else 1
    count = len(texts) * per_prompt
    if len(seeds) == 1:
        seeds = [seeds[0] + k for k in range(count)]
        if seeds[-1] > MAX_SEED:
            raise UsageError(f"--seed {seeds[0]} counts up to {seeds[-1]} for {count} pictures, beyond 2^64 - 1")
    if len(seeds) != count:
        raise UsageError(f"--seed must be one number or one per picture ({count}), got {len(seeds)}")
    unwanted = negative if negative is not None else recipe.negative if recipe else ""
    return [Request(texts[k // per_prompt], unwanted, sizes[k // per_prompt], seeds[k]) for k in range(count)]


def loras(
    given: Sequence[Path] | None, scales: Sequence[float] | None, recipe: image_file.Recipe | None
) -> list[tuple[Path, float]]:
    """(file or folder, scale) of every LoRA. A recipe knows its LoRAs by fingerprint only: the files must be given again."""
    if not given:
        if scales:
            raise UsageError("--lora-scale needs --lora")
        if recipe is not None and recipe.loras:
            names = ", ".join(name for name, _, _ in recipe.loras)
            raise UsageError(f"the picture was drawn with the LoRA {names}: give it with --lora")
        return []
    if not scales:
        recorded = [scale for _, _, scale in recipe.loras] if recipe is not None else []
        scales = recorded if len(recorded) == len(given) else [1.0]
    if len(scales) not in (1, len(given)):
        raise UsageError(f"--lora-scale must be given once, or once per --lora ({len(given)}), got {len(scales)}")
    if not all(math.isfinite(scale) for scale in scales):
        raise UsageError(f"--lora-scale must be a finite number, got {', '.join(map(str, scales))}")
    return list(zip(given, scales if len(scales) == len(given) else [*scales] * len(given)))


def _read_prompts(file: str) -> list[str]:
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text: {error}"
        raise UsageError(f"--file {file}: {reason}") from None
    lines = [line.strip() for line in text.splitlines()]
    found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise UsageError(f"--file {file}: no prompt in it")
    return found


def _seeds(text: str | None, recipe: image_file.Recipe | None) -> list[int]:
    if text is None:
        return [recipe.seed if recipe else secrets.randbelow(2**31)]
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--seed must be a whole number or a list such as 1,2,3, got {text!r}") from None
    if not all(MIN_SEED <= s <= MAX_SEED for s in seeds):
        raise UsageError(f"--seed must lie between -2^63 and 2^64 - 1, got {shortened(text)}")
    return seeds


def _sizes(
    count: int,
    recipe: image_file.Recipe | None,
    size: Sequence[str] | None,
    height: int | None,
    width: int | None,
    base: int | None,
    aspect: str | None,
) -> list[tuple[int, int] | None]:
    """One (height, width) per prompt, or None for the model's own size. --size says the width first, as --aspect does."""
    if size:
        try:
            pairs = [tuple(int(n) for n in reversed(text.lower().replace("×", "x").split("x"))) for text in size]
        except ValueError:
            pairs = []
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise UsageError(f"--size must be WIDTHxHEIGHT such as 96x64, got {', '.join(size)}")
        for text, (h, w) in zip(size, pairs):
            if wrong := [n for n in (w, h) if not 0 < n <= resolution.MAX_SIDE or n % resolution.TOKEN_PIXELS]:
                raise UsageError(f"--size {text}: {_offer(wrong[0], w, h)}")
        given: Any = pairs * count if len(pairs) == 1 else pairs
        if len(given) != count:
            raise UsageError(f"--size must be given once, or once per prompt ({count}), got {len(pairs)}")
    else:
        given = None
    if given is None and all(x is None for x in (height, width, base, aspect)):
        return [recipe.size if recipe else None] * count
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the pipeline, which knows the model, warns
            grids = resolution.request_grids(count, height, width, base, aspect, given, 1024, 1440)
    except ValueError as error:
        raise UsageError(flag_names(str(error))) from None
    return [(h * resolution.TOKEN_PIXELS, w * resolution.TOKEN_PIXELS) for h, w in grids]


def _offer(wrong: int, width: int, height: int) -> str:
    """What is wrong about a size, and the valid one next to it."""
    step, most = resolution.TOKEN_PIXELS, resolution.MAX_SIDE
    near = [min(most, max(step, round(n / step) * step)) if n <= most else most for n in (width, height)]
    nearest = f"; the nearest is {near[0]}x{near[1]}" if min(width, height) > 0 else ""
    return (
        f"width and height must be multiples of {step} pixels, from {step} to {most}, got {shortened(wrong)}{nearest}"
    )


def flag_names(message: str) -> str:
    """The library's argument names as the command line spells them."""
    for argument, flag in (("base_resolution", "--base"), ("aspect_ratio", "--aspect"), ("sizes", "--size"),
                       ("height", "--height"), ("width", "--width")):  # fmt: skip
        message = message.replace(argument, flag)
    return message


def chat_date(text: str | None, recipe: image_file.Recipe | None) -> str:
    """Always a date, so that the recipe of a picture drawn with "today" still redraws it tomorrow."""
    if text is None:
        return recipe.chat_date if recipe else DEFAULT_CHAT_DATE
    if text == "today":
        return datetime.date.today().isoformat()
    try:
        return parse_date(text).isoformat()
    except ValueError:
        raise UsageError(f'--chat-date must be YYYY-MM-DD or "today", got {text!r}') from None


def make_folders(files: Sequence[Path]) -> None:
    """Make the folders of files to come, before minutes of drawing are spent on them. Errors: OSError naming the folder."""
    for folder in dict.fromkeys(file.parent for file in files):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))


def _check_length(file: Path) -> None:
    for part in file.parts:
        if (got := len(os.fsencode(part))) > image_file.NAME_MAX:
            raise UsageError(f"a file name has at most {image_file.NAME_MAX} bytes, got {got}: {shortened(part)}")
    if (got := len(os.fsencode(file.absolute()))) > _PATH_MAX:
        raise UsageError(f"a path has at most {_PATH_MAX} bytes, got {got}: {shortened(str(file))}")


def check_names(files: Sequence[Path], sheet: Path | None) -> None:
    """Refuse names that no file system takes and a sheet that would replace a picture. Errors: UsageError."""
    for file in [*files, *([sheet] if sheet else [])]:
        _check_length(file)
    if sheet is not None and os.path.realpath(sheet) in {os.path.realpath(file) for file in files}:
        raise UsageError(f"--sheet {sheet} is also the file of a picture: give it another name")


def paths(output: Path | None, name: str | None, prompts: Sequence[str], seeds: Sequence[int]) -> list[Path]:
    """Where each picture goes. -o FILE.png is one picture; anything else is a folder."""
    if output == Path("-"):
        raise UsageError(
            "--output: a picture is not written to stdout: name a file or a folder (./- if it is called so)"
        )
    target = output if output is not None else Path()
    _check_length(target)
    if target.suffix and not target.is_dir() and target.suffix.lower() != ".png":
        raise UsageError(f"--output: pictures are written as .png, which can carry the recipe, got {str(output)!r}")
    if target.suffix.lower() == ".png" and not target.is_dir():
        if len(prompts) > 1:
            raise UsageError(f"--output {output} is one file for {len(prompts)} pictures: give a folder")
        if name is not None:
            raise UsageError(f"--name chooses names inside a folder, but --output {output} is a file")
        return [target]
    pattern = name if name is not None else DEFAULT_NAME
    try:
        image_file.check_name(pattern)
    except ValueError as error:
        raise UsageError(f"--name: {error}") from None
    names = [image_file.file_name(pattern, k, *pair) for k, pair in enumerate(zip(prompts, seeds))]
    if len(set(names)) < len(names):
        raise UsageError(f"--name {pattern!r} gives several pictures the same name: add {{index}} or {{seed}}")
    return [target / n for n in names]


def batched(sizes: Sequence[tuple[int, int]], batch_size: int | None) -> list[range]:
    """Runs of consecutive pictures to draw at once. What is drawn together changes no picture's content."""
    tokens = [h * w // resolution.TOKEN_PIXELS**2 for h, w in sizes]
    batches, start = [], 0
    for k in range(1, len(tokens) + 1):
        full = k - start >= (batch_size or _BATCH)
        if k == len(tokens) or full or (batch_size is None and sum(tokens[start : k + 1]) > _BATCH_TOKENS):
            batches.append(range(start, k))
            start = k
    return batches
