"""Lens-Toy, the paper's model for its ablations: 14 blocks at the released width behind Qwen3-0.6B, base 512.

    python -m train pretrain --config released/lens_toy --dry-run --world 8 --gpu a100
    python -m train pretrain --config released/lens_toy --dry-run --set 'MODEL.in_channels=64' --set 'MODEL.out_channels=16'

The paper says 1.2B; 14 blocks of width 1536 have 1.21e9 parameters. The encoder's four layers lie at the same relative depth as GPT-OSS's
6th, 12th, 18th and 24th of 24: 7th, 14th, 21st and 28th of 28; its prefix is that of its own chat template
(train/ablations/adapters.py). With FLUX.1's or SD3's latents a token has 64 channels instead of 128.
"""

from __future__ import annotations

from . import pretrain_512 as BASED_ON
from .pretrain_512 import *  # noqa: F403

MODEL = {
    "num_layers": 14,
    "in_channels": 128,
    "out_channels": 32,
    "enc_hidden_dim": 1024,
    "selected_layer_index": (6, 13, 20, 27),  # type: ignore[dict-item]
}
SLOTS = 8  # of 24: a global batch of 192
STEPS = 200_000
PAPER_A100_HOURS = 0  # not stated for the ablations

OPEN = BASED_ON.OPEN | {
    "SLOTS": "the ablations' batch is not given; one node",
    "STEPS": "not given; the paper plots against steps",
}
