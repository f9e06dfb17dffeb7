"""Mini's reasoner: the text encoder's layers once more, which write a dense caption for a wish (train/data/small_world/wishes.py)."""

FIRST_SEED = 600_000_000
SHARES = {"caption": 0.42, "open": 0.45, "elsewhere": 0.05, "unknown": 0.08}  # kinds of wishes
TRAIN = {
    "batch": 32,
    "lr": 2e-3,
    "warmup": 50,
    "steps": 18_800,
    "decay": 400,
    "weight_decay": 0.01,
    "ema": 0.99,
}
AUTOCAST = True  # bfloat16 GEMMs
VALIDATION = 64
SAVE_EVERY, LOG_EVERY, VALIDATE_EVERY = 50, 25, 250
