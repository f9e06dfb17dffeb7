"""The ops of the model, and one of the data engine: one file per op, one stem everywhere.

`reference.py` is the specification, `backend.py` decides which kernel runs and says why.
"""

from lens.ops import backend, reference
from lens.ops.attention.hopper import HeadNorms
from lens.ops.gated_residual import gated_residual
from lens.ops.gated_residual_norm_modulate import gated_residual_norm_modulate
from lens.ops.group_norm_silu import group_norm_silu
from lens.ops.guidance_step import guidance_step
from lens.ops.image_scores import ImageScores, image_scores
from lens.ops.joint_attention import joint_attention
from lens.ops.linear_rows import linear_rows
from lens.ops.moe_mxfp4 import moe_mxfp4
from lens.ops.pack_tokens import pack_tokens, unpack_tokens
from lens.ops.qk_norm_rope import qk_norm_rope
from lens.ops.rms_norm_modulate import rms_norm_modulate
from lens.ops.sink_attention import sink_attention
from lens.ops.swiglu import swiglu

__all__ = [
    "HeadNorms",
    "ImageScores",
    "backend",
    "gated_residual",
    "gated_residual_norm_modulate",
    "group_norm_silu",
    "guidance_step",
    "image_scores",
    "joint_attention",
    "linear_rows",
    "moe_mxfp4",
    "pack_tokens",
    "qk_norm_rope",
    "reference",
    "rms_norm_modulate",
    "sink_attention",
    "swiglu",
    "unpack_tokens",
]
