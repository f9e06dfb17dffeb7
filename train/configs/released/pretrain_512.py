"""Stage A of the paper: 400,000 steps of 3,072 pictures of 512x512 on 128 A100, from fresh weights.

    torchrun --nproc-per-node 8 --nnodes 16 ... -m train pretrain --config released/pretrain_512 --data SHARDS \\
        --model CHECKPOINT --out runs/pretrain_512 --device cuda

What the paper leaves open is in OPEN, with the reason for the value here.
"""

from __future__ import annotations

from typing import Literal

SEED = 0
MODEL: dict[str, int] = {}  # fields of LensConfig that differ from the released shape

# ---- data
BASES: tuple[int, ...] = (512,)
ASPECTS: tuple[str, ...] = ("1:1",)
BATCH: dict[int, int] = {512: 24, 768: 10, 1024: 6}  # pictures of a micro-batch, by base
SLOTS = 128  # micro-batches of an optimiser step, whoever computes them: 128 x 24 = 3,072
BASE_WEIGHTS: dict[int, float] | None = None
ASPECT_WEIGHTS: dict[str, float] | str = "data"
MAX_UPSCALE = 1.0  # shards that enlarge pictures more are refused
TEXT_DROPOUT = 0.1
TEXT_TOKENS = 200  # of a caption on average; --dry-run alone reads it

# ---- objective: t = sigmoid(mu + TIME_SIGMA z); no weighting over t
MU: float | tuple[tuple[int, float], ...] = 1.06  # a number, or two points (image tokens, mu) of a line
TIME_SIGMA = 1.0
TIME_STRATIFIED = False
LOSS_REDUCTION: Literal["rank_mean", "sample_mean", "token_mean"] = "rank_mean"

# ---- optimiser: AdamW on float32 masters
STEPS = 400_000
LR, WARMUP, DECAY = 2e-4, 2_000, 0
BETAS: tuple[float, float] = (0.9, 0.999)
EPS = 1e-8
WEIGHT_DECAY = 0.01  # on matrices alone
CLIP = 1.0
EMA = 0.9999
SKIP_LIMIT = 10  # steps in a row whose gradient is not finite, before the training gives up
DAMAGED_LIMIT = 0.01  # of the members asked for: more that cannot be used end the training

# ---- machine
COMPUTE: Literal["bfloat16", "float32"] = "bfloat16"
RECOMPUTE: Literal["none", "block", "selective"] = "block"
RESHARD = True
SHARD = 8
ATTENTION = "auto"

# ---- what a person watches
LOG_EVERY, SAVE_EVERY, KEEP_LAST, KEEP_EVERY = 20, 1_000, 2, 20_000
VALIDATE_EVERY, VALIDATION = 1_000, 1  # steps between; SLOTS of micro-batches of `--validate`: 3,072 pictures
SHEET: dict[str, float] = {"steps": 20, "guidance": 5.0, "base": 512}
PROMPTS: tuple[str, ...] = (
    "A lighthouse on a cliff at dusk, waves breaking below, warm light in its window.",
    "Two green apples to the left of a blue ceramic bowl on a wooden table, soft daylight.",
    'A shop window with hand-painted letters that say "OPEN LATE".',
    "Five paper cranes in a row, each of another colour, on a white background.",
    "An old man with a grey beard reading a newspaper on a park bench in autumn.",
    "Une rue étroite pavée à Lyon sous la pluie, la nuit.",
    "一只戴着红色围巾的橘猫坐在雪地里",
    "A cutaway drawing of a mechanical watch, thin ink lines, labelled parts.",
)

PAPER_A100_HOURS = 192_000  # as the paper states it, not by stage; --dry-run prints it beside its own estimate

OPEN = {
    "SEED": "any will do; every draw of the training follows from it",
    "BASE_WEIGHTS": "p(base) is not given; None: every base of the data alike",
    "ASPECT_WEIGHTS": "p(aspect | base) is not given; 'data': as often as in the data, 'uniform', or aspect -> weight",
    "MAX_UPSCALE": "not given; the paper keeps pictures from 384^2 pixels on, which implies 1.34 for base 512 (`shards --max-upscale "
    "1.34`); 1 enlarges nothing",
    "TEXT_DROPOUT": "the rate is not given; a tenth is what classifier-free guidance is usually trained with",
    "TEXT_TOKENS": "captions average 109 words; 200 tokens with the chat's ending are assumed for estimates",
    "TIME_SIGMA": "only mu is given; 1 is the plain logit-normal",
    "TIME_STRATIFIED": "not mentioned; one quantile of t for each picture of a micro-batch cuts the variance of the loss",
    "LOSS_REDUCTION": "not given; rank_mean is what averaging gradients over ranks gives. The batch sizes balance tokens, so "
    "it is within 6 % of token_mean: a 1024-base picture weighs four times a 512-base one; sample_mean weighs all alike",
    "WARMUP": "the rate is called constant; 2,000 steps guard Adam's first moments, 0 is the paper to the letter",
    "EPS": "torch's default",
    "WEIGHT_DECAY": "not given; matrices only, since norms, biases and the time path have no scale to shrink to",
    "EMA": "not mentioned; the average is kept and drawn from, never trained on unless `--weights average` says so",
    "SKIP_LIMIT": "not mentioned; a gradient that is not finite is skipped, counted and told, this many times in a row",
    "DAMAGED_LIMIT": "not mentioned; damaged members are replaced, counted and named, and a hundredth of all is no accident",
    "RECOMPUTE": "gradient checkpointing is stated, its granularity is not: block, or selective where memory allows",
    "RESHARD": "not given; False keeps gathered weights between the passes: 8.2 GB more, a third less traffic",
    "SHARD": "not given; the eight GPUs of a node hold one copy of the state, 66 GB with 16 GB of averages",
    "ATTENTION": "not given; auto takes the first of the order in lens/ops/attention/choice.py that can serve",
    "SHEET": "ours; base and guidance of the pictures drawn at every save",
    "PROMPTS": "ours; fixed, with seeds 0, 1, ...",
    "VALIDATE_EVERY": "ours",
    "VALIDATION": "ours",
    "LOG_EVERY": "ours",
    "SAVE_EVERY": "ours",
    "KEEP_LAST": "ours",
    "KEEP_EVERY": "ours",
}
