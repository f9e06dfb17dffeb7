"""Lens: a prompt becomes a picture."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import LensConfig
    from .formats.files import CheckpointError
    from .model import LensTransformer2DModel
    from .pipeline import LensPipeline, LensPipelineOutput

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "LensConfig",
    "LensPipeline",
    "LensPipelineOutput",
    "LensTransformer2DModel",
    "__version__",
]

_HOMES = {
    "CheckpointError": "formats.files",
    "LensConfig": "config",
    "LensPipeline": "pipeline",
    "LensPipelineOutput": "pipeline",
    "LensTransformer2DModel": "model",
}


def __getattr__(name: str) -> Any:
    """The names above, and modules as lens.sampler, when they are asked for: most import torch, which takes seconds that
    `lens --help` need not wait for."""
    if name in _HOMES:
        found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    elif not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        found = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
