"""What a curation keeps, as images to caption and as sources of shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..sources import CuratedPicture, key_of
from .manifest import Curation
from .records import Record


def kept_records(folder: Path) -> Iterator[tuple[Record, Path]]:
    """Records that the latest manifest keeps, in its order, and the folder below which the path of each lies.

    Errors: those of `Curation`.
    """
    curation = Curation(folder)
    for record in curation.records(np.flatnonzero(curation.view().kept)):
        yield record, folder.resolve() if record.root == "out" else Path(curation.manifest["root"])


def kept_of(
    folder: Path, captions: dict[str, str] | None, out: list[tuple[str, str]], workers: int = 0
) -> Iterator[tuple[CuratedPicture, int, int]]:
    """Images that the latest manifest keeps and that have a caption, in its order, with height and width; those without a
    caption go to `out`. No image is opened: the manifest knows its size.

    captions: by the record's key as `captions_of` spells it, instead of its own. Errors: those of `Curation`.
    """
    taken = set[str]()
    for record, root in kept_records(folder):
        caption = (record.caption or "") if captions is None else captions.get(str(Path(record.key)), "")
        if not caption.strip():
            out.append((record.key, "no caption"))
            continue
        key = key_of(record.key, taken)
        taken.add(key)
        path, size = str(record.path), int(record.byte_count or 0)
        suffix = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}.get(str(record.format), str(record.format).lower())
        content = (suffix, record.offset, size, str(record.sha256), record.source, record.licence)
        picture = CuratedPicture(str(root), path, record.key, key, caption.strip(), *content)
        yield picture, int(record.height or 0), int(record.width or 0)
