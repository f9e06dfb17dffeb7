"""Values of the public calls' arguments: the plain kinds that several take, and how an error shows what came instead."""

from __future__ import annotations

import math
import operator
import os
from typing import Any


def shortened(value: Any) -> str:
    """A value as an error shows it, which may be a number of 5,000 digits."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no int of more than 4,300 digits
        return f"an integer of {value.bit_length()} bits" if isinstance(value, int) else f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def finite(name: str, value: Any, least: float = -math.inf) -> float:
    """A finite number, numpy's too, but neither True nor "5"."""
    try:
        number = math.nan if isinstance(value, bool | str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and number >= least):
        bound = "" if least == -math.inf else f" >= {least:g}"
        raise ValueError(f"{name} must be a finite number{bound}, got {shortened(value)}")
    return number


def count(name: str, value: Any, most: int | None = None) -> int:
    """A positive whole number, numpy's too, but neither True nor 2.0; at most ``most``."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if number < 1:
        raise ValueError(f"{name} must be a positive integer, got {shortened(value)}")
    if most is not None and number > most:
        raise ValueError(f"{name} must be at most {most}, got {shortened(number)}")
    return number


def location(name: str, value: Any) -> str:
    """A path's or a hub id's text: a str, or what stands for one, but no bytes."""
    try:
        text = os.fspath(value)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a str or a path, got {shortened(value)}")
    return text
