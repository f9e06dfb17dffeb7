"""Training state on disk: written to a temporary name, flushed, renamed; resumed bit for bit on a CPU."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import torch

from lens import checkpoint

FORMAT = 1


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors, numbers, strings, containers of them) so that `path` is never half a file."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:  # a file, not a path: torch.save would store the temporary's name inside
            torch.save({"format": FORMAT, **state}, file)

    checkpoint.write_atomic(path, write)


def load_state(path: Path, expect: str) -> dict[str, Any]:
    """Read what `save_state` wrote. Errors: missing file, no or half a state file, another stage's file, another format."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no training state here; `python -m train {expect.split()[0]}` writes one")
    if not zipfile.is_zipfile(path):  # whose table comes last, so half a file is none
        raise ValueError(f"{path}: not a training state, or only the first part of one")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds a {type(state).__name__}, expected the training state of {expect!r}")
    if state.get("format") != FORMAT or state.get("stage") != expect:
        raise ValueError(
            f"{path}: stage {state.get('stage')!r} format {state.get('format')!r}, expected {expect!r} format {FORMAT}"
        )
    return state


def folder_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a released-layout folder (`transformer/`, `vae/`, ...), floats as float32. Errors as in loading."""
    out: dict[str, torch.Tensor] = {}
    for key, shard in checkpoint.open_shards(folder).items():

        def take(value: torch.Tensor, key: str = key) -> None:
            out[key] = value.float() if value.is_floating_point() else value.clone()

        shard.read(key, take)
    return out


def write_text(path: Path, text: str) -> None:
    """Write a text file through a temporary name."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    checkpoint.write_atomic(path, write)
