"""See the docstring in reference.py."""

from lens.ops.reference import gated_residual, gated_residual_norm_modulate  # noqa: F401
