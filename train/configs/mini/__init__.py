"""The recipe of Lens-Mini."""
