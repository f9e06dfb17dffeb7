"""lens doctor: what runs on this machine, why, and whether it is right.

Every line of the report is a `Finding`. A finding is "ok", "note" (works, but could be better or is absent by choice) or
"broken"; its remedy, where there is one, is a command or a sentence that changes it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from . import __version__, ops, residency
from .ops import attention_backends, backend, reference

if TYPE_CHECKING:
    from .pipeline import LensPipelineOutput

OK, NOTE, BROKEN = "ok", "note", "broken"
_DISTRIBUTION = "lens-t2i"
_OPTIONAL_ON_CUDA = {"kernels": "keeps the MXFP4 text encoder packed on the GPU instead of expanding it to bfloat16"}
_EXTRAS_LEFT_OUT = ("dev",)  # needed to work on Lens, not to use it


@dataclass(frozen=True)
class Finding:
    section: str
    name: str
    status: str
    detail: str
    remedy: str = ""


def examine(model: str = "mini", device: torch.device | None = None) -> list[Finding]:
    """All findings, in the order of the report; about ten seconds, most of them imports.

    device: where the self-test runs; None: cuda where torch can use it, else cpu.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    findings = [*system(), *devices(), *extension(), *op_backends(device), *attention(device), *memory(device)]
    findings += packages()
    findings += self_test_ops(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a small picture gains nothing from more, and on busy cores each one costs
    try:
        findings += self_test_picture(model, device)
    finally:
        torch.set_num_threads(threads)
    return findings


def broken(findings: Sequence[Finding]) -> bool:
    return any(f.status == BROKEN for f in findings)


def as_json(findings: Sequence[Finding]) -> str:
    status = BROKEN if broken(findings) else OK
    return json.dumps({"status": status, "version": __version__, "findings": [asdict(f) for f in findings]}, indent=2)


def as_text(findings: Sequence[Finding]) -> str:
    marks = {OK: "ok    ", NOTE: "note  ", BROKEN: "BROKEN"}
    width = max(len(f.name) for f in findings)
    lines: list[str] = []
    section = ""
    for f in findings:
        if f.section != section:
            section = f.section
            lines += ["", section] if lines else [section]
        lines.append(f"  {marks[f.status]}  {f.name:<{width}}  {f.detail}")
        if f.remedy:
            lines.append(f"          {'':<{width}}  -> {f.remedy}")
    failures = [f.name for f in findings if f.status == BROKEN]
    verdict = f"broken: {', '.join(failures)}" if failures else "everything that is here works"
    return "\n".join([*lines, "", verdict])


# ------------------------------------------------------------------------------------------------ what is here


def system() -> list[Finding]:
    section = "System"
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding(section, "lens", OK, f"{__version__}, {Path(__file__).parent}"),
        Finding(section, "python", OK, f"{platform.python_version()}, {platform.platform()}"),
        Finding(section, "torch", OK, f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}"),
        Finding(section, "cpu", OK, f"{cpu}; {cores} cores, {torch.get_num_threads()} threads in use"),
    ]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []


def driver_version() -> str | None:
    """Version of the NVIDIA kernel driver, or None where there is none."""
    for line in _lines("/proc/driver/nvidia/version"):
        if "Kernel Module" in line:
            return next((word for word in line.split() if word[0].isdigit() and "." in word), line)
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.splitlines()[0].strip() if answer.returncode == 0 and answer.stdout else None
    return None


def devices() -> list[Finding]:
    section = "Devices"
    driver = driver_version()
    found = [Finding(section, "driver", OK, driver or "no NVIDIA driver: everything runs on the CPU")]
    if driver is None:
        return found
    if torch.version.cuda is None:
        return [
            *found,
            Finding(section, "cuda", NOTE, "this torch has no CUDA", "install a CUDA build of torch to use the GPU"),
        ]
    if not torch.cuda.is_available():
        return [
            *found,
            Finding(
                section,
                "cuda",
                BROKEN,
                f"a driver is here, but torch cannot use it (it needs one for CUDA {torch.version.cuda})",
                "update the driver, or install a torch built for an older CUDA; see CUDA_VISIBLE_DEVICES, too",
            ),
        ]
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        free, total = torch.cuda.mem_get_info(i)
        what = f"{p.name}, compute capability {p.major}.{p.minor}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
        old = p.major < 8
        found.append(
            Finding(
                section,
                f"cuda:{i}",
                NOTE if old else OK,
                what,
                "the kernels are built for 8.0 and newer: use --device cpu" if old else "",
            )
        )
    return found


def extension() -> list[Finding]:
    section = "Extension"
    try:
        module = importlib.import_module("lens._C")
    except ImportError as error:
        remedy = "pip install . from the checkout, or make build in it"
        return [Finding(section, "lens._C", BROKEN, f"cannot be imported: {error}", remedy)]
    found = [
        Finding(section, "lens._C", OK, str(module.__file__)),
        Finding(
            section, "cpu kernels", OK, f"{module.isa()} in use; this CPU can run {', '.join(module.available_isas())}"
        ),
    ]
    if module.with_cuda:
        targets = module.cuda_targets.replace("-real", "").replace("-virtual", " and newer")
        return [*found, Finding(section, "cuda kernels", OK, f"built in, for {targets}")]
    wanted = driver_version() is not None
    remedy = "LENS_CUDA=ON pip install . from the checkout; nvcc is fetched where it is missing" if wanted else ""
    return [*found, Finding(section, "cuda kernels", NOTE if wanted else OK, "not built in", remedy)]


def op_backends(device: torch.device) -> list[Finding]:
    """Which kernel serves each op on ``device``, and why; then what batching does to bits."""
    section = f"Ops on {device.type}"
    found = []
    for op, chosen, reason in backend.report(device.type):
        status = BROKEN if chosen == "none" else NOTE if chosen == "reference" else OK
        found.append(Finding(section, op, status, f"{chosen}: {reason}"))
    if device.type == "cpu":
        detail = "yes, bit for bit: every matrix product, attention and decode runs sample by sample"
        found.append(Finding(section, "batch invariant", OK, detail))
    else:
        detail = (
            "no, at rounding level: the libraries choose their matrix product by its size, so a picture's last bits "
            "depend on what is drawn beside it"
        )
        found.append(Finding(section, "batch invariant", NOTE, detail))
    return found


def attention(device: torch.device) -> list[Finding]:
    """Which library computes attention on a GPU: every candidate, for plain steps, captured ones and training."""
    if device.type != "cuda":
        detail = "torch's flash attention for CPUs, the only candidate here; the others need a CUDA device"
        return [Finding("Attention", "cpu", OK, detail)]
    found = []
    with torch.cuda.device(device):
        needs = {
            "plain steps": attention_backends.usual(),
            "captured steps": attention_backends.usual(device_lengths=True),
            "training": attention_backends.usual(backward=True),
        }
    for use, need in needs.items():
        for name, chosen, why in attention_backends.report(need):
            status = OK if chosen or not attention_backends.forced() else NOTE
            found.append(Finding(f"Attention for {use}", name, status, f"{'CHOSEN' if chosen else 'not'}: {why}"))
    return found


def memory(device: torch.device) -> list[Finding]:
    """What the released model would peak at under each residency, one 1024x1024 guided picture at a time."""
    section = "Residency of the released model"
    sizes = residency.released_sizes()
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    found = []
    for name, policy in residency.PRESETS.items():
        fits = free is None or residency.fits(sizes, policy, free)
        detail = residency.describe(sizes, policy)
        if free is not None:
            detail += f"; {'fits' if fits else 'does not fit'} {free / 2**30:.1f} GiB free"
        if policy.text_encoder != "resident":
            detail += "; refused for packed MXFP4 experts, which cannot visit the device"
        found.append(Finding(section, name, OK if fits else NOTE, detail))
    return found


def packages() -> list[Finding]:
    """Requirements by name and version, then the optional extras, from the metadata of the installed distribution."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        remedy = "pip install . from the checkout"
        return [Finding("Packages", _DISTRIBUTION, BROKEN, "not installed as a distribution", remedy)]
    found, extras = [], dict[str, list[str]]()
    for requirement in map(Requirement, lines):
        extra = _extra_of(str(requirement.marker or ""))
        if extra in _EXTRAS_LEFT_OUT:
            continue
        if requirement.marker and not requirement.marker.evaluate({"extra": extra or ""}):
            continue
        have = _version(requirement.name)
        fits = have is not None and requirement.specifier.contains(have, prereleases=True)
        if extra is not None:
            extras.setdefault(extra, [])
            if not fits:
                extras[extra].append(requirement.name)
        elif fits:
            found.append(Finding("Packages", requirement.name, OK, str(have)))
        else:
            wanted = f"{requirement.name}{requirement.specifier}"
            detail = f"{have or 'missing'}, needs {requirement.specifier or 'any version'}"
            found.append(Finding("Packages", requirement.name, BROKEN, detail, f"pip install '{wanted}'"))
    for extra, missing in sorted(extras.items()):
        detail = f"optional, without {', '.join(missing)}" if missing else "complete"
        remedy = f"pip install {' '.join(missing)}" if missing else ""
        found.append(Finding("Packages", f"[{extra}]", NOTE if missing else OK, detail, remedy))
    for name, why in _OPTIONAL_ON_CUDA.items() if torch.cuda.is_available() else ():
        if (have := _version(name)) is None:
            found.append(Finding("Packages", name, NOTE, f"optional, missing: {why}", f"pip install {name}"))
        else:
            found.append(Finding("Packages", name, OK, have))
    return found


def _extra_of(marker: str) -> str | None:
    _, found, after = marker.partition("extra ==")
    return after.strip().strip("()").split()[0].strip("\"'") if found else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# ------------------------------------------------------------------------------------------------ self-test


def op_cases(seed: int = 0) -> dict[str, list[Any]]:
    """Per op, float64 arguments of one ragged call: three samples, one without text, odd widths.

    Named as in reference.py; the caller chooses dtype and device. Index and length arguments are integers already.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64)

    images, texts = [20, 6, 16], [7, 0, 12]
    samples, heads, channels, hidden = len(images), 2, 64, 341
    rows, text_rows, width = sum(images), sum(texts), heads * channels
    offsets, text_offsets = (
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32) for n in (images, texts)
    )
    table = normal(samples, 6 * width)  # one modulation table: its slices have a row stride of 6 D
    gate, scale, shift = (table[:, i * width : (i + 1) * width] for i in (0, 2, 5))
    angle = normal(rows + text_rows, channels // 2)
    index = torch.tensor([0, 2, 3, 9, 10, 19, 21])
    x, y, weight = normal(rows, width), normal(rows, width), normal(width)
    qkv = normal(3, rows + text_rows, heads, channels)
    return {
        "pack_tokens": [normal(2, 11, 64), index],
        "unpack_tokens": [normal(len(index), 64), index, 2, 11],
        "rms_norm_modulate": [x, weight, scale, shift, offsets],
        "qk_norm_rope": [
            normal(rows, 3 * width), normal(text_rows, 3 * width), *(normal(channels) for _ in range(4)),
            angle.cos(), angle.sin(), offsets, text_offsets,
        ],
        "joint_attention": [*qkv, images, texts, offsets, text_offsets],
        "gated_residual": [x, y, gate, offsets],
        "gated_residual_norm_modulate": [x, y, gate, weight, scale, shift, offsets],
        "swiglu": [normal(rows, 2 * hidden)],
        "guidance_step": [x, normal(rows, width), normal(rows, width), normal(samples), 5.0, offsets],
    }  # fmt: skip


def compare(op: str, arguments: Sequence[Any], dtype: torch.dtype, device: torch.device) -> tuple[float, float]:
    """Relative L2 error of the op, and of the specification itself, both run in ``dtype``, against float64."""

    def cast(i: int, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value.to(device) if isinstance(value, Tensor) else value
        # the rotary table, the latents and the step lengths are float32 whatever the model's dtype is
        wide = (op == "qk_norm_rope" and i in (6, 7)) or (op == "guidance_step" and i in (0, 3))
        return _like(value, torch.float32 if wide else dtype, device)

    given = [cast(i, value) for i, value in enumerate(arguments)]
    exact = [v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in given]
    spec: Callable[..., Any] = getattr(reference, op)
    truth = _flat(spec(*exact))
    return tuple(float((_flat(f(*given)) - truth).norm() / truth.norm()) for f in (getattr(ops, op), spec))  # type: ignore[return-value]


def _like(value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A copy in ``dtype`` that keeps the strides of a slice."""
    if value.is_contiguous():
        return value.to(device, dtype)
    whole = torch.empty(value.shape[0], value.stride(0), dtype=dtype, device=device)
    return whole[:, : value.shape[1]].copy_(value)


def _flat(result: Any) -> Tensor:
    parts = result if isinstance(result, tuple) else (result,)
    return torch.cat([p.double().flatten() for p in parts])


def self_test_ops(device: torch.device) -> list[Finding]:
    """Every op against its specification: error at most twice what the specification itself makes in that dtype."""
    section = f"Self-test on {device}"
    found = []
    for op, arguments in op_cases().items():
        words, status = [], OK
        for dtype, floor in ((torch.float32, 5e-7), (torch.bfloat16, 1e-5)):
            name = str(dtype).removeprefix("torch.")
            try:
                error, allowed = compare(op, arguments, dtype, device)
            except Exception as failure:
                # whatever an op raises is this report's content
                words.append(f"{name} raised {type(failure).__name__}: {str(failure).splitlines()[0]}")
                status = BROKEN
                continue
            limit = 2 * allowed + floor
            words.append(f"{name} error {error:.1e} (limit {limit:.1e})")
            if not error <= limit:  # a NaN is broken, too
                status = BROKEN
        found.append(Finding(section, op, status, ", ".join(words)))
    return found


def self_test_picture(model: str, device: torch.device) -> list[Finding]:
    """One small picture, alone and beside another: finite, repeatable, and whether its bits depend on its neighbour."""
    from .pipeline import LensPipeline

    section = f"Self-test on {device}"
    red, seed, full = "a red apple", 1, (64, 64)
    began = time.perf_counter()
    try:
        pipe = LensPipeline.from_pretrained(model, device=device)
        loaded = time.perf_counter()

        def draw(prompts: list[str], sizes: list[tuple[int, int]], seeds: list[int]) -> Tensor:
            """The last picture, float32 [H, W, 3]."""
            small: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
            output = cast("LensPipelineOutput", pipe(prompts, sizes=sizes, seed=seeds, **small))
            return torch.from_numpy(output.images[-1])

        alone = draw([red], [full], [seed])
        seconds = time.perf_counter() - loaded
        again = draw([red], [full], [seed])
        together = draw(["two blue keys", red], [(32, 48), full], [5, seed])
    except Exception as failure:
        # whatever loading or drawing raises is this report's content
        detail = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else 'no message'}"
        return [Finding(section, f"picture ({model})", BROKEN, detail)]
    found = [
        Finding(
            section,
            f"picture ({model})",
            OK if torch.isfinite(alone).all() and alone.std() > 0 else BROKEN,
            f"64x64, 2 steps: {seconds:.2f} s; loading {loaded - began:.1f} s",
        ),
        Finding(
            section,
            "same bits again",
            OK if torch.equal(alone, again) else BROKEN,
            "yes" if torch.equal(alone, again) else f"no, differs by up to {float((alone - again).abs().max()):.1e}",
        ),
    ]
    difference = float((alone - together).abs().max())
    invariant = difference == 0
    # on the CPU independence is promised bit for bit; elsewhere up to rounding, which bfloat16 makes visible
    status = OK if invariant else BROKEN if device.type == "cpu" or difference > 0.1 else NOTE
    detail = "yes" if invariant else f"no, a neighbour changes values by up to {difference:.1e} of 1"
    return [*found, Finding(section, "same bits in a batch", status, detail)]
