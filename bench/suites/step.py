"""One denoise step: latents in, latents out, guidance and Euler included; a guided pair, a single call, or one of Turbo's
batches.

step/<side>/<cfg | single | b4 | b8>/text<tokens>/<dtype>. Text projection and the modulation table are made before, where
a subject can (ours, exact); the reference computes both at every step, as it does. `ours_batch_invariant` is ours under
batch_invariant: the ratio of both is its price, which `python -m bench tables` takes from the cases that
`lens.engine.batch_invariance` names.
"""

from __future__ import annotations

import torch

from lens.cost import step_flops, step_traffic_bytes

from ..case import OURS, Case, Subject, Work
from ..work.denoiser import STEP_BOUND, DenoiserSetup, checked
from ..work.scale import Scale

INVARIANT = "ours_batch_invariant"
SUBJECTS = (OURS, INVARIANT, "ours_op_by_op", "exact_compiled", "reference_eager", "reference_compiled")
PRICED = SUBJECTS[:2]  # of a batch
SETS = 2
INDEX = 1  # which step of the schedule; they all cost the same


def prepare(scale: Scale, size: int, guided: bool, text: int, device: torch.device, batch: int = 1) -> Work:
    """The subjects of one size and text length on one model."""
    d = DenoiserSetup(scale, device, scale.sizes[size], text, guided, batch=batch)
    index = min(INDEX, d.steps - 1)
    inputs = d.inputs(SETS)
    flops = step_flops(scale.config, d.images, d.texts)
    return Work(
        inputs=inputs,
        subjects={
            OURS: Subject(
                d.engine(index), mode="stream", extra_fields=d.fields_of_step(False)
            ),  # it replays its own graph
            INVARIANT: Subject(d.engine(index, invariant=True), mode="stream", extra_fields=d.fields_of_step(True)),
            "ours_op_by_op": Subject(d.ours(index), mode="stream"),
            "exact_compiled": Subject(d.exact(index)),
            "reference_eager": Subject(d.reference(index), mode="stream"),
            "reference_compiled": Subject(d.reference(index, compile=True), mode="stream"),
        },
        oracle=lambda *arguments: d.reference(index, wide=True)(*arguments),
        bound=STEP_BOUND[scale.dtype],
        flops=sum(flops.values()),
        bytes=step_traffic_bytes(scale.config, d.images, d.texts, scale.dtype.itemsize),
        data=checked(inputs, d.model),
        note=f"{flops['gemm'] / 1e12:.4g} TFLOP in GEMMs, {flops['attention'] / 1e12:.4g} in attention",
    )


def cases(scale: Scale, gpu: bool) -> list[Case]:
    """The headline first: the main size with guidance and the longest text; batches last."""
    if not gpu and not scale.tiny:
        return []  # 34 TFLOP a call: not for a CPU
    sizes = sorted(scale.sizes, key=lambda size: (size != scale.main, size))
    found = []
    for size in sizes:
        for kind in ("cfg", "single"):
            for text in sorted(scale.texts, reverse=True):

                def make(device: torch.device, size: int = size, kind: str = kind, text: int = text) -> Work:
                    return prepare(scale, size, kind == "cfg", text, device)

                found.append(Case(f"{scale.prefix}step/{size}/{kind}/text{text}/{scale.dtype_name}", SUBJECTS, make))
    text = scale.texts[-2]
    for batch in (4, 8):

        def many(device: torch.device, batch: int = batch) -> Work:
            return prepare(scale, scale.main, False, text, device, batch)

        found.append(Case(f"{scale.prefix}step/{scale.main}/b{batch}/text{text}/{scale.dtype_name}", PRICED, many))
    return found
