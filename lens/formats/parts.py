"""Where each part of a model is: a folder in the released layout, files from several places, an adapter's folder and its base."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lens.arguments import location
from lens.formats import contents
from lens.formats.files import CheckpointError, is_there, read_json
from lens.formats.hub import EMBEDDED, WEIGHTS, is_hub_id, resolve, variant_hint
from lens.formats.safetensors import Shard, has_variant

Source = str | os.PathLike[str]

# What names a part's configuration as its own.
_OWN = {
    "transformer": ("_class_name", "LensTransformer2DModel"),
    "text_encoder": ("model_type", "gpt_oss"),
    "vae": ("_class_name", "AutoencoderKLFlux2"),
}
# a folder of peft's: its configuration, and what that calls the model it adapts
ADAPTER, BASE = "adapter_config.json", "base_model_name_or_path"
_OPTION = {"transformer": "--transformer", "text_encoder": "--text-encoder", "vae": "--vae"}


@dataclass(frozen=True)
class Part:
    """The weights of one part, a folder or a safetensors file. ``config``: its configuration, None where only the
    tensors tell. ``variant``: of the weights, as diffusers names files ("fp16"), where the folder has it."""

    weights: Path
    config: Path | None
    variant: str | None = None

    @classmethod
    def of(cls, source: Path | Part) -> Part:
        """A part's own folder."""
        return source if isinstance(source, Part) else cls(source, source / "config.json")

    def settings(self) -> dict[str, Any] | None:
        return None if self.config is None else read_json(self.config)

    def __str__(self) -> str:
        """The file to name in an error about the configuration."""
        return str(self.config or self.weights)


@dataclass(frozen=True)
class Parts:
    """Everything a pipeline is loaded from. ``root``: the folder whose model_index.json tells defaults, None for files
    alone; ``tokenizer``: a folder, a tokenizer.json, or the text encoder's file where it holds one; ``scheduler``: None means
    the released schedule; ``name`` speaks of the variant; ``adapter``: a folder of peft's, merged into the transformer."""

    transformer: Part
    text_encoder: Part
    vae: Part
    tokenizer: Path
    scheduler: Path | None
    root: Path | None
    name: str
    adapter: Path | None = None


def find(
    source: Source,
    transformer: Source | None = None,
    text_encoder: Source | None = None,
    vae: Source | None = None,
    tokenizer: Source | None = None,
    weights_variant: str | None = None,
    revision: str | None = None,
) -> Parts:
    """Where the parts are that ``from_pretrained`` names. With all three given, a source that is the default, "mini",
    is not read: they are a model of their own. A source that is a file is the transformer. A source that is a folder of
    peft's is the model that it names as its base, with this adapter; a ``transformer`` of its own stands for both.

    CheckpointError names what is missing and where it was looked for.
    """
    given = {"transformer": transformer, "text_encoder": text_encoder, "vae": vae}
    for name, value in (("source", source), *given.items(), ("tokenizer", tokenizer)):
        if value is not None or name == "source":
            location(name, value)
    root: Path | None = None
    adapter: Path | None = None
    if any(value is None for value in given.values()) or os.fspath(source) != "mini":
        root = resolve(source, weights_variant, revision)
        if not root.is_dir():
            if given["transformer"] is not None:
                raise CheckpointError(f"{root}: a file is the transformer, and {transformer} was given as one, too")
            given["transformer"], root = root, None
        elif (base := _base_of(root)) is not None:
            adapter, root = root, base
    found = {part: _part(part, given[part], root, weights_variant, given) for part in WEIGHTS}
    if weights_variant and not any(_holds(part.weights, weights_variant) for part in found.values()):
        raise CheckpointError(
            f"{root or found['transformer'].weights}: no weights of the variant {weights_variant!r}, expected files such as "
            f"diffusion_pytorch_model.{weights_variant}.safetensors"
        )
    scheduler = root / "scheduler" / "scheduler_config.json" if root else None
    own_index = adapter is not None and is_there(adapter / "model_index.json")
    return Parts(
        **found,
        tokenizer=_tokenizer(tokenizer, text_encoder, found["text_encoder"].weights, root),
        scheduler=scheduler if scheduler and is_there(scheduler) else None,
        root=adapter if own_index else root,
        adapter=adapter if given["transformer"] is None else None,
        name=variant_hint(source if root else given["transformer"] or source),
    )


def _base_of(folder: Path) -> Path | None:
    """The folder of the model that a folder of peft's adapts, as it names it; None for any other folder.

    It may name an embedded model or a folder here: what a file names is not fetched. Errors: CheckpointError.
    """
    path = folder / ADAPTER
    if is_there(folder / "transformer") or not is_there(path):
        return None
    name = read_json(path).get(BASE)
    here = isinstance(name, str) and (name in EMBEDDED or is_there(Path(name)))
    base = resolve(name) if isinstance(name, str) and here else None
    if base is None or not is_there(base / "transformer"):
        raise CheckpointError(
            f"{path}: {BASE} must be an embedded model or the folder of a whole one, got {str(name)[:200]!r}; to draw with another "
            "base, give that with --model and this folder with --lora"
        )
    return base


def _part(part: str, given: Source | None, root: Path | None, variant: str | None, all_given: dict[str, Any]) -> Part:
    inside = root / part if root else None
    if given is None:
        if inside is None:
            rest = " and ".join(_OPTION[name] for name in WEIGHTS if all_given[name] is None)
            found = contents.of_names(Shard(Path(all_given["transformer"])).entries)
            raise CheckpointError(
                f"{all_given['transformer']}: {found}; a single file is taken as the transformer: name the other parts with "
                f"{rest}, or a whole checkpoint's folder with --model and this file with --transformer"
            )
        if not inside.is_dir():
            raise CheckpointError(f"{inside}: folder not found, expected the released layout{_instead(root)}")
        return Part(inside, inside / "config.json", variant)
    path = Path(os.fspath(given))
    if not is_there(path):
        hint = "; of a hub repository, download it and name the folder" if is_hub_id(os.fspath(given)) else ""
        raise CheckpointError(f"{path}: not found, expected a .safetensors file or a folder with the {part}{hint}")
    if path.is_dir():
        if not is_there(path / "config.json") and (path / part).is_dir():
            path = path / part
        beside = [path / "config.json"]
    else:
        beside = [path.parent / "config.json", *([inside / "config.json"] if inside else [])]
    key, name = _OWN[part]
    for config in beside:
        if is_there(config) and (path.is_dir() or read_json(config).get(key) == name):
            return Part(path, config, variant)
    return Part(path, None, variant)


def _instead(root: Path | None) -> str:
    """What a folder without the parts is, as far as its own files tell."""
    if root is None:
        return ""
    if is_there(root / "config.json"):
        settings = read_json(root / "config.json")
        for part, (key, name) in _OWN.items():
            if settings.get(key) == name:
                return f"; this is the folder of a {part}: give the folder above it, or {_OPTION[part]}"
    files = sorted(path.name for path in root.glob("*.safetensors"))
    if files:
        return f"; it has the single file{'s' if len(files) > 1 else ''} {', '.join(files[:4])}: give the file itself"
    return ""


def _holds(weights: Path, variant: str) -> bool:
    return weights.is_dir() and has_variant(os.listdir(weights), variant)


def _tokenizer(given: Source | None, text_encoder: Source | None, weights: Path, root: Path | None) -> Path:
    """The tokenizer that was named, else that of the text encoder that was named, else the source's."""
    if given is not None:
        path = Path(os.fspath(given))
        if not is_there(path):
            raise CheckpointError(f"{path}: not found, expected a folder with a tokenizer.json")
        inner = path / "tokenizer"
        return inner if path.is_dir() and not is_there(path / "tokenizer.json") and inner.is_dir() else path
    if text_encoder is not None:
        named = Path(os.fspath(text_encoder))
        folder = named if named.is_dir() else named.parent
        for place in (folder, folder / "tokenizer", folder.parent / "tokenizer"):
            if is_there(place / "tokenizer.json"):
                return place
    inside = root / "tokenizer" if root else None
    if inside is not None and inside.is_dir():
        return inside
    if inside is not None and text_encoder is None:
        raise CheckpointError(f"{inside}: folder not found, expected the released layout")
    return weights  # ComfyUI keeps it inside the text encoder's file
