"""See the docstring in reference.py."""

from lens.ops.reference import pack_tokens, unpack_tokens  # noqa: F401
