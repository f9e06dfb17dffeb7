"""What a case is: a stable id, what it times, and the work it prepares on a device.

A case id is never renamed, so that old results stay comparable: "<suite>/<what>/<sizes>/<dtype>[/<pass>]", with
"tiny/" in front where a small stand-in ran through the same code. A subject is one way of doing the work; "ours" comes
first. Another variant (the engine, a new kernel) is one more subject: a name in `Case.subjects`, a call in
`Work.subjects`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OURS = "ours"


class ConstantData(ValueError):
    """An input without variance: library kernels run faster on such data, so its time would be a lie."""


class Disagreement(ValueError):
    """A subject whose result is not the oracle's: not timed."""


class LeftOut(RuntimeError):
    """A case or a subject that this machine cannot run; the message says why."""


@dataclass(frozen=True)
class Subject:
    """One way of doing a case's work.

    call: gets one of `Work.inputs`, returns the tensors that are compared. mode, on a GPU: "graph" replays a captured
    CUDA graph, so that no host time is measured; "stream" calls it as a user would, host gaps included.
    restore: what the comparison changed is put back by it before the timing. timed: where the time is not that of the call:
    makes one and returns seconds. extra_fields: further fields of the row, asked for after the timing.
    """

    call: Callable[..., Any]
    mode: str = "graph"
    grad: bool = False  # records gradients
    restore: Callable[[], Any] | None = None
    timed: Callable[..., float] | None = None
    extra_fields: Callable[[], dict[str, Any]] = dict


@dataclass
class Work:
    """A prepared case.

    inputs: argument tuples that take turns, so that caches do not hold what a call reads. oracle: the same result in
    wider arithmetic. bound: largest relative L2 distance of a subject's result to the oracle's. flops, bytes: what no
    implementation can avoid, by the formulas of `bench.roofline`. data: further tensors that must not be constant.
    select: the part of a result that is compared. left_out: subjects this machine cannot run, with the reason.
    failed: subjects with a wrong result, and ours that did not run, filled by `bench.measure`. more: what else a row
    says, such as {"images": 8}.
    """

    inputs: Sequence[tuple[Any, ...]]
    subjects: dict[str, Subject]
    oracle: Callable[..., Any]
    bound: float
    flops: float
    bytes: float
    data: Sequence[Tensor] = ()
    select: Callable[[Any], Any] = lambda result: result
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    note: str = ""
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """`prepare(device)` makes the work, or raises LeftOut. rounds: at least so many timed rounds in each pass."""

    id: str
    subjects: tuple[str, ...]
    prepare: Callable[[torch.device], Work]
    rounds: int = 5

    @property
    def suite(self) -> str:
        """The first word of the id that is not "tiny"."""
        return self.id.removeprefix("tiny/").split("/")[0]


def tensors(value: Any) -> list[Tensor]:
    """The tensors of a nested tuple, list or dict, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [t for v in value for t in tensors(v)] if isinstance(value, Iterable) and not isinstance(value, str) else []


def refuse_constant(values: Any, where: str) -> None:
    """Raise ConstantData for a floating-point tensor of two or more elements that are all the same, or not finite."""
    for index, t in enumerate(tensors(values)):
        if t.is_floating_point() and t.numel() > 1:
            least, most = (float(v) for v in torch.aminmax(t.detach()))
            if not (math.isfinite(least) and math.isfinite(most)):
                raise ConstantData(f"{where}: tensor {index} {list(t.shape)} holds NaN or infinity")
            if least == most:
                raise ConstantData(
                    f"{where}: tensor {index} {list(t.shape)} is constant ({least:g}): its time would mean nothing"
                )


def distance(ours: Any, oracle: Any) -> float:
    """Largest relative L2 distance |a - b| / |b| over pairs of tensors; infinity where a value is not finite."""
    pairs = list(zip(tensors(ours), tensors(oracle), strict=True))
    if not pairs:
        raise Disagreement("nothing to compare: no tensor in the results")
    worst = 0.0
    for a, b in pairs:
        if a.shape != b.shape:
            raise Disagreement(f"a result has the shape {list(a.shape)}, the oracle's {list(b.shape)}")
        if a.numel():
            a, b = a.detach().to(b.device).double(), b.detach().double()
            norm = float(b.norm())
            relative = float((a - b).norm()) / norm if norm else (0.0 if float(a.norm()) == 0 else math.inf)
            worst = max(worst, relative if math.isfinite(relative) else math.inf)
    return worst


def wider(dtype: torch.dtype) -> torch.dtype:
    """The dtype an oracle computes in: float32 for bfloat16, float64 for float32."""
    return torch.float32 if dtype == torch.bfloat16 else torch.float64


def generator(device: torch.device, *key: object) -> torch.Generator:
    """A generator on the device, seeded by the words of a key: equal keys, equal draws on equal devices."""
    import hashlib

    digest = hashlib.sha256(" ".join(map(str, key)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
