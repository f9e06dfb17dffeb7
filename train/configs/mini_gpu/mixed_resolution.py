"""The second stage on one H200: nine aspect ratios at bases 64, 96 and 128 from the weights of the first; 6-8 minutes.

    python -m train mixed_resolution --config mini_gpu --init runs/gpu/mini --vae runs/gpu/mini/vae --out runs/gpu/mixed \\
        --device cuda --workers 14 --stop-after 9m                            # again to resume

The first stage knows 128 pixels only, so every base has the same share. 3,000 steps of 640 on average are 1.9 M pictures:
7 minutes at the 4,500 a second that are assumed, not measured.
"""

from ..mini.mixed_resolution import FIRST_SEED, JOINT_STEPS, RATIOS  # noqa: F401
from .pretrain import (  # noqa: F401 (fields of this recipe, too)
    BETAS,
    CLIP,
    EMA,
    LM_WEIGHT,
    LOG_EVERY,
    MODEL,
    PROMPTS,
    SHEET,
    TEXT_DROPOUT,
    VALIDATE_EVERY,
    VALIDATION,
    WARMUP,
    WEIGHT_DECAY,
)
from .world import SIDE  # noqa: F401

SEED = 4
BUCKETS = {64: (0.34, 768), 96: (0.33, 640), 128: (0.33, 512)}  # base: (share of the batches, samples of a batch)
MU = ((16, 0.46), (64, 0.7))  # the first stage's at its 64 tokens; as far below at 16 as in train/configs/mini
WINDOW = 24  # batches
LR, ENCODER_LR = 1e-3, 0.0  # half of the first stage's, as in the paper
STEPS, DECAY = 3_000, 1_500
SAVE_EVERY = 1_000
