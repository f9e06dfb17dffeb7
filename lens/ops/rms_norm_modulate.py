"""See the docstring in reference.py."""

from lens.ops.reference import rms_norm_modulate  # noqa: F401
