"""Mini at 128x128 alone, from shipped weights, the text encoder frozen: long and plain, on a pool of encoded scenes.

python -m train pretrain --config mini/pretrain_128 --init lens/mini/base --out runs/base_128 --stop-after 2h
"""

from train.data.small_world import kinds, world

from .pretrain import BETAS, CLIP, MODEL, PROMPTS, SHEET, TEXT_DROPOUT, WEIGHT_DECAY  # noqa: F401 (fields of this recipe, too)

SEED = 6
FIRST_SEED = 200_000_000  # scenes that no stage before has seen
SIDE = 128
SIZES = {(128, 128): 1.0}
BATCH = 32
TEXT_BINS = (16, 32, 72, 88, 104, 120, 160)  # brief captions end at 33 tokens; of dense ones few have more than 117
CLASSES = kinds.CORE
TASKS = world.TASKS
CAPTIONS = {"geneval": 0.10, "brief": 0.38, "dense": 0.52}  # English alone: other languages are the encoder's to bridge
PHOTOGRAPHS = 0.0  # share of scenes before a photograph
POOL = {"chunk": 2_048, "kept": 8, "reuse": 4}
MU = 0.2  # lower times deserve more draws at this size: outlines are lost between t = .8 and .4
LR, WARMUP = 1.5e-3, 100
STEPS, DECAY = 60_000, 20_000
EMA = 0.999
COMPILED = True
GEMM = "bfloat16"  # float32 (--set GEMM=float32) is several times faster on a CPU without bfloat16 units
STRAIGHTEN = 512  # scenes that find the convolution which stands for the VAE's encoder
TIMES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)  # of the validation loss, whose mean weighs them alike
VALIDATION = 256
LOG_EVERY, VALIDATE_EVERY, SAVE_EVERY = 100, 2_000, 250
