"""Recipes as plain Python: `load("mini", "vae")` -> the module train.configs.mini.vae; `load("my/recipe.py", ...)` -> that file.

A training that reads the recipes of other stages, too, as Mini's does its text encoder's and its world's, finds them by `beside`.
A field is a name in capitals. `--set FIELD=value` replaces one, checked against its annotation or, where there is none that
the value it has would pass, against that value. A file anywhere begins from another recipe by
`from train.configs.released.pretrain_512 import *`.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import traceback
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from lens.arguments import shortened

if TYPE_CHECKING:
    from ..data.small_world.world import World


def load(name: str, stage: str) -> ModuleType:
    """The recipe of a stage; "released/pretrain_512" names the file itself, and so does a path that ends in .py.

    Errors: ValueError naming recipe and stage.
    """
    if name.endswith(".py"):
        return _of_file(Path(name))
    folder, _, file = name.partition("/")
    try:
        return importlib.import_module(f"train.configs.{folder}.{file or stage}")
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("train.configs"):
            raise ValueError(
                f"no recipe {name!r} for stage {stage!r} in train/configs; there are {', '.join(_near(folder, stage))}"
            ) from None
        raise


def _of_file(path: Path) -> ModuleType:
    """A recipe outside of the package. Errors: ValueError naming the file."""
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    spec = importlib.util.spec_from_file_location(str(path), path)
    assert spec is not None, "a .py file has a loader"
    assert spec.loader is not None, "and it is there"
    recipe = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(recipe)
        repr(fields(recipe))  # an integer of 5,000 digits is none that can be written down
    except (Exception, SystemExit) as error:  # whatever that code does
        steps = traceback.extract_tb(error.__traceback__)
        line = next((f", line {step.lineno}" for step in reversed(steps) if step.filename == str(path)), "")
        raise ValueError(f"--config {path}{line}: {type(error).__name__}: {error}") from error
    if not fields(recipe):
        raise ValueError(f"--config {path}: no field there; expected names in capitals, such as LR = 1e-4")
    return recipe


def beside(name: str, stage: str) -> ModuleType:
    """The recipe of another stage than the one that a recipe is of: in train/configs that of the same folder. For a file
    anywhere the file of that stage in its folder, or else that of the recipe which the file begins from.

    Errors: ValueError naming recipe and stage.
    """
    if not name.endswith(".py"):
        return load(name.partition("/")[0], stage)
    near = Path(name).with_name(f"{stage}.py")
    if near.is_file():
        return _of_file(near)
    folder, file = _begins_from(Path(name))
    if file == stage:
        return _of_file(Path(name))
    if not folder:
        raise ValueError(
            f"--config {name}: no recipe for the stage {stage!r}, expected {near.name} beside it, or in it a line such as "
            f"`from train.configs.mini.pretrain import *`, which says whose {stage} to take"
        )
    return load(folder, stage)


def family(name: str) -> str:
    """The folder in train/configs that a recipe is of; of a file anywhere that of the recipe it begins from, "" for none."""
    return _begins_from(Path(name))[0] if name.endswith(".py") else name.partition("/")[0]


def _begins_from(path: Path) -> tuple[str, str]:
    """(folder, file) of the first recipe in train/configs that a file imports, ("", "") for none."""
    _of_file(path)  # refuses what is no Python
    for node in ast.walk(ast.parse(path.read_bytes())):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules = [f"{node.module}.{node.names[0].name}"]  # a module, or a field of one
        for module in modules:
            parts = module.split(".")
            if parts[:2] == ["train", "configs"] and len(parts) > 3:
                return parts[2], parts[3]
    return "", ""


def _near(folder: str, stage: str) -> list[str]:
    """The recipes of a folder; of all folders for a stage where there is no such folder."""
    here = Path(__file__).parent
    if own := [f"{folder}/{path.stem}" for path in sorted(here.glob(f"{folder}/[a-z]*.py"))] if folder else []:
        return own
    return [path.parent.name for path in sorted(here.glob(f"*/{stage}.py"))] + [
        f"{path.parent.name}/{path.stem}" for path in sorted(here.glob(f"*/{stage}_*.py"))
    ]


def world(name: str, split: str = "train") -> World:
    """The world a recipe trains on."""
    from ..data.small_world.world import World  # recipes are read without the sprites

    own = world_recipe(name)
    return World(split, own.TASKS, own.CLASSES, own.CAPTIONS, own.PHOTOGRAPHS)


def world_recipe(name: str) -> ModuleType:
    """What says of a world's classes, tasks, captions and photographs: the recipe itself where it has all of them."""
    own = load(name, "world")
    return (
        own
        if all(hasattr(own, field) for field in ("TASKS", "CLASSES", "CAPTIONS", "PHOTOGRAPHS"))
        else beside(name, "world")
    )


def fields(recipe: ModuleType) -> dict[str, Any]:
    """Every field and its value, in the order written. OPEN, the reasons, and BASED_ON, another recipe, are none."""
    return {name: value for name, value in vars(recipe).items() if name.isupper() and name not in ("OPEN", "BASED_ON")}


def override(recipe: ModuleType, changes: Sequence[str]) -> ModuleType:
    """A copy with fields replaced: "LR=1e-4", or "SHEET.steps=30" for one entry of a table.

    Errors: ValueError for a field there is not, naming those with a similar name, and for a value of another type.
    """
    copy = ModuleType(recipe.__name__, recipe.__doc__)
    copy.__dict__.update({k: v for k, v in vars(recipe).items() if not k.startswith("__") or k == "__annotations__"})
    hints = _hints(recipe)
    for change in changes:
        path, equals, text = change.partition("=")
        name, *keys = path.strip().split(".")
        if not equals or name not in fields(recipe):
            close = difflib.get_close_matches(name, fields(recipe), 3, 0.5)
            near = f"; did you mean {' or '.join(close)}?" if close else f"; fields: {', '.join(fields(recipe))}"
            raise ValueError(f"--set {_told(change)}: {'no value' if not equals else f'no field {name!r}'}{near}")
        value, old = _value(text.strip()), getattr(copy, name)
        if keys:
            table, key = old, _value(".".join(keys))
            hint = typing.get_args(hints.get(name))
            if table == {} and len(hint) == 2:  # one that says what may come in
                setattr(copy, name, {key: _typed(change, value, hint[1])})
                continue
            if not isinstance(table, dict) or key not in table:
                known = ", ".join(map(str, table)) if isinstance(table, dict) else "no table"
                raise ValueError(f"--set {_told(change)}: {name} has no entry {key!r}; it has {known}")
            setattr(copy, name, {**table, key: _typed(change, value, type(table[key]))})
        else:
            kind = hints.get(name, type(old))
            setattr(copy, name, _typed(change, value, kind if fits(old, kind) else type(old)))
    return copy


def _hints(recipe: ModuleType) -> dict[str, Any]:
    """The annotations of a recipe and of the one it is BASED_ON."""
    base = getattr(recipe, "BASED_ON", None)
    return {**(_hints(base) if base else {}), **typing.get_type_hints(recipe)}


def _value(text: str) -> Any:
    """A Python literal, or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (
        ValueError,
        SyntaxError,
        TypeError,
        RecursionError,
        MemoryError,
    ):  # as literal_eval's own documentation has it
        return text


def _told(change: str) -> str:
    """As an error repeats it."""
    told = change if len(change) <= 200 else f"{change[:200]}..."
    return told if told.isprintable() else told.encode("unicode_escape").decode("ascii")


def _typed(change: str, value: Any, kind: Any) -> Any:
    if not fits(value, kind):
        expected = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
        raise ValueError(f"--set {_told(change)}: expected {expected}, got {type(value).__name__} {shortened(value)}")
    return _as(value, kind)


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is of a type: int where float is asked for counts, bool where int is asked for does not."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if origin is dict:
        return isinstance(value, dict) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if origin is tuple:
        if not isinstance(value, tuple | list):
            return False
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else list(inner)
        return len(kinds) == len(value) and all(map(fits, value, kinds))
    if kind is tuple:
        return isinstance(value, tuple | list)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


def _as(value: Any, kind: Any) -> Any:
    """A value that fits, in the type it stands for: 1 for a float is 1.0, a list for a tuple a tuple."""
    if kind is float:
        return float(value)
    return tuple(value) if isinstance(value, list) else value


def describe(recipe: ModuleType) -> str:
    """Every field as Python, one a line; below what the paper leaves open, why it is as it is."""
    lines, reasons = [], getattr(recipe, "OPEN", {})
    for name, value in fields(recipe).items():
        lines.append(f"{name} = {value!r}")
        if name in reasons:
            lines.append(f"    # open: {reasons[name]}")
    return "\n".join(lines)
