"""The generator on one H200: 128 pixels (64 image tokens), all classes, half of the captions dense; 10-12 minutes.

    python -m train pretrain --config mini_gpu --vae runs/gpu/vae --encoder runs/gpu/encoder/encoder.pt \\
        --out runs/gpu/base --device cuda --workers 14 --stop-after 9m        # again to resume

What ships must stay within 24 MB in bfloat16: 5.6 MB are the VAE's and 4.6 MB the text encoder's, so 160 x 7 (6.7 M
parameters, 13.4 MB); 256 x 8 would be 38 MB, 192 x 6 16.5 MB. Five heads of 32 channels keep the matrices' sides multiples
of 32. 5,500 steps of 512 are 2.8 M pictures: 10 minutes at the 4,500 a second that are assumed, not measured.
"""

from .world import SIDE as SIDE

SEED = 3
MODEL = {
    "num_layers": 7,
    "num_attention_heads": 5,
    "attention_head_dim": 32,
    "in_channels": 32,
    "out_channels": 8,
    "axes_dims_rope": (8, 12, 12),
}
MU = 0.7  # more than at 64 pixels: neighbouring tokens say more about each other, so the middle is easier
TEXT_DROPOUT = 0.1
WINDOW = 16_384
BATCHES = ((0, 512),)
LM_WEIGHT = 0.1
JOINT_STEPS = 1_500
LR, ENCODER_LR, WARMUP, WEIGHT_DECAY, BETAS, CLIP = 2e-3, 1e-3, 200, 0.01, (0.9, 0.95), 1.0
STEPS, DECAY = 5_500, 2_500
EMA = 0.998
LOG_EVERY, VALIDATE_EVERY, SAVE_EVERY = 50, 500, 1_000
VALIDATION = 512
SHEET = {"steps": 20, "guidance": 3.0, "mu": MU}
PROMPTS = (
    "a photo of a blue car",
    "A large red apple on green grass under a blue sky.",
    "a photo of a yellow star, against a dark starry night",
    "a brown horse on a plain mint background",
    "a green teapot on a wooden table",
    "a helicopter over the sea",
    "a photo of three strawberries",
    "four yellow bells on a plain lavender background",
    "A blue car to the left of a red book, on a wooden table.",
    "A purple umbrella above an orange fish, on a pink backdrop.",
    "a photo of a guitar below a green turtle",
    "a blue heart, a yellow key and a red shirt in a row",
    "a castle and a snowman, on snow under a pale sky",
    "a pink elephant to the right of a white cup, on a wall of bricks",
    "five red leaves on a plain grey background",
    "a small purple moon in the upper left of the picture, under a starry sky at night",
    "A large red umbrella stands at the center of the picture, and nothing else is there. It is painted in one clear color "
    "and has a soft sheen. Behind it there is a plain mint wall. A small dark shadow lies below the umbrella. "
    "The light is even and warm, and the whole picture has the clean look of a small digital drawing.",
    "Two things share the frame, a medium-sized green chair and a medium-sized yellow bucket. The chair is on the left and "
    "the bucket is on the right of it. In the background there is a meadow under a clear blue sky. Each thing casts a soft "
    "shadow on the ground. No other objects can be seen, and the mood of the picture is calm.",
    "une voiture bleue à gauche d'un livre rouge",
    "三个粉色的蘑菇，草地背景",
    "una manzana roja sobre una mesa de madera",
    "黄色い鍵と紫色のブーツ",
    'a white sign with black letters that says "OPEN"',
    'a red apple below a yellow sign with black letters that reads "SALE 7"',
)
