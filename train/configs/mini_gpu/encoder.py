"""The text encoder on one H200: width 160, about 2 minutes alone, then jointly with the MMDiT.

    python -m train encoder --config mini_gpu --out runs/gpu/encoder --device cuda --workers 14 --stop-after 2m

A third of the captions is dense. 2.3 M parameters: 4.6 MB in bfloat16 of the 24 MB that all parts
may take together (width 256 would be 7.9 MB, at the cost of the generator).
"""

from ..mini import encoder as small

SEED, TOKENIZER, LAYERS = small.SEED, small.TOKENIZER, small.LAYERS
MODEL = {**small.MODEL, "hidden_size": 160, "head_dim": 40, "max_position_embeddings": 2048}
EMBEDDING_STD = small.EMBEDDING_STD
CAPTIONS = {"geneval": 0.08, "brief": 0.32, "dense": 0.35, "translated": 0.25}
TRAIN = {
    **small.TRAIN,
    "batch": 384,
    "pairs": 32,
    "lr": 1.5e-3,
    "warmup": 100,
    "steps": 1_000,
    "decay": 400,
    "ema": 0.995,
}
VALIDATION = 512
SAVE_EVERY, LOG_EVERY = 500, small.LOG_EVERY
