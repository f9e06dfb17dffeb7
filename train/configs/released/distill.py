"""Lens-Turbo (arXiv 2605.21573): four steps without guidance, from the RL weights; 8 GPUs, at most 1,000 student steps.

    torchrun --nproc-per-node 8 -m train distill --config released --init CHECKPOINT --data SHARDS --validate SHARDS \\
        --out runs/turbo --device cuda

What the paper leaves open is in OPEN, with the reason for the value here.
"""

from __future__ import annotations

from typing import Literal

from train.data import buckets

SEED = 0
MODEL: dict[str, int] = {}  # fields of LensConfig that differ from the released shape

# ---- data: 100,000 pictures and their captions
BASES: tuple[int, ...] = (512, 768, 1024)
ASPECTS: tuple[str, ...] = buckets.ASPECTS
BATCH: dict[int, int] = {512: 4, 768: 4, 1024: 4}  # pictures of a micro-batch, by base
SLOTS = 8  # micro-batches of an optimiser step: 8 x 4 = 32
BASE_WEIGHTS: dict[int, float] | None = None
ASPECT_WEIGHTS: dict[str, float] | str = "data"
MAX_UPSCALE = 1.0  # shards that enlarge pictures more are refused
TEXT_TOKENS = 200  # of a caption on average; --dry-run alone reads it

# ---- student: its steps are the sampler's
STUDENT_STEPS = 4
STUDENT_SAMPLER: Literal["euler", "renoise"] = "euler"
GRID: Literal["fixed", "random"] = "fixed"

# ---- objective: LAMBDA_D (DM_WEIGHT DM + CA_WEIGHT CA) + LAMBDA_G generator
GUIDANCE = 5.0  # w of CA
CFG_MODE: Literal["plain", "token_norm"] = "plain"
DM_WEIGHT, CA_WEIGHT = 1.0, 1.0
LAMBDA_D, LAMBDA_G = 0.1, 0.001  # LAMBDA_G = 0: no heads
NORMALISER_FLOOR = 1e-6
MU: float | tuple[tuple[int, float], ...] = ((256, 1.0), (4096, 1.3))
TAPS: tuple[int, ...] = (12, 24, 36)  # blocks behind which the heads look; the other arm is (24, 36, 47)
HEAD_WIDTH = 512
HEADS_MU: float | None = None  # of the times at which the heads look; None: MU
R1_GAMMA, R1_ALPHA = 1.0, 0.1  # R1_GAMMA = 0: no penalty
IDA = 0.03
FAKE_UPDATES = 4  # of fake score and heads before each student step
GUIDED_STEPS = 0  # before all turns: the student alone learns the guided teacher's way from its own states
GUIDED_SUBSTEPS = 1  # of the teacher in one of the student's: with n the student learns what n times as many steps draw
FAKE_WARMUP = 0  # then: of fake score and heads alone

# ---- optimiser: AdamW without first moment on float32 masters
STEPS = 1_000  # of the student
LR, FAKE_LR, HEADS_LR = 5e-7, 5e-7, 1e-4
GUIDED_LR = 1e-5  # in GUIDED_STEPS, over which it falls to zero
BETA2, EPS, WEIGHT_DECAY = 0.9, 1e-8, 0.0
CLIP, HEADS_CLIP = 1.0, 10.0
EMA = 0.98
SKIP_LIMIT = 10

# ---- machine
COMPUTE: Literal["bfloat16", "float32"] = "bfloat16"
RECOMPUTE: Literal["none", "block", "selective"] = "block"
RESHARD = True
SHARD = 8

# ---- watch: every WATCH_EVERY student steps, on WATCHED held-out pictures
WATCH_EVERY, WATCHED = 25, 32
SCORE = ""  # "module:function" of (pictures uint8 [n, H, W, 3], captions) -> float, higher is better; "": none
TEACHER_STEPS, TEACHER_GUIDANCE = 20, 5.0  # of the reference
GROUPS, GROUP = 4, 6  # captions, and pictures of each, that diversity is measured by
RULES: dict[str, tuple[float, float]] = {
    "ca_over_dm": (0.2, 5.0),
    "deviation": (0.85, 1.15),
    "cast": (0.0, 4.0),
    "saturation": (0.8, 1.25),
    "high_frequency": (0.6, 1.3),
    "fake_rise": (0.0, 1.5),
    "heads_accuracy": (0.0, 0.98),
    "drift": (0.0, 0.05),
    "diversity": (0.7, 2.0),
    "backdrops": (0.6, 2.0),
}
BARS: dict[
    str, tuple[float, float]
] = {}  # what is aimed at; a student is selected by its score less its distance from them
PATIENCE = 2  # checks in a row outside of its range, before a number ends the training
LOG_EVERY, SAVE_EVERY, KEEP_LAST, KEEP_EVERY = 5, 50, 2, 100  # in student steps

OPEN = {
    "SEED": "any will do; every draw of the training follows from it",
    "BASES": "the paper's own sheets are 1440^2; the 27 training sizes are assumed",
    "ASPECTS": "as in stage B",
    "BASE_WEIGHTS": "not given; None: every base of the data alike",
    "ASPECT_WEIGHTS": "not given; as often as in the data",
    "MAX_UPSCALE": "not given; as in stage A",
    "TEXT_TOKENS": "captions average 109 words; 200 tokens with the chat's ending are assumed for estimates",
    "STUDENT_SAMPLER": "DMD2 and SenseFlow noise anew between steps, the released scheduler walks on by Euler: training and "
    "inference must agree, so the released one's",
    "GRID": "the scheduler's four times; random trains for other numbers of steps, too",
    "CFG_MODE": "the papers' formula is plain; the released sampler rescales every token's norm",
    "DM_WEIGHT": "1 in the formula",
    "CA_WEIGHT": "1 in the formula; keep `ca_over_dm` between .7 and 1.5",
    "NORMALISER_FLOOR": "DMD2 has none; CA is loud at small tau, .1 is what others took",
    "MU": "the training's line: times of DM, CA, fake score and heads are shifted by it",
    "TAPS": "blocks not given; a quarter, a half and three quarters of 48",
    "HEAD_WIDTH": "not given",
    "HEADS_MU": "not given; None: real and drawn are looked at where the fake score is trained",
    "GUIDED_STEPS": "ours: with 0 the student starts from the teacher's weights, with more from its guided steps",
    "GUIDED_SUBSTEPS": "ours: 1 learns the teacher in the student's few steps, errors of so long steps included",
    "GUIDED_LR": "ours",
    "FAKE_WARMUP": "not mentioned; the four fake updates before the first student step are all",
    "EPS": "torch's default; `near_eps` in the log says whether it matters at gradients this small",
    "WEIGHT_DECAY": "not given; a thousand steps at 5e-7 need none",
    "CLIP": "not given; SenseFlow's 1",
    "HEADS_CLIP": "not given; DMD2's 10",
    "EMA": "not mentioned; what is watched and exported",
    "SKIP_LIMIT": "as in stage A",
    "RECOMPUTE": "as in stage A",
    "RESHARD": "as in stage A",
    "SHARD": "as in stage A",
    "WATCH_EVERY": "ours",
    "WATCHED": "ours",
    "SCORE": "ours: the held-out score that selects the checkpoint; none is shipped for photographs",
    "TEACHER_STEPS": "ours",
    "TEACHER_GUIDANCE": "ours",
    "GROUPS": "ours",
    "GROUP": "ours",
    "RULES": "ours: number -> range; see docs/distillation.md",
    "BARS": "ours",
    "PATIENCE": "ours",
    "LOG_EVERY": "ours",
    "SAVE_EVERY": "ours",
    "KEEP_LAST": "ours",
    "KEEP_EVERY": "ours",
}
