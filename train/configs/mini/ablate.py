"""The ablations' small world: Mini's own pre-training at a scale at which a CPU tells arms apart in minutes."""

from . import pretrain as BASED_ON  # noqa: F401 (train.configs reads it)
from .pretrain import *  # noqa: F403

SEED = 41
STEPS, DECAY, WARMUP = 6_000, 0, 50  # a constant rate: every round is a result of its own
ROUND = 500  # steps between scores
EMA = 0.99
WINDOW = 512  # scenes sorted by caption length together: the first step waits for no more
LOG_EVERY, VALIDATE_EVERY, SAVE_EVERY = 50, 500, 0
VALIDATION = 128
SCORED = ("single_object", "colors", "two_object", "position", "color_attr")
PER_TASK = 12  # prompts of each
STYLES = ("dense", "brief", "geneval")  # of the prompts that all arms are scored by
ARMS = {"brief": {"brief": 1.0}, "detailed": {"dense": 1.0}, "mixed": {"brief": 0.5, "dense": 0.5}}
