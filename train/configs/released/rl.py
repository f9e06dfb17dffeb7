"""Stage C of the paper: 180 steps of DiffusionNFT on 48 prompts x 24 pictures with a rubric judge, on 64 GPUs.

    torchrun --nproc-per-node 8 --nnodes 8 ... -m train rl --config released --init CHECKPOINT --prompts PROMPTS.jsonl \\
        --judge URL --out runs/rl --device cuda

What the paper leaves open is in OPEN, with the reason for the value here.
"""

from __future__ import annotations

from typing import Literal

from train.data import buckets

from .pretrain_512 import PROMPTS as PROMPTS

SEED = 2
MODEL: dict[str, int] = {}

# ---- rollouts
GROUPS, GROUP = 48, 24
SLOTS = 576
BASES: tuple[int, ...] = (1024,)
ASPECTS: tuple[str, ...] = buckets.ASPECTS
SAMPLING_STEPS, SOLVER = 20, "dpm2m"
ROLLOUT_OVERLAP = True

# ---- objective
TIMES = 10
INNER_STEPS = 1
NFT_BETA = 1.0
Z_SCALE = 5.0
ADAPTIVE, RECENTRE, MASK_DEGENERATE = True, False, False
KL_WEIGHT = 1e-4
ETA: float | Literal["nft"] = "nft"
DIVERSITY_WEIGHT = 0.0
NEUTRAL: tuple[str, ...] = ()
NEUTRAL_SHRINK = 8.0
MOST_FAILURES = 0.05
SHUFFLE = False

# ---- judge over HTTP, where --judge names one
JUDGE_MODEL = "gpt-4.1-mini"
JUDGE_SCORE: Literal["binary", "graded", "probability"] = "binary"  # of a rubric; their mean is the reward
JUDGE_CONCURRENCY, JUDGE_TIMEOUT = 8, 120.0  # calls at once of a process; seconds of an attempt

# ---- optimiser
LORA = "r=64,alpha=128,targets=attention"
STEPS, WARMUP, DECAY, COSINE = 180, 1, 0, False
LR = 3e-4
BETAS: tuple[float, float] = (0.9, 0.999)
EPS, WEIGHT_DECAY, CLIP = 1e-8, 1e-4, 1.0
EMA = 0.9
SKIP_LIMIT = 3

# ---- machine
COMPUTE: Literal["bfloat16", "float32"] = "bfloat16"
INVARIANT = False
SUMMED = False
RECOMPUTE: Literal["none", "block", "selective"] = "block"

# ---- what a person watches
WATCH: Literal["small-world", "none"] = "none"
WINDOW = 5
STOP: dict[str, float] = {"group_diversity": 0.5, "sharpness": 0.6}
LOG_EVERY, SAVE_EVERY, KEEP_LAST, KEEP_EVERY = 1, 5, 2, 20
VALIDATE_EVERY, VALIDATION = 10, 64
SHEET: dict[str, float] = {"steps": 20, "guidance": 5.0, "base": 1024}
TEXT_TOKENS = 200

OPEN = {
    "SEED": "any will do; every draw of the run follows from it",
    "SLOTS": "not given; two pictures of 1024^2 at ten times each are a micro-batch that fits, nine of them on each of 64 GPUs",
    "SAMPLING_STEPS": "not given; at 10 steps the last node of the released schedule is t = .51, and nothing below would be trained: 20",
    "ROLLOUT_OVERLAP": "ours; a judge's answer is waited for while the next micro-batch of the same step is drawn",
    "TIMES": "not given; a random half of the nodes of every picture, all in one packed forward",
    "INNER_STEPS": "not given; one optimiser step a rollout, as in the official code",
    "NFT_BETA": "1 is stated; it mixes policies, and is not the weight of the KL term",
    "Z_SCALE": "the paper's formula has 1, the official code divides by five standard deviations: 5",
    "ADAPTIVE": "adaptive weighting is stated; its normaliser is the official code's, mean |x0 error| of each branch",
    "RECENTRE": "not mentioned; True takes off the bias that clipping leaves in a group",
    "MASK_DEGENERATE": "not mentioned; True leaves out groups whose rewards are all equal, which pull theta to old",
    "ETA": "min(.001, .5) is printed, which is constant: read as min(.001 i, .5), i the optimiser step, as in the official code",
    "NEUTRAL": "ours; reads the small world's backdrops and places, so () here",
    "DIVERSITY_WEIGHT": "ours; the groupwise reward reads the small world's backdrops, so 0 here",
    "SHUFFLE": "ours; the control",
    "MOST_FAILURES": "ours; a failed judgement is masked, and more than these stop the step",
    "JUDGE_MODEL": "a small vision-language model that many can reach; any server's model will do",
    "JUDGE_SCORE": "binary is stated; graded and probability are smoother",
    "JUDGE_CONCURRENCY": "ours; what a server takes from each process at once",
    "JUDGE_TIMEOUT": "ours",
    "LORA": "r and alpha are stated, the layers are not: qkv and output of both streams",
    "WARMUP": "not mentioned: none",
    "CLIP": "not mentioned; the official code's",
    "EMA": "not mentioned; the official code's average, min((1 + k) / (10 + k), .9)",
    "INVARIANT": "ours; only on a CPU",
    "SUMMED": "ours; adapters beside the weights, as bfloat16 would round a small one away",
    "RECOMPUTE": "not mentioned; the rollout shares the memory",
    "WATCH": "ours; the small world's judges cannot see such pictures, so VALIDATION prompts of the file, by hash, are held out",
    "WINDOW": "ours",
    "STOP": "ours; a run that collapses or blurs ends and says which number fell",
    "SHEET": "ours",
    "PROMPTS": "ours; of the sheets, fixed, with seeds 0, 1, ...",
}
