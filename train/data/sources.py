"""What shards are made of: pictures with captions in a folder, in WebDataset tars or in a curation, scenes of the small world."""

from __future__ import annotations

import functools
import hashlib
import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.arguments import shortened

from .. import configs
from .buckets import Bucket, eligible, nearest_aspect
from .images import SUFFIXES, Unusable, decoded, oriented_size
from .shards import Sample
from .tables import json_lines


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
class TarPicture:
    """A picture inside a WebDataset tar. `stamp`: of the tar."""

    folder: str
    tar: str
    file: str
    key: str
    caption: str
    offset: int
    size: int
    stamp: tuple[int, int]

    def sample(self) -> Sample:
        with Path(self.folder, self.tar).open("rb") as stream:
            stream.seek(self.offset)
            data = stream.read(self.size)
        decoded(data)  # whole, so that a torn file is found now
        suffix = self.file.rpartition(".")[2].lower()
        return Sample(self.key, data, suffix, self.caption, {"source": f"{self.tar}/{self.file}"})


@dataclass(frozen=True)
class CuratedPicture:
    """An image that a curation keeps: the file `path` below `folder`, or `size` bytes of it from `offset` on.

    file: the record's key; suffix: of the format that it was decoded as; sha256: of its bytes, so that another image under the
    same name is noticed; kind, licence: of its source
    """

    folder: str
    path: str
    file: str
    key: str
    caption: str
    suffix: str
    offset: int | None
    size: int
    sha256: str
    kind: str
    licence: str

    def sample(self) -> Sample:
        with Path(self.folder, self.path).open("rb") as stream:
            stream.seek(self.offset or 0)
            data = stream.read(self.size)
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise Unusable("is not the file that was curated")
        meta = {"source": self.file, "kind": self.kind, "licence": self.licence}
        return Sample(self.key, data, self.suffix, self.caption, meta)


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


Source = Picture | TarPicture | CuratedPicture | Drawing


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
    """A captions file: JSON lines, or Parquet with columns file and caption. Errors: ValueError naming the line or the column."""
    out: dict[str, str] = {}
    if path.suffix == ".parquet":
        return _captions_of_parquet(path)
    for number, entry in json_lines(path):
        if not all(isinstance(entry.get(name), str) for name in ("file", "caption")):
            raise ValueError(f'{path}, line {number}: expected {{"file": ..., "caption": ...}}, got {shortened(entry)}')
        out[str(Path(entry["file"]))] = entry["caption"]
    return out


def _captions_of_parquet(path: Path) -> dict[str, str]:
    try:
        from pyarrow import parquet  # no dependency of this stage: whoever has such files has it
    except ImportError:
        raise ValueError(f"--captions {path}: Parquet needs pyarrow: pip install pyarrow") from None
    file = parquet.ParquetFile(path)
    if missing := {"file", "caption"} - set(file.schema_arrow.names):
        raise ValueError(
            f"--captions {path}: no column {sorted(missing)[0]!r}; it has {', '.join(file.schema_arrow.names)}"
        )
    out: dict[str, str] = {}
    for batch in file.iter_batches(columns=["file", "caption"]):
        rows = batch.to_pydict()
        out |= {str(Path(name)): str(text) for name, text in zip(rows["file"], rows["caption"])}
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
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise error if isinstance(error, Unusable) else Unusable(f"no caption: {text.name}: {error!r}") from None
    if not isinstance(caption, str) or not caption.strip():
        raise Unusable("no caption")
    return caption.strip()


def images_of(
    folder: Path, captions: dict[str, str] | None, out: list[tuple[str, str]], workers: int = 0
) -> Iterator[tuple[Picture, int, int]]:
    """Usable pictures of a folder in order of their names, with height and width; the others go to `out`, with the reason.

    workers: threads that read captions and headers, which wait for the disk.
    """

    def look(path: Path) -> tuple[str, str, int, int] | str:
        file = path.relative_to(folder).as_posix()
        try:
            if captions is None:
                caption = caption_beside(path)
            elif not (caption := captions.get(file, "").strip()):
                raise Unusable("no caption")
            return file, caption, *oriented_size(path)
        except Unusable as error:
            return str(error)

    taken: set[str] = set()
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for path, found in zip(paths, pool.map(look, paths)):
            if isinstance(found, str):
                out.append((path.relative_to(folder).as_posix(), found))
                continue
            file, caption, height, width = found
            key, stat = key_of(file, taken), path.stat()
            taken.add(key)
            yield Picture(str(folder), file, key, caption, (stat.st_size, stat.st_mtime_ns)), height, width


def tars_of(
    folder: Path, captions: dict[str, str] | None, out: list[tuple[str, str]], workers: int = 0
) -> Iterator[tuple[TarPicture, int, int]]:
    """The same of the WebDataset tars below a folder, as they are: a picture, and beside it KEY.txt or "caption" of KEY.json.

    captions: by the picture's name in its tar. A key and size that came before, as in shards of several bases, come once.
    """
    tars, taken, seen = sorted(folder.rglob("*.tar")), set[str](), set[tuple[str, int]]()

    def look(tar: Path) -> list[tuple[str, int, int, str, int, int] | tuple[str, str]]:
        return list(_pictures_of_tar(tar, captions))

    with ThreadPoolExecutor(max(1, workers)) as pool:
        for tar, pictures in zip(tars, pool.map(look, tars)):
            name, stat = tar.relative_to(folder).as_posix(), tar.stat()
            for found in pictures:
                if len(found) == 2:
                    out.append((f"{name}/{found[0]}", found[1]))
                    continue
                file, offset, size, caption, height, width = found
                if (file, size) in seen:
                    out.append((f"{name}/{file}", "twice"))
                    continue
                seen.add((file, size))
                key = key_of(file, taken)
                taken.add(key)
                stamp = stat.st_size, stat.st_mtime_ns
                yield TarPicture(str(folder), name, file, key, caption, offset, size, stamp), height, width


def _pictures_of_tar(
    path: Path, captions: dict[str, str] | None
) -> Iterator[tuple[str, int, int, str, int, int] | tuple[str, str]]:
    """(name, offset, size in bytes, caption, height, width) of every picture, or (name, reason). Errors: ValueError for no tar."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as stream:

            def read(member: tarfile.TarInfo) -> bytes:
                stream.seek(member.offset_data)
                return stream.read(member.size)

            for member in tar:
                if member.isfile():
                    parent, slash, name = member.name.rpartition("/")
                    stem, _, part = name.partition(".")  # WebDataset's rule
                    samples.setdefault(parent + slash + stem, {})[part.lower()] = member
            for parts in samples.values():
                picture = next((m for part, m in parts.items() if f".{part}" in SUFFIXES), None)
                if picture is None:
                    continue
                try:
                    if captions is not None:
                        caption = captions.get(picture.name, "")
                    elif "txt" in parts:
                        caption = read(parts["txt"]).decode("utf-8-sig")
                    else:
                        caption = json.loads(read(parts["json"]))["caption"]
                    if not isinstance(caption, str) or not caption.strip():
                        raise Unusable("no caption")
                    height, width = oriented_size(read(picture))
                except Unusable as error:
                    yield picture.name, str(error)
                except (ValueError, TypeError, KeyError, RecursionError) as error:
                    yield picture.name, f"no caption: {error!r}"
                else:
                    yield picture.name, picture.offset_data, picture.size, caption.strip(), height, width
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a tar that can be read: {error}") from None


def assign(
    height: int, width: int, bases: Sequence[int], aspects: Sequence[str], largest: bool, max_upscale: float = 1.0
) -> list[Bucket]:
    """The buckets a picture serves, largest base first."""
    aspect = nearest_aspect(height, width, aspects)
    offered = [Bucket(base, aspect) for base in sorted(bases, reverse=True)]
    fitting = [bucket for bucket in offered if eligible(height, width, bucket, max_upscale)]
    return fitting[:1] if largest else fitting
