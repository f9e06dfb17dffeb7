"""The ablations' small world: eight classes at 64x64 and an MMDiT of a quarter of Mini's size, an arm of which a core trains in minutes."""

from train.data.small_world import kinds

from .pretrain import BETAS, CLIP, MU, TEXT_DROPOUT, WEIGHT_DECAY  # noqa: F401 (fields of this recipe, too)
from .world import PHOTOGRAPHS, SIDE  # noqa: F401

SEED = 41
FIRST_SEED = 400_000_000
POOL = {"chunk": 4_096, "kept": 1, "reuse": 1}  # the same chunk for ever: a turn is an epoch
CLASSES = kinds.CORE[:8]  # all of them painted
TASKS = {"single_object": 0.2, "colors": 0.25, "two_object": 0.15, "position": 0.2, "color_attr": 0.2}
MODEL = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": 32,
    "out_channels": 8,
    "axes_dims_rope": (8, 28, 28),
}
BATCH = 16  # steps are scarcer than samples
LR, WARMUP = 2e-3, 50
STEPS, DECAY = 1_440, 0  # a constant rate: every round is a result of its own
ROUND = 240  # steps between scores
EMA = 0.99
COMPILED = True
GEMM = "bfloat16"  # float32 (--set GEMM=float32) on a CPU without bfloat16 units
TIMES = (0.2, 0.5, 0.8)  # of the validation loss
VALIDATION = 64
LOG_EVERY, VALIDATE_EVERY, SAVE_EVERY = 60, 240, 0
SHEET = {"steps": 10, "guidance": 3.0, "mu": 0.5}
SCORED = ("single_object", "colors", "two_object", "position", "color_attr")
PER_TASK = 12  # prompts of each
STYLES = ("dense", "brief", "geneval")  # of the prompts that all arms are scored by
ARMS = {"brief": {"brief": 1.0}, "detailed": {"dense": 1.0}, "mixed": {"brief": 0.5, "dense": 0.5}}
