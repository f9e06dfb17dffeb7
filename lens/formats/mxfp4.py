"""MXFP4 experts on a GPU: whether transformers keeps them packed, asked of transformers itself.

It needs accelerate, Triton and a narrow range of versions of `kernels`, another with every release, and where one of
them is missing it expands the experts to bfloat16 with one line in a log: 38 GiB instead of 12.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from torch import nn

from lens import notices

_TRITON = "3.4.0"  # that transformers asks for on CUDA


def why_expanded() -> str:
    """Why transformers would expand MXFP4 experts on a CUDA device, in its own words, or "".

    The quantizer's check of its surroundings, as loading makes it: it raises, or turns to expanding with a warning.
    """
    try:
        from transformers import Mxfp4Config
        from transformers.quantizers import quantizer_mxfp4
    except ImportError as error:
        return f"this transformers has no MXFP4: {error}"
    logger, said = quantizer_mxfp4.logger, _Messages()
    quantizer = quantizer_mxfp4.Mxfp4HfQuantizer(Mxfp4Config(), pre_quantized=True)
    quantizer_mxfp4.logger = said
    try:
        quantizer.validate_environment(device_map={"": "cuda"})
    except (ImportError, RuntimeError, ValueError) as error:
        return " ".join(str(error).split())
    finally:
        quantizer_mxfp4.logger = logger
    if not quantizer.quantization_config.dequantize:
        return ""
    return " ".join(" ".join(said.lines).split()) or "transformers does not say why"


class _Messages:
    """Stands in for a logger whose warning_once is silent the second time."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def warning_once(self, line: str, *_: Any, **__: Any) -> None:
        self.lines.append(line)

    warning = warning_once


def wanted() -> list[str]:
    """What to install so that the experts stay packed: requirements for pip, by the versions transformers takes."""
    from transformers.utils import import_utils

    low, high = (getattr(import_utils, f"KERNELS_{end}_VERSION", "") for end in ("MIN", "MAX"))
    kernels = "kernels" + ",".join(sign + version for sign, version in ((">=", low), ("<", high)) if version)
    checks = {
        "accelerate": import_utils.is_accelerate_available,
        f"triton>={_TRITON}": functools.partial(import_utils.is_triton_available, _TRITON),
        kernels: import_utils.is_kernels_available,
    }
    return [requirement for requirement, there in checks.items() if not there()]


def warn_expanded(folder: Path, why: str) -> None:
    """Say that the experts of a checkpoint become bfloat16 on a GPU."""
    notices.warn(f"{folder}: its MXFP4 experts are expanded, to about four times their size: {why}")


def packed_modules(model: nn.Module) -> list[nn.Module]:
    """The modules that hold experts in 4 bits, as loaded: by their class, whatever the configuration says."""
    return [
        module
        for module in model.modules()
        if type(module).__name__.startswith("Mxfp4") and "Experts" in type(module).__name__
    ]
