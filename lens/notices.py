"""Warnings of Lens, each at the line of the caller's own code that it is about."""

from __future__ import annotations

import sys
import warnings

_INSIDE = ("lens", "torch", "contextlib")  # decorators and stages lie between the pipeline's methods


def warn(message: str) -> None:
    """A UserWarning at the innermost line outside of Lens: Python shows it, and by default once, for that line."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
