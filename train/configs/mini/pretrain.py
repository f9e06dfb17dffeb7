"""Mini's base model: flow matching at 64x64. Fields the paper leaves open carry their reason."""

from lens.config import LensConfig

SEED = 1
SIDE = 64
MODEL = LensConfig.mini()
INIT_STD = 0.05  # width 128: the released scale of 0.02 starts too quietly
BATCH = 32  # steps, not samples, are scarce on a CPU
POOL = 64  # batches drawn together, so that captions of one length can share a batch
MU = 0.5  # 16 tokens of 32 channels hold little redundancy: shape is decided below t = 0.5
STRATIFIED = True
TEXT_DROPOUT = 0.1
LR, WARMUP, STEPS, DECAY = 2e-3, 100, 24_000, 9_000
ENCODER_LR = 1e-3
ENCODER_STEPS = 8_000  # the text encoder learns together with the model this long, then is frozen
BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.01  # matrices only
CLIP = 1.0
EMA = 0.998
LOG_EVERY, SAVE_EVERY, SHEET_EVERY = 50, 500, 2_000
SAMPLER = {"num_inference_steps": 20, "guidance_scale": 3.0}
SHIFT = 1.65  # e^MU: the sampler spends its steps where training did
PROMPTS = (
    "a photo of a red apple",
    "a blue car on a wooden table",
    "a purple heart on a plain mint background",
    "a yellow star against a dark starry night",
    "a green book to the left of a red umbrella",
    "a purple umbrella above an orange fish",
    "three pink mushrooms on a checkered wall",
    "two green keys",
    "a photo of a tree in a meadow",
    "a red balloon to the right of a yellow crown",
    "a blue shirt and a red cup",
    "a pink house",
    "four purple stars",
    "a banana below a blue bell",
    "a cactus on a wooden table",
    "a red heart, a blue key and a green fish in a row",
)
