"""The suites, in the order of their value: what a cut-off run should have measured first."""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..case import Case
    from ..work.scale import Scale

SUITES = ("step", "e2e", "ops", "attention", "gemm", "train", "data")


def cases(
    suites: Sequence[str] = SUITES, patterns: Sequence[str] = ("*",), tiny: bool = False, gpu: bool = True
) -> list[Case]:
    """Cases of some suites whose id matches one of the globs, with or without the "tiny/" in front.

    gpu: whether they will run on one; cases that take a CPU minutes, and those of a CPU alone, are parted here.
    """
    from ..work.scale import RELEASED, TINY  # only now: torch takes its time

    scale: Scale = TINY if tiny else RELEASED
    found: list[Case] = []
    for suite in suites:
        module = importlib.import_module(f"{__name__}.{suite}")
        found += module.cases(scale, gpu)
    names = [(c, (c.id, c.id.removeprefix("tiny/"))) for c in found]
    return [c for c, spelled in names if any(fnmatch.fnmatch(s, p) for s in spelled for p in patterns)]
