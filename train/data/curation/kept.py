"""What a curation keeps, as sources of shards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..sources import CuratedPicture, key_of
from .manifest import Curation


def kept_of(
    folder: Path, captions: dict[str, str] | None, out: list[tuple[str, str]], workers: int = 0
) -> Iterator[tuple[CuratedPicture, int, int]]:
    """Images that the latest manifest keeps and that have a caption, in its order, with height and width; those without a
    caption go to `out`. No image is opened: the manifest knows its size.

    captions: by the record's key, instead of its own. Errors: those of `Curation`.
    """
    curation, taken = Curation(folder), set[str]()
    for record in curation.records(np.flatnonzero(curation.view().kept)):
        caption = (record.caption or "") if captions is None else captions.get(record.key, "")
        if not caption.strip():
            out.append((record.key, "no caption"))
            continue
        key = key_of(record.key, taken)
        taken.add(key)
        root = str(folder.resolve()) if record.root == "out" else str(curation.manifest["root"])
        path, size = str(record.path), int(record.byte_count or 0)
        suffix = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif"}.get(str(record.format), str(record.format).lower())
        content = (suffix, record.offset, size, str(record.sha256), record.source, record.licence)
        picture = CuratedPicture(root, path, record.key, key, caption.strip(), *content)
        yield picture, int(record.height or 0), int(record.width or 0)
