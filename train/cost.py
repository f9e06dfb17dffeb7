"""What a training costs, from its recipe alone: parameters, memory of a GPU by part, FLOPs, time. No GPU, no weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType

import torch

from bench.roofline import step_flops, table_flops, text_projection_flops
from lens.config import LensConfig

from .data.buckets import Bucket, BucketLaw
from .denoiser import Denoiser

GPUS = {  # dense bfloat16 FLOP/s of the matrix units, bytes
    "a100": (312e12, 80e9),
    "h100": (989.5e12, 80e9),
    "h200": (989.5e12, 141e9),
}
ENCODER_BYTES = {"bfloat16": 41.8e9, "mxfp4": 13.8e9}  # GPT-OSS 20B
ENCODER_FLOPS = 2 * 3.6e9  # a token: two for each active parameter
VAE_BYTES = 0.17e9  # the encoder's half is less
# What a block keeps for its backward pass without recomputation, per row of width D: numbers of the compute dtype, in units of D.
# Counted on a block by tests/train/test_cost.py.
KEPT = 22.1
PASSED = 2.0  # between two blocks: the residual stream and what is still to be added to it
PRODUCTS = 6.0  # what "selective" keeps besides: attention, qkv, out, w2


def training_flops(config: LensConfig, image: int, texts: Sequence[int]) -> float:
    """One micro-batch, forward and backward: three times the forward pass. What is computed again does not count."""
    forward = sum(step_flops(config, [image] * len(texts), texts).values())
    forward += text_projection_flops(config, sum(texts)) + table_flops(config, len(texts))
    return 3.0 * forward


def peak_of(device: torch.device) -> float | None:
    """FLOP/s that MFU is a share of; None where the device is not in the table."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).lower()
    return next((peak for gpu, (peak, _) in GPUS.items() if gpu in name), None)


def parameters(config: LensConfig) -> tuple[int, int]:
    """All parameters, and those of the largest block."""
    with torch.device("meta"):
        model = Denoiser(config)
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in model.layers()[0].parameters())


def memory(recipe: ModuleType, config: LensConfig, shard: int, world: int, rows: int) -> dict[str, float]:
    """Bytes on one GPU by part. rows: image and text rows of the largest micro-batch."""
    total, block = parameters(config)
    item, width, layers = (2 if recipe.COMPUTE == "bfloat16" else 4), config.inner_dim, config.num_layers
    unit = rows * width * item
    rest = total - layers * block
    kept = {"none": layers * KEPT, "block": layers * PASSED + KEPT, "selective": layers * (PASSED + PRODUCTS) + KEPT}
    found = {
        "float32 weights": 4 * total / shard,
        "gradients": 4 * total / shard,
        "AdamW moments": 8 * total / shard,
        "running average": 4 * total / shard,
    }
    if shard > 1:
        held = total if not recipe.RESHARD else rest + 2 * block
        found["gathered weights"] = held * item
        found["gradients before they are summed"] = 2 * block * item + 4 * block
    elif item == 2:
        # rounded where they are used: kept until the backward pass unless that rounds them again
        found["rounded weights"] = item * (total if recipe.RECOMPUTE == "none" else rest + block)
        if world > 1:
            found["buckets of gradients"] = 50e6
    found["activations"] = kept[recipe.RECOMPUTE] * unit
    return found


def shares(recipe: ModuleType, sizes: Mapping[Bucket, int] | None) -> dict[Bucket, float]:
    """p(bucket): by the data, or as if every bucket had the same number of samples."""
    known = [Bucket(base, aspect) for base in recipe.BASES for aspect in recipe.ASPECTS]
    counts = dict.fromkeys(known, 1) if sizes is None else {b: n for b, n in sizes.items() if b in set(known)}
    law = BucketLaw(recipe.BATCH, recipe.BASE_WEIGHTS, recipe.ASPECT_WEIGHTS)
    return {bucket: float(p) for bucket, p in law.weights(counts).items()}


def dry_run(
    recipe: ModuleType,
    world: int,
    shard: int | None,
    gpu: str,
    mfu: float,
    sizes: Mapping[Bucket, int] | None = None,
) -> str:
    """The table of `--dry-run`. sizes: samples of each bucket of the data, where there is any.

    Errors: ValueError where the processes divide neither the slots nor into shards.
    """
    shard = shard or min(world, recipe.SHARD)
    if world % shard or recipe.SLOTS % world:
        raise ValueError(
            f"--dry-run: {world} processes in shards of {shard} for {recipe.SLOTS} slots; expected divisors"
        )
    config, text, law = LensConfig(**recipe.MODEL), recipe.TEXT_TOKENS, shares(recipe, sizes)
    total, _ = parameters(config)
    peak, capacity = GPUS[gpu]
    lines = [
        f"{recipe.__name__.removeprefix('train.configs.')} on {world} x {gpu}, {world // shard} x {shard} (replicas x shards)"
    ]
    lines += ["", f"parameters           {total / 1e9:8.3f} e9"]
    pictures = tokens = flops = encoder = 0.0
    rows = 0
    for bucket, p in law.items():
        batch = recipe.BATCH[bucket.base]
        pictures += recipe.SLOTS * p * batch
        tokens += recipe.SLOTS * p * batch * (bucket.tokens + text)
        flops += recipe.SLOTS * p * training_flops(config, bucket.tokens, [text] * batch)
        encoder += recipe.SLOTS * p * batch * text * ENCODER_FLOPS
        rows = max(rows, batch * (bucket.tokens + text))
    seconds = flops / (world * peak * mfu)
    lines += [
        f"pictures a step      {pictures:8.0f}",
        f"tokens a step        {tokens / 1e6:8.2f} e6 ({text} of text each)",
        f"FLOPs a step         {flops / 1e15:8.1f} e15, {flops / pictures / 1e12:.1f} e12 a picture (three forward passes)",
        f"at {mfu:4.0%} MFU          {seconds:8.2f} s a step, {pictures / seconds:,.0f} pictures/s, {tokens / seconds:,.0f} tokens/s",
        f"GPU hours            {seconds * recipe.STEPS * world / 3600:8,.0f} for {recipe.STEPS:,} steps",
    ]
    if recipe.RECOMPUTE != "none":
        share = {"block": 1 / 3, "selective": 1 / 6}[recipe.RECOMPUTE]
        lines.append(
            f"  recomputation      {share:8.0%} more work than the FLOPs above, at most: MFU does not count it"
        )
    lines.append(f"  text encoder       {encoder / flops:8.0%} more, where features are not in the shards")
    if hasattr(recipe, "PAPER_A100_HOURS"):
        lines.append(f"  paper              {recipe.PAPER_A100_HOURS:8,} A100 hours, all stages of the model together")
    lines += ["", f"memory of a GPU, {capacity / 1e9:.0f} GB"]
    parts = memory(recipe, config, shard, world, rows)
    lines += [f"  {name:32} {value / 1e9:7.1f} GB" for name, value in parts.items()]
    need = sum(parts.values())
    lines.append(f"  {'sum':32} {need / 1e9:7.1f} GB{'' if need < 0.95 * capacity else '   does not fit'}")
    lines.append(
        f"  besides, encoding while training: text encoder {ENCODER_BYTES['bfloat16'] / 1e9:.0f} GB, VAE {VAE_BYTES / 1e9:.1f} GB"
    )
    lines += ["", "buckets: share of the micro-batches, pictures in one, image tokens of a picture, mu"]
    from .objectives.flow_matching import mu_of

    width = max(law.values())
    lines += [
        f"  {b.name:12} {p:6.2%} {recipe.BATCH[b.base]:4} {b.tokens:6} {mu_of(recipe.MU, b.tokens):7.4f} {'#' * round(24 * p / width)}"
        for b, p in law.items()
    ]
    return "\n".join(lines)
