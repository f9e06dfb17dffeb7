"""Reading scores.json, as `python -m train evaluate mini-bench` writes it: strictly, every fault named with its place."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .gallery_page import Share
from .judges import wilson

CEILINGS = {"vae": "through the VAE", "render": "true pictures"}


@dataclass(frozen=True)
class Scores:
    """`tasks`: task -> column -> share (None: not measured); `classes`: class -> share found when asked for, at `shown`."""

    source: str
    shown: str  # the strength of guidance whose pictures are shown, as the file spells it
    columns: Sequence[tuple[str, str]]  # key and heading
    tasks: Mapping[str, Mapping[str, Share | None]]
    classes: Mapping[str, Share]
    settings: Mapping[str, Any]


class _Reader:
    """Values of nested objects by path, each of an expected type."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self.values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"{path}: not found; `python -m train evaluate mini-bench` writes it") from None
        except ValueError as error:
            raise ValueError(f"{path}: not JSON: {error}") from None

    def fail(self, at: Sequence[str], expected: str, got: Any) -> ValueError:
        where = ".".join(at) or "the whole"
        return ValueError(
            f"{self.path}: {where} must be {expected}, got {got!r}: written by another version of mini-bench?"
        )

    def get(self, *at: str, kind: type = dict, default: Any = ...) -> Any:
        value: Any = self.values
        for i, key in enumerate(at):
            if not isinstance(value, dict) or key not in value:
                if default is not ...:
                    return default
                raise self.fail(at[: i + 1], "there", sorted(value) if isinstance(value, dict) else value)
            value = value[key]
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.fail(
                at,
                {dict: "an object", float: "a number", int: "a whole number", str: "text", list: "a list"}[kind],
                value,
            )
        return value

    def share(self, *at: str) -> Share | None:
        """The row's score with its interval; None where the row says why it was not measured."""
        if isinstance(self.get(*at, "not_measured", kind=str, default=None), str):
            return None
        score, low, high = (self.get(*at, name, kind=float) for name in ("score", "low", "high"))
        if not (-1e-6 <= low <= score + 1e-6 and score - 1e-6 <= high <= 1 + 1e-6):
            raise self.fail(at, "a share within its interval", (score, low, high))
        return Share(score, low, high, self.get(*at, "pictures", kind=int))

    def said(self, *at: str) -> Share | None:
        """The stricter score, whose interval the file does not hold: it follows from the number of pictures."""
        if self.share(*at) is None:
            return None
        value, of = self.get(*at, "said", kind=float), self.get(*at, "pictures", kind=int)
        if not 0 <= value <= 1 or of < 1:
            raise self.fail((*at, "said"), "a share of at least one picture", (value, of))
        return Share(value, *wilson(round(value * of), of), of)

    def audit(self, *at: str) -> Share | None:
        value = self.get(*at)
        return None if value.get("audit") is None else Share(self.get(*at, "audit", kind=float))


def read_scores(path: Path, tasks: Sequence[str], guidance: float) -> Scores:
    """The file's scores of `tasks`, with `guidance` the strength whose pictures are shown. Errors: ValueError."""
    file, shown = _Reader(path), f"{guidance:g}"
    strengths = sorted(file.get("guidance"), key=float)
    if shown not in strengths:
        raise file.fail(("guidance",), f"an object with {shown!r}, the model's own strength", strengths)
    table: dict[str, dict[str, Share | None]] = {}
    for task in tasks:
        row = {strength: file.share("guidance", strength, task) for strength in strengths}
        row["said"] = file.said("guidance", shown, task)
        row["audit"] = file.audit("guidance", shown, task)
        row |= {name: file.share("ceilings", name, task) for name in CEILINGS}
        table[task] = row
    classes = {}
    for kind in file.get("per_class", shown):
        found, asked = (file.get("per_class", shown, kind, name, kind=int) for name in ("found", "asked"))
        if not 0 <= found <= asked or not asked:
            raise file.fail(("per_class", shown, kind), "found of asked", (found, asked))
        classes[kind] = Share(found / asked, *wilson(found, asked), asked)
    columns = [
        *((s, f"guidance {s}") for s in strengths),
        ("said", "with every colour"),
        ("audit", "template judge"),
        *CEILINGS.items(),
    ]
    settings = {
        "classes": file.get("settings", "classes", kind=list),
        "captions": file.get("settings", "captions", kind=str),
        **{name: file.get("settings", name, kind=int) for name in ("steps", "side", "per_task")},
    }
    return Scores(str(path), shown, columns, table, classes, settings)
