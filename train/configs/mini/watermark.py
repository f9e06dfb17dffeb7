"""The watermark judge on one CPU core."""

SEED = 18
WIDTHS = (12, 24, 32, 40)  # 70,000 numbers
GROUNDS = 900  # pictures that stamps are put on, kept in memory: .4 MB each
PAIRS = 12  # of a batch: a picture as it is, and one with a stamp
DECOYS = 0.35  # share of the pairs with something on them that is no watermark
STEPS, WARMUP, DECAY = 1400, 30, 600
LR, BETAS, WEIGHT_DECAY, CLIP = 4e-3, (0.9, 0.98), 0.02, 5.0
AUTOCAST = True  # bfloat16 GEMMs; twice as fast where the processor has them
LEAST_PRECISION = 0.99  # of pictures to calibrate on, half of them stamped: the logits are shifted until .5 has it
CALIBRATION, VALIDATION = 600, 200  # pairs
LOG_EVERY, EVALUATE_EVERY, SAVE_EVERY = 50, 500, 100
