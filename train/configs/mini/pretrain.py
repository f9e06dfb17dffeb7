"""Mini's flow-matching training: small batches first (optimiser steps are the scarce thing), encoder trained jointly first."""

from .world import SIDE as SIDE

SEED = 3
MODEL = {
    "num_layers": 6,
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "in_channels": 32,
    "out_channels": 8,
    "axes_dims_rope": (8, 28, 28),
}
MU = 0.5
TEXT_DROPOUT = 0.1
WINDOW = 2_048  # scenes sorted by caption length together
BATCHES = ((0, 32),)  # (from window, batch); larger from a later window where samples, not steps, are scarce
LM_WEIGHT = 0.1  # of the captions' next-token loss while the encoder trains along: it stays a language model
JOINT_STEPS = 4_000  # the encoder trains along until then, and is frozen at its average
LR, ENCODER_LR, WARMUP, WEIGHT_DECAY, BETAS, CLIP = 2e-3, 1e-3, 100, 0.01, (0.9, 0.95), 1.0
STEPS, DECAY = 23_000, 8_000
EMA = 0.998
LOG_EVERY, VALIDATE_EVERY, SAVE_EVERY = 50, 1_000, 1_000
VALIDATION = 256
SHEET = {"steps": 20, "guidance": 3.0, "mu": 0.5}
PROMPTS = (
    "A large red apple on green grass under a blue sky.",
    "a photo of a blue car",
    "A purple heart on a plain mint background.",
    "a photo of a yellow star, against a dark starry night",
    "a white umbrella in front of a pink wall",
    "a photo of a green teapot on a wooden table",
    "a house in a meadow with a clear blue sky",
    "a penguin against a checkered background",
    "A blue car to the left of a red book, on a wooden table.",
    "A purple umbrella above an orange fish, on a pink backdrop.",
    "a yellow star above a green key, on a checkered wall",
    "a photo of a red balloon right of an orange star, in a meadow",
    "Three pink mushrooms on a checkered wall.",
    "a photo of two green books on a wooden table",
    "four yellow bells on a plain lavender background",
    "a blue heart, a yellow key and a red shirt in a row",
    "A large red umbrella stands at the center of the picture, and nothing else is there. It is painted in one clear color "
    "and has a soft sheen. Behind it there is a plain mint wall. A small dark shadow lies below the umbrella. "
    "The light is even and warm, and the whole picture has the clean look of a small digital drawing.",
    "Two things share the frame, a medium-sized green chair and a medium-sized yellow bucket. The chair is on the left and "
    "the bucket is on the right of it. In the background there is a meadow under a clear blue sky. Each thing casts a soft "
    "shadow on the ground. No other objects can be seen, and the mood of the picture is calm.",
    "une voiture bleue à gauche d'un livre rouge",
    "三个粉色的蘑菇，草地背景",
    'a white sign with black letters that says "OPEN"',
    'a red apple below a yellow sign with black letters that reads "SALE"',
    "a blue elephant on a plain pink background",
    "an orange whale to the right of a purple dress, by the sea",
)
