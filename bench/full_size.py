"""`python -m bench full_size make | run | compare DIR`: Lens at its released size, end to end, on a machine without a GPU.

`make` writes a checkpoint with random weights (work/checkpoint.py). `run` loads it as `LensPipeline.from_pretrained` does,
draws, and measures every stage: seconds, peak memory with the pages of mapped files counted, beside what lens/cost.py
predicts, and bytes read from the disk beside the files' size. Images are noise, numbers are not: blocks are held against
their specification, the decoder against diffusers, layers of the text encoder against transformers', one at a time, so that
both fit. The result is a file as of `python -m bench run`, of one row a stage.

`compare` draws with the same pipeline made of diffusers' and transformers' parts as well (work/parts.py), stage by stage in
turns. Its parts expand the experts, 38 GB at the released size: a sixteenth of it fits everywhere.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lens import LensPipeline, ops
from lens.config import VARIANTS, Defaults
from lens.cost import HOST_BYTES, cpu_peak_bytes
from lens.engine.residency import CPU_NAMES
from lens.formats.files import write_json
from lens.formats.gpt_oss import load_gpt_oss
from lens.formats.released import load_scheduler, load_transformer
from lens.formats.text_encoder import text_encoder_tensors, vocab_size
from lens.formats.vae import load_vae
from lens.gpt_oss import GptOss, Keys, Samples
from lens.model import Block
from lens.packing import plan
from lens.text_encoder import ChatTokenizer, TextEncoder
from lens.vae import PixelCodec

from .case import OURS, LeftOut
from .machine import card, folder_name, state
from .work import checkpoint, parts
from .work.drawing import NoEncoder
from .work.experts import bfloat16

RESULTS = Path(__file__).parent / "results"
PROMPT = "a red apple beside two blue keys on a wooden table, a lighthouse at dusk behind them"
BLOCK_BOUND = 2e-2  # relative L2 distance of a bfloat16 block from its specification in float32


# ------------------------------------------------------------------------------------------------ measuring


def resident_bytes(peak: bool = False) -> int:
    """Bytes of this process in memory, the pages of mapped files among them; or the most since `reset_peak`."""
    key = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(key))) * 1024


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def disk_bytes() -> int:
    """Bytes that this process has had read from a disk, page cache left out."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("read_bytes:")))


def forget_pages(folder: Path) -> None:
    """Files' pages leave the page cache, so that loading reads the disk."""
    for path in folder.rglob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


@dataclass
class Record:
    """What was measured, stage by stage."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    processor: dict[str, float] = field(default_factory=dict)  # seconds of all cores that the process used
    memory: dict[str, dict[str, int]] = field(default_factory=dict)
    read: dict[str, dict[str, int]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, files: Path | None = None) -> Iterator[None]:
        reset_peak()
        disk, used, began = disk_bytes(), time.process_time(), time.perf_counter()
        yield
        self.seconds[name] = [time.perf_counter() - began]
        self.processor[name] = time.process_time() - used
        self.memory[name] = {"peak": resident_bytes(peak=True), "after": resident_bytes()}
        if files is not None:
            size = sum(path.stat().st_size for path in files.rglob("*.safetensors"))
            self.read[name] = {"from_disk": disk_bytes() - disk, "files": size}
        say(f"{name}: {self.seconds[name][0]:.1f} s, peak {self.memory[name]['peak'] / 1e9:.2f} GB")


def import_libraries() -> None:
    """What loading would import the first time: a stage's time and memory are its own."""
    from diffusers import AutoencoderKLFlux2  # noqa: F401


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------ comparisons


@torch.no_grad()
def block_error(block: Block, config: Any, dtype: torch.dtype, key: int) -> float:
    """Relative L2 distance of a block on a small batch from its specification in float32, on the same weights."""
    g = torch.Generator().manual_seed(key)
    packing = plan([(8, 8), (4, 6)], [torch.arange(9), torch.arange(0)], config.axes_dims_rope, torch.device("cpu"))
    rows = [torch.randn(n, config.inner_dim, generator=g).to(dtype) for n in (64 + 24, 9)]
    modulation = (0.3 * torch.randn(2, 2, 6, config.inner_dim, generator=g)).to(dtype)
    ours = _summed(block([(r,) for r in rows], modulation, packing), packing)
    wide = Block(config)
    wide.load_state_dict(
        {name: value.float() for name, value in block.state_dict().items() if not value.is_meta}, strict=False
    )
    with ops.backend.use("reference"):
        exact = _summed(wide.eval()([(r.float(),) for r in rows], modulation.float(), packing), packing)
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


@torch.no_grad()
def layer_errors(folder: Path, model: GptOss, ids: list[int], layer: int) -> tuple[float, float]:
    """Relative L2 distances of a layer of our text encoder, and of transformers' in the same dtype, from transformers' in
    float32, on the same input and weights, of what the layer adds. Of the token in the middle: where rounding changes one
    token's experts, of two that are about equally likely, its distance is half of what is added."""
    if layer:
        x = model([ids], [Keys(len(ids))], (layer - 1,))[layer - 1]
    else:
        x = torch.nn.functional.embedding(torch.tensor(ids), model.embed_tokens.weight).to(model.dtype)
    frequencies, grown = model.config.rotary()
    angle = torch.arange(len(ids)).float()[:, None] * frequencies
    cos, sin = angle.cos() * grown, angle.sin() * grown
    ours = model.layers[layer](x, cos, sin, Samples((Keys(len(ids)),), (len(ids),)))
    theirs = TransformersLayer(folder, layer)
    rounded = theirs(x, model.dtype)
    exact = theirs(x, torch.float32)  # last: its weights are widened in place
    added = (exact.double() - x.double()).norm(dim=1)
    mine, other = (float(((y.double() - exact.double()).norm(dim=1) / added).median()) for y in (ours, rounded))
    return mine, other


class TransformersLayer:
    """One layer of transformers' model, its experts expanded to bfloat16, in which they are exact."""

    def __init__(self, folder: Path, layer: int):
        from transformers import GptOssConfig, GptOssModel

        settings = json.loads((folder / "config.json").read_text())
        settings |= {"num_hidden_layers": 1, "layer_types": settings["layer_types"][layer : layer + 1], "vocab_size": 8}
        settings |= {"pad_token_id": None, "eos_token_id": None, "quantization_config": None}
        config = GptOssConfig.from_dict(settings)
        with torch.device("meta"):
            self.model: Any = GptOssModel(config).eval()
        self.model.rotary_emb = type(self.model.rotary_emb)(config)
        self.model.norm = torch.nn.Identity()
        found: dict[str, Tensor] = {}
        for name, stored in text_encoder_tensors(folder).items():
            if name.startswith(f"layers.{layer}."):
                short = name.split(".", 2)[2]
                stored.read(lambda value, short=short: found.update({short: value.clone()}))  # type: ignore[misc]
                stored.shard.close()
        for name in [name for name in found if name.endswith("_blocks")]:
            whole = name.removesuffix("_blocks")
            found[whole] = bfloat16(found.pop(name), found.pop(f"{whole}_scales"))
        self.model.layers[0].load_state_dict(found, assign=True)
        self.made: list[Tensor] = []
        self.model.layers[0].register_forward_hook(lambda _module, _inputs, out: self.made.append(out))

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[T, D] -> [T, D]."""
        self.model.layers[0].to(dtype)
        self.made.clear()
        self.model(inputs_embeds=x.to(dtype)[None], use_cache=False)
        out = self.made[0]
        return (out[0] if isinstance(out, tuple) else out).reshape(x.shape)


def _summed(carried: Any, packing: Any) -> Tensor:
    from lens.model import summed

    return torch.cat([x.float() for x in summed(carried, packing)])


@torch.no_grad()
def decode_errors(vae: Any, side: int) -> tuple[float, float]:
    """Relative L2 distances of our decode and of diffusers' from diffusers' in float32, of a picture of ``side`` pixels."""
    import copy

    codec, z = PixelCodec(vae), torch.randn(1, vae.config.latent_channels, side // 8, side // 8)
    z = z.to(vae.dtype)
    exact = copy.deepcopy(vae).float().decode(z.float(), return_dict=False)[0]
    found = (codec.decoded(z), vae.decode(z, return_dict=False)[0])
    ours, theirs = (float((x.double() - exact).norm() / exact.double().norm()) for x in found)
    return ours, theirs


# ------------------------------------------------------------------------------------------------ the run


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Load, draw, compare; the result as of `python -m bench run`."""
    folder, record = options.folder, Record()
    height, width = options.size[1], options.size[0]
    dtype = torch.float32 if options.dtype == "fp32" else torch.bfloat16
    steps, guidance = VARIANTS[options.variant]
    steps = options.steps or steps
    before = state(torch.device("cpu"))
    import_libraries()
    if not options.keep_cache:
        forget_pages(folder)
    base = resident_bytes()

    with record.stage("load transformer", folder / "transformer"):
        # 1.36 of 4.1 billion weights, of which only the schedule's table is read, stay in the files
        transformer = load_transformer(folder / "transformer", dtype, "cpu", modulation=False)
    config = transformer.config
    for index in sorted({0, config.num_layers // 2, config.num_layers - 1}):
        record.errors[f"block {index}"] = block_error(transformer.layers()[index], config, dtype, index)
    with record.stage("load vae", folder / "vae"):
        codec = PixelCodec(load_vae(folder / "vae", dtype, "cpu"))
    ours, theirs = decode_errors(codec.vae, 128)
    record.errors |= {"decode": ours, "decode by diffusers": theirs}

    written = (folder / "text_encoder").is_dir() and options.text is None
    encoder: Any = NoEncoder()
    if written:
        chat = ChatTokenizer(folder / "tokenizer", vocab_size(folder / "text_encoder"))
        with record.stage("load text_encoder", folder / "text_encoder"):
            layers = config.selected_layer_index
            encoder = TextEncoder(chat, load_gpt_oss(folder / "text_encoder", dtype, "cpu", max(layers) + 1), layers)
    scheduler = load_scheduler(folder / "scheduler")
    pipe: Any = LensPipeline(transformer, encoder, codec, scheduler, Defaults(options.variant, steps, guidance))
    tokens = height * width // 256
    if written:
        pipe.set_residency(options.residency)
    with record.stage("table"):
        pipe.prepare(tokens, steps)

    text: dict[str, Any] = {"prompt": PROMPT}
    if written:
        with record.stage("prompt"):
            features, mask = pipe.encode_text([PROMPT])
        text = {"prompt_embeds": features, "prompt_mask": mask}
        with record.stage("prompt again"):  # another one: the preamble's keys are kept, pages may be
            pipe.encode_text([PROMPT.replace("red", "green")])
    else:
        g = torch.Generator().manual_seed(0)
        count = options.text or 200
        text = {
            "prompt_embeds": [
                torch.randn(1, count, config.enc_hidden_dim, generator=g).to(dtype) for _ in config.selected_layer_index
            ]
        }
    text_tokens = text["prompt_embeds"][0].shape[1]

    marks: list[float] = []

    def mark(*_: Any) -> dict[str, Any]:
        marks.append(time.perf_counter())
        return {}

    with record.stage("denoise"):
        marks.append(time.perf_counter())
        latents = pipe(
            **text, height=height, width=width, num_inference_steps=steps, guidance_scale=guidance, seed=0,
            output_type="latent", callback_on_step_end=mark, callback_on_step_end_tensor_inputs=(),
        ).images  # fmt: skip
    record.seconds["step"] = [after - start for start, after in itertools.pairwise(marks)]
    with record.stage("decode"), torch.no_grad():
        image = codec.decode(latents[0], (height // 16, width // 16))
    if not (torch.isfinite(image).all() and image.std() > 0):
        raise ValueError(
            f"bench full_size: the image must be finite and not constant, has deviation {float(image.std())}"
        )

    plan = pipe.sizes(tokens, 1, guidance != 1.0) if written else None
    predicted = cpu_peak_bytes(
        config, tuple(codec.vae.config.block_out_channels), tokens, text_tokens, steps, guidance != 1.0,
        encoder=plan.text_encoder if plan else 0, itemsize=dtype.itemsize,
        visiting=plan.visiting if plan and options.residency == "balanced" else None,
    )  # fmt: skip
    record.memory["predicted"] = {stage: HOST_BYTES + n for stage, n in predicted.items()}
    if written:  # the text encoder alone from here on: a layer in float32 takes 3 GB
        del transformer, pipe
        gc.collect()
        ids = encoder.tokenizer.encode(PROMPT, 512, "reference", "2026-05-23")
        kinds = encoder.model.config.layer_types
        for layer in sorted({0, kinds.index("full_attention"), len(encoder.model.layers) - 1}):
            ours, theirs = layer_errors(folder / "text_encoder", encoder.model, ids, layer)
            record.errors |= {f"layer {layer}": ours, f"layer {layer} by transformers": theirs}
    return _result(options, record, before, config, text_tokens, base)


def _result(
    options: argparse.Namespace, record: Record, before: dict[str, Any], config: Any, text_tokens: int, base: int
) -> dict[str, Any]:
    side = f"{options.size[0]}x{options.size[1]}"
    benchmarks = []
    for stage, data in record.seconds.items():
        case = f"full_size/{options.variant}/{side}/{options.dtype}/{stage.replace(' ', '_')}"
        more = {
            "case": case,
            "subject": OURS,
            "band": max(data) / min(data) - 1,
            "processor_seconds": record.processor.get(stage),
        }
        more |= {"memory": record.memory.get(stage), "read": record.read.get(stage)}
        benchmarks.append({"group": case, "name": case, "fullname": case, "extra_info": more, "stats": _stats(data)})
    cpu = torch.device("cpu")
    return {
        "machine_info": card(cpu),
        "benchmarks": benchmarks,
        "bench": {
            "before": before, "after": state(cpu), "asked": {"cases": [b["name"] for b in benchmarks], "subjects": None},
            "left_out": {}, "failed": {},
            "full_size": {
                "layers": config.num_layers, "width": config.inner_dim, "text_tokens": text_tokens,
                "text_encoder": "load text_encoder" in record.seconds, "residency": options.residency, "errors": record.errors,
                "memory": {"at_start": base, "predicted": record.memory["predicted"]},
            },
        },
    }  # fmt: skip


def _stats(data: list[float]) -> dict[str, Any]:
    middle = statistics.median(data)
    return {"min": min(data), "max": max(data), "median": middle, "rounds": len(data), "data": data}


def summary(result: dict[str, Any]) -> str:
    """Every stage in one line: seconds, peak, what was predicted, bytes read."""
    full = result["bench"]["full_size"]
    predicted = full["memory"]["predicted"]
    lines = [f"{'stage':22}{'seconds':>9}{'of CPU':>9}{'peak GB':>9}{'predicted':>11}{'read / size':>13}"]
    for entry in result["benchmarks"]:
        more, stage = entry["extra_info"], entry["name"].rsplit("/", 1)[1].replace("_", " ", 1)
        peak = f"{more['memory']['peak'] / 1e9:.2f}" if more["memory"] else ""
        foreseen = f"{predicted[stage] / 1e9:.2f}" if stage in predicted else ""
        read = f"{more['read']['from_disk'] / more['read']['files']:.3f}" if more["read"] else ""
        used = more["processor_seconds"]
        used = f"{used:.2f}" if used is not None else ""
        lines.append(f"{stage:22}{entry['stats']['median']:9.2f}{used:>9}{peak:>9}{foreseen:>11}{read:>13}")
    lines += [f"{name}: relative error {error:.2e}" for name, error in full["errors"].items()]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------ the commands


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`full_size make`, `full_size run` and `full_size compare`."""
    kinds = parser.add_subparsers(required=True, metavar="make | run | compare")
    make = kinds.add_parser("make", help="write a checkpoint of the released size, 22 or 30 GB, with random weights")
    make.add_argument("folder", type=Path, help="new, or begun by this command and then finished")
    make.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="of the transformer (default: bf16)")
    make.add_argument("--scale", type=int, default=1, help="about so many times fewer weights, 1 to 4096 (default: 1)")
    make.add_argument("--seed", type=int, default=0)
    make.add_argument("--without-text-encoder", action="store_true", help="leave its 13.8 GB out")
    make.set_defaults(do=_make)
    run = kinds.add_parser(
        "run", help="draw with it and measure every stage; writes bench/results/<device>/full_size.json"
    )
    run.add_argument("folder", type=Path)
    run.add_argument("--variant", choices=list(VARIANTS), default="turbo")
    run.add_argument("--size", type=_size, default=(512, 512), metavar="WIDTHxHEIGHT", help="default: 512x512")
    run.add_argument("--steps", type=int, help="default: the variant's")
    run.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16")
    run.add_argument(
        "--residency",
        choices=CPU_NAMES,
        default="trimmed",
        help="whether the text encoder's pages stay (trimmed) or not",
    )
    run.add_argument("--text", type=int, metavar="TOKENS", help="random features of so many tokens, no text encoder")
    run.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    run.add_argument(
        "--keep-cache", action="store_true", help="files may be in the page cache; bytes read say nothing then"
    )
    run.add_argument("--out", type=Path, help="default: bench/results/<device>/full_size.json")
    run.set_defaults(do=_run)
    compare = kinds.add_parser(
        "compare", help="draw with it and with diffusers' and transformers' parts; writes full_size_parts.json"
    )
    compare.add_argument("folder", type=Path)
    compare.add_argument("--variant", choices=list(VARIANTS), default="turbo")
    compare.add_argument("--size", type=_size, default=(512, 512), metavar="WIDTHxHEIGHT", help="default: 512x512")
    compare.add_argument("--rounds", type=int, default=3, help="that count, after one that does not (default: 3)")
    compare.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    compare.add_argument("--out", type=Path, help="default: bench/results/<device>/full_size_parts.json")
    compare.set_defaults(do=_compare)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if (
        not (width.isdigit() and height.isdigit())
        or int(width) % 16
        or int(height) % 16
        or 0 in (int(width), int(height))
    ):
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT in multiples of 16, got {text}")
    return int(width), int(height)


def _make(options: argparse.Namespace) -> int:
    began, dtype = time.perf_counter(), {"bf16": "BF16", "fp32": "F32"}[options.dtype]
    try:
        written = checkpoint.make(options.folder, options.scale, dtype, options.seed, not options.without_text_encoder)
    except (OSError, ValueError) as error:
        print(f"bench full_size make: {error}", file=sys.stderr)
        return 1
    print(f"{options.folder}: {written / 1e9:.2f} GB in {time.perf_counter() - began:.0f} s")
    return 0


def _compare(options: argparse.Namespace) -> int:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    cpu = torch.device("cpu")
    before = state(cpu)
    try:
        turns = parts.compare(options.folder, options.variant, options.size, options.rounds)
    except (OSError, ValueError, LeftOut) as error:
        print(f"bench full_size compare: {error}", file=sys.stderr)
        return 1
    identity, side = card(cpu), f"{options.size[0]}x{options.size[1]}"
    benchmarks = []
    for (stage, subject), seconds in turns.wall.items():
        case = f"full_size/{options.variant}/{side}/bf16/{stage}"
        used = turns.processor[stage, subject]
        more = {"case": case, "subject": subject, "band": max(used) / min(used) - 1, "processor_seconds": min(used)}
        benchmarks.append({"group": case, "name": case, "fullname": case, "extra_info": more, "stats": _stats(seconds)})
    result = {
        "machine_info": identity,
        "benchmarks": benchmarks,
        "bench": {
            "before": before, "after": state(cpu), "asked": {"cases": [b["name"] for b in benchmarks], "subjects": None},
            "left_out": {}, "failed": {},
            "full_size": {"apart": turns.apart, "encoder_bytes": turns.encoder_bytes, "rounds": options.rounds},
        },
    }  # fmt: skip
    out = options.out or RESULTS / folder_name(identity["identity"]) / "full_size_parts.json"
    write_json(out, json.loads(json.dumps(result)))
    print(f"{'stage':12}{'ours':>9}{'parts':>9}{'ratio':>8}{'apart':>10}   seconds of the processor, best round")
    for stage in (*parts.STAGES, "whole"):
        own, other = (turns.best(name, parts.STAGES if stage == "whole" else (stage,)) for name in (OURS, parts.PARTS))
        apart = f"{turns.apart[stage]:10.1e}" if stage in turns.apart else ""
        print(f"{stage:12}{own:9.2f}{other:9.2f}{other / own:8.2f}{apart}")
    print(f"text encoder: {', '.join(f'{name} {n / 1e9:.2f} GB' for name, n in turns.encoder_bytes.items())}")
    print(out)
    return 0


def _run(options: argparse.Namespace) -> int:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    try:
        result = measure(options)
    except (OSError, ValueError) as error:  # lens.CheckpointError is a ValueError
        print(f"bench full_size run: {error}", file=sys.stderr)
        return 1
    out = options.out or RESULTS / folder_name(result["machine_info"]["identity"]) / "full_size.json"
    write_json(out, json.loads(json.dumps(result)))
    print(summary(result))
    print(out)
    bad = [
        n for n, e in result["bench"]["full_size"]["errors"].items() if n.startswith("block") and not e <= BLOCK_BOUND
    ]
    if bad:
        print(
            f"bench full_size run: {', '.join(bad)} must be within {BLOCK_BOUND} of its specification", file=sys.stderr
        )
    return 1 if bad else 0
