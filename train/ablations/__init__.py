"""Ablations: arms that differ in one thing, trained on the same images for the same steps, and curves with their intervals."""
