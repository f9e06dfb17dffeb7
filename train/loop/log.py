"""A stage's record: one JSON object per line, appended and flushed, a short line on the terminal, and TensorBoard's copy.

The JSONL file is the record. Where the package `tensorboard` is installed (extra `[train]`), every number and every sheet
also goes to the folder `tensorboard` beside it: `tensorboard --logdir runs`.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@functools.cache
def _writer_type() -> Any:
    """torch's SummaryWriter, or None after one line that says why."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:  # torch names whichever of its parts is missing
        print(
            f"TensorBoard is off ({error}): pip install -e '.[train]' from a checkout turns it on; log.jsonl holds the same numbers",
            file=sys.stderr,
            flush=True,
        )
        return None
    return SummaryWriter


class JsonLog:
    """`log(step=10, loss=.5)` appends {"time": seconds since the epoch, ...} to `path` and prints it.

    A value that is text ("part": "decoder") names the TensorBoard run inside the folder that the row's numbers belong to.
    """

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        cut = path.is_file() and path.read_bytes()[-1:] not in (b"", b"\n")
        self.path = path
        self.file = open(path, "a")  # noqa: SIM115 (open for the life of the run)
        if cut:  # a killed run's last line: what follows starts a line of its own
            self.file.write("\n")
        self._writers: dict[str, Any] = {}

    def __call__(self, **values: float | int | str) -> None:
        self.record(values)

    def record(self, values: Mapping[str, float | int | str], shown: Sequence[str] | None = None) -> None:
        """The same for names that are no words of Python. shown: what the terminal's line has of them; default: all."""
        rounded = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in values.items()}
        try:
            self.file.write(json.dumps({"time": round(time.time(), 1), **rounded}) + "\n")
            self.file.flush()
        except OSError as error:  # a full disk, without the name of what is on it
            raise OSError(error.errno, error.strerror, str(self.path)) from error
        line = rounded if shown is None else {k: rounded[k] for k in shown if k in rounded}
        print("  ".join(f"{k} {v}" for k, v in line.items()), file=sys.stderr, flush=True)
        step = int(rounded.get("step", 0))
        writer = self._writer(" ".join(str(v) for v in rounded.values() if isinstance(v, str)), step)
        if writer is not None:
            for name, value in rounded.items():
                if name != "step" and not isinstance(value, str):
                    writer.add_scalar(name, value, step)
            writer.flush()

    def image(self, name: str, path: Path, step: int) -> None:
        """Copy a written picture to TensorBoard."""
        writer = self._writer("", step)
        if writer is not None:
            with Image.open(path) as image:
                writer.add_image(name, np.asarray(image.convert("RGB")), step, dataformats="HWC")
            writer.flush()

    def _writer(self, run: str, step: int) -> Any:
        """The event writer of a run. A resumed stage takes up its own curves: what a killed one wrote from this step on is hidden."""
        kind = _writer_type()
        if kind is not None and run not in self._writers:
            self._writers[run] = kind(str(self.path.parent / "tensorboard" / run), purge_step=step)
        return self._writers.get(run)


def read_log(path: Path) -> list[dict[str, Any]]:
    """The objects of a log in order. A line cut by a kill is left out."""
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:  # no JSON, or bytes that are no text
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


class Progress:
    """A bar with the steps, the loss and the time left, where stderr is a terminal; elsewhere the log's own lines say it."""

    def __init__(self, name: str, start: int, total: int, enabled: bool = True):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        hidden = not (enabled and console.is_terminal)
        self.bar = Bar(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=hidden)
        self.task = self.bar.add_task(name, total=total, completed=start, loss="")

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()

    def show(self, step: int, loss: float | None) -> None:
        self.bar.update(self.task, completed=step, loss="" if loss is None else f"loss {loss:.4g}")
