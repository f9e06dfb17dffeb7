"""Lens-Mini-Turbo, on one CPU core: four steps without guidance, from the Mini of RL, at 64 and 128 pixels.

python -m train distill --config mini --init mini-rl --lora r=32,alpha=64,targets=all --out runs/turbo --stop-after 5m

From mini-base, which needs more guidance: --set GUIDANCE=3.0 --set TEACHER_GUIDANCE=3.0.
"""

from __future__ import annotations

from train.data.small_world import kinds, world

from ..released import distill as BASED_ON
from ..released.distill import *  # noqa: F403
from . import pretrain as mini

SEED = 8
# without an annotation, by which `--set` would check: the released table, which mypy takes for one, has integers alone
MODEL = {**mini.MODEL, "enc_hidden_dim": 128, "selected_layer_index": (0, 1, 2, 3)}  # type: ignore[dict-item]
BASES = (64, 128)
ASPECTS = ("1:1",)
BATCH = {64: 16, 128: 16}
SLOTS = 1
BASE_WEIGHTS = {64: 0.3, 128: 0.7}
ASPECT_WEIGHTS = "uniform"
TEXT_TOKENS = 40
FIRST_SEED = 300_000_000  # scenes that no stage before has seen
SCENES = 2_048  # of each size; encoded when they are first met, and kept
STRAIGHTEN = 256  # scenes that find the convolution which stands for the VAE's encoder
CLASSES = kinds.CORE
TASKS = world.TASKS
CAPTIONS = {"geneval": 0.4, "brief": 0.4, "dense": 0.2}
PHOTOGRAPHS = 0.0

GUIDANCE, CA_WEIGHT = 2.0, 0.33  # keep `ca_over_dm` in .7 .. 1.5
LAMBDA_D, LAMBDA_G = 0.01, 0.01  # under Adam only their ratio acts
NORMALISER_FLOOR = 0.1
MU = ((16, 0.5), (64, 0.74))
TAPS = (2, 4, 5)  # of six blocks
HEAD_WIDTH = 128
GUIDED_STEPS, GUIDED_SUBSTEPS, GUIDED_LR = 500, 5, 1e-3  # most of what the student gains; docs/distillation.md
FAKE_WARMUP = 50  # before: the fake score is the teacher, DM says nothing, CA would act alone
STEPS = 25
LR, FAKE_LR, HEADS_LR = 2e-4, 1e-3, 1e-3
EMA = 0.98
COMPUTE, RECOMPUTE = "float32", "none"
WATCHED = 48
SCORE = "train.evaluate.distillation:detector_score"
TEACHER_GUIDANCE = 2.0
GROUPS, GROUP = 4, 8
RULES = {**BASED_ON.RULES, "drift": (0.0, 0.5), "deviation": (0.75, 1.15), "high_frequency": (0.5, 1.3)}
BARS = {
    "deviation": (0.95, 1.05),
    "saturation": (0.95, 1.05),
    "high_frequency": (0.9, 1.05),  # four steps of the untrained student have .85
    "cast": (0.0, 1.0),
    "diversity": (0.9, 2.0),
    "backdrops": (0.9, 2.0),
}
LOG_EVERY, SAVE_EVERY = 5, 25
OPEN = {}
