"""Mini's RL: DiffusionNFT with the small world's local judge, minutes of a CPU core.

python -m train rl --config mini --out runs/rl --stop-after 5m
"""

from __future__ import annotations

from typing import Literal

from .pretrain import PROMPTS as PROMPTS

SEED = 11
MODEL: dict[str, int] = {}  # the checkpoint's own

# ---- rollouts
GROUPS, GROUP = 12, 8  # prompts a step, pictures a prompt
SLOTS = 6  # micro-batches of a step, whoever computes them; every group is spread over them
BASES: tuple[int, ...] = (64, 128)  # of a group; they take turns
ASPECTS: tuple[str, ...] = ("1:1",)  # at base 64 the detector cannot look at the others, whose short side is 48 pixels
SAMPLING_STEPS, SOLVER = 8, "dpm2m"
ROLLOUT_OVERLAP = False  # decode and judge a slot while the next one is drawn: nothing to gain on one core

# ---- objective
TIMES = 2  # nodes of a picture's schedule that are trained, in one packed forward
INNER_STEPS = 1  # optimiser steps a rollout; with 1 and ETA 0 beta and the negative branch cancel
NFT_BETA = 1.0
Z_SCALE = 5.0
ADAPTIVE, RECENTRE, MASK_DEGENERATE = True, False, False
KL_WEIGHT = 0.1  # arms 1e-4, .3, 1: 1e-4 was seen to do nothing
ETA: float | Literal["nft"] = 0.0  # old <- eta old + (1 - eta) theta; "nft": min(.001 i, .5)
DIVERSITY_WEIGHT = 0.25  # of the groupwise reward: backdrops and places that differ within a group
NEUTRAL: tuple[str, ...] = ("backdrop",)  # that earn nothing by being themselves: taken off scores
NEUTRAL_SHRINK = (
    8.0  # pictures of no effect beside those that show one; 0: what a step's few pictures say is believed whole
)
MOST_FAILURES = 0.05  # share of judgements that may fail in a step
SHUFFLE = False  # the control: rewards in another order within every group, so that nothing should rise

# ---- judge over HTTP, where --judge names one
JUDGE_MODEL = "gpt-4.1-mini"
JUDGE_SCORE: Literal["binary", "graded", "probability"] = "binary"  # of a rubric; their mean is the reward
JUDGE_CONCURRENCY, JUDGE_TIMEOUT = 8, 120.0  # calls at once of a process; seconds of an attempt

# ---- optimiser
LORA = "r=8,alpha=16,targets=all"  # 0.6 MB in bfloat16 at width 192
STEPS, WARMUP, DECAY, COSINE = 40, 1, 40, True
LR = 5e-4
BETAS: tuple[float, float] = (0.9, 0.999)
EPS, WEIGHT_DECAY, CLIP = 1e-8, 1e-4, 1.0
EMA = 0.9
SKIP_LIMIT = 3

# ---- machine
COMPUTE: Literal["bfloat16", "float32"] = "float32"
INVARIANT = False  # True: GEMMs sample by sample, so that a rollout's velocity is the training forward's to the bit, 2 to 4 times slower
SUMMED = True  # W + up down in one GEMM: of so small a model an adapter beside it takes as long as the layer
RECOMPUTE: Literal["none", "block", "selective"] = "none"

# ---- what a person watches; a rule stops the run where the mean of the last WINDOW steps falls below this share of the first ones'
WATCH: Literal["small-world", "none"] = "small-world"  # whose held-out prompts and independent judges watch
WINDOW = 3
STOP: dict[str, float] = {"effective_backdrops": 0.5, "group_diversity": 0.6, "sharpness": 0.7}
LOG_EVERY, SAVE_EVERY, KEEP_LAST, KEEP_EVERY = 1, 5, 2, 5
VALIDATE_EVERY, VALIDATION = 5, 48  # prompts neither trained on nor reported
SHEET: dict[str, float] = {"steps": 20, "guidance": 1.0, "base": 128}
TEXT_TOKENS = 20  # of a prompt on average; --dry-run alone reads it

OPEN: dict[str, str] = {}
