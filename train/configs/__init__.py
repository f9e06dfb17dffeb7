"""Recipes as plain Python: `load("mini", "vae")` -> the module train.configs.mini.vae."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..data.world import World


def load(name: str, stage: str) -> ModuleType:
    """The recipe of a stage. Errors: ValueError naming the recipe and the stage."""
    try:
        return importlib.import_module(f"train.configs.{name}.{stage}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("train.configs"):
            raise ValueError(f"no recipe {name!r} for stage {stage!r} in train/configs") from None
        raise


def world(name: str, split: str = "train") -> World:
    """The world a recipe trains on."""
    from ..data.world import World  # recipes are read without the sprites

    own = load(name, "world")
    return World(split, own.TASKS, own.CLASSES, own.CAPTIONS)
