"""See the docstring in reference.py."""

from lens.ops.reference import qk_norm_rope  # noqa: F401
