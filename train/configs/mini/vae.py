"""Mini's VAE: FLUX.2 layout, 8 latent channels (32 per 16x16-pixel token)."""

from .world import SIDE as SIDE

SEED = 1
MODEL = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 8,
    "block_out_channels": (16, 32, 48, 64),
    "decoder_block_out_channels": (16, 32, 64, 96),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "mid_block_add_attention": False,
    "sample_size": SIDE,
}
# The linear codec whose code is the latent space: channels are whitened; noise makes it robust.
CODEC = {
    "encode_kernel": 16,
    "decode_kernel": 24,
    "scenes": 20_000,
    "batch": 64,
    "steps": 4_000,
    "lr": 3e-3,
    "noise": 0.2,
    "head": 0.02,  # weight of the cross-entropy of every token's class and colour
}
STATISTICS_SCENES = 10_000
PROBE = {"scenes": 10_000, "held": 2_000, "batch": 64, "steps": 1_500, "lr": 3e-3, "noise": 0.5}
DECODER = {
    "batch": 16,
    "lr": 2e-3,
    "warmup": 100,
    "steps": 3_000,
    "decay": 1_000,
    "weight_decay": 0.0,
    "ema": 0.998,
    "noise": 0.2,
    "detail_from": 1_500,
    "detail_full": 4_000,
}
ENCODER = {"batch": 16, "lr": 2e-3, "warmup": 100, "steps": 1_500, "decay": 1_000, "weight_decay": 0.0, "ema": 0.995}
# Encoder, decoder and head together (--part joint): what a GPU does, here to be tried.
JOINT = {
    "batch": 16,
    "lr": 2e-3,
    "warmup": 100,
    "steps": 6_000,
    "decay": 2_000,
    "weight_decay": 0.0,
    "ema": 0.998,
    "kl": 1e-6,
    "noise": 0.2,  # of each channel's deviation, at most
    "head": 0.02,
    "detail_from": 1_500,
    "detail_full": 4_000,
    "pool": 0,
}
VALIDATION = 128  # scenes
SAVE_EVERY, LOG_EVERY, EVALUATE_EVERY = 1_000, 100, 500
