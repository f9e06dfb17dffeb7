"""Recipes as plain Python: `load("mini", "vae")` -> the module train.configs.mini.vae."""

from __future__ import annotations

import importlib
from types import ModuleType


def load(name: str, stage: str) -> ModuleType:
    """The recipe of a stage. Errors: ValueError naming the recipe and the stage."""
    try:
        return importlib.import_module(f"train.configs.{name}.{stage}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("train.configs"):
            raise ValueError(f"no recipe {name!r} for stage {stage!r} in train/configs") from None
        raise
