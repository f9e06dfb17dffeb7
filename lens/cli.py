"""lens generate | doctor: the command line.

Exit codes: 0 done, 1 failed (a checkpoint, the disk, memory), 2 a mistake in the command, 130 interrupted. Paths of
pictures go to stdout, one per line; progress and notices to stderr.
"""

from __future__ import annotations

import datetime
import math
import os
import secrets
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import __version__, checkpoint, pictures, resolution
from .text_encoder import DEFAULT_CHAT_DATE, parse_date

if TYPE_CHECKING:
    from .pipeline import LensPipeline, LensPipelineOutput

_BATCH, _BATCH_TOKENS = 8, 8192  # pictures, and image tokens, drawn at once unless --batch-size says otherwise
_SMALL_WORK = 64 * 256  # tokens of a picture times width of the model, up to which one CPU thread is enough
_PLAIN_PROGRESS_SECONDS = 10.0  # between lines of progress where stderr is no terminal

console = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(
    name="lens",
    help="Turn prompts into pictures with the Lens diffusion transformer.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


class Variant(str, Enum):
    """Which released model the weights are: sets the default steps and guidance."""

    lens = "lens"
    turbo = "turbo"
    base = "base"


class DType(str, Enum):
    """Number type of the weights and activations."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Truncation(str, Enum):
    """What is cut from a prompt that is too long."""

    reference = "reference"
    prompt = "prompt"


class Residence(str, Enum):
    """Which parts of the model stay on the device."""

    auto = "auto"
    resident = "resident"
    trimmed = "trimmed"
    balanced = "balanced"
    lean = "lean"


class UsageError(Exception):
    """The command line cannot be carried out as written: exit code 2."""


def main() -> None:
    """Entry point of the `lens` command."""
    app(prog_name="lens")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lens {__version__}")
        raise typer.Exit


VERSION = typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")


@app.callback()
def _root(version: Annotated[bool, VERSION] = False) -> None: ...


# ------------------------------------------------------------------------------------------------ generate

_what = partial(typer.Option, rich_help_panel="What to draw", show_default=False)
_how = partial(typer.Option, rich_help_panel="How to draw it", show_default=False)
_files = partial(typer.Option, rich_help_panel="Files", show_default=False)
_where = partial(typer.Option, rich_help_panel="Model and machine", show_default=False)

FILE = 'Prompts from a text file, one per line; # starts a comment line; "-" is stdin.'
LIKE = "Redraw a picture from the recipe inside it; every other option overrides its part of the recipe."
PER_PROMPT = "Pictures per prompt (default: 1, or as many as --seed lists)."
SEED = "Starting noise: S gives picture k the seed S + k; a list, one to each (default: random, reported)."
SIZE = "Height x width in pixels, multiples of 16; once, or once per prompt (default: the model's, square)."
BASE = "Base resolution: 512, 768, 1024, 1440 (Mini: 64, 96, 128); needs --aspect."
GUIDANCE = "How strongly the prompt pulls; 1 turns guidance off and halves the work (default: the model's)."
CHAT_DATE = f'Date written into the text encoder\'s chat, or "today" (default: {DEFAULT_CHAT_DATE}).'
TRUNCATION = 'Beyond 512 tokens "reference" cuts the end of the whole chat, "prompt" the prompt (default: reference).'
OUTPUT = "One picture's file, or a folder, made where missing; files of the same name are replaced (default: .)."
NAME = f"File names in the folder, from {{index}}, {{prompt}}, {{seed}} (default: {pictures.DEFAULT_NAME})."
SCALE = "Whole factor by which the sheet enlarges pictures, unsmoothed (default: small ones to about 192 pixels)."
MODEL = "mini, a folder in the released layout, or a hub id (default: mini)."
VARIANT = "What the weights are, where the checkpoint does not say: sets default steps and guidance."
DEVICE = '"cpu", "cuda" or "cuda:1" (default: cuda if usable, else cpu).'
DTYPE = "Number type of weights and activations (default: bfloat16 on cuda, float32 on cpu)."
RESIDENCY = "Where the parts live: resident, trimmed, balanced or lean, from fast to small; auto: the first that fits."
BATCH = "Pictures drawn at once (default: up to 8, fewer when they are large)."


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="One or more prompts.")] = None,
    file: Annotated[str | None, _what("--file", "-f", help=FILE)] = None,
    negative: Annotated[str | None, _what("--negative", help="What the pictures should not show.")] = None,
    like: Annotated[Path | None, _what("--like", metavar="PICTURE.png", help=LIKE)] = None,
    images_per_prompt: Annotated[int | None, _what("--images-per-prompt", "-n", min=1, help=PER_PROMPT)] = None,
    seed: Annotated[str | None, _what("--seed", "-s", metavar="INT[,INT...]", help=SEED)] = None,
    size: Annotated[list[str] | None, _how("--size", metavar="HxW", help=SIZE)] = None,
    height: Annotated[int | None, _how("--height", help="Height in pixels; needs --width.")] = None,
    width: Annotated[int | None, _how("--width", help="Width in pixels; needs --height.")] = None,
    base: Annotated[int | None, _how("--base", help=BASE)] = None,
    aspect: Annotated[str | None, _how("--aspect", metavar="W:H", help="From 1:2 to 2:1; needs --base.")] = None,
    steps: Annotated[int | None, _how("--steps", min=1, help="Denoising steps (default: the model's).")] = None,
    guidance: Annotated[float | None, _how("--guidance", "-g", min=0.0, help=GUIDANCE)] = None,
    chat_date: Annotated[str | None, _how("--chat-date", metavar="YYYY-MM-DD", help=CHAT_DATE)] = None,
    truncation: Annotated[Truncation | None, _how("--truncation", help=TRUNCATION)] = None,
    output: Annotated[Path | None, _files("--output", "-o", metavar="FILE.png|FOLDER", help=OUTPUT)] = None,
    name: Annotated[str | None, _files("--name", help=NAME)] = None,
    sheet: Annotated[Path | None, _files("--sheet", metavar="FILE.png", help="Also write a contact sheet.")] = None,
    scale: Annotated[int | None, _files("--scale", min=1, max=64, help=SCALE)] = None,
    model: Annotated[str | None, _where("--model", "-m", help=MODEL)] = None,
    variant: Annotated[Variant | None, _where("--variant", help=VARIANT)] = None,
    device: Annotated[str | None, _where("--device", help=DEVICE)] = None,
    dtype: Annotated[DType | None, _where("--dtype", help=DTYPE)] = None,
    residency: Annotated[Residence | None, _where("--residency", help=RESIDENCY)] = None,
    batch_size: Annotated[int | None, _where("--batch-size", min=1, help=BATCH)] = None,
    quiet: Annotated[bool, _where("--quiet", "-q", help="Print the pictures' paths only.")] = False,
) -> None:
    """Draw pictures from prompts.

    [bold]lens generate "a red apple" -o apple.png[/bold]

    Every picture carries its recipe; [bold]lens generate --like apple.png[/bold] draws it again.
    """
    saved: list[Path] = []
    with _clean_exits(saved), _notices(quiet):
        recipe = pictures.read_recipe(like) if like is not None else None
        request = _request(
            prompts, file, negative, recipe, images_per_prompt, seed, (size, height, width, base, aspect)
        )
        chat_day = _chat_date(chat_date, recipe)
        cut = truncation.value if truncation else recipe.truncation if recipe else Truncation.reference.value
        if guidance is not None and not math.isfinite(guidance):
            raise UsageError(f"--guidance must be a finite number, got {guidance}")
        paths = _paths(output, name, request)
        if scale is not None and sheet is None:
            raise UsageError("--scale enlarges pictures of the contact sheet: give --sheet, too")
        if sheet is not None and sheet.suffix.lower() != ".png":
            raise UsageError(f"--sheet must name a .png file, got {str(sheet)!r}")

        began = time.perf_counter()
        pipe = _load(model, variant, device, dtype, recipe, quiet, residency)
        loaded = time.perf_counter()
        if recipe is not None:
            _same_checkpoint(recipe, pipe, like, explicit=model is not None)
        # an explicit --variant brings its own steps and guidance; otherwise the recipe's hold
        kept = recipe if variant is None else None
        n_steps = steps if steps is not None else kept.steps if kept else pipe.defaults.num_inference_steps
        strength = guidance if guidance is not None else kept.guidance if kept else pipe.defaults.guidance_scale
        side = pipe.defaults.base_resolution
        request = [replace(r, size=r.size or (side, side)) for r in request]
        if residency is not None and not quiet:
            _residency_plan(pipe, request, batch_size, strength)

        drawn: list[Any] = []
        batches = _batches([r.size for r in request], batch_size)
        with _few_threads(pipe, request) as threads, _step_progress(len(batches) * n_steps, quiet) as advance:
            for batch in batches:
                items = request[batch.start : batch.stop]
                result = pipe(
                    [r.prompt for r in items],
                    negative_prompt=[r.negative for r in items],
                    sizes=[r.size for r in items],
                    seed=[r.seed for r in items],
                    num_inference_steps=n_steps,
                    guidance_scale=strength,
                    truncation=cut,
                    chat_date=chat_day,
                    callback_on_step_end=advance,
                    callback_on_step_end_tensor_inputs=(),
                )
                images = cast("LensPipelineOutput", result).images
                for item, image, path in zip(items, images, paths[batch.start : batch.stop]):
                    made = pictures.Recipe(
                        prompt=item.prompt,
                        negative=item.negative,
                        seed=item.seed,
                        steps=n_steps,
                        guidance=float(strength),
                        size=item.size,
                        variant=pipe.defaults.variant,
                        chat_date=chat_day,
                        truncation=cut,
                        model=_model_name(model or (recipe.model if recipe else "mini")),
                        dtype=str(pipe.dtype).removeprefix("torch."),
                        version=__version__,
                        fingerprint=pipe.fingerprint or "",
                    )
                    pictures.save_png(image, path, made)
                    saved.append(path)
                    typer.echo(path)
                    if sheet is not None:
                        drawn.append(image)
        seconds = time.perf_counter() - loaded
        if sheet is not None:
            captions = [f"{r.prompt}\nseed {r.seed}" for r in request]
            pictures.save_png(pictures.contact_sheet(drawn, captions, scale), sheet)
            typer.echo(sheet)
        if not quiet:
            _summary(pipe, request, n_steps, strength, threads, seconds, loaded - began)


@dataclass(frozen=True)
class _Item:
    """One picture to draw; ``size`` None until the model's own is known."""

    prompt: str
    negative: str
    seed: int
    size: Any  # (height, width) | None


def _request(
    prompts: Sequence[str] | None,
    file: str | None,
    negative: str | None,
    recipe: pictures.Recipe | None,
    per_prompt: int | None,
    seed: str | None,
    size_args: tuple[Sequence[str] | None, int | None, int | None, int | None, str | None],
) -> list[_Item]:
    """The pictures asked for, prompt-major. Mistakes are found here, before anything is loaded."""
    texts = [*(prompts or []), *(_read_prompts(file) if file is not None else [])]
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
    if len(seeds) != count:
        raise UsageError(f"--seed must be one number or one per picture ({count}), got {len(seeds)}")
    unwanted = negative if negative is not None else recipe.negative if recipe else ""
    return [_Item(texts[k // per_prompt], unwanted, seeds[k], sizes[k // per_prompt]) for k in range(count)]


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


def _seeds(text: str | None, recipe: pictures.Recipe | None) -> list[int]:
    if text is None:
        return [recipe.seed if recipe else secrets.randbelow(2**31)]
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"--seed must be a whole number or a list such as 1,2,3, got {text!r}") from None
    if not all(0 <= s < 2**63 for s in seeds):
        raise UsageError(f"--seed must lie between 0 and 2^63 - 1, got {text!r}")
    return seeds


def _sizes(
    count: int,
    recipe: pictures.Recipe | None,
    size: Sequence[str] | None,
    height: int | None,
    width: int | None,
    base: int | None,
    aspect: str | None,
) -> list[tuple[int, int] | None]:
    """One (height, width) per prompt, or None for the model's own size."""
    if size:
        try:
            pairs = [tuple(int(n) for n in text.lower().replace("×", "x").split("x")) for text in size]
        except ValueError:
            pairs = []
        if not pairs or any(len(pair) != 2 for pair in pairs):
            raise UsageError(f"--size must be HEIGHTxWIDTH such as 64x96, got {', '.join(size)}")
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
        raise UsageError(_flag_names(str(error))) from None
    return [(h * resolution.TOKEN_PIXELS, w * resolution.TOKEN_PIXELS) for h, w in grids]


def _flag_names(message: str) -> str:
    """The library's argument names as the command line spells them."""
    for ours, flag in (("base_resolution", "--base"), ("aspect_ratio", "--aspect"), ("sizes", "--size"),
                       ("height", "--height"), ("width", "--width")):  # fmt: skip
        message = message.replace(ours, flag)
    return message


def _chat_date(text: str | None, recipe: pictures.Recipe | None) -> str:
    """Always a date, so that the recipe of a picture drawn with "today" still redraws it tomorrow."""
    if text is None:
        return recipe.chat_date if recipe else DEFAULT_CHAT_DATE
    if text == "today":
        return datetime.date.today().isoformat()
    try:
        return parse_date(text).isoformat()
    except ValueError:
        raise UsageError(f'--chat-date must be YYYY-MM-DD or "today", got {text!r}') from None


def _paths(output: Path | None, name: str | None, request: Sequence[_Item]) -> list[Path]:
    """Where each picture goes. -o FILE.png is one picture; anything else is a folder."""
    target = output if output is not None else Path()
    if target.suffix and not target.is_dir() and target.suffix.lower() != ".png":
        raise UsageError(f"--output: pictures are written as .png, which can carry the recipe, got {str(output)!r}")
    if target.suffix.lower() == ".png" and not target.is_dir():
        if len(request) > 1:
            raise UsageError(f"--output {output} is one file for {len(request)} pictures: give a folder")
        if name is not None:
            raise UsageError(f"--name chooses names inside a folder, but --output {output} is a file")
        return [target]
    pattern = name if name is not None else pictures.DEFAULT_NAME
    try:
        pictures.check_name(pattern)
    except ValueError as error:
        raise UsageError(f"--name: {error}") from None
    names = [pictures.file_name(pattern, k, item.prompt, item.seed) for k, item in enumerate(request)]
    if len(set(names)) < len(names):
        raise UsageError(f"--name {pattern!r} gives several pictures the same name: add {{index}} or {{seed}}")
    return [target / n for n in names]


def _batches(sizes: Sequence[tuple[int, int]], batch_size: int | None) -> list[range]:
    """Runs of consecutive pictures to draw at once. What is drawn together changes no picture's content."""
    tokens = [h * w // resolution.TOKEN_PIXELS**2 for h, w in sizes]
    batches, start = [], 0
    for k in range(1, len(tokens) + 1):
        full = k - start >= (batch_size or _BATCH)
        if k == len(tokens) or full or (batch_size is None and sum(tokens[start : k + 1]) > _BATCH_TOKENS):
            batches.append(range(start, k))
            start = k
    return batches


# ------------------------------------------------------------------------------------------------ model


def _load(
    model: str | None,
    variant: Variant | None,
    device: str | None,
    dtype: DType | None,
    recipe: pictures.Recipe | None,
    quiet: bool,
    residency: Residence | None = None,
) -> LensPipeline:
    import torch

    from .pipeline import LensPipeline

    source = model
    if source is None:
        source = recipe.model if recipe else "mini"
        if recipe and source not in checkpoint.EMBEDDED:  # a file from elsewhere opens no path and fetches nothing
            what = "the hub id" if "/" in source else "a folder named"
            raise UsageError(f"the picture was drawn by weights in {what} {source!r}: give it with --model")
    where = _device(device)
    kind = variant.value if variant else recipe.variant if recipe else None
    number_type = dtype.value if dtype else recipe.dtype if recipe else None
    for value, known in ((kind, Variant), (number_type, DType)):
        if value is not None and value not in known.__members__:
            raise pictures.RecipeError(f"the recipe names {value!r}, expected one of {', '.join(known.__members__)}")
    with console.status(f"loading {escape(source)}") if not quiet else _nothing():
        return LensPipeline.from_pretrained(
            source,
            variant=kind,
            device=where,
            dtype=getattr(torch, number_type) if number_type else None,
            residency=residency.value if residency else None,
        )


def _residency_plan(pipe: LensPipeline, request: Sequence[_Item], batch_size: int | None, guidance: float) -> None:
    """Where the parts live and the memory predicted for the largest of these pictures, as one line."""
    from .residency import describe

    if pipe.places is None:
        return
    batch = max(len(b) for b in _batches([r.size for r in request], batch_size))
    tokens = max(r.size[0] * r.size[1] for r in request) // resolution.TOKEN_PIXELS**2
    console.print(escape(describe(pipe.sizes(tokens, batch, guidance != 1.0), pipe.places.residency)))


def _device(text: str | None) -> Any:
    import torch

    if text is None:
        return None
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f'--device must be "cpu", "cuda" or "cuda:N", got {text!r}')
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {text}: torch sees {torch.cuda.device_count()} CUDA devices here; `lens doctor` says why"
        )
    return device


def _model_name(source: str) -> str:
    """How a recipe names the weights; see `pictures.Recipe`."""
    if source in checkpoint.EMBEDDED or not Path(source).is_dir():
        return source
    return Path(source).resolve().name


def _same_checkpoint(recipe: pictures.Recipe, pipe: LensPipeline, like: Path | None, explicit: bool) -> None:
    """Other weights draw another picture: refused, unless the user named those weights himself."""
    if pipe.fingerprint != recipe.fingerprint:
        theirs, ours = recipe.fingerprint[:12], str(pipe.fingerprint)[:12]
        what = f"{like} was drawn by other weights (fingerprint {theirs}, here {ours})"
        if not explicit:
            raise checkpoint.CheckpointError(f"{what}; --model names the weights to use")
        warnings.warn(f"{what}: this will be another picture", stacklevel=2)
    elif recipe.version != __version__:
        warnings.warn(f"{like} was drawn by version {recipe.version}, this is {__version__}", stacklevel=2)


@contextmanager
def _few_threads(pipe: LensPipeline, request: Sequence[_Item]) -> Iterator[int]:
    """One CPU thread for work that more could not speed up, unless OMP_NUM_THREADS says otherwise.

    Threads meet at every operation. Where one operation takes microseconds they bring nothing, and where the cores are
    busy with something else each meeting waits for the scheduler: measured 100 times slower. Yields the number in use.
    """
    import torch

    tokens = max(r.size[0] * r.size[1] for r in request) // resolution.TOKEN_PIXELS**2
    small = tokens * pipe.transformer.config.inner_dim <= _SMALL_WORK
    before = torch.get_num_threads()
    if small and pipe.device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def _summary(
    pipe: LensPipeline,
    request: Sequence[_Item],
    steps: int,
    guidance: float,
    threads: int,
    seconds: float,
    loading: float,
) -> None:
    sizes = sorted({r.size for r in request})
    what = " and ".join(f"{h}x{w}" for h, w in sizes) if len(sizes) < 4 else f"{len(sizes)} sizes"
    count = f"{len(request)} picture{'s' if len(request) > 1 else ''}"
    where = pipe.device.type
    if where == "cpu":
        where += f" with {threads} thread{'s' if threads > 1 else ''}"
    console.print(
        f"{count} of {what} drawn in {seconds:.1f} s, {seconds / len(request):.2f} s each ({steps} steps, guidance "
        f"{guidance:g}, {where}, {str(pipe.dtype).removeprefix('torch.')}); loading took {loading:.1f} s",
        markup=False,
    )


# ------------------------------------------------------------------------------------------------ doctor


@app.command()
def doctor(
    model: Annotated[str, typer.Option("--model", "-m", help="Weights for the picture of the self-test.")] = "mini",
    device: Annotated[str | None, typer.Option("--device", help=DEVICE, show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Say what runs here, why, and whether it is right.

    Devices, the compiled extension, each op's backend and the reason, packages, then a self-test of about ten seconds:
    every op against its specification and one small picture. Exit code 1 when something is broken.
    """
    from . import doctor as examination

    with _clean_exits([]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with console.status("examining") if not as_json else _nothing():
            findings = examination.examine(model, _device(device))
        typer.echo(examination.as_json(findings) if as_json else examination.as_text(findings))
        if examination.broken(findings):
            raise typer.Exit(1)


# ------------------------------------------------------------------------------------------------ terminal


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _clean_exits(saved: Sequence[Path]) -> Iterator[None]:
    """User mistakes and failures become one line and an exit code; anything else is a bug and keeps its traceback."""
    import torch

    def leave(message: str, code: int) -> NoReturn:
        console.print(f"[bold red]error:[/bold red] {escape(' '.join(message.split()))}")
        raise typer.Exit(code) from None

    try:
        yield
    except KeyboardInterrupt:
        kept = f"; {len(saved)} finished pictures kept" if saved else ""
        console.print(f"interrupted{kept}", markup=False)
        raise typer.Exit(130) from None
    except UsageError as error:
        leave(str(error), 2)
    except torch.OutOfMemoryError as error:
        leave(f"out of memory: try a smaller --batch-size or size ({str(error).splitlines()[0]})", 1)
    except BrokenPipeError:
        raise
    except (checkpoint.CheckpointError, pictures.RecipeError, FloatingPointError, ImportError, MemoryError) as error:
        leave(str(error), 1)
    except ValueError as error:  # what only the model could refuse, a size or a truncation
        leave(_flag_names(str(error)), 2)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        leave(f"{place}{error.strerror or error}", 1)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "lens.ops" not in str(error):
            raise
        leave(str(error).splitlines()[0], 1)


@contextmanager
def _notices(quiet: bool) -> Iterator[None]:
    """Warnings of ours as one line each; the libraries' own about their future stay out of the way."""
    seen: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning) and str(message) not in seen and not quiet:
            seen.add(str(message))
            console.print(f"[yellow]note:[/yellow] {escape(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


@contextmanager
def _step_progress(total: int, quiet: bool) -> Iterator[Any]:
    """A callback for the pipeline that shows each step: a bar on a terminal, else a line every ten seconds."""
    if quiet:
        yield None
        return
    if not console.is_terminal:
        done, last = 0, time.monotonic()

        def line(*_: Any) -> dict[str, Any]:
            nonlocal done, last
            done += 1
            if time.monotonic() - last > _PLAIN_PROGRESS_SECONDS:
                last = time.monotonic()
                console.print(f"step {done}/{total}", markup=False)
            return {}

        yield line
        return
    columns = (
        TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("drawing", total=total)

        def bar(*_: Any) -> dict[str, Any]:
            progress.advance(task)
            return {}

        yield bar


if __name__ == "__main__":
    main()
