"""Reading all images of a text benchmark, a part at a time: what was read, or why it was not, for each of a prompt's images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from .chat_judges import Reader
from .drawing import Ask, read_image
from .judging import Column, Progress

TOGETHER = 16  # prompts whose images are read in one call

Texts = list[tuple[str, str | None, str]]  # file, what was read or None, why not


def read_all(
    reader: Reader,
    asks: Sequence[Ask],
    folder: Path,
    column: Column,
    limit: Callable[[Ask], int],
    images_of: Callable[[Ask], Sequence[tuple[str, np.ndarray | None]]] | None = None,
) -> Iterator[tuple[Ask, Texts]]:
    """Each prompt with its images' texts; counts judgements and failures as `column`'s "text", and ends where too many failed.

    images_of: file and image of each of a prompt's images (default: its files). limit: tokens of a prompt's texts.
    """
    count, progress = column.count("text", sum(len(ask.files) for ask in asks)), Progress("text", len(asks))

    def files(ask: Ask) -> list[tuple[str, np.ndarray | None]]:
        out: list[tuple[str, np.ndarray | None]] = []
        for file in ask.files:
            try:
                out.append((file, read_image(folder / file)))
            except ValueError:
                out.append((file, None))
        return out

    for k in range(0, len(asks), TOGETHER):
        if not count.goes_on():
            return
        part = [(ask, list((images_of or files)(ask))) for ask in asks[k : k + TOGETHER]]
        for tokens in sorted({limit(ask) for ask, _ in part}):
            own = [(ask, shown) for ask, shown in part if limit(ask) == tokens]
            found = iter(reader.read([image for _, shown in own for _, image in shown if image is not None], tokens))
            for ask, shown in own:
                texts: Texts = []
                for file, image in shown:
                    text = ValueError("no such image, or none that can be read") if image is None else next(found)
                    count.judged += 1
                    count.missing += not isinstance(text, str)
                    texts.append((file, text, "") if isinstance(text, str) else (file, None, str(text)))
                progress()
                yield ask, texts
