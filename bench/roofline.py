"""FLOPs and bytes that a piece of the model cannot avoid, and the share of this machine's ceilings that a time reaches.

A product of [m, k] and [k, n] counts 2 m k n; attention 4 S_q S_k D (two products); everything else counts nothing.
Bytes are compulsory traffic: every weight and input read once, every output written once. B samples, I image and T
text tokens of each, D width, F hidden width, L blocks; see `lens.ops.reference` for the alphabet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from lens.config import LensConfig

from .case import tensors

# the paper's times (arXiv 2605.21573) on one H100: 1024 x 1024, batch 1, prompt to pixels
PAPER_SECONDS = {"lens": 3.15, "turbo": 0.84}
H100_BF16 = 989.5e12  # FLOP/s of the dense matrix units: 132 multiprocessors x 4096 x 1.83 GHz; an H200 has the same
SAME_CHIP = "An H200 has an H100's multiprocessors and 1.4x its memory bandwidth."


def product(m: int, k: int, n: int) -> int:
    """FLOPs of [m, k] @ [k, n]."""
    return 2 * m * k * n


def attention(queries: int, keys: int, width: int) -> int:
    """FLOPs of softmax(q k^T) v over all heads, width = heads x channels of a head."""
    return 4 * queries * keys * width


def moved(*values: Any) -> int:
    """Bytes of all tensors in nested arguments and results: what a pass over them reads and writes once."""
    return sum(t.numel() * t.element_size() for t in tensors(values))


def row_product(rows: int, k: int, n: int, item: int, bias: bool = True) -> int:
    """Bytes of y = x w^T + b: x [rows, k], w [n, k], b [n], y [rows, n], `item` bytes an element."""
    return item * (rows * k + n * k + rows * n + (n if bias else 0))


def step_flops(config: LensConfig, images: Sequence[int], texts: Sequence[int]) -> dict[str, int]:
    """One denoiser call on packed samples with every exact saving: {"gemm": ..., "attention": ...}.

    Text is projected once per prompt and modulation once per schedule, so neither counts. The last block needs of its
    text only keys and values: its text queries, attention rows, output product and MLP are dead.
    """
    d, f, layers, c = config.inner_dim, config.mlp_hidden_dim, config.num_layers, config.in_channels
    ri, rt = sum(images), sum(texts)
    row = product(1, d, 3 * d) + product(1, d, d) + product(1, d, 2 * f) + product(1, f, d)
    gemm = layers * ri * row + (layers - 1) * rt * row + rt * product(1, d, 2 * d) + 2 * ri * product(1, c, d)
    mixed = sum((layers - 1) * attention(i + t, i + t, d) + attention(i, i + t, d) for i, t in zip(images, texts))
    return {"gemm": gemm, "attention": mixed}


def reference_step_flops(config: LensConfig, batch: int, image: int, text: int) -> dict[str, int]:
    """The reference's call on a padded batch [batch, image + text]: modulation, text projection, dead rows and all."""
    d, f, layers, c = config.inner_dim, config.mlp_hidden_dim, config.num_layers, config.in_channels
    features = len(config.selected_layer_index) * config.enc_hidden_dim
    row = product(1, d, 3 * d) + product(1, d, d) + 2 * product(1, d, f) + product(1, f, d)
    time = product(batch, 256, d) + product(batch, d, d) + product(batch, d, 2 * d)
    gemm = layers * batch * (image + text) * row + 2 * batch * image * product(1, c, d)
    gemm += batch * text * product(1, features, d) + layers * 2 * product(batch, d, 6 * d) + time
    return {"gemm": gemm, "attention": layers * batch * attention(image + text, image + text, d)}


def text_projection_flops(config: LensConfig, tokens: int) -> int:
    """The features of `tokens` text tokens, concatenated and projected to the width."""
    return product(tokens, len(config.selected_layer_index) * config.enc_hidden_dim, config.inner_dim)


def table_flops(config: LensConfig, steps: int) -> int:
    """The modulation table of a schedule: time embedding, two projections per block, the final one."""
    d = config.inner_dim
    embed = product(steps, 256, d) + product(steps, d, d)
    return embed + config.num_layers * 2 * product(steps, d, 6 * d) + product(steps, d, 2 * d)


def step_bytes(config: LensConfig, images: Sequence[int], texts: Sequence[int], item: int) -> int:
    """Compulsory traffic of one call: the blocks' weights without modulation, and the rows each fused stage must read
    and write where products, attention and norms are kernels of their own.

    Per row of width D and block: norm 2 D, qkv 4 D, q k v through attention 4 D, out + residual 4 D, norm 2 D,
    w1 and w3 with SwiGLU D + F, w2 + residual F + 3 D.
    """
    d, f, layers, c = config.inner_dim, config.mlp_hidden_dim, config.num_layers, config.in_channels
    weights = layers * 2 * (3 * d * d + 3 * d + d * d + d + 2 * d * f + f * d + 2 * d + 2 * config.attention_head_dim)
    rows = sum(images) + sum(texts)
    ends = sum(images) * 2 * (c + d) + 2 * c * d
    return item * (weights + layers * rows * (2 * d + 4 * d + 4 * d + 4 * d + 2 * d + d + f + f + 3 * d) + ends)


def encoder_flops(config: Any, tokens: int, layers: int) -> int:
    """A GPT-OSS prefill of one prompt through its first `layers` layers: attention counted over all pairs in the
    window or below the diagonal, `num_experts_per_tok` experts a token. config: transformers' GptOssConfig."""
    e, head, per = config.hidden_size, config.head_dim, config.num_experts_per_tok
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    row = product(1, e, q + 2 * kv) + product(1, q, e) + product(1, e, config.num_local_experts)
    row += per * (product(1, e, 2 * config.intermediate_size) + product(1, config.intermediate_size, e))
    pairs = 0
    for kind in config.layer_types[:layers]:
        window = config.sliding_window if kind == "sliding_attention" else tokens
        pairs += sum(min(i + 1, window) for i in range(tokens))
    return layers * tokens * row + 4 * pairs * q


def decoder_flops(config: Any, grid: tuple[int, int]) -> int:
    """The FLUX.2 decoder for a grid of tokens (2 x 2 latent pixels each): convolutions and the middle attention.
    config: diffusers' AutoencoderKLFlux2 configuration; a level has `layers_per_block` + 1 residual blocks."""
    pixels, widths = 4 * grid[0] * grid[1], list(reversed(config.block_out_channels))

    def conv(k: int, n: int, side: int = 3) -> int:
        return product(pixels, k * side * side, n)

    def residual(k: int, n: int) -> int:
        return conv(k, n) + conv(n, n) + (conv(k, n, 1) if k != n else 0)

    z, d = config.latent_channels, widths[0]
    total = (conv(z, z, 1) if config.use_post_quant_conv else 0) + conv(z, d) + 2 * residual(d, d)
    if config.mid_block_add_attention:
        total += 4 * conv(d, d, 1) + attention(pixels, pixels, d)
    for level, width in enumerate(widths):
        for block in range(config.layers_per_block + 1):
            total += residual(d if block == 0 else width, width)
        d = width
        if level + 1 < len(widths):
            pixels *= 4
            total += conv(d, d)
    return total + conv(d, config.out_channels)


def roof(flops: float, moved_bytes: float, seconds: float, ceilings: dict[str, float]) -> dict[str, float]:
    """What a time means on this machine: rates, their shares of the ceilings, and the floor min time over both.

    ceilings: {"copy": bytes per second, "matmul": FLOP/s}, measured in the same run.
    """
    floor = max(flops / ceilings["matmul"], moved_bytes / ceilings["copy"])
    return {
        "flops_per_s": flops / seconds,
        "bytes_per_s": moved_bytes / seconds,
        "of_matmul": flops / seconds / ceilings["matmul"],
        "of_copy": moved_bytes / seconds / ceilings["copy"],
        "floor_s": floor,
        "of_floor": floor / seconds,
    }


def ceilings(device: torch.device) -> dict[str, float]:
    """Measured now on this device: bytes/s of a copy far larger than any cache (read plus written), and FLOP/s of a
    square product of random numbers, bfloat16 on a GPU, float32 on a CPU."""
    from .case import Subject, generator
    from .timing import clock_of

    gpu = device.type == "cuda"
    g = generator(device, "ceilings")
    source = torch.randn((1 << 28) if gpu else (16 << 20), generator=g, device=device)
    target = torch.empty_like(source)
    side, dtype = (8192, torch.bfloat16) if gpu else (768, torch.float32)
    a, b = (torch.randn(side, side, generator=g, device=device, dtype=dtype) for _ in range(2))
    clock, found = clock_of(device), {}
    for name, call, work in (
        ("copy", lambda: target.copy_(source), 2 * moved(source)),
        ("matmul", lambda: a @ b, product(side, side, side)),
    ):
        launcher = clock.launcher(Subject(call, mode="stream"), [()])
        launcher.outputs()
        launcher.round()
        found[name] = work / min(launcher.round() for _ in range(8 if gpu else 5))
    return found
