"""lens generate | doctor: the command line.

Exit codes: 0 done, 1 failed (a checkpoint, the disk, memory), 2 a mistake in the command, 3 a reasoner refused a prompt
(the others are drawn), 130 interrupted. Paths of pictures go to stdout, one per line; progress and notices to stderr.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer
from rich.markup import escape

from .. import __version__
from ..config import MAX_IMAGES, MAX_STEPS
from ..formats.files import CheckpointError, is_there
from ..formats.hub import EMBEDDED
from . import options
from .options import DType, Residence, Solver, Truncation, Variant

# What imports torch is imported where it is used: --help and --version need not wait for it.
if TYPE_CHECKING:
    from .. import image_file
    from ..pipeline import LensPipeline

app = typer.Typer(
    name="lens",
    help="Turn prompts into pictures with the Lens diffusion transformer.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


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


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="One or more prompts.")] = None,
    file: Annotated[str | None, _what("--file", "-f", help=options.FILE)] = None,
    negative: Annotated[str | None, _what("--negative", help="What the pictures should not show.")] = None,
    like: Annotated[Path | None, _what("--like", metavar="PICTURE.png", help=options.LIKE)] = None,
    images_per_prompt: Annotated[
        int | None, _what("--images-per-prompt", "-n", min=1, max=MAX_IMAGES, help=options.PER_PROMPT)
    ] = None,
    seed: Annotated[str | None, _what("--seed", "-s", metavar="INT[,INT...]", help=options.SEED)] = None,
    reason: Annotated[bool, _what("--reason", help=options.REASON)] = False,
    reasoner: Annotated[str | None, _what("--reasoner", metavar="URL", help=options.REASONER)] = None,
    reasoner_model: Annotated[str | None, _what("--reasoner-model", help=options.REASONER_MODEL)] = None,
    reasoner_prompt: Annotated[str | None, _what("--reasoner-prompt", help=options.REASONER_PROMPT)] = None,
    size: Annotated[list[str] | None, _how("--size", metavar="WxH", help=options.SIZE)] = None,
    height: Annotated[int | None, _how("--height", help="Height in pixels; needs --width.")] = None,
    width: Annotated[int | None, _how("--width", help="Width in pixels; needs --height.")] = None,
    base: Annotated[int | None, _how("--base", help=options.BASE)] = None,
    aspect: Annotated[str | None, _how("--aspect", metavar="W:H", help="From 1:2 to 2:1; needs --base.")] = None,
    steps: Annotated[
        int | None, _how("--steps", min=1, max=MAX_STEPS, help="Denoising steps (default: the model's).")
    ] = None,
    guidance: Annotated[float | None, _how("--guidance", "-g", min=0.0, help=options.GUIDANCE)] = None,
    solver: Annotated[Solver | None, _how("--solver", help=options.SOLVER)] = None,
    chat_date: Annotated[str | None, _how("--chat-date", metavar="YYYY-MM-DD", help=options.CHAT_DATE)] = None,
    truncation: Annotated[Truncation | None, _how("--truncation", help=options.TRUNCATION)] = None,
    output: Annotated[Path | None, _files("--output", "-o", metavar="FILE.png|FOLDER", help=options.OUTPUT)] = None,
    name: Annotated[str | None, _files("--name", help=options.NAME)] = None,
    sheet: Annotated[Path | None, _files("--sheet", metavar="FILE.png", help="Also write a contact sheet.")] = None,
    scale: Annotated[int | None, _files("--scale", min=1, max=64, help=options.SCALE)] = None,
    model: Annotated[str | None, _where("--model", "-m", help=options.MODEL)] = None,
    variant: Annotated[Variant | None, _where("--variant", help=options.VARIANT)] = None,
    transformer: Annotated[
        Path | None, _where("--transformer", metavar="FILE|FOLDER", help=options.TRANSFORMER)
    ] = None,
    text_encoder: Annotated[
        Path | None, _where("--text-encoder", metavar="FILE|FOLDER", help=options.TEXT_ENCODER)
    ] = None,
    vae: Annotated[Path | None, _where("--vae", metavar="FILE|FOLDER", help=options.VAE)] = None,
    tokenizer: Annotated[Path | None, _where("--tokenizer", metavar="FILE|FOLDER", help=options.TOKENIZER)] = None,
    weights_variant: Annotated[
        str | None, _where("--weights-variant", metavar="NAME", help=options.WEIGHTS_VARIANT)
    ] = None,
    revision: Annotated[str | None, _where("--revision", metavar="NAME", help=options.REVISION)] = None,
    lora: Annotated[list[Path] | None, _where("--lora", metavar="FILE|FOLDER", help=options.LORA)] = None,
    lora_scale: Annotated[list[float] | None, _where("--lora-scale", help=options.LORA_SCALE)] = None,
    device: Annotated[str | None, _where("--device", help=options.DEVICE)] = None,
    dtype: Annotated[DType | None, _where("--dtype", help=options.DTYPE)] = None,
    residency: Annotated[Residence | None, _where("--residency", help=options.RESIDENCY)] = None,
    memory: Annotated[float | None, _where("--memory", metavar="GB", help=options.MEMORY)] = None,
    batch_size: Annotated[int | None, _where("--batch-size", min=1, help=options.BATCH)] = None,
    as_json: Annotated[bool, _files("--json", help=options.JSON)] = False,
    quiet: Annotated[bool, _where("--quiet", "-q", help="Print the pictures' paths only.")] = False,
) -> None:
    """Draw pictures from prompts.

    [bold]lens generate "a red apple" -o apple.png[/bold]

    Every picture carries its recipe; [bold]lens generate --like apple.png[/bold] draws it again.
    """
    from .. import image_file
    from ..reasoner import Refused
    from ..request import joined
    from . import reason as cli_reason
    from . import request as cli_request
    from . import terminal
    from .request import UsageError

    saved: list[Path] = []
    with terminal.clean_exits(saved), terminal.notices(quiet):
        if like is not None and not is_there(like):  # as for --file: a mistake in the line, not a broken picture
            raise UsageError(f"--like {terminal.printable(str(like))}: file not found")
        recipe = image_file.read_recipe(like) if like is not None else None
        lines = cli_request.parse(
            prompts, file, negative, recipe, images_per_prompt, seed, (size, height, width, base, aspect)
        )
        chat_day = cli_request.chat_date(chat_date, recipe)
        cut = truncation.value if truncation else recipe.truncation if recipe else Truncation.reference.value
        way = solver.value if solver else recipe.solver if recipe else Solver.euler.value
        if way not in Solver.__members__:
            known = ", ".join(Solver.__members__)
            raise image_file.RecipeError(f"the recipe names the solver {way!r}, expected one of {known}")
        if guidance is not None and not math.isfinite(guidance):
            raise UsageError(f"--guidance must be a finite number, got {guidance}")
        if memory is not None and residency is not None:
            raise UsageError("give only one of --memory and --residency")
        if memory is not None and not 0 < memory < math.inf:
            raise UsageError(f"--memory must be a positive number of GB, got {memory:g}")
        reasoning = cli_reason.asked(reason, reasoner, reasoner_model, reasoner_prompt)
        adapters = cli_request.loras(lora, lora_scale, recipe)
        texts, seeds = [str(r.prompt) for r in lines], [cast(int, r.seed) for r in lines]
        paths = cli_request.paths(output, name, texts, seeds)
        if scale is not None and sheet is None:
            raise UsageError("--scale enlarges pictures of the contact sheet: give --sheet, too")
        if sheet is not None and sheet.suffix.lower() != ".png":
            raise UsageError(f"--sheet must name a .png file, got {str(sheet)!r}")
        cli_request.check_names(paths, sheet)
        cli_request.make_folders([*paths, *([sheet] if sheet else [])])

        began = time.perf_counter()
        elsewhere = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae, "tokenizer": tokenizer}
        pipe = _load(
            model, variant, device, dtype, recipe, quiet, residency, elsewhere, weights_variant, revision, memory
        )
        for adapter, factor in adapters:
            pipe.load_lora(adapter, factor)
        pipe.set_progress_bar_config(disable=True)  # the command has its own, for all batches
        loaded = time.perf_counter()
        if recipe is not None:
            _same_checkpoint(recipe, pipe, like, explicit=bool(model or transformer))
            _same_machine(recipe, pipe, like)
        wishes, sources = [""] * len(lines), [""] * len(lines)
        if recipe is not None and not (prompts or file):
            wishes, sources = [recipe.wish] * len(lines), [recipe.reasoner] * len(lines)
        refused = False
        if reasoning is not None:
            told = cli_reason.reasoned(reasoning, pipe, [w or t for w, t in zip(wishes, texts)], quiet)
            refused = any(isinstance(answer, Refused) for answer in told)
            left = [(k, answer) for k, answer in enumerate(told) if not isinstance(answer, Refused)]
            lines = [replace(lines[k], prompt=answer.prompt) for k, answer in left]
            paths, seeds = [paths[k] for k, _ in left], [seeds[k] for k, _ in left]
            texts, wishes = [answer.prompt for _, answer in left], [answer.wish for _, answer in left]
            sources = [answer.described for _, answer in left]
            if not left:
                raise typer.Exit(3)
        # an explicit --variant brings its own steps and guidance; otherwise the recipe's hold
        kept = recipe if variant is None else None
        n_steps = steps if steps is not None else kept.steps if kept else pipe.defaults.num_inference_steps
        strength = guidance if guidance is not None else kept.guidance if kept else pipe.defaults.guidance_scale
        common: dict[str, Any] = {"truncation": cut, "chat_date": chat_day, "solver": way}
        common |= {"num_inference_steps": n_steps, "guidance_scale": strength}
        requests = [replace(r, **common).resolved(pipe.defaults) for r in lines]
        sizes = [pair for r in requests for pair in r.sizes or ()]
        if not quiet:
            terminal.sizes_drawn(sizes)
        if memory is not None:
            terminal.fit(pipe, memory, sizes, batch_size, strength)
        if (residency or memory) is not None and not quiet:
            terminal.residency_plan(pipe, sizes, batch_size, strength)

        drawn: list[Any] = []
        batches = cli_request.batched(sizes, batch_size)
        machine = image_file.Machine.here(pipe.device, pipe.threads)
        with terminal.step_progress(len(batches) * n_steps, quiet) as advance:
            for batch in batches:
                together = joined([requests[k] for k in batch], [seeds[k] for k in batch])
                for k, image in zip(batch, pipe.draw(together, advance, ()).images):
                    made = image_file.Recipe(
                        prompt=texts[k],
                        negative=str(lines[k].negative_prompt),
                        seed=seeds[k],
                        steps=n_steps,
                        guidance=float(strength),
                        size=sizes[k],
                        variant=pipe.defaults.variant,
                        chat_date=chat_day,
                        truncation=cut,
                        solver=way,
                        model=_model_name(str(transformer or model or (recipe.model if recipe else "mini"))),
                        dtype=str(pipe.dtype).removeprefix("torch."),
                        version=__version__,
                        fingerprint=pipe.fingerprint or "",
                        loras=tuple(pipe.loras),
                        threads=machine.threads,
                        hardware=machine.hardware,
                        torch_version=machine.torch_version,
                        wish=wishes[k],
                        reasoner=sources[k],
                    )
                    image_file.save_png(image, paths[k], made)
                    saved.append(paths[k])
                    typer.echo(made.to_json(path=str(paths[k])) if as_json else paths[k])
                    if sheet is not None:
                        drawn.append(image)
        seconds = time.perf_counter() - loaded
        if sheet is not None:
            captions = [f"{wish or text}\nseed {number}" for wish, text, number in zip(wishes, texts, seeds)]
            image_file.save_png(image_file.contact_sheet(drawn, captions, scale), sheet)
            if not as_json:
                typer.echo(sheet)
        if not quiet:
            terminal.summary(pipe, sizes, n_steps, strength, machine.threads, seconds, loaded - began)
        if refused:
            raise typer.Exit(3)


# ------------------------------------------------------------------------------------------------ model


def _load(
    model: str | None,
    variant: Variant | None,
    device: str | None,
    dtype: DType | None,
    recipe: image_file.Recipe | None,
    quiet: bool,
    residency: Residence | None = None,
    elsewhere: Mapping[str, Any] | None = None,  # part -> its path
    weights_variant: str | None = None,
    revision: str | None = None,
    memory: float | None = None,
) -> LensPipeline:
    import torch

    from .. import image_file
    from ..pipeline import LensPipeline
    from . import terminal
    from .request import UsageError

    source = model
    if source is None:
        moved = (elsewhere or {}).get("transformer") is not None
        source = recipe.model if recipe and not moved else "mini"
        if recipe and source not in EMBEDDED:  # a file from elsewhere opens no path and fetches nothing
            what = "the hub id" if "/" in source else "a folder named"
            raise UsageError(f"the picture was drawn by weights in {what} {source!r}: give it with --model")
    where = _device(device)
    kind = variant.value if variant else recipe.variant if recipe else None
    number_type = dtype.value if dtype else recipe.dtype if recipe else None
    for value, known in ((kind, Variant), (number_type, DType)):
        if value is not None and value not in known.__members__:
            raise image_file.RecipeError(f"the recipe names {value!r}, expected one of {', '.join(known.__members__)}")
    with terminal.console.status(f"loading {escape(terminal.printable(source))}") if not quiet else terminal.nothing():
        return LensPipeline.from_pretrained(
            source,
            variant=kind,
            device=where,
            dtype=getattr(torch, number_type) if number_type else None,
            residency=residency.value if residency else None,
            weights_variant=weights_variant,
            revision=revision,
            memory=memory,
            **(elsewhere or {}),
        )


def _device(text: str | None) -> Any:
    import torch

    from .request import UsageError

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
    """How a recipe names the weights; see `image_file.Recipe`."""
    if source in EMBEDDED or not Path(source).exists():
        return source
    return Path(source).resolve().name


def _same_checkpoint(recipe: image_file.Recipe, pipe: LensPipeline, like: Path | None, explicit: bool) -> None:
    """Other weights draw another picture: refused, unless the user named those weights himself."""
    if pipe.fingerprint != recipe.fingerprint:
        drawn_with, loaded = recipe.fingerprint[:12], str(pipe.fingerprint)[:12]
        what = f"{like} was drawn by other weights (fingerprint {drawn_with}, here {loaded})"
        if not explicit:
            raise CheckpointError(f"{what}; --model names the weights to use")
        warnings.warn(f"{what}: this will be another picture", stacklevel=2)
    elif recipe.version != __version__:
        warnings.warn(f"{like} was drawn by version {recipe.version}, this is {__version__}", stacklevel=2)
    if [digest for _, digest, _ in pipe.loras] != [digest for _, digest, _ in recipe.loras]:
        names = ", ".join(name for name, _, _ in recipe.loras) or "no LoRA"
        warnings.warn(f"{like} was drawn with {names}, not with these: this will be another picture", stacklevel=2)


def _same_machine(recipe: image_file.Recipe, pipe: LensPipeline, like: Path | None) -> None:
    """Redraw on as many threads as the picture was drawn on, and say what else may change its last bits."""
    import torch

    from .. import image_file

    if recipe.threads and pipe.threads != recipe.threads:
        torch.set_num_threads(recipe.threads)
    if differing := recipe.machine.differences(image_file.Machine.here(pipe.device, pipe.threads)):
        warnings.warn(f"{like} was drawn with {differing}: the last bits may differ", stacklevel=2)


# ------------------------------------------------------------------------------------------------ doctor


@app.command()
def doctor(
    model: Annotated[str, typer.Option("--model", "-m", help="Weights for the picture of the self-test.")] = "mini",
    device: Annotated[str | None, typer.Option("--device", help=options.DEVICE, show_default=False)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Say what runs here, why, and whether it is right.

    Devices, the compiled extension, each op's backend and the reason, packages, then a self-test of about ten seconds:
    every op against its specification and one small picture. Exit code 1 when something is broken.
    """
    from ..doctor import findings as report
    from ..doctor import report as examination
    from . import terminal

    with terminal.clean_exits([]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with terminal.console.status("examining") if not as_json else terminal.nothing():
            findings = examination.examine(model, _device(device))
        typer.echo(report.as_json(findings) if as_json else terminal.printable(report.as_text(findings)))
        if report.broken(findings):
            raise typer.Exit(1)


if __name__ == "__main__":
    app(prog_name="lens")
