"""Mini at nine aspect ratios of three bases, on a pool of encoded scenes: what goes on from pretrain_128, whose square keeps the
largest share.

python -m train pretrain --config mini/pretrain_sizes --init runs/base_128/export --out runs/base_sizes --stop-after 2h
"""

from lens.resolution import bucket_size

from . import pretrain_128
from .mixed_resolution import RATIOS
from .pretrain_128 import (  # noqa: F401 (fields of this recipe, too)
    BETAS,
    CLASSES,
    CLIP,
    COMPILED,
    EMA,
    GEMM,
    LOG_EVERY,
    LR,
    MODEL,
    MU,
    PHOTOGRAPHS,
    PROMPTS,
    SAVE_EVERY,
    SHEET,
    SIDE,
    STRAIGHTEN,
    TEXT_DROPOUT,
    TIMES,
    WARMUP,
    WEIGHT_DECAY,
)

SEED = 7
CAPTIONS = {
    "geneval": 0.25,
    "brief": 0.24,
    "dense": 0.51,
}  # what is judged leaves the backdrop unsaid: no rare case here
# single objects are large, so that their outlines are judged most and were the worst; signs, which so small a model does not
# spell, are few
TASKS = {
    "single_object": 0.28,
    "colors": 0.26,
    "two_object": 0.08,
    "position": 0.12,
    "counting": 0.10,
    "color_attr": 0.10,
    "row": 0.05,
    "text": 0.01,
}
FIRST_SEED = pretrain_128.FIRST_SEED + 400_000_000  # scenes that no stage before has seen
# shares of the scenes: a base's square, and what its other sizes have together (several ratios share a size)
SQUARES = {64: 0.05, 96: 0.05, 128: 0.36}
OTHERS = {64: 0.04, 96: 0.08, 128: 0.42}


def _sizes() -> dict[tuple[int, int], float]:
    """(height, width): share."""
    sizes = {(side, side): share for side, share in SQUARES.items()}
    for base, share in OTHERS.items():
        found = sorted({bucket_size(base, ratio) for ratio in RATIOS} - {(base, base)})
        sizes |= {size: share / len(found) for size in found}
    return sizes


SIZES = _sizes()
BATCH = {
    48: 32,
    64: 24,
    80: 16,
    96: 32,
    112: 32,
    128: 32,
}  # by the shorter side: sizes that are rare fill small ones alone
TEXT_BINS = (16, 34, 96, 160)  # fewer than at one size, so that every size fills batches of each
STEPS, DECAY = 60_000, 20_000
POOL = {**pretrain_128.POOL, "kept": 5}  # a start takes minutes less; a turn still uses each scene four times
VALIDATION = 48  # a size on average, by the shares
VALIDATE_EVERY = 3_000
