"""Prompt sets: JSON lines {id, category, sub_category, item, dimensions, prompt, rubrics [10], subsets}, one prompt a line.

Subsets are nested and follow from the id's hash alone: "quarter" within "half" within "full".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lens.arguments import shortened

from .tables import json_lines

_LISTS = ("dimensions", "rubrics", "subsets")
SUBSETS = {"full": 1.0, "half": 0.5, "quarter": 0.25}


@dataclass(frozen=True)
class Prompt:
    """rubrics: the specific ones; a judge is asked the global one beside them. dimensions: what is tested."""

    id: str
    category: str
    sub_category: str
    item: str
    dimensions: tuple[str, ...]
    prompt: str
    rubrics: tuple[str, ...]
    subsets: tuple[str, ...]


def subsets_of(name: str) -> tuple[str, ...]:
    """The subsets that a prompt of that id belongs to: those whose share exceeds its draw in [0, 1)."""
    draw = int.from_bytes(hashlib.sha256(f"subset {name}".encode()).digest()[:8], "big") / 2**64
    return tuple(subset for subset, share in SUBSETS.items() if draw < share)


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    from ..loop.checkpoints import write_text

    write_text(path, "".join(json.dumps(asdict(prompt), ensure_ascii=False) + "\n" for prompt in prompts))


def read_prompts(path: Path, subset: str = "full", without: Sequence[str] = (), rubrics: int = 10) -> list[Prompt]:
    """The prompts of a subset, in the order of the file. without: categories and sub-categories left out.

    Errors: ValueError naming the line for another set of keys, another number of rubrics, or an id that is there twice;
    ValueError where nothing is left.
    """
    if subset not in SUBSETS:
        raise ValueError(f"--subset: {subset!r}, expected one of {', '.join(SUBSETS)}")
    names, found, seen = {field.name for field in fields(Prompt)}, [], set()
    for number, row in json_lines(path):
        if set(row) != names:
            raise ValueError(f"{path}, line {number}: {shortened(sorted(row))}, expected the keys {sorted(names)}")
        for name, value in row.items():
            texts = value if name in _LISTS and isinstance(value, list) else [value]
            if (name in _LISTS) != isinstance(value, list) or not all(isinstance(text, str) for text in texts):
                kind = "a list of texts" if name in _LISTS else "a text"
                raise ValueError(f"{path}, line {number}: {name} must be {kind}, got {shortened(value)}")
        if len(row["rubrics"]) != rubrics or row["id"] in seen:
            what = "id is there twice" if row["id"] in seen else f"{len(row['rubrics'])} rubrics, expected {rubrics}"
            raise ValueError(f"{path}, line {number} ({row['id']}): {what}")
        seen.add(row["id"])
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in row.items()}
        prompt = Prompt(**values)
        if subset in prompt.subsets and not {prompt.category, prompt.sub_category} & set(without):
            found.append(prompt)
    if not found:
        raise ValueError(f"{path}: no prompt in subset {subset!r} without {list(without)}")
    return found
