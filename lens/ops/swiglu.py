"""See the docstring in reference.py."""

from lens.ops.reference import swiglu  # noqa: F401
