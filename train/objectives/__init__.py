"""Losses as pure functions: tensors in, loss out."""
