"""What the commands show on a terminal: progress, notices, summaries, and how a failure ends."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from .. import image_file, resolution
from ..chat_client import ChatError
from ..formats.files import CheckpointError
from ..notices import printable
from .request import UsageError, batched, flag_names

if TYPE_CHECKING:
    from ..pipeline import LensPipeline

_PLAIN_PROGRESS_SECONDS = 10.0  # between lines of progress where stderr is no terminal


class Terminal(Console):
    """A console on which every text is printable."""

    def render_str(self, text: str, **how: Any) -> Text:
        return super().render_str(printable(text), **how)


console = Terminal(stderr=True, highlight=False, soft_wrap=True)


@contextmanager
def nothing() -> Iterator[None]:
    yield


@contextmanager
def clean_exits(saved: Sequence[Path]) -> Iterator[None]:
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
    except (CheckpointError, ChatError, image_file.RecipeError, FloatingPointError, ImportError, MemoryError) as error:
        leave(str(error), 1)
    except ValueError as error:  # what only the model could refuse, a size or a truncation
        leave(flag_names(str(error)), 2)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        leave(f"{place}{error.strerror or error}", 1)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and "lens.ops" not in str(error):
            raise
        leave(str(error).splitlines()[0], 1)


@contextmanager
def notices(quiet: bool) -> Iterator[None]:
    """Warnings of this package as one line each; deprecation warnings of libraries are not shown."""
    seen: set[str] = set()

    record_of = logging.getLogRecordFactory()

    def printable_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        """What libraries log about a file quotes the file."""
        record = record_of(*args, **kwargs)
        record.msg, record.args = printable(record.getMessage()), ()
        return record

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, UserWarning) and str(message) not in seen and not quiet:
            seen.add(str(message))
            console.print(f"[yellow]note:[/yellow] {escape(str(message))}")

    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        logging.setLogRecordFactory(printable_record)
        try:
            yield
        finally:
            logging.setLogRecordFactory(record_of)


@contextmanager
def step_progress(total: int, quiet: bool) -> Iterator[Any]:
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


def residency_plan(
    pipe: LensPipeline, sizes: Sequence[tuple[int, int]], batch_size: int | None, guidance: float
) -> None:
    """Where the parts live and the memory predicted for the largest of these pictures, as one line."""
    from ..engine.residency import describe

    if pipe.placement is None:
        return
    work = _largest(sizes, batch_size, guidance)
    console.print(escape(describe(pipe.sizes(**work), pipe.placement.residency)))


def fit(
    pipe: LensPipeline, memory: float, sizes: Sequence[tuple[int, int]], batch_size: int | None, guidance: float
) -> None:
    """The residency for ``memory`` GB at the largest of these pictures, which may be larger than loading foresaw."""
    pipe.set_residency("auto", memory=memory, **_largest(sizes, batch_size, guidance))


def _largest(sizes: Sequence[tuple[int, int]], batch_size: int | None, guidance: float) -> dict[str, Any]:
    """What the largest of these pictures' batches is, as a pipeline's ``sizes`` asks."""
    batch = max(len(b) for b in batched(sizes, batch_size))
    tokens = max(h * w for h, w in sizes) // resolution.TOKEN_PIXELS**2
    return {"image_tokens": tokens, "images": batch, "guided": guidance != 1.0}


def sizes_drawn(sizes: Sequence[tuple[int, int]]) -> None:
    """Every size that is not square, once, in words: which of two numbers is the width differs from tool to tool."""
    for h, w in dict.fromkeys(sizes):
        if h != w:
            console.print(f"width {w}, height {h}", markup=False)


def summary(
    pipe: LensPipeline,
    drawn: Sequence[tuple[int, int]],
    steps: int,
    guidance: float,
    threads: int,
    seconds: float,
    loading: float,
) -> None:
    sizes = sorted(set(drawn))
    what = " and ".join(f"{w}x{h}" for h, w in sizes) if len(sizes) < 4 else f"{len(sizes)} sizes"
    count = f"{len(drawn)} picture{'s' if len(drawn) > 1 else ''}"
    where = pipe.device.type
    if where == "cpu":
        where += f" with {threads} thread{'s' if threads > 1 else ''}"
    console.print(
        f"{count} of {what} drawn in {seconds:.1f} s, {seconds / len(drawn):.2f} s each ({steps} steps, guidance "
        f"{guidance:g}, {where}, {str(pipe.dtype).removeprefix('torch.')}); loading took {loading:.1f} s",
        markup=False,
    )
