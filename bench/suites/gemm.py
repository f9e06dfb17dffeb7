"""The model's GEMMs: gemm/<what>/<rows>/<dtype>.

Rows are image rows of one sample or of a guided pair, "+text": with the text stream's own weights on its rows, which is
what a block does. table<steps> is the modulation table of a schedule: 96 projections of `steps` rows. The GEMMs with
the row op behind them are in work/linear.py and come first.

On a CPU the four of a block at 512x512 with 200 text tokens, and all of them ("block"): `ours` is what a step takes, `linear_rows`
for bfloat16 where there is AMX, else `library`: torch's F.linear, which calls oneDNN; `matmul` is its product with the bias added
after, `packed` oneDNN on weights in a layout of its own choice.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lens.cost import gemm_flops, gemm_traffic_bytes
from lens.ops import linear_rows
from lens.ops.linear_rows import available as linear_rows_available

from ..case import OURS, Case, Subject, Work, generator, wider
from ..work import linear
from ..work.scale import Scale

SUBJECTS = (OURS, "matmul")
LIBRARY, PACKED = "library", "packed"
BLOCK = ("qkv", "out", "w13", "w2")
BOUND = {torch.bfloat16: 1e-2, torch.float32: 1e-5}
Layer = tuple[int, int, int, bool]  # rows, inputs, outputs, bias


def layers_of(scale: Scale, what: str, rows: tuple[int, ...]) -> list[Layer]:
    """The GEMMs of one case, one for each stream; "block": of all that a block has."""
    if what == "block":
        return [layer for part in BLOCK for layer in layers_of(scale, part, rows)]
    c = scale.config
    d, f = c.inner_dim, c.mlp_hidden_dim
    sizes = {
        "qkv": (d, 3 * d, True),
        "out": (d, d, True),
        "w13": (d, 2 * f, False),
        "w2": (f, d, False),
        "text_in": (len(c.selected_layer_index) * c.enc_hidden_dim, d, True),
        "image_in": (c.in_channels, d, True),
        "image_out": (d, c.in_channels, True),
        "table": (d, 6 * d, True),
    }
    k, n, bias = sizes[what]
    return [(m, k, n, bias) for m in rows]


def prepare(scale: Scale, what: str, rows: tuple[int, ...], device: torch.device) -> Work:
    """Products of unit gain; as many input sets as exceed the L2 cache, at most eight."""
    dtype, layers = scale.dtype, layers_of(scale, what, rows)
    times = 2 * scale.config.num_layers if what == "table" else 1
    g = generator(device, "gemm", what, *rows)

    def normal(*shape: int, gain: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=g, device=device) * gain).to(dtype)

    weights = [
        [(normal(n, k, gain=1 / math.sqrt(k)), normal(n, gain=0.02) if bias else None) for _ in range(times)]
        for _, k, n, bias in layers
    ]
    size = sum(gemm_traffic_bytes(m, k, n, dtype.itemsize, bias) for m, k, n, bias in layers) * times
    sets = min(8, max(2, math.ceil(200e6 / size))) if device.type == "cuda" else 1
    inputs = [tuple(normal(m, k) for m, k, _, _ in layers) for _ in range(sets)]

    rows_alone = device.type == "cpu" and dtype == torch.bfloat16 and linear_rows_available()
    multiply = linear_rows if rows_alone else F.linear

    def ours(*xs: Tensor) -> list[Tensor]:
        return [multiply(x, w, b) for x, stream in zip(xs, weights) for w, b in stream]

    def library(*xs: Tensor) -> list[Tensor]:
        return [F.linear(x, w, b) for x, stream in zip(xs, weights) for w, b in stream]

    def matmul(*xs: Tensor) -> list[Tensor]:
        results = [(x @ w.t(), b) for x, stream in zip(xs, weights) for w, b in stream]
        return [y if b is None else y + b for y, b in results]

    subjects, left_out = {OURS: Subject(ours), "matmul": Subject(matmul)}, dict[str, str]()
    if rows_alone:
        subjects[LIBRARY] = Subject(library)
    elif device.type == "cpu" and not scale.tiny:
        left_out[LIBRARY] = "it is ours where there is no AMX"
    if device.type == "cpu" and not scale.tiny:
        try:
            ordered = [
                [(torch.ops.mkldnn._reorder_linear_weight(w, m), b) for w, b in stream]
                for (m, *_), stream in zip(layers, weights)
            ]
        except (AttributeError, RuntimeError) as error:  # torch's own, of no stable name
            left_out[PACKED] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        else:

            def packed(*xs: Tensor) -> list[Tensor]:
                call = torch.ops.mkldnn._linear_pointwise
                return [call(x, w, b, "none", [], "") for x, stream in zip(xs, ordered) for w, b in stream]

            subjects[PACKED] = Subject(packed)

    def oracle(*xs: Tensor) -> list[Tensor]:
        wide = wider(dtype)
        return [
            F.linear(x.to(wide), w.to(wide), None if b is None else b.to(wide))
            for x, stream in zip(xs, weights)
            for w, b in stream
        ]

    return Work(
        inputs=inputs,
        subjects=subjects,
        left_out=left_out,
        oracle=oracle,
        bound=BOUND[dtype],
        flops=times * sum(gemm_flops(m, k, n) for m, k, n, _ in layers),
        bytes=size,
        data=[w for stream in weights for w, _ in stream],
    )


def _on_a_cpu(scale: Scale, what: str) -> Case:
    rows = scale.tokens(512), scale.texts[1]
    id = f"gemm/{what}/{rows[0]}+text{rows[1]}/{scale.dtype_name}"
    return Case(id, (*SUBJECTS, LIBRARY, PACKED), lambda device: prepare(scale, what, rows, device))


def cases(scale: Scale, gpu: bool) -> list[Case]:
    """The GEMMs with their row ops; then alone, image rows of a pair and of one sample at the main size."""
    if not gpu and not scale.tiny:
        return [_on_a_cpu(scale, what) for what in ("block", *BLOCK)]
    one, longest = scale.tokens(scale.main), scale.texts[-1]
    rows = [(2 * one, longest), (2 * one,), (one, scale.texts[-2]), (one,)]
    wanted: list[tuple[str, tuple[int, ...], str]] = []
    for what in ("w13", "qkv", "w2", "out"):
        for r in rows:
            wanted.append((what, r, f"{r[0]}" + (f"+text{r[1]}" if len(r) > 1 else "")))
    wanted += [("text_in", (t,), f"text{t}") for t in reversed(scale.texts)]
    wanted += [("table", (s,), f"table{s}") for s in scale.steps.values()]
    wanted += [(what, (r,), str(r)) for what in ("image_in", "image_out") for r in (one, 2 * one)]
    found = linear.cases(scale, gpu)
    for what, r, label in wanted:

        def make(device: torch.device, what: str = what, r: tuple[int, ...] = r) -> Work:
            return prepare(scale, what, r, device)

        found.append(Case(f"{scale.prefix}gemm/{what}/{label}/{scale.dtype_name}", SUBJECTS, make))
    return found
