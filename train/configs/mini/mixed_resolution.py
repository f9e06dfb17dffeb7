"""Mini's second stage: nine aspect ratios at bases 64, 96 and 128, from the weights of the first, the encoder frozen."""

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
    VALIDATION,
    WARMUP,
    WEIGHT_DECAY,
)
from .world import SIDE  # noqa: F401

SEED = 4
FIRST_SEED = 100_000_000  # scenes that the first stage never saw
# base: (share of the batches, samples of a batch). Batches take equally long, as image and text tokens together decide at
# these sizes: 32 x (16 + 28), 22 x (36 + 28), 16 x (64 + 28).
BUCKETS = {64: (0.34, 32), 96: (0.33, 22), 128: (0.33, 16)}
# squares more often: the first stage's size must not fade, and at base 64 three of the ratios share one size
RATIOS = {
    "1:2": 0.08,
    "9:16": 0.08,
    "2:3": 0.08,
    "3:4": 0.08,
    "1:1": 0.36,
    "4:3": 0.08,
    "3:2": 0.08,
    "16:9": 0.08,
    "2:1": 0.08,
}
# (tokens, mu) of two points of a line: the first stage's at base 64, and at base 128 as much more as the released line
# rises over the same fourfold tokens, from 1.06 at 1024 to 1.30 at 4096
MU = ((16, 0.5), (64, 0.74))
WINDOW = 192  # batches; the scenes of one bucket among them are sorted by caption length together
JOINT_STEPS = 0  # the encoder stays as it was shipped
# three quarters of the first stage's (the paper: half), since every size but base 64 is noise at first. The shipped weights
# took 13,750 steps at 1e-3, the last 9,250 falling to nothing, with 0.4 of the batches at base 64; then as it says here
LR, ENCODER_LR = 1.5e-3, 0.0
STEPS, DECAY = 30_600, 9_600
VALIDATE_EVERY, SAVE_EVERY = 1_000, 2_000
