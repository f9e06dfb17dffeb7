"""The doctor's examination: what runs on this machine, why, and whether it is right, a `Finding` for each line."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch

from .. import __version__
from ..engine import batch_invariance, residency
from ..formats import mxfp4
from ..ops import backend
from ..ops.attention import choice as attention_choice
from ..ops.attention import cpu as attention_cpu
from ..ops.linear import choice as linear_choice
from ..ops.linear.fused import by_rows
from . import ops, selftest
from .findings import BROKEN, NOTE, OK, Finding

_DISTRIBUTION = "lens-t2i"
_EXTRAS_LEFT_OUT = ("dev",)  # needed to work on Lens, not to use it


def examine(model: str = "mini", device: torch.device | None = None) -> list[Finding]:
    """All findings, in the order of the report; about ten seconds, most of them imports.

    device: where the self-test runs; None: cuda where torch can use it, else cpu.
    """
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    findings = [*system(), *devices(), *extension(), *op_backends(device), *attention(device)]
    findings += [*gemms(device), *memory(device)]
    findings += packages()
    findings += selftest.run_ops(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a small picture gains nothing from more, and on busy cores each one costs
    try:
        findings += selftest.draw_image(model, device)
    finally:
        torch.set_num_threads(threads)
    return findings


# ------------------------------------------------------------------------------------------------ what is here


def system() -> list[Finding]:
    section = "System"
    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.machine(),
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding(section, "lens", OK, f"{__version__}, {Path(__file__).parents[1]}"),
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
        found.append(Finding(section, "cuda kernels", OK, f"built in, for {targets}"))
        devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
        missing = {i: why for i in devices if (why := backend.no_target(i))}
        return [
            *found,
            *(Finding(section, f"cuda kernels on cuda:{i}", NOTE, *_reason(why)) for i, why in missing.items()),
        ]
    wanted = driver_version() is not None
    remedy = "LENS_CUDA=ON pip install . from the checkout; nvcc is fetched where it is missing" if wanted else ""
    return [*found, Finding(section, "cuda kernels", NOTE if wanted else OK, "not built in", remedy)]


def _reason(why: str) -> tuple[str, str]:
    """Detail and remedy of a reason that ends with what to do; the ops run their reference meanwhile."""
    detail, _, remedy = why.partition("; ")
    return f"{detail}: the ops run their PyTorch reference there", remedy


def op_backends(device: torch.device) -> list[Finding]:
    """Which kernel serves each op on ``device``, and why; then what batching does to bits."""
    section = f"Ops on {device.type}"
    found = []
    for op, chosen, reason in ops.report(device.type):
        status = BROKEN if chosen == "none" else NOTE if chosen == "reference" else OK
        found.append(Finding(section, op, status, f"{chosen}: {reason}"))
    if device.type == "cpu":
        detail = "yes, bit for bit: " + (
            "bfloat16 GEMMs row by row, others, attention and decode sample by sample"
            if by_rows()
            else "every GEMM, attention and decode runs sample by sample"
        )
        found.append(Finding(section, "batch invariant", OK, detail))
    else:
        yes, detail = batch_invariance.report(device)
        found.append(Finding(section, "batch invariant", OK if yes else NOTE, detail))
    return found


def attention(device: torch.device) -> list[Finding]:
    """Which library computes attention on a GPU: every candidate, for plain steps, captured and batch-invariant ones, for
    training and its gradients."""
    if device.type != "cuda":
        detail = "torch's flash attention for CPUs, the only candidate here; the others need a CUDA device"
        if attention_cpu.by_amx(torch.empty(0, 2, dtype=torch.bfloat16)):
            detail = f"bfloat16 by lens._C's AMX kernel, else and with gradients by {detail}"
        return [Finding("Attention", "cpu", OK, detail)]
    found = []
    with torch.cuda.device(device):
        calls = {
            "plain steps": attention_choice.released_call(),
            "captured steps": attention_choice.released_call(device_lengths=True),
            "batch-invariant steps": attention_choice.released_call(device_lengths=True, batch_invariant=True),
            "training": attention_choice.released_call(backward=True),
        }
    forced = {False: attention_choice.override.name, True: attention_choice.override_backward.name}
    parts = [(f"Attention for {use}", call, False) for use, call in calls.items()]
    for section, call, backward in [*parts, ("Gradients of attention", calls["training"], True)]:
        for name, chosen, why in attention_choice.report(call, backward):
            status = OK if chosen or not forced[backward] else NOTE
            found.append(Finding(section, name, status, f"{'CHOSEN' if chosen else 'not'}: {why}"))
    return found


def gemms(device: torch.device) -> list[Finding]:
    """Which kernel computes each GEMM of a block of the released model: cuBLASLt's with a row kernel after it, or ours."""
    section = "GEMMs with a row op as epilogue"
    if device.type != "cuda":
        wanted = linear_choice.override.name == "fused"
        detail = "torch's GEMM, sample by sample; GEMMs with a fused epilogue need a CUDA device"
        if by_rows():
            detail = f"bfloat16 without gradients by lens._C's AMX kernel, else {detail}"
        return [Finding(section, "cpu", BROKEN if wanted else OK, "LENS_LINEAR=fused: " * wanted + detail)]
    with torch.cuda.device(device):
        rows = ops.gemms()
    return [Finding(section, name, BROKEN if by == "none" else OK, f"{by}: {why}") for name, by, why in rows]


def _available() -> int | None:
    """Bytes of memory that a process can have without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def memory(device: torch.device) -> list[Finding]:
    """What the released model would peak at under each residency, one 1024x1024 guided picture at a time. On a CPU: of those
    that are a choice there, and of the whole process."""
    section = "Residency of the released model"
    free: int | None
    if device.type == "cuda":
        sizes, names, free = residency.released_sizes(), tuple(residency.PRESETS), torch.cuda.mem_get_info(device)[0]
    else:
        sizes, names, free = residency.released_cpu_sizes(), residency.CPU_NAMES, _available()
    found = []
    for name in names:
        policy = residency.PRESETS[name]
        fits = free is None or residency.fits(sizes, policy, free)
        detail = residency.describe(sizes, policy)
        if free is not None:
            detail += f"; {'fits' if fits else 'does not fit'} {free / 2**30:.1f} GiB free"
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
    return [*found, *packed_text_encoder()] if torch.cuda.is_available() else found


def packed_text_encoder() -> list[Finding]:
    """Whether transformers, where it is asked for, keeps the released text encoder's experts in 4 bits on the GPU: its own
    answer. Our own encoder always does."""
    try:
        why, wanted = mxfp4.why_expanded(), mxfp4.wanted()
    except ImportError:  # transformers is missing, which is reported above
        return []
    if not why:
        return [Finding("Packages", "MXFP4 experts", OK, "stay packed on the GPU, with encoder='transformers', too")]
    remedy = f"pip install {' '.join(map(repr, wanted))}" if wanted else ""
    size = f"{residency.EXPANDED_BYTES / 2**30:.0f} GiB instead of {residency.ENCODER_BYTES / 2**30:.0f}"
    return [
        Finding(
            "Packages",
            "MXFP4 experts",
            NOTE,
            f"with encoder='transformers' alone, expanded to bfloat16, {size}: {why}",
            remedy,
        )
    ]


def _extra_of(marker: str) -> str | None:
    _, found, after = marker.partition("extra ==")
    return after.strip().strip("()").split()[0].strip("\"'") if found else None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
