"""Training objectives as pure functions: tensors in, loss out."""
