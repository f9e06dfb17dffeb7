"""Builds csrc/cuda for the host and stands in for the GPU: lens.ops calls, the emulator runs the launchers as they are.

The library is compiled with g++ into build/emulation, one object per source, named by the hash of what goes into it.
`Emulator.launch` replaces `lens.ops.backend.launch`: every tensor is copied into a buffer of its own between two
inaccessible pages, as far off a 16-byte boundary as the tensor is; outputs hold NaN until written. Where the fields of
a kernel's struct lie is asked of the library, so that the two cannot disagree.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import fcntl
import hashlib
import os
import pathlib
import re
import shutil
import struct
import subprocess
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lens.ops import backend

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCE = ROOT / "csrc"
BUILD = ROOT / "build" / "emulation"
# checks that trap: misaligned vector accesses, array bounds (shared memory), integer overflow
FLAGS = [
    "-x", "c++", "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-fno-gnu-unique", "-Wall", "-Wextra", "-Werror",
    "-Wno-unknown-pragmas", "-fsanitize=alignment,bounds,signed-integer-overflow,integer-divide-by-zero,shift",
    "-fsanitize-undefined-trap-on-error", "-DLENS_WITH_CUDA=1", "-mfma",
]  # fmt: skip
# As the device's build does (CMakeLists.txt): a * b + c stays two roundings where the source does not say mul_add, since
# -fmad=false writes mul.rn and add.rn, which the PTX ISA never lets contract; but in attention the compiler contracts what
# it likes, from nothing to everything: test_documented_errors.py tries both ends.
CONTRACTED, PLAIN = "-ffp-contract=fast", "-ffp-contract=off"
CONTRACTED_FOLDERS = ("attention",)
STREAM = 1  # any but the default one


class EmulationError(RuntimeError):
    """A launch that would not have gone well on a device; the message says where and why."""


# ---- building


def _compile(source: pathlib.Path, include: pathlib.Path, key: str, contract: str) -> pathlib.Path:
    """The object of one source, compiled with `include` in place of csrc; `key` names its content."""
    target = BUILD / f"{source.stem}-{key}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.part")
        includes = [f"-I{include}/emulation", f"-I{include}"]
        command = ["g++", *FLAGS, contract, *includes, "-c", str(source), "-o", str(partial)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise AssertionError(f"{source.name} does not compile for the emulator:\n{done.stderr}")
        partial.replace(target)
    return target


def _digest(paths: list[pathlib.Path]) -> str:
    digest = hashlib.sha256(repr((FLAGS, CONTRACTED, PLAIN)).encode())
    for path in sorted(paths):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def build(
    tree: pathlib.Path, only: str = "", probe: pathlib.Path | None = None, contract: str | None = None
) -> pathlib.Path:
    """The library made of tree/cuda and tree/emulation; with `only`, of that launcher and the emulator alone; with
    `probe`, of that source of a test and the emulator. `contract`: of all kernels, instead of what the device's build has."""
    headers = [*tree.rglob("*.h"), *tree.rglob("*.cuh")]
    kernels = [probe] if probe else [*tree.glob(f"cuda/**/{only or '*'}.cu")]
    sources = [*tree.glob("emulation/*.cpp"), *kernels]
    # the emulator itself sees no kernel, so that a mutant's is compiled once
    own = [path for path in headers if path.relative_to(tree).parts[0] != "cuda"]
    common = {"cuda": _digest(headers), "emulation": _digest(own)}

    def contraction(source: pathlib.Path) -> str:
        if contract is not None and source.parent != tree / "emulation":
            return contract
        return CONTRACTED if source.parent.name in CONTRACTED_FOLDERS else PLAIN

    def key(source: pathlib.Path) -> str:
        seen = common["emulation" if source.parent == tree / "emulation" else "cuda"] + contraction(source)
        return hashlib.sha256(seen.encode() + source.read_bytes()).hexdigest()[:16]

    keys = {source: key(source) for source in sources}
    name = probe.stem if probe else only or "all"
    library = BUILD / f"{name}-{hashlib.sha256(''.join(sorted(keys.values())).encode()).hexdigest()[:16]}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with open(BUILD / f"{library.stem}.lock", "w") as lock:  # tests may run in several processes
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
                objects = list(
                    pool.map(lambda source: _compile(source, tree, keys[source], contraction(source)), sources)
                )
            partial = library.with_suffix(f".{os.getpid()}.part")
            # a launcher that is left out stays undefined: it fails when called, not when loaded
            subprocess.run(["g++", "-shared", "-Wl,-z,lazy", "-o", partial, *objects], check=True)
            partial.replace(library)
    return library


def mutant(folder: pathlib.Path, stem: str, file: str, old: str, new: str) -> Emulator:
    """The emulator of one op, bfloat16 alone, with one piece of text in csrc/cuda replaced."""
    tree = folder / "csrc"
    shutil.copytree(SOURCE, tree)

    def replace(name: str, before: str, after: str) -> None:
        path = tree / "cuda" / name
        text = path.read_text()
        assert text.count(before) == 1, f"{name} must hold {before!r} once, holds it {text.count(before)} times"
        path.write_text(text.replace(before, after))

    path = tree / "params" / "common.h"
    for unused in ("kFloat32", "kFloat64"):  # a third of the compile time
        text, count = re.subn(rf"(case DType::{unused}:\s*return )f\(.*?\), true;", r"\1false;", path.read_text())
        assert count == 1, f"common.h must call f for {unused} once, does so {count} times"
        path.write_text(text)
    replace(file, old, new)
    return Emulator(build(tree, stem))


# ---- params structs, as their `fields` tell them (csrc/params)

_FORMATS = {"type": "i", "integer": "q", "number": "d", "reads": "N", "writes": "N"}


class Field(NamedTuple):
    offset: int
    kind: str  # of _FORMATS; a pointer's says whether the kernel reads or writes there


def _layout(library: ctypes.CDLL, kernel: str) -> tuple[int, dict[str, Field]]:
    """Bytes of a kernel's params struct, and its fields by name."""
    tell = getattr(library, f"lens_emulation_layout_{kernel}")
    tell.restype = ctypes.c_char_p
    size, *lines = tell().decode().splitlines()
    fields = {name: Field(int(offset), kind) for name, offset, kind in map(str.split, lines)}
    assert int(size) == 8 * len(fields), f"{kernel}: `fields` leaves out a part of the struct"
    return int(size), fields


# ---- running


def _span(tensor: Tensor) -> int:
    """Bytes from a tensor's first element to the end of its last."""
    if tensor.numel() == 0:
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


ON_CPU = ("linear_rows", "sink_attention")  # kernels without a CUDA form, which serve tensors of the CPU as ever
LAUNCH = backend.launch


class Emulator:
    """One library of emulated launchers; `seed` orders threads and blocks (csrc/emulation/scheduler.h), `errors`, unless 0,
    draws the errors of approximate functions (inexact.h)."""

    def __init__(self, library: pathlib.Path) -> None:
        self.library = ctypes.CDLL(str(library), mode=os.RTLD_LAZY)
        self.library.lens_emulation_allocate.restype = ctypes.c_void_p
        self.library.lens_emulation_allocate.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t]
        self.library.lens_emulation_free.argtypes = [ctypes.c_void_p]
        self.library.lens_emulation_message.restype = ctypes.c_char_p
        self.library.lens_emulation_maps.restype = ctypes.c_char_p
        self.library.lens_emulation_seed.argtypes = [ctypes.c_uint64]
        self.library.lens_emulation_errors.argtypes = [ctypes.c_uint64]
        self.library.lens_emulation_device.argtypes = [ctypes.c_int, ctypes.c_int]
        self.seed = self.errors = 0
        self.multiprocessors, self.major = 3, 9  # few, so that small problems make blocks that take several tiles
        self.calls: list[str] = []

    def launch(self, kernel: str, like: Tensor, dtype: torch.dtype | None = None, **arguments: Any) -> None:
        """In place of backend.launch. EmulationError: the launch failed or wrote where it must not."""
        if kernel in ON_CPU:
            return LAUNCH(kernel, like, dtype, **arguments)
        self.calls.append(kernel)
        size, fields = _layout(self.library, kernel)
        params = ctypes.create_string_buffer(size)
        written = {name for name, field in fields.items() if field.kind == "writes"}
        arguments |= {"dtype": backend.DTYPES[dtype or like.dtype], "stream": STREAM}
        assert set(fields) == set(arguments)

        buffers: dict[str, tuple[int, Tensor]] = {}
        in_place: dict[int, int] = {}
        for name in sorted(arguments, key=lambda name: name not in written):  # outputs first: inputs may be one of them
            value = arguments[name]
            if isinstance(value, Tensor):
                address = in_place.get(value.data_ptr(), 0)
                if not address or not value.numel():
                    address = self.library.lens_emulation_allocate(name.encode(), _span(value), value.data_ptr() % 16)
                    assert address, "out of memory"
                    buffers[name] = address, value
                if name not in written:
                    ctypes.memmove(address, value.data_ptr(), _span(value))
                elif value.numel():
                    in_place[value.data_ptr()] = address
                value = address
            struct.pack_into(_FORMATS[fields[name].kind], params, fields[name].offset, value or 0)
        self.library.lens_emulation_seed(self.seed)
        self.library.lens_emulation_errors(self.errors)
        self.library.lens_emulation_device(self.multiprocessors, self.major)
        error = getattr(self.library, f"lens_emulation_{kernel}")(ctypes.byref(params))
        faults = []
        for name, (address, tensor) in buffers.items():
            if name in written:
                ctypes.memmove(tensor.data_ptr(), address, _span(tensor))
            elif ctypes.string_at(address, _span(tensor)) != ctypes.string_at(tensor.data_ptr(), _span(tensor)):
                faults.append(f"{kernel} wrote into its input {name}")
            if self.library.lens_emulation_free(address):
                faults.append(f"{kernel} wrote beside {name}")
        if error:
            message = self.library.lens_emulation_message().decode() if error < 801 else "not supported"
            raise EmulationError(f"{kernel}: error {error}: {message}")
        if faults:
            raise EmulationError("; ".join(faults))
