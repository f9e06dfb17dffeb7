"""Which part lives where: one policy for the text encoder, the transformer and the VAE, and the memory it will peak at.

A picture passes three stages, and each needs one part: encode, denoise, decode. A part is "resident" (always on the
device) or "on_demand" (its weights lie in host memory and visit the device for their stage). The modulation weights,
a third of the transformer, may besides stay on the host for good: schedules are then computed there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from lens.cost import (
    HOST_BYTES,
    cpu_decode_bytes,
    cpu_encode_bytes,
    decode_bytes,
    encode_bytes,
    step_buffer_bytes,
    step_workspace_bytes,
    transformer_parameters,
)

from ..arguments import shortened
from ..config import LensConfig
from ..formats.mxfp4 import packed_modules
from ..gpt_oss import GptOss

TIERS = ("resident", "on_demand")
STAGES = {"encode": "text_encoder", "denoise": "transformer", "decode": "vae"}
ENCODER_BYTES = 12_800_000_000  # GPT-OSS-20B without its output layer, experts in MXFP4
EXPANDED_BYTES = 40_670_000_000  # the same, all of it in bfloat16
# of one of its 24 layers: 32 experts of three 2880 x 2880 matrices at 4.25 bits, the attention's matrices in bfloat16
LAYER_BYTES = 32 * 3 * 2880 * 2880 * 17 // 32 + 2 * 2880 * (2 * 64 * 64 + 2 * 8 * 64)
MARGIN = 0.92  # share of the free memory a plan may fill: the libraries' own buffers and the allocator's rounding


@dataclass(frozen=True)
class Residency:
    """Where each part lives."""

    text_encoder: str = "resident"
    transformer: str = "resident"
    vae: str = "resident"
    modulation: str = "resident"  # or "host"; of a transformer that is resident

    def __post_init__(self) -> None:
        for field in fields(self):
            known = ("resident", "host") if field.name == "modulation" else TIERS
            if (value := getattr(self, field.name)) not in known:
                raise ValueError(f"Residency: {field.name} must be one of {', '.join(known)}, got {shortened(value)}")
        if self.modulation == "host" and self.transformer != "resident":
            raise ValueError("Residency: modulation='host' needs a resident transformer; on demand it moves with it")

    def tier(self, part: str) -> str:
        return str(getattr(self, part))


PRESETS = {
    "resident": Residency(),
    "trimmed": Residency(modulation="host"),
    "balanced": Residency(text_encoder="on_demand", modulation="host"),
    "lean": Residency("on_demand", "on_demand", "on_demand"),
}  # from the fastest to the smallest
NAMES = ("auto", *PRESETS)
# On a CPU the transformer and the VAE have nowhere to move to, and modulation weights in memory buy no time: a schedule's
# table reads them once, wherever they are.
CPU_NAMES = ("trimmed", "balanced")


def named(residency: Any, device: torch.device) -> Any:
    """The policy of a preset's name on a device; what names none as it is. On a CPU "lean" is "balanced", than which nothing
    is smaller there: parts that visit the memory they are in would only keep modulation weights in it."""
    name = "balanced" if residency == "lean" and device.type == "cpu" else residency
    return PRESETS[name] if isinstance(name, str) and name in PRESETS else residency


@dataclass(frozen=True)
class Sizes:
    """Bytes: of each part's weights, and of what each stage needs besides."""

    text_encoder: int
    transformer: int  # with the modulation
    modulation: int
    vae: int
    encode: int
    denoise: int
    decode: int
    process: int = 0  # besides all of them, always
    # of a text encoder on demand, at once, where no other part leaves; None: all of it, and of others
    visiting: int | None = None


def module_bytes(module: nn.Module) -> int:
    """Parameters and buffers, shared ones once, and what packed experts hold beside them."""
    return sum(t.numel() * t.element_size() for t in _tensors(module))


def _tensors(module: nn.Module) -> Iterable[Tensor]:
    found = {id(t): t for t in (*module.parameters(), *module.buffers())}
    for experts in packed_modules(module):  # their kernels' own objects, wrapped a few deep
        held = [value for name, value in vars(experts).items() if not name.startswith("_")]
        for _ in range(5):
            found |= {id(t): t for t in held if isinstance(t, Tensor)}
            held = [v for x in held if hasattr(x, "__dict__") and not isinstance(x, Tensor) for v in vars(x).values()]
    return found.values()


def work_bytes(config: LensConfig, channels: tuple[int, ...], tokens: int, images: int, guided: bool) -> dict[str, int]:
    """What the stages need for ``images`` of ``tokens`` image tokens each at once, in bfloat16; one is decoded."""
    halves = 2 if guided else 1
    rows, text = tokens * images * halves, 512 * images * halves
    denoise = step_workspace_bytes(config, rows, text) + step_buffer_bytes(config, rows, text, halves)
    encode = encode_bytes(config.enc_hidden_dim)
    return {"encode": encode, "denoise": denoise, "decode": decode_bytes(channels, 256 * tokens)}


def cpu_sizes(
    config: LensConfig,
    encoder: int,
    layer: int,
    autoencoder: int,
    channels: tuple[int, ...],
    tokens: int,
    images: int,
    guided: bool,
    itemsize: int = 2,
) -> Sizes:
    """Sizes on a CPU, where the process's own memory counts. encoder: its weights that a prompt touches; layer: those of
    one of its layers, which are there at a time where it is on demand."""
    weights, modulation = (itemsize * n for n in transformer_parameters(config))
    halves = 2 if guided else 1
    rows, text = tokens * images * halves, 512 * images * halves
    buffers = step_buffer_bytes(config, rows, text, halves, itemsize=itemsize)
    return Sizes(
        encoder, weights, modulation, autoencoder,
        encode=buffers + cpu_encode_bytes(config, 512, itemsize),
        denoise=buffers + step_workspace_bytes(config, rows, text, itemsize),
        decode=buffers + cpu_decode_bytes(channels, 256 * tokens, itemsize),
        process=HOST_BYTES, visiting=layer,
    )  # fmt: skip


def released_sizes(tokens: int = 4096, images: int = 1, guided: bool = True, packed: bool = True) -> Sizes:
    """The released model in bfloat16, its text encoder's experts ``packed`` in 4 bits, its autoencoder of 84 M weights."""
    config = LensConfig()
    weights, modulation = transformer_parameters(config)
    work = work_bytes(config, (128, 256, 512, 512), tokens, images, guided)
    return Sizes(ENCODER_BYTES if packed else EXPANDED_BYTES, 2 * weights, 2 * modulation, 2 * 84_046_115, **work)


def released_cpu_sizes(tokens: int = 4096, images: int = 1, guided: bool = True) -> Sizes:
    """The same on a CPU, by our own text encoder: rows of its embedding are pages of a file, few of which are read."""
    layers = max(LensConfig().selected_layer_index) + 1
    channels = (128, 256, 512, 512)
    return cpu_sizes(LensConfig(), layers * LAYER_BYTES, LAYER_BYTES, 2 * 84_046_115, channels, tokens, images, guided)


def predict(sizes: Sizes, residency: Residency) -> dict[str, int]:
    """Bytes on the device in each stage: what is always there, the stage's own part, its work."""
    weights = {p: getattr(sizes, p) for p in STAGES.values()}
    if residency.modulation == "host":
        weights["transformer"] -= sizes.modulation
    leaves = STAGES.values() if sizes.visiting is None else ["text_encoder"]
    stays = {part for part in weights if residency.tier(part) == "resident" or part not in leaves}
    always = sizes.process + sum(weights[part] for part in stays)
    if sizes.visiting is not None:
        weights["text_encoder"] = sizes.visiting
    visiting = {stage: 0 if part in stays else weights[part] for stage, part in STAGES.items()}
    return {stage: always + visiting[stage] + getattr(sizes, stage) for stage in STAGES}


def peak(sizes: Sizes, residency: Residency) -> int:
    """The predicted peak in bytes."""
    return max(predict(sizes, residency).values())


def fits(sizes: Sizes, residency: Residency, free: int) -> bool:
    return peak(sizes, residency) <= MARGIN * free


def choose(name: str | Residency, sizes: Sizes, free: int | None, fixed: Sequence[str] = ()) -> Residency:
    """A policy by name; "auto": the fastest that fits ``free`` bytes (None: any amount) and moves no ``fixed`` part.

    MemoryError, with the plans, where none does.
    """
    if isinstance(name, Residency):
        return name
    if isinstance(name, str) and name in PRESETS:
        return PRESETS[name]
    if name != "auto":
        raise ValueError(f"residency must be a Residency or one of {', '.join(NAMES)}, got {shortened(name)}")
    if free is None:
        return PRESETS["resident"]
    able = {n: r for n, r in PRESETS.items() if all(r.tier(part) == "resident" for part in fixed)}
    for residency in able.values():
        if fits(sizes, residency, free):
            return residency
    plans = ", ".join(f"{n} {peak(sizes, r) / 2**30:.1f} GiB" for n, r in able.items())
    raise MemoryError(f"residency='auto': no plan fits {free / 2**30:.1f} GiB of free device memory: {plans}")


def within(memory: float, sizes: Sizes, names: Iterable[str] = CPU_NAMES) -> Residency:
    """The fastest of the policies ``names`` whose predicted peak fits ``memory`` GB (10^9 bytes). MemoryError where none does."""
    for name in names:
        if fits(sizes, PRESETS[name], int(memory * 1e9)):
            return PRESETS[name]
    plans = ", ".join(f"{name} {peak(sizes, PRESETS[name]) / MARGIN / 1e9:.1f} GB" for name in names)
    raise MemoryError(f"memory: {memory:g} GB are too few, at least needed: {plans}")


# ---------------------------------------------------------------------------------------------------- moving


class Placement:
    """Carries out a policy: parts on demand are on ``device`` inside ``using(part)`` and in host memory outside.

    The host copy is the truth: leaving throws the device's copy away, so weights must not be changed inside. On a CPU the
    device's memory is the host's, and weights that are mapped from their files are dropped: of a text encoder's layers, which
    each prompt passes once, as soon as one has run. A part that is used inside its own block stays until the outermost ends.
    """

    def __init__(self, residency: Residency, device: torch.device):
        self.residency = residency
        self.device = device
        self._depth = dict.fromkeys(STAGES.values(), 0)
        self._moving = threading.Lock()  # a thread that finds a part in use must find all of it on the device
        self._host: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._pages: dict[str, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        """Copied where every part is resident. TypeError where parts visit the device: a copy would not know them."""
        if self._host:
            raise TypeError(
                f"a pipeline with {', '.join(self._host)} on demand cannot be copied or pickled: "
                "set_residency('resident') first"
            )
        return Placement, (self.residency, self.device)

    def add(self, part: str, module: nn.Module) -> None:
        """Put a part where it lives. ValueError where one that cannot move is wanted on demand."""
        # weights that were left out when loading are on the meta device and stay there
        tensors = {id(t): t for t in (*module.parameters(), *module.buffers()) if not t.is_meta}.values()
        if isinstance(module, GptOss):
            module.streamed = self.residency.tier(part) != "resident" and self.device.type == "cpu"
        if self.residency.tier(part) == "resident":
            for tensor in tensors:
                tensor.data = tensor.data.to(self.device)
            return
        if why := immovable(module):
            raise ValueError(f"residency: {part} cannot be on_demand: {why}")
        self._host[part] = [(tensor, self._park(tensor.data)) for tensor in tensors]
        if self.device.type == "cpu":  # weights that stayed in their files
            self._pages[part] = getattr(module, "pages", None)
        for tensor, host in self._host[part]:
            tensor.data = host

    def _park(self, tensor: Tensor) -> Tensor:
        """A host copy, which the device fetches by itself."""
        return tensor.cpu().pin_memory() if self.device.type == "cuda" else tensor.cpu()

    def _visit(self, host: Tensor) -> Tensor:
        return host.to(self.device, non_blocking=True)

    @contextlib.contextmanager
    def using(self, part: str) -> Iterator[None]:
        """The part on the device."""
        moved = self._host.get(part, [])
        try:
            with self._moving:
                self._depth[part] += 1
                if self._depth[part] == 1:
                    for tensor, host in moved:
                        tensor.data = self._visit(host)
            yield
        finally:
            with self._moving:
                self._depth[part] -= 1
                if self._depth[part] == 0:
                    for tensor, host in moved:
                        tensor.data = host
                    if moved and (pages := self._pages.get(part)):
                        pages.drop()


def immovable(module: nn.Module) -> str:
    """Why a part's weights cannot visit the device, or ""."""
    if packed_modules(module):
        return "its packed MXFP4 experts are held by their kernels, not as parameters"
    return ""


def free_bytes(device: torch.device, parts: Iterable[nn.Module]) -> int | None:
    """Device memory that a plan may use: what is free, and what the parts hold already. None where it has no bound."""
    if device.type != "cuda":
        return None
    held = (t for part in parts for t in _tensors(part) if t.device == device)
    return torch.cuda.mem_get_info(device)[0] + sum(t.numel() * t.element_size() for t in held)


def describe(sizes: Sizes, residency: Residency) -> str:
    """One line: where each part lives, then the predicted peak of each stage."""
    where = ", ".join(f"{f.name} {residency.tier(f.name)}" for f in fields(residency))
    stages = ", ".join(f"{stage} {n / 2**30:.2f}" for stage, n in predict(sizes, residency).items())
    return f"{where}; predicted GiB: {stages}"


def sizes_of(
    config: LensConfig, encoder: nn.Module, transformer: nn.Module, vae: Any, device: torch.device, **work: Any
) -> Sizes:
    """Sizes of loaded parts that live on ``device``; ``work`` as in ``work_bytes``."""
    itemsize = next(transformer.parameters()).element_size()
    modulation = transformer_parameters(config)[1] * itemsize
    channels = tuple(vae.config.block_out_channels)
    if device.type == "cpu" and isinstance(encoder, GptOss):

        def mapped(module: nn.Module) -> int:
            inside = [t for t in module.parameters() if encoder.pages and t in encoder.pages]
            return sum(t.numel() * t.element_size() for t in inside)

        pages, rows = mapped(encoder), mapped(encoder.embed_tokens)  # of which a prompt reads few
        copied = module_bytes(encoder) - pages
        layer = max(mapped(own) for own in encoder.layers)
        found = cpu_sizes(config, pages - rows, layer, module_bytes(vae), channels, itemsize=itemsize, **work)
        return replace(found, process=found.process + copied)
    parts = module_bytes(encoder), module_bytes(transformer), modulation, module_bytes(vae)
    return Sizes(*parts, **work_bytes(config, channels, **work))
