"""A model that is an adapter's folder, as the start of a training: made whole first, and one adapter with what is learned after.

A training with `--lora` from such a model learns a second adapter on the sum of base and first. Both are one of rank r1 + r2:

    W + s1 B1 A1 + s2 B2 A2 = W + [s1 B1 | s2 B2] [A1 ; A2]
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lens.formats import lora as files
from lens.formats.files import read_json, write_json
from lens.formats.parts import find
from lens.formats.released import load_transformer, save_transformer

NOT_ITS_OWN = ("transformer", "lora", "scores.json", "bars.json", "*.jsonl")  # of a model, for one that is made of it
MADE_OF = "made_of.json"  # beside a model that was made whole: the fingerprint of its adapter


def is_adapter(folder: Path) -> bool:
    """Whether a folder is an adapter's alone, not a whole model's with one beside it."""
    return (folder / files.CONFIG).is_file() and not (folder / "transformer").is_dir()


def base_of(adapter: Path) -> Path:
    """The folder of the model that it adapts. Errors: those of the pipeline's loading."""
    return find(adapter).transformer.weights.parent


def made_whole(adapter: Path, folder: Path) -> None:
    """The model that an adapter's folder is, with the base that it names, as `folder` in the released layout; the sum is
    float32, so that nothing of a small adapter is rounded away. One that is there already stays. Errors: those of the
    pipeline's loading; ValueError where the one that is there was made of another adapter."""
    base, mark = base_of(adapter), folder / MADE_OF
    model = load_transformer(base / "transformer", torch.float32, "cpu")
    change = files.read(adapter, model)
    if mark.is_file():  # written last: all of it is there
        if read_json(mark) != {"adapter": change.fingerprint}:
            raise ValueError(
                f"{folder}: made of another adapter than {adapter}; expected an empty --out, or that adapter"
            )
        return
    files.merge(change, model)
    shutil.copytree(base, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*NOT_ITS_OWN))
    save_transformer(model, folder / "transformer", torch.float32)
    for about in ("recipe.json", "model_index.json"):
        if (adapter / about).is_file():
            shutil.copyfile(adapter / about, folder / about)
    write_json(mark, {"adapter": change.fingerprint})


def pairs_of(adapter: Path) -> Mapping[str, files.Pair]:
    """Module -> its two matrices. Errors: ValueError for an adapter that is not of low rank alone."""
    found: dict[str, files.Pair] = {}
    for module, change in files.read(adapter).pairs.items():
        if not isinstance(change, files.Pair) or change.magnitude is not None:
            raise ValueError(
                f"{adapter}: {module} is adapted by more than two matrices, expected plain LoRA to put together with another"
            )
        found[module] = change
    return found


def joined(first: Path, second: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module -> (down [r1 + r2, in], up [out, r1 + r2]) of two adapters at once, factor 1; a module that one of them does not
    adapt has zeros there, since peft knows one rank."""
    both = [pairs_of(adapter) for adapter in (first, second)]
    ranks = [max(len(pair.down) for pair in pairs.values()) for pairs in both]
    out: dict[str, tuple[Tensor, Tensor]] = {}
    for module in dict.fromkeys([*both[0], *both[1]]):
        shape = next(pairs[module].shape for pairs in both if module in pairs)
        downs, ups = [], []
        for pairs, rank in zip(both, ranks):
            down, up = torch.zeros(rank, shape[1]), torch.zeros(shape[0], rank)
            if (pair := pairs.get(module)) is not None:
                down[: len(pair.down)] = pair.down.float()
                up[:, : len(pair.down)] = pair.factor * pair.up.float()
            downs.append(down)
            ups.append(up)
        out[module] = torch.cat(downs), torch.cat(ups, 1)
    return out
