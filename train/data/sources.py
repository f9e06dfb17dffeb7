"""What shards are made of: pictures with captions in a folder, scenes of the small world."""

from __future__ import annotations

import functools
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import configs
from .buckets import Bucket, eligible, nearest_aspect
from .images import SUFFIXES, Unusable, decoded, oriented_size
from .shards import Sample


@dataclass(frozen=True)
class Picture:
    """A file of a folder. `stamp`: its size in bytes and time of change, so that a resumed build sees another file."""

    folder: str
    file: str
    key: str
    caption: str
    stamp: tuple[int, int]

    def sample(self) -> Sample:
        path = Path(self.folder, self.file)
        data = path.read_bytes()
        decoded(data)  # whole, so that a torn file is found now
        return Sample(self.key, data, path.suffix[1:].lower(), self.caption, {"source": self.file})


@dataclass(frozen=True)
class Drawing:
    """A scene of the small world at a bucket's size."""

    recipe: str
    split: str
    seed: int
    height: int
    width: int

    @property
    def key(self) -> str:
        return f"{self.split}_{self.seed:010d}_{self.height}x{self.width}"

    @property
    def file(self) -> str:
        return self.key

    def sample(self) -> Sample:
        from PIL import Image

        world = _world(self.recipe, self.split)
        scene, stream = world.scene(self.seed, self.height, self.width), io.BytesIO()
        Image.fromarray(world.render(scene)).save(stream, "PNG", compress_level=1)
        meta = {"source": f"world {self.recipe}", "task": scene.task, "language": scene.language, "seed": self.seed}
        return Sample(self.key, stream.getvalue(), "png", scene.caption, meta)


@functools.lru_cache(maxsize=2)
def _world(recipe: str, split: str) -> Any:
    return configs.world(recipe, split)


Source = Picture | Drawing


def fraction(key: str) -> float:
    """A key's place in [0, 1), by its hash alone: a subset below 1/4 lies within that below 1/2."""
    return int.from_bytes(hashlib.sha256(f"subset {key}".encode()).digest()[:8], "big") / 2.0**64


def key_of(file: str, taken: set[str]) -> str:
    """A file's path as a WebDataset key: no dot, plain characters, at most 80, unlike those taken."""
    stem = file.rpartition(".")[0]
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "_-/") else "_" for c in stem)
    if plain != stem or len(plain) > 80 or plain in taken:
        plain = f"{plain[:63].rstrip('/')}-{hashlib.sha256(file.encode()).hexdigest()[:16]}"
    return plain


def captions_of(path: Path) -> dict[str, str]:
    """A captions file. Errors: ValueError naming the line."""
    out = {}
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at U+2028 inside a caption
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8: {error}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            out[str(Path(entry["file"]))] = str(entry["caption"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f'{path}, line {number}: expected {{"file": ..., "caption": ...}}, got {line[:60]!r} ({error!r})'
            ) from None
    return out


def caption_beside(path: Path) -> str:
    """NAME.txt, or "caption" of NAME.json. Errors: Unusable."""
    try:
        if (text := path.with_suffix(".txt")).is_file():
            caption = text.read_text(encoding="utf-8-sig")  # some editors put a mark before the first letter
        elif (text := path.with_suffix(".json")).is_file():
            caption = json.loads(text.read_text(encoding="utf-8-sig"))["caption"]
        else:
            raise Unusable("no caption")
    except (ValueError, TypeError, KeyError) as error:
        raise error if isinstance(error, Unusable) else Unusable(f"no caption: {text.name}: {error!r}") from None
    if not isinstance(caption, str) or not caption.strip():
        raise Unusable("no caption")
    return caption.strip()


def images_of(
    folder: Path, captions: dict[str, str] | None, out: list[tuple[str, str]]
) -> Iterator[tuple[Picture, int, int]]:
    """Usable pictures of a folder in order of their names, with height and width; the others go to `out`, with the reason."""
    taken: set[str] = set()
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
        file = path.relative_to(folder).as_posix()
        try:
            if captions is None:
                caption = caption_beside(path)
            elif not (caption := captions.get(file, "").strip()):
                raise Unusable("no caption")
            height, width = oriented_size(path)
        except Unusable as error:
            out.append((file, str(error)))
            continue
        key, stat = key_of(file, taken), path.stat()
        taken.add(key)
        yield Picture(str(folder), file, key, caption, (stat.st_size, stat.st_mtime_ns)), height, width


def assign(
    height: int, width: int, bases: Sequence[int], aspects: Sequence[str], largest: bool, max_upscale: float = 1.0
) -> list[Bucket]:
    """The buckets a picture serves, largest base first."""
    aspect = nearest_aspect(height, width, aspects)
    offered = [Bucket(base, aspect) for base in sorted(bases, reverse=True)]
    fitting = [bucket for bucket in offered if eligible(height, width, bucket, max_upscale)]
    return fitting[:1] if largest else fitting
