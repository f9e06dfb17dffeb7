"""Where a checkpoint comes from: embedded weights, a folder, a file, a hub id; and what its name says."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from lens import notices
from lens.arguments import location
from lens.formats.files import CheckpointError, is_there, read_json

EMBEDDED = {
    "mini": "base",
    "mini-base": "base",
    "mini-rl": "rl",
    "mini-turbo": "turbo",
}  # a release may hold some of them alone: `shipped`
_MINI = Path(__file__).parents[1] / "mini"
WEIGHTS = ("transformer", "text_encoder", "vae")  # the parts that have weights
_FILES = (".safetensors", ".gguf", ".bin", ".pt", ".pth", ".ckpt", ".sft")  # endings that no hub id has


def shipped() -> list[str]:
    """The names of the models that are inside this package."""
    return [name for name, folder in EMBEDDED.items() if (_MINI / folder / "model_index.json").is_file()]


def resolve(source: str | os.PathLike[str], weights_variant: str | None = None, revision: str | None = None) -> Path:
    """ "mini..." -> the embedded weights; an existing folder or file -> itself; else a hub id, fetched by huggingface_hub.

    revision: a branch, tag or commit of the hub's; a warning where the source is here, which has none."""
    name = location("source", source)
    if revision is not None and (name in EMBEDDED or is_there(Path(name))):
        notices.warn(f"revision {revision!r} is not read: {name!r} is no hub id, but lies here")
    if name in EMBEDDED:
        folder = _MINI / EMBEDDED[name]
        if not (folder / "model_index.json").is_file():
            raise CheckpointError(f"{name!r} is not part of this version of Lens; embedded models: {shipped()}")
        return folder
    if name and is_there(Path(name)):
        return Path(name)
    if name.lower().endswith(_FILES):
        raise CheckpointError(f"{name!r}: file not found")
    if is_hub_id(name):
        return _fetch(name, weights_variant, revision)
    known = f"one of {shipped()}, a folder in the released layout, a .safetensors file or a hub id"
    raise CheckpointError(f"{name if len(name) < 300 else name[:300] + '...'!r}: expected {known}")


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and len(name) <= 96


def _fetch(name: str, weights_variant: str | None, revision: str | None) -> Path:
    """The snapshot of a Lens repository: model_index.json first, so that another model costs nothing, then the files of
    the parts and no others. Without a connection: what was fetched before."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    def fetched_before() -> Path:
        try:
            return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise CheckpointError(
                f"{name!r}: no folder here, not fetched before, and the hub cannot be reached (or HF_HUB_OFFLINE is set)"
            ) from None

    try:
        try:
            index = Path(huggingface_hub.hf_hub_download(name, "model_index.json", revision=revision))
            revision = index.parent.name  # one commit for all files
        except LocalEntryNotFoundError:
            return fetched_before()
        except EntryNotFoundError:
            index = None
        if index is not None and (kind := read_json(index).get("_class_name")) != "LensPipeline":
            raise CheckpointError(f"{name!r}: _class_name must be LensPipeline, got {kind!r}: another model")
        try:
            names = huggingface_hub.list_repo_files(name, revision=revision)
        except Exception:  # no connection, in one of the ways that the library's HTTP client has for it
            return fetched_before()
        if index is None and not all(f"{part}/config.json" in names for part in WEIGHTS):
            files = [file for file in names if file.lower().endswith(_FILES)]
            held = f"it has {', '.join(files[:6])}{', ...' if len(files) > 6 else ''}" if files else "it has no weights"
            raise CheckpointError(
                f"{name!r}: neither model_index.json nor transformer/config.json, expected the released layout; {held}; "
                "single files: download them and name them with --transformer, --text-encoder and --vae"
            )

        def download(file: str) -> Path:
            return Path(huggingface_hub.hf_hub_download(name, file, revision=revision))

        wanted = sorted(_wanted(name, names, weights_variant, download))
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{name!r} is neither a folder here nor a hub id that can be fetched: {error}") from error


def _wanted(name: str, names: Collection[str], weights_variant: str | None, download: Any) -> Iterator[str]:
    """The files of a repository that loading it reads."""
    from lens.formats.safetensors import shards_of, weights_name  # only now: torch takes its time

    for file in names:
        folder, _, leaf = file.rpartition("/")
        if file == "model_index.json" or (folder in ("tokenizer", "scheduler") and leaf.endswith((".json", ".jinja"))):
            yield file
    for part in WEIGHTS:
        inside = [file.removeprefix(f"{part}/") for file in names if file.startswith(f"{part}/")]
        chosen = weights_name(inside, f"{name}/{part}", weights_variant)
        yield from (f"{part}/{leaf}" for leaf in ("config.json", chosen) if leaf in inside)
        if chosen.endswith(".json"):
            yield from {f"{part}/{shard}" for shard in shards_of(download(f"{part}/{chosen}")).values()}
    yield from (file for file in names if file == "reasoner/model.safetensors")


def variant_hint(source: str | os.PathLike[str]) -> str:
    """The name that tells a source's variant: the hub id, or the folder's or file's (of a hub cache: the repository's)."""
    path = Path(os.fspath(source))
    if not is_there(path):
        return str(source)
    path = path.resolve()
    return path.parent.parent.name if path.parent.name == "snapshots" else path.name
