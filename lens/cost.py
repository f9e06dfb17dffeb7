"""FLOPs, bytes and parameters from shapes alone: the one place of these formulas.

Residency plans, the bench and the dry runs of training read them. A GEMM of [m, k] and [k, n]
counts 2 m k n; attention 4 S_q S_k D (two GEMMs); everything else counts nothing. Traffic is compulsory: every weight
and input read once, every output written once. B samples, I image and T text tokens of each, D width, F hidden width,
L blocks; see `lens.ops.reference` for the alphabet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lens.config import LensConfig


def gemm_flops(m: int, k: int, n: int) -> int:
    """FLOPs of [m, k] @ [k, n]."""
    return 2 * m * k * n


def attention_flops(queries: int, keys: int, width: int) -> int:
    """FLOPs of softmax(q k^T) v over all heads, width = heads x channels of a head."""
    return 4 * queries * keys * width


def gemm_traffic_bytes(rows: int, k: int, n: int, item: int, bias: bool = True) -> int:
    """Bytes of y = x w^T + b: x [rows, k], w [n, k], b [n], y [rows, n], `item` bytes an element."""
    return item * (rows * k + n * k + rows * n + (n if bias else 0))


def step_flops(config: LensConfig, images: Sequence[int], texts: Sequence[int]) -> dict[str, int]:
    """One denoiser call on packed samples with every exact saving: {"gemm": ..., "attention": ...}.

    Text is projected once per prompt and modulation once per schedule, so neither counts. The last block needs of its
    text only keys and values: its text queries, attention rows, output projection and MLP are dead.
    """
    d, f, layers, c = config.inner_dim, config.mlp_hidden_dim, config.num_layers, config.in_channels
    ri, rt = sum(images), sum(texts)
    row = gemm_flops(1, d, 3 * d) + gemm_flops(1, d, d) + gemm_flops(1, d, 2 * f) + gemm_flops(1, f, d)
    gemm = layers * ri * row + (layers - 1) * rt * row + rt * gemm_flops(1, d, 2 * d) + 2 * ri * gemm_flops(1, c, d)
    mixed = sum(
        (layers - 1) * attention_flops(i + t, i + t, d) + attention_flops(i, i + t, d) for i, t in zip(images, texts)
    )
    return {"gemm": gemm, "attention": mixed}


def text_projection_flops(config: LensConfig, tokens: int) -> int:
    """The features of `tokens` text tokens, concatenated and projected to the width."""
    return gemm_flops(tokens, len(config.selected_layer_index) * config.enc_hidden_dim, config.inner_dim)


def table_flops(config: LensConfig, steps: int) -> int:
    """The modulation table of a schedule: time embedding, two projections per block, the final one."""
    d = config.inner_dim
    embed = gemm_flops(steps, 256, d) + gemm_flops(steps, d, d)
    return embed + config.num_layers * 2 * gemm_flops(steps, d, 6 * d) + gemm_flops(steps, d, 2 * d)


def step_traffic_bytes(config: LensConfig, images: Sequence[int], texts: Sequence[int], item: int) -> int:
    """Compulsory traffic of one call: the blocks' weights without modulation, and the rows each fused stage must read
    and write where GEMMs, attention and norms are separate kernels.

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
    row = gemm_flops(1, e, q + 2 * kv) + gemm_flops(1, q, e) + gemm_flops(1, e, config.num_local_experts)
    row += per * (gemm_flops(1, e, 2 * config.intermediate_size) + gemm_flops(1, config.intermediate_size, e))
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
        return gemm_flops(pixels, k * side * side, n)

    def residual(k: int, n: int) -> int:
        return conv(k, n) + conv(n, n) + (conv(k, n, 1) if k != n else 0)

    z, d = config.latent_channels, widths[0]
    total = (conv(z, z, 1) if config.use_post_quant_conv else 0) + conv(z, d) + 2 * residual(d, d)
    if config.mid_block_add_attention:
        total += 4 * conv(d, d, 1) + attention_flops(pixels, pixels, d)
    for level, width in enumerate(widths):
        for block in range(config.layers_per_block + 1):
            total += residual(d if block == 0 else width, width)
        d = width
        if level + 1 < len(widths):
            pixels *= 4
            total += conv(d, d)
    return total + conv(d, config.out_channels)


# ---------------------------------------------------------------------------------------------------- sizes


def transformer_parameters(config: LensConfig) -> tuple[int, int]:
    """(all, of them modulation of the blocks) weights of an MMDiT: 4,104,225,152 and 1,359,839,232 as released."""
    width, hidden, features = config.inner_dim, config.mlp_hidden_dim, len(config.selected_layer_index)
    modulation = 6 * width * (width + 1)
    projections = 3 * width * (width + 1) + width * (width + 1) + 3 * width * hidden
    stream = modulation + projections + 2 * width + 2 * config.attention_head_dim
    ends = config.in_channels * (2 * width + 1) + width + 2 * width * (width + 1)
    text = features * config.enc_hidden_dim * (width + 1) + width
    time = (256 + 1) * width + width * (width + 1)
    return 2 * config.num_layers * stream + ends + text + time, 2 * config.num_layers * modulation


def step_workspace_bytes(config: LensConfig, image_rows: int, text_rows: int, itemsize: int = 2) -> int:
    """Most memory alive inside a step, besides weights and the step's own buffers.

    The peak lies in the image's MLP: its hidden rows thrice (both branches and their elementwise product), and two rows of the
    width for every token: the residual and its normed rows.
    """
    rows = image_rows + text_rows
    return itemsize * (3 * config.mlp_hidden_dim * image_rows + 2 * config.inner_dim * rows)


def step_buffer_bytes(
    config: LensConfig, image_rows: int, text_rows: int, halves: int, steps: int = 32, itemsize: int = 2
) -> int:
    """The step's own buffers: latents twice in float32, velocities, text, rotary table, table of the schedule."""
    latents = config.in_channels * (image_rows // halves * 8 + image_rows * itemsize)
    rotary = config.attention_head_dim * 4 * (image_rows + text_rows)
    table = steps * config.inner_dim * (12 * config.num_layers + 2) * itemsize
    return latents + rotary + table + text_rows * config.inner_dim * itemsize


def decode_bytes(channels: tuple[int, ...], pixels: int, itemsize: int = 2) -> int:
    """Most memory alive inside the decoder: at full resolution three maps of the last but one level's channels."""
    return 3 * channels[min(1, len(channels) - 1)] * pixels * itemsize


def cpu_decode_bytes(channels: tuple[int, ...], pixels: int, itemsize: int = 2) -> int:
    """Most memory of `engine/decode.py` besides the autoencoder: three maps as wide as the last but one level's, which an
    upsampling brings to full resolution, and of each thread's block at most a few megabytes, which are not counted."""
    return 3 * channels[min(1, len(channels) - 1)] * pixels * itemsize


HOST_BYTES = 500_000_000  # of a process that has imported what drawing needs, before a model is loaded


def cpu_encode_bytes(config: LensConfig, text: int, itemsize: int = 2) -> int:
    """Most memory of our text encoder's activations on a CPU, ``text`` tokens after the preamble of 97: of every token its
    rows in the mixture of experts; and what attention lays out, 64 heads' float32 scores of 128 queries twice by the
    specification, less by the kernel."""
    tokens = text + 97
    scores = 2 * 4 * 64 * min(128, tokens) * tokens
    rows = (4 + len(config.selected_layer_index)) * itemsize + 5 * 4 * 4
    return scores + rows * config.enc_hidden_dim * tokens


def cpu_peak_bytes(
    config: LensConfig,
    channels: tuple[int, ...],
    tokens: int,
    text: int,
    steps: int,
    guided: bool,
    encoder: int = 0,
    autoencoder: int = 2 * 84_046_115,
    itemsize: int = 2,
    visiting: int | None = None,
) -> dict[str, int]:
    """Resident bytes of a CPU's process in each stage, besides what it has before a model is loaded, `HOST_BYTES`.

    Everything stays: ``encoder`` bytes of the text encoder's weights, pages of mapped files counted, from the first prompt
    on, the transformer, the autoencoder. ``visiting``: bytes of the encoder that are there at once, while a prompt is read
    and not after, where it is on demand. The transformer's modulation weights stay in the files: a schedule's table reads
    them block by block.
    One picture of ``tokens`` image tokens beside ``text`` text tokens; both halves of a ``guided`` step at once.
    """
    weights, modulation = (itemsize * n for n in transformer_parameters(config))
    one = modulation // (2 * config.num_layers)
    halves = 2 if guided else 1
    rows, texts = tokens * halves, text * halves
    buffers = step_buffer_bytes(config, rows, texts, halves, steps, itemsize)
    always = autoencoder + weights - modulation
    if visiting is None:
        always, visiting = always + encoder, 0
    return {
        "load transformer": weights - modulation,
        "table": always + buffers + one,
        "prompt": always + visiting + buffers + cpu_encode_bytes(config, text, itemsize),
        "denoise": always + buffers + step_workspace_bytes(config, rows, texts, itemsize),
        "decode": always + buffers + cpu_decode_bytes(channels, 256 * tokens, itemsize),
    }


def encode_bytes(width: int, tokens: int = 512, itemsize: int = 2) -> int:
    """A generous bound of the text encoder's activations: 64 rows of its width for every token."""
    return 64 * width * tokens * itemsize
