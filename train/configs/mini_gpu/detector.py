"""Lens-Eye on a GPU: the same net on more pictures; rendering is the limit, so give it `--workers`."""

from ..mini.detector import *  # noqa: F403

BATCHES = (
    (0, ((64, 64, 256, 1.0),)),
    (
        1_500,
        ((64, 64, 256, 0.50), (96, 96, 128, 0.15), (128, 128, 64, 0.15), (64, 128, 128, 0.10), (128, 64, 128, 0.10)),
    ),
)
STEPS, WARMUP, DECAY = 6_000, 200, 3_000
LR = 4e-3
SAVE_EVERY = 500
