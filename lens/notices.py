"""What Lens says: text as a terminal may show it; warnings, each at the line of the caller's own code that it is about."""

from __future__ import annotations

import re
import sys
import warnings

_INSIDE = ("lens", "torch", "contextlib")  # decorators and stages lie between the pipeline's methods

_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text as a terminal may show it: control characters, which could drive the terminal, and those that turn the
    direction of what follows are spelled out. Names in files come from strangers."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def warn(message: str) -> None:
    """A UserWarning at the innermost line outside of Lens: Python shows it, and by default once, for that line."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(printable(message), stacklevel=level)
