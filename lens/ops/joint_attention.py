"""See the docstring in reference.py."""

from lens.ops.reference import joint_attention  # noqa: F401
