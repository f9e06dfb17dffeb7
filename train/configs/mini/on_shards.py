"""Mini's generator on shards, by the loop of the released recipe: tried on any CPU, on one process or under torchrun.

    python -m train shards --world mini --bases 64 96 128 --per-bucket 2000 --out shards/world
    python -m train mixed_resolution --config mini/on_shards --data shards/world \\
        --vae runs/vae --encoder runs/encoder/encoder.pt --out runs/on_shards
"""

from __future__ import annotations

from train.data import buckets

from ..released import pretrain_512 as BASED_ON  # noqa: F401 (train.configs reads it)
from ..released.pretrain_512 import *  # noqa: F403
from . import pretrain as mini

SEED = 4
# without an annotation, by which `--set` would check: the released table, which mypy takes for one, has integers alone
MODEL = {**mini.MODEL, "enc_hidden_dim": 128, "selected_layer_index": (0, 1, 2, 3)}  # type: ignore[dict-item]
BASES = (64, 96, 128)
ASPECTS = buckets.ASPECTS
BATCH = {64: 8, 96: 5, 128: 4}
SLOTS = 4  # micro-batches of an optimiser step, on 1, 2 or 4 processes
ASPECT_WEIGHTS = "uniform"
TEXT_TOKENS = 40
MU = ((16, 0.5), (64, 0.74))  # the first stage's at base 64; the released line rises as much over fourfold tokens
STEPS = 6_000
LR, WARMUP, DECAY = 1e-3, 100, 2_000
BETAS = (0.9, 0.95)
EMA = 0.998
COMPUTE, RECOMPUTE = "float32", "none"
LOG_EVERY, SAVE_EVERY, KEEP_LAST, KEEP_EVERY = 20, 500, 2, 0
VALIDATE_EVERY, VALIDATION = 500, 16
SHEET = {"steps": 20, "guidance": 3.0, "base": 64}
PROMPTS = mini.PROMPTS[:16]
OPEN = {}
