"""Lens: a prompt becomes a picture."""

# torch first: its bundled OpenMP runtime and the system's share one soname, so whichever is loaded first serves
# both. With torch's loaded, torch.set_num_threads also governs the CPU kernels of lens._C.
import torch  # noqa: F401  isort: skip

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
