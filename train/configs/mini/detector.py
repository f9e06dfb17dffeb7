"""Lens-Eye on one CPU core: all classes and tasks, 64 pixels first, then a mix of buckets."""

SEED = 5
SHAPE = {"widths": (32, 48, 96, 96), "blocks": (1, 3, 1), "neck": 64}
# From a step on: (height, width, pictures of a batch, share of the batches).
BATCHES: tuple[tuple[int, tuple[tuple[int, int, int, float], ...]], ...] = (
    (0, ((64, 64, 32, 1.0),)),
    (2_000, ((64, 64, 32, 0.70), (96, 96, 16, 0.08), (128, 128, 8, 0.08), (64, 128, 16, 0.08), (128, 64, 16, 0.06))),
    (2_800, ((64, 64, 32, 0.46), (96, 96, 16, 0.10), (128, 128, 8, 0.24), (64, 128, 16, 0.10), (128, 64, 16, 0.10))),
    (5_000, ((64, 64, 32, 0.35), (96, 96, 16, 0.15), (128, 128, 8, 0.30), (64, 128, 16, 0.10), (128, 64, 16, 0.10))),
    (6_200, ((64, 64, 32, 0.60), (96, 96, 16, 0.10), (128, 128, 8, 0.15), (64, 128, 16, 0.08), (128, 64, 16, 0.07))),
)
STEPS, WARMUP, DECAY = 7_000, 200, 2_000
LR, BETAS, WEIGHT_DECAY, CLIP = 2e-3, (0.9, 0.98), 0.02, 5.0
EMA = 0.998
AUTOCAST = True  # bfloat16 GEMMs; twice as fast where the processor has them
# Shares of a batch's pictures: how copies differ from clean renders.
COPIES = {"warp": 0.4, "blur": 0.15, "shrink": 0.15, "reconstruct": 0.2, "noise": 0.3, "tone": 0.3}
VALIDATION = 256  # unseen scenes
LOG_EVERY, EVALUATE_EVERY, SAVE_EVERY = 50, 500, 250
