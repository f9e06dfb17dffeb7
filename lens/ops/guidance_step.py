"""See the docstring in reference.py."""

from lens.ops.reference import guidance_step  # noqa: F401
