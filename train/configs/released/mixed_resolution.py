"""Stage B of the paper: 400,000 further steps over 27 buckets, nine aspect ratios at bases 512, 768 and 1024.

    torchrun --nproc-per-node 8 --nnodes 16 ... -m train mixed_resolution --config released --data SHARDS \\
        --model CHECKPOINT --init runs/pretrain_512/checkpoints/step_0400000 --out runs/mixed_resolution --device cuda

It continues from the weights that stage A trained; `--weights average` begins from their running average instead.
"""

from __future__ import annotations

from train.data import buckets

from . import pretrain_512 as BASED_ON
from .pretrain_512 import *  # noqa: F403

SEED = 1
BASES = (512, 768, 1024)
ASPECTS = buckets.ASPECTS
MU = ((256, 1.0), (4096, 1.3))  # by image tokens of the bucket, extrapolated: 1.3106 at 4,232
LR = 1e-4
SHEET = {**BASED_ON.SHEET, "base": 1024}
OPEN = {
    **BASED_ON.OPEN,
    "MU": "the line is given up to 4,096 tokens; the largest bucket has 4,232: extrapolated, not cut",
}
