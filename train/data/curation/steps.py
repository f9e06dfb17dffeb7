"""The cleaning steps that need no model, each a pure function of one image's work: read, decode, scores, inputs of models.

    read      the encoded bytes: of a file, a tar's member, a URL
    decode    step 1, broken files, by decoding all of them; step 2, the size in pixels
    score     steps 6 to 8: clarity, entropy, luminance
    prepare   what the classifiers of steps 3 to 5 and 9 will look at

They run in this order, cheapest first and one decode for all; the report counts in the paper's order. A step that cannot go
on sets `failure` and the later ones leave the work as it is, so that a record has one reason at most.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lens.ops import image_scores

from ..images import Unusable, decoded
from ..sources import caption_beside
from .classifiers import Classifier
from .fetch import FetchLimits, Unreachable, fetch
from .records import Item, Record

MOST_PIXELS = 178_956_970  # Pillow refuses more by itself
ANIMATED = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")  # in which a second frame is another image; an MPO's is a preview


@dataclass(frozen=True)
class Limits:
    """bytes: of an encoded image; pixels: of a decoded one; seconds, allow_private: see `FetchLimits`."""

    bytes: int = 64 << 20
    pixels: int = 1 << 26
    seconds: float = 30.0
    allow_private: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.pixels <= MOST_PIXELS:
            raise ValueError(f"--max-pixels {self.pixels}: expected 1 to {MOST_PIXELS}")
        if self.bytes < 1 or self.seconds <= 0:
            raise ValueError("--max-bytes and --max-seconds: expected more than 0")

    @property
    def of_fetching(self) -> FetchLimits:
        return FetchLimits(self.bytes, self.seconds, self.allow_private)


@dataclass
class Work:
    """A record on its way, with what later steps need of it and no file keeps."""

    record: Record
    data: bytes | None = None
    image: Any = None  # Pillow's, RGB, upright
    inputs: dict[str, np.ndarray] = field(default_factory=dict)  # of the classifiers, by name

    def failed(self, why: str) -> Work:
        return Work(self.record.with_(failure=" ".join(why.split())))

    def with_(self, **changes: Any) -> Work:
        return dataclasses.replace(self, record=self.record.with_(**changes))


def read(item: Item, root: Path, source: str, licence: str, limits: Limits) -> Work:
    """The encoded bytes of an item, with what is known of them."""
    record = Record(
        item.key, source, licence, "source", item.path, item.member, item.offset, item.size, item.url, item.caption
    )
    work = Work(record)
    if item.fault is not None:
        return work.failed(item.fault)
    try:
        if item.url is not None:
            data = fetch(item.url, limits.of_fetching)
        else:
            data = _bytes_of(item, root, limits)
    except Unreachable as error:
        return work.failed(f"not fetched: {error}")
    except OSError as error:
        return work.failed(f"cannot be read: {error.strerror or error}")
    except Unusable as error:
        return work.failed(str(error))
    if not data:
        return work.failed("empty file").with_(byte_count=0)
    caption = item.caption
    if caption is None and item.path is not None and item.member is None:
        try:
            caption = caption_beside(root / item.path)
        except (Unusable, OSError):
            caption = None
    known = {"byte_count": len(data), "sha256": hashlib.sha256(data).hexdigest(), "caption": caption}
    return Work(record.with_(**known), data)


def _bytes_of(item: Item, root: Path, limits: Limits) -> bytes:
    assert item.path is not None, "an item has a path or a url"
    path = root / item.path
    if item.offset is None:
        if not path.exists():
            raise Unusable("cannot be read: no such file")
        if not path.is_file():
            raise Unusable("cannot be read: not a file")
        if (size := path.stat().st_size) > limits.bytes:
            raise Unusable(f"{size} bytes, more than {limits.bytes}")
        return path.read_bytes()
    assert item.size is not None, "a member of a tar has a size"
    if item.size > limits.bytes:
        raise Unusable(f"{item.size} bytes, more than {limits.bytes}")
    with path.open("rb") as stream:
        stream.seek(item.offset)
        data = stream.read(item.size)
    if len(data) < item.size:
        raise Unusable(f"its tar ends after {len(data)} of {item.size} bytes")
    return data


def decode(work: Work, limits: Limits) -> Work:
    """Step 1 and the size for step 2: the whole image in RGB, upright. Broken is what cannot be decoded to its last row, has
    more pixels than the limit, or more than one frame: an animation is not an image."""
    if work.data is None:
        return work
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of EXIF, palettes, sizes between our limit and Pillow's
            with Image.open(io.BytesIO(work.data)) as header:
                form, mode, size = header.format, header.mode, header.size
                frames = getattr(header, "n_frames", 1) if header.format in ANIMATED else 1
            if size[0] * size[1] > limits.pixels:
                return work.failed(f"{size[0]} x {size[1]} pixels, more than {limits.pixels}").with_(
                    format=form, mode=mode
                )
            if frames > 1:
                return work.failed(f"animated: {frames} frames").with_(format=form, mode=mode)
            image = decoded(work.data)
    except Unusable as error:
        return work.failed(f"not decoded: {error}")
    except Image.UnidentifiedImageError:
        return work.failed("not decoded: not an image")
    except Exception as error:  # decoders of rare formats raise what they like
        return work.failed(f"not decoded: {error or type(error).__name__}")
    known = work.record.with_(format=form, mode=mode, width=image.width, height=image.height)
    return Work(known, work.data, image)


def score(work: Work) -> Work:
    """Steps 6 to 8."""
    if work.image is None:
        return work
    found = image_scores(torch.from_numpy(np.array(work.image)))
    return work.with_(clarity=found.clarity, entropy=found.entropy, luminance=found.luminance)


def prepare(work: Work, classifiers: Mapping[str, Classifier]) -> Work:
    """What each classifier looks at, once for those that share a backbone, and no longer the image."""
    if work.image is None:
        return work
    seen = {id(one.backbone): one.backbone for one in classifiers.values()}
    prepared = {key: backbone.prepare(work.image) for key, backbone in seen.items()}
    return Work(work.record, work.data, None, {use: prepared[id(one.backbone)] for use, one in classifiers.items()})
