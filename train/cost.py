"""What a training costs, from its recipe alone: parameters, memory of a GPU by part, FLOPs, time. No GPU, no weights."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from types import ModuleType

import torch

from lens.config import LensConfig
from lens.cost import gemm_flops, step_flops, table_flops, text_projection_flops

from .data.buckets import Bucket, BucketLaw
from .loop.lora import TARGETS, Lora, attach_lora, lora_layers, lora_of
from .networks.denoiser import Denoiser

GPUS = {  # dense bfloat16 FLOP/s of the matrix units, bytes
    "a100": (312e12, 80e9),
    "h100": (989.5e12, 80e9),
    "h200": (989.5e12, 141e9),
}
ENCODER_BYTES = {"bfloat16": 41.8e9, "mxfp4": 13.8e9}  # GPT-OSS 20B
ENCODER_FLOPS = 2 * 3.6e9  # a token: two for each active parameter
PREFIX_TOKENS = 97  # of a released tokenizer: their keys and values are computed once


def vae_flops(pixels: int) -> float:
    """Of encoding a picture: the convolutions, and attention over the pixels' 64ths, 4 n^2 C with C = 512. Fitted to 1.12, 2.61
    and 4.89 TFLOP at 512^2, 768^2 and 1024^2."""
    return 4.14e6 * pixels + 0.5 * pixels**2


LENS_HOURS, Z_IMAGE_HOURS = 192e3, 314e3  # of A100 and of H800, as the paper counts them: captioning left out
H800_FLOPS = 989.5e12


MFU = 0.4  # that a dry run assumes unless told otherwise


def share_of_papers(a100_hours: float) -> str:
    """Our estimate of a stage beside the paper's two sums: Lens's A100 hours, and Z-Image's H800 hours by peak FLOP/s."""
    z_image = Z_IMAGE_HOURS * H800_FLOPS / GPUS["a100"][0]
    return (
        f"this estimate      {a100_hours:8,.0f} A100 hours by peak: {percent(a100_hours / LENS_HOURS)} of Lens's {LENS_HOURS:,.0f}, "
        f"{percent(a100_hours / z_image)} of Z-Image's {z_image:,.0f} (Lens in all {LENS_HOURS / z_image:.1%})"
    )


def percent(share: float) -> str:
    """Two digits behind the point, and one that counts of what is smaller."""
    return f"{share:.2%}" if share >= 1e-4 else f"{100 * share:.1g}%"


def hours_of(flops: float, gpu: str) -> list[str]:
    """The lines of a dry run about a whole stage of so many FLOPs: GPU hours at MFU, and the papers' sums beside them."""
    hours, of_a100 = (flops / (peak * MFU * 3600) for peak in (GPUS[gpu][0], GPUS["a100"][0]))
    return [f"GPU hours            {hours:8,.0f} at {MFU:.0%} MFU, encoders left out", f"  {share_of_papers(of_a100)}"]


VAE_BYTES = 0.17e9  # the encoder's half is less
# What a block keeps for its backward pass without recomputation, per row of width D: numbers of the compute dtype, in units of D.
# Counted on a block by tests/train/test_denoiser.py. Of a LoRA, without the rows of its adapters' inside: a frozen GEMM
# keeps nothing.
SAVED_ACTIVATIONS = 22.1
SAVED_WITH_LORA = {"attention": 18.5, "all": 22.1}
BLOCK_BOUNDARY = 2.0  # between two blocks: the residual stream and what is still to be added to it
SMALL_GEMMS = 6.0  # what "selective" keeps besides: attention, qkv, out, w2


def forward_flops(config: LensConfig, image: int, texts: Sequence[int]) -> float:
    """One micro-batch, forward, without adapters."""
    forward = sum(step_flops(config, [image] * len(texts), texts).values())
    return float(forward + text_projection_flops(config, sum(texts)) + table_flops(config, len(texts)))


def training_flops(config: LensConfig, image: int, texts: Sequence[int], lora: Lora | None = None) -> float:
    """One micro-batch, forward and backward: three times the forward pass. What is computed again does not count.

    Of a LoRA the backward pass is the gradients of activations, from the first adapter on, attention's and the adapters'
    own: no frozen weight has one, and neither the text's projection nor the modulation depends on an adapter.
    """
    forward = forward_flops(config, image, texts)
    if lora is None:
        return 3.0 * forward
    width, rows = config.inner_dim, (image * len(texts), sum(texts))
    step = step_flops(config, [image] * len(texts), texts)
    ahead = gemm_flops(rows[0], config.in_channels, width) + gemm_flops(
        sum(rows), width, 3 * width
    )  # the first block's qkv
    own = sum(6 * n * r for n, r in zip(adapter_parameters(config, lora), rows))
    first = sum(2 * lora.r * width * r for r in rows)  # nor does what the first adapters read
    return forward + step["gemm"] - ahead + 2.0 * step["attention"] + own - first


@functools.lru_cache(maxsize=8)
def adapter_parameters(config: LensConfig, lora: Lora) -> tuple[int, int]:
    """The numbers that train, of the image stream and of the text stream."""
    with torch.device("meta"):
        model = Denoiser(config)
        attach_lora(model, lora)
    found = {"image": 0, "text": 0}
    for name, layer in lora_layers(model):
        found[name.split(".")[2]] += sum(p.numel() for p in layer.parameters() if p.requires_grad)
    return found["image"], found["text"]


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


def saved_activations(lora: Lora | None, width: int) -> float:
    """What a block keeps for its backward pass without recomputation, numbers per row in units of D."""
    return (
        SAVED_ACTIVATIONS
        if lora is None
        else SAVED_WITH_LORA[lora.targets] + len(TARGETS[lora.targets]) / 2 * lora.r / width
    )


def memory(recipe: ModuleType, config: LensConfig, shard: int, world: int, rows: int) -> dict[str, float]:
    """Bytes on one GPU by part. rows: image and text rows of the largest micro-batch."""
    total, block = parameters(config)
    item, width, layers = (2 if recipe.COMPUTE == "bfloat16" else 4), config.inner_dim, config.num_layers
    unit, lora = rows * width * item, lora_of(recipe)
    rest = total - layers * block
    trained, own = total, float(block)
    if lora:
        trained = sum(adapter_parameters(config, lora))
        own = trained / layers
    inside = saved_activations(lora, width)
    kept = {
        "none": layers * inside,
        "block": layers * BLOCK_BOUNDARY + inside,
        "selective": layers * (BLOCK_BOUNDARY + SMALL_GEMMS) + inside,
    }
    found = {"frozen weights": item * total / shard} if lora else {}
    found |= {
        "float32 adapters" if lora else "float32 weights": 4 * trained / shard,
        "gradients": 4 * trained / shard,
        "AdamW moments": 8 * trained / shard,
        "running average": 4 * trained / shard,
    }
    if shard > 1:
        held = total if not recipe.RESHARD else rest + 2 * block
        found["gathered weights"] = held * item
        found["gradients before they are summed"] = 2 * own * item + 4 * own
    elif item == 2 and not lora:
        # rounded where they are used: kept until the backward pass unless that rounds them again
        found["rounded weights"] = item * (total if recipe.RECOMPUTE == "none" else rest + block)
        if world > 1:
            found["buckets of gradients"] = 50e6
    found["activations"] = kept[recipe.RECOMPUTE] * unit
    return found


def distillation_memory(recipe: ModuleType, config: LensConfig, shard: int, rows: int) -> dict[str, float]:
    """Bytes on one GPU by part, of student, fake score, frozen teacher and heads. rows: of the largest micro-batch.

    Gradients of student and fake score are never there together; the heads are whole on every GPU. The most activations are
    the student's step: its own, and the teacher's up to the deepest tap, whose graph the generator's gradient passes.
    """
    total, block = parameters(config)
    item, width, layers = (2 if recipe.COMPUTE == "bfloat16" else 4), config.inner_dim, config.num_layers
    lora = lora_of(recipe)
    trained = sum(adapter_parameters(config, lora)) if lora else total
    found = {"frozen weights beside the adapters": 2 * item * total / shard} if lora else {}
    for name in ("student", "fake score"):
        found[f"{name}: float32 masters"] = 4 * trained / shard
        found[f"{name}: second moment"] = 4 * trained / shard
    found["student: running average"] = 4 * trained / shard
    found["gradients of one of them"] = 4 * trained / shard
    found["teacher, frozen"] = item * total / shard
    deepest = max(recipe.TAPS) if recipe.LAMBDA_G else 0
    if recipe.LAMBDA_G:
        inside = 16 * width * recipe.HEAD_WIDTH + 4 * recipe.HEAD_WIDTH
        found["heads, their gradients and moment"] = 12 * len(recipe.TAPS) * inside
    if shard > 1:
        held = total if not recipe.RESHARD else total - layers * block + 2 * block
        found["gathered weights"] = held * item
        found["gradients before they are summed"] = 2 * block * item + 4 * block
    elif item == 2 and not lora:
        found["rounded weights"] = item * (total if recipe.RECOMPUTE == "none" else total - layers * block + block)
    own = saved_activations(lora, width)
    kept = {"none": own, "block": BLOCK_BOUNDARY, "selective": BLOCK_BOUNDARY + SMALL_GEMMS}[recipe.RECOMPUTE]
    found["activations of student and tapped teacher"] = ((layers + deepest) * kept + own) * rows * width * item
    return found


def distillation_dry_run(recipe: ModuleType, world: int, shard: int | None, gpu: str) -> str:
    """The table of `distill --dry-run`. Errors: ValueError where the processes divide neither the slots nor into shards."""
    shard = shard or min(world, recipe.SHARD)
    if world % shard or recipe.SLOTS % world:
        raise ValueError(
            f"--dry-run: {world} processes in shards of {shard} for {recipe.SLOTS} slots; expected divisors"
        )
    config, law, (_, capacity) = LensConfig(**recipe.MODEL), shares(recipe, None), GPUS[gpu]
    total, _ = parameters(config)
    rows = max(recipe.BATCH[b.base] * (b.tokens + recipe.TEXT_TOKENS) for b in law)
    pictures = recipe.SLOTS * sum(p * recipe.BATCH[b.base] for b, p in law.items())
    forward = recipe.SLOTS * sum(
        p * forward_flops(config, b.tokens, [recipe.TEXT_TOKENS] * recipe.BATCH[b.base]) for b, p in law.items()
    )
    tapped = max(recipe.TAPS) / config.num_layers if recipe.LAMBDA_G else 0.0
    simulated = (recipe.STUDENT_STEPS - 1) / 2
    fake = simulated + 1 + 3 + tapped * (3 if recipe.R1_GAMMA else 2)
    student = simulated + 3 + 1 + 3 + 2 * tapped
    guided = simulated + 2 * recipe.GUIDED_SUBSTEPS + 3
    cycle = recipe.FAKE_UPDATES * fake + student
    passes = recipe.STEPS * cycle + recipe.FAKE_WARMUP * fake + recipe.GUIDED_STEPS * guided
    lines = [
        f"{recipe.__name__.removeprefix('train.configs.')} on {world} x {gpu}, {world // shard} x {shard} (replicas x shards)",
        "",
        f"parameters           {total / 1e9:8.3f} e9, three times; heads look behind blocks {', '.join(map(str, recipe.TAPS))}",
        f"pictures a turn      {pictures:8.0f}",
        f"a student step       {cycle:8.1f} forward passes of all its pictures, {recipe.FAKE_UPDATES} turns of the fake score included",
        f"FLOPs a student step {cycle * forward / 1e15:8.2f} e15",
        *hours_of(passes * forward, gpu),
        "",
        f"memory of a GPU, {capacity / 1e9:.0f} GB",
    ]
    parts = distillation_memory(recipe, config, shard, rows)
    lines += [f"  {name:42} {value / 1e9:7.1f} GB" for name, value in parts.items()]
    need = sum(parts.values())
    lines.append(f"  {'sum':42} {need / 1e9:7.1f} GB{'' if need < 0.95 * capacity else '   does not fit'}")
    lines.append(
        f"  besides, where features are not in the shards: text encoder {ENCODER_BYTES['bfloat16'] / 1e9:.0f} GB, "
        f"VAE {VAE_BYTES / 1e9:.1f} GB"
    )
    return "\n".join(lines)


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
    if world % shard or world > recipe.SLOTS:
        raise ValueError(
            f"--dry-run: {world} processes in shards of {shard} for {recipe.SLOTS} slots; expected a divisor of the processes, "
            "and no more of them than slots"
        )
    idle = -(-recipe.SLOTS // world) * world / recipe.SLOTS  # rounds times ranks, of slots
    # parameters
    config, text, law = LensConfig(**recipe.MODEL), recipe.TEXT_TOKENS, shares(recipe, sizes)
    total, _ = parameters(config)
    peak, capacity = GPUS[gpu]
    lines = [
        f"{recipe.__name__.removeprefix('train.configs.')} on {world} x {gpu}, {world // shard} x {shard} (replicas x shards)"
    ]
    lines += ["", f"parameters           {total / 1e9:8.3f} e9"]
    lora = lora_of(recipe)
    if lora:
        trained = sum(adapter_parameters(config, lora))
        lines.append(f"  of adapters        {trained / 1e9:8.3f} e9 more, which alone train: {lora}")
    # a step: the mean over the buckets of all its micro-batches
    pictures = tokens = flops = forward = encoder = vae = 0.0
    rows = 0
    for bucket, p in law.items():
        batch = recipe.BATCH[bucket.base]
        pictures += recipe.SLOTS * p * batch
        tokens += recipe.SLOTS * p * batch * (bucket.tokens + text)
        flops += recipe.SLOTS * p * training_flops(config, bucket.tokens, [text] * batch, lora)
        forward += recipe.SLOTS * p * forward_flops(config, bucket.tokens, [text] * batch)
        encoder += recipe.SLOTS * p * batch * text * ENCODER_FLOPS
        vae += recipe.SLOTS * p * batch * vae_flops(bucket.size[0] * bucket.size[1])
        rows = max(rows, batch * (bucket.tokens + text))
    seconds = flops * idle / (world * peak * mfu)
    lines += [
        f"pictures a step      {pictures:8.0f}",
        f"tokens a step        {tokens / 1e6:8.2f} e6 ({text} of text each)",
        f"FLOPs a step         {flops / 1e15:8.1f} e15, {flops / pictures / 1e12:.1f} e12 a picture ({flops / forward:.3g} forward passes)",
        f"at {mfu:4.0%} MFU          {seconds:8.2f} s a step, {pictures / seconds:,.0f} pictures/s, {tokens / seconds:,.0f} tokens/s",
        f"GPU hours            {seconds * recipe.STEPS * world / 3600:8,.0f} for {recipe.STEPS:,} steps",
    ]
    if idle > 1:
        lines.append(
            f"  idle               {1 - 1 / idle:8.0%} of the time: {recipe.SLOTS} slots do not divide among {world} processes"
        )
    if recipe.RECOMPUTE != "none":
        share = forward / flops * {"block": 1, "selective": 1 / 2}[recipe.RECOMPUTE]
        lines.append(
            f"  recomputation      {share:8.0%} more work than the FLOPs above, at most: MFU does not count it"
        )
    lines += [
        f"  text encoder       {encoder / flops:8.0%} more, where features are not in the shards: {encoder / pictures / 1e12:.2f} e12 a "
        f"picture; the prefix's {PREFIX_TOKENS} tokens once",
        f"  VAE                {vae / flops:8.0%} more, where latents are not in the shards: {vae / pictures / 1e12:.2f} e12 a picture",
    ]
    if getattr(recipe, "PAPER_A100_HOURS", 0) and not lora:
        a100 = seconds * recipe.STEPS * world / 3600 * peak / GPUS["a100"][0]
        lines.append(
            f"  paper              {recipe.PAPER_A100_HOURS:8,} A100 hours, as stated; not said of which stages"
        )
        lines.append(f"  {share_of_papers(a100)}")
    # memory
    lines += ["", f"memory of a GPU, {capacity / 1e9:.0f} GB"]
    parts = memory(recipe, config, shard, world, rows)
    lines += [f"  {name:32} {value / 1e9:7.1f} GB" for name, value in parts.items()]
    need = sum(parts.values())
    lines.append(f"  {'sum':32} {need / 1e9:7.1f} GB{'' if need < 0.95 * capacity else '   does not fit'}")
    lines.append(
        f"  besides, encoding while training: text encoder {ENCODER_BYTES['bfloat16'] / 1e9:.0f} GB, VAE {VAE_BYTES / 1e9:.1f} GB"
    )
    # buckets
    lines += ["", "buckets: share of the micro-batches, pictures in one, image tokens of a picture, mu"]
    from .objectives.flow_matching import mu_of

    width = max(law.values())
    lines += [
        f"  {b.name:12} {p:6.2%} {recipe.BATCH[b.base]:4} {b.tokens:6} {mu_of(recipe.MU, b.tokens):7.4f} {'#' * round(24 * p / width)}"
        for b, p in law.items()
    ]
    return "\n".join(lines)
