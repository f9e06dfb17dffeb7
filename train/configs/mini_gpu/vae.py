"""The VAE on one H200: everything trained together at 128 pixels, bfloat16, channels last, compiled; about 5 minutes.

    python -m train vae --config mini_gpu --out runs/gpu/vae --part joint --device cuda --compile

4,600 steps of 128 are 590 k pictures: 5 minutes at the 2,000 pictures/s estimated. Files are 5.6 MB in bfloat16.
"""

from .world import SIDE as SIDE

SEED = 1
MODEL = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 8,
    "block_out_channels": (32, 48, 64, 64),
    "decoder_block_out_channels": (32, 64, 128, 128),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": SIDE,
}
STATISTICS_SCENES = 10_000
JOINT = {
    "batch": 128,
    "lr": 1e-3,
    "warmup": 200,
    "steps": 4_600,
    "decay": 1_500,
    "weight_decay": 0.0,
    "ema": 0.998,
    "kl": 1e-6,
    "noise": 0.2,  # of each channel's deviation, at most
    "head": 0.02,
    "detail_from": 1_000,
    "detail_full": 2_500,
    "pool": 100_000,  # scenes rendered once by all processes and kept on the device: 4.9 GB
}
PROBE = {"scenes": 10_000, "held": 2_000, "batch": 64, "steps": 1_500, "lr": 3e-3, "noise": 0.5}
VALIDATION = 256  # scenes
SAVE_EVERY, LOG_EVERY, EVALUATE_EVERY = 1_000, 100, 500
