"""The machine card: what must be alike for two results to be compared, what was built, and the state of the device.

identity    device, memory, multiprocessors, power limit, driver, torch, CUDA, threads: compared, unlike ones refused
build       commit, nvcc, kernel configuration, versions: written down, may differ (that is what one compares)
state       clocks, temperature, power, throttle reasons, before and after the run
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import lens
from lens.doctor.ops import report
from lens.ops import backend

ROOT = Path(__file__).parents[1]
UNNAMED = (
    "nvidia",
    "tesla",
    "geforce",
    "rtx",
    "amd",
    "intel",
    "r",
    "tm",
    "cpu",
    "processor",
)  # words that tell no device
NOT_READ = "not read through nvidia-ml-py"


class Incomparable(ValueError):
    """Results of unlike machines or settings: refused, not failed."""


def _output(*command: str) -> str:
    """What a command prints, "" where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The checkout's commit, with "+" where files differ from it; outside of git what BENCH_COMMIT says, or "unknown"."""
    head = _output("git", "rev-parse", "--short=12", "HEAD")
    if not head:
        return os.environ.get("BENCH_COMMIT", "unknown")
    return head + ("+" if _output("git", "status", "--porcelain", "-uno") else "")


@contextmanager
def _nvml(index: int) -> Iterator[tuple[Any, Any]]:
    """(pynvml, handle) of torch's device, found by its UUID or PCI address; ImportError without nvidia-ml-py."""
    import pynvml

    pynvml.nvmlInit()
    try:
        properties = torch.cuda.get_device_properties(index)
        bus = getattr(properties, "pci_bus_id", None)
        for k in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(k)
            uuid = pynvml.nvmlDeviceGetUUID(handle)
            uuid = uuid.decode() if isinstance(uuid, bytes) else uuid
            if str(getattr(properties, "uuid", "")) in uuid or pynvml.nvmlDeviceGetPciInfo(handle).bus == bus:
                yield pynvml, handle
                return
        yield pynvml, pynvml.nvmlDeviceGetHandleByIndex(index)
    finally:
        pynvml.nvmlShutdown()


def _asked(questions: dict[str, Any]) -> dict[str, Any]:
    """The answers; where the driver refuses one, its words."""
    answers = {}
    for name, ask in questions.items():
        try:
            value = ask()
            answers[name] = value.decode() if isinstance(value, bytes) else value
        except Exception as error:  # a virtual machine's driver refuses single questions
            answers[name] = f"not read: {error}"
    return answers


def throttle_reasons(bits: int, names: dict[str, int]) -> list[str]:
    """Names of the set bits, "GpuIdle" and the composite "All" left out: what held the clocks down."""
    return sorted(n for n, bit in names.items() if bit and bit & (bit - 1) == 0 and bits & bit and n != "GpuIdle")


def state(device: torch.device) -> dict[str, Any]:
    """Clocks in MHz, temperature, power in W and throttle reasons of a GPU now; the load of a CPU machine."""
    if device.type != "cuda":
        return {"load_1min": round(os.getloadavg()[0], 2), "cores": os.cpu_count()}
    try:
        with _nvml(device.index or 0) as (nv, handle):
            prefix = "nvmlClocksThrottleReason"
            names = {n.removeprefix(prefix): getattr(nv, n) for n in dir(nv) if n.startswith(prefix)}
            return _asked(
                {
                    "sm_mhz": lambda: nv.nvmlDeviceGetClockInfo(handle, nv.NVML_CLOCK_SM),
                    "memory_mhz": lambda: nv.nvmlDeviceGetClockInfo(handle, nv.NVML_CLOCK_MEM),
                    "temperature": lambda: nv.nvmlDeviceGetTemperature(handle, nv.NVML_TEMPERATURE_GPU),
                    "power_w": lambda: nv.nvmlDeviceGetPowerUsage(handle) / 1e3,
                    "throttled_by": lambda: throttle_reasons(
                        nv.nvmlDeviceGetCurrentClocksThrottleReasons(handle), names
                    ),
                }
            )
    except Exception as error:  # no nvidia-ml-py, or a machine that hides its driver from it
        return {"sm_mhz": f"{NOT_READ}: {error}"}


def _gpu_identity(device: torch.device) -> dict[str, Any]:
    p = torch.cuda.get_device_properties(device)
    found = {
        "device": p.name,
        "memory_gib": round(p.total_memory / 2**30, 1),
        "multiprocessors": p.multi_processor_count,
        "capability": f"{p.major}.{p.minor}",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    try:
        with _nvml(device.index or 0) as (nv, handle):
            return found | _asked(
                {
                    "driver": nv.nvmlSystemGetDriverVersion,
                    "power_limit_w": lambda: nv.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3,
                    "max_sm_mhz": lambda: nv.nvmlDeviceGetMaxClockInfo(handle, nv.NVML_CLOCK_SM),
                    "max_memory_mhz": lambda: nv.nvmlDeviceGetMaxClockInfo(handle, nv.NVML_CLOCK_MEM),
                }
            )
    except Exception as error:  # as in `state`
        return found | {"driver": f"{NOT_READ}: {error}"}


def _cpu_identity() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": backend.isa() if not backend.unavailable("cpu") else "none",
    }


def card(device: torch.device) -> dict[str, Any]:
    """{"identity": ..., "build": ...} of this machine and this checkout."""
    identity = _gpu_identity(device) if device.type == "cuda" else _cpu_identity()
    nvcc = re.search(r"release ([\d.]+)", _output(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc", "--version"))
    build = {
        "lens": lens.__version__,
        "commit": commit(),
        "python": platform.python_version(),
        "nvcc": nvcc[1] if nvcc else "none",
        "kernels": {op: kind for op, kind, _ in report(device.type)},
        "targets": getattr(backend._extension, "cuda_targets", "") if device.type == "cuda" else "",
        "settings": {k: v for k, v in sorted(os.environ.items()) if k.startswith("LENS_") and "DIR" not in k},
    }
    return {"identity": {**identity, "torch": torch.__version__}, "build": build}


def folder_name(identity: dict[str, Any]) -> str:
    """The folder of bench/results a device's results are committed in: "NVIDIA H200" -> "h200"."""
    words = re.findall(r"[a-z0-9]+", str(identity.get("device", "")).lower())
    return "-".join(w for w in words if w not in UNNAMED) or "unknown"


def unlike(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What differs between two identities, in words; empty where they are alike."""
    keys = sorted(before.keys() | after.keys())
    return [f"{k}: {before.get(k)!r} and {after.get(k)!r}" for k in keys if before.get(k) != after.get(k)]


def refuse_unlike(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raise Incomparable where two identities differ."""
    if differences := unlike(before, after):
        raise Incomparable("the machine cards differ in " + "; ".join(differences))
