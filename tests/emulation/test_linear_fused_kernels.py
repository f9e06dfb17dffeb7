"""The products with an epilogue (csrc/cuda/gemm), run thread by thread on the CPU, against the specification."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lens.ops import reference
from tests.emulation import emulator
from tests.ops.harness import error, offsets_of, same_bits

# seeds: copies and products as late as can be; as drawn, in any order; the newest thread and copy first
SEEDS = (0, 21, 20)
HEAD = 64
Inputs = dict[str, Any]


class Draw:
    """bfloat16 tensors from one seed, on 16-byte boundaries."""

    def __init__(self, seed: int = 0, scale: float = 1.0) -> None:
        self.generator, self.scale = torch.Generator().manual_seed(seed), scale

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=self.generator) * scale).bfloat16()

    def rows(self, lengths: Sequence[int], depth: int) -> Tensor:
        return self(sum(lengths), depth, scale=self.scale)

    def weight(self, columns: int, depth: int) -> Tensor:
        return self(columns, depth, scale=depth**-0.5)


# ---- one dict of a kernel's arguments each, and what reference.py says of it


def linear(rows: int, depth: int, columns: int, bias: bool = True, draw: Draw | None = None) -> Inputs:
    draw = draw or Draw()
    made = {"x": draw.rows([rows], depth), "weight": draw.weight(columns, depth)}
    made |= {"bias": draw(columns) if bias else None, "y": torch.empty(rows, columns, dtype=torch.bfloat16)}
    return {**made, "R": rows, "K": depth, "D": columns, "cluster": 0}


def linear_spec(a: Inputs) -> dict[str, Tensor]:
    return {"y": reference.linear(a["x"], a["weight"], a["bias"])}


def streams(image: Sequence[int], text: Sequence[int], depth: int, columns: int, bias: bool, draw: Draw) -> Inputs:
    """Weights and biases of both streams; a stream without rows holds nothing at all."""
    made: Inputs = {"RI": sum(image), "RT": sum(text), "K": depth, "cluster": 0}
    for name, lengths in (("image", image), ("text", text)):
        there = sum(lengths) > 0
        made[f"{name}_weight"] = draw.weight(columns, depth) if there else None
        made[f"{name}_bias"] = draw(columns) if there and bias else None
    return made


def samples(image: Sequence[int], text: Sequence[int]) -> Inputs:
    return {"image_offsets": offsets_of(list(image)), "text_offsets": offsets_of(list(text)), "B": len(image)}


def qkv(image: Sequence[int], text: Sequence[int], depth: int, heads: int, draw: Draw | None = None) -> Inputs:
    draw = draw or Draw()
    made = {**streams(image, text, depth, 3 * heads * HEAD, True, draw), **samples(image, text)}
    joint = made["RI"] + made["RT"]
    angle = torch.randn(joint, HEAD // 2, generator=draw.generator)
    made |= {"cos": angle.cos(), "sin": angle.sin(), "N": heads, "H": HEAD, "eps": 1e-6}
    for name, lengths in (("image", image), ("text", text)):
        made[f"{name}_x"] = draw.rows(lengths, depth)
        made |= {f"{name}_{part}_weight": draw(HEAD) for part in "qk"}
    return {**made, "qkv": torch.empty(3, joint, heads, HEAD, dtype=torch.bfloat16)}


def qkv_spec(a: Inputs) -> dict[str, Tensor]:
    projected = [
        torch.zeros(0, 3 * a["N"] * HEAD, dtype=a["image_x"].dtype)
        if a[f"{s}_weight"] is None
        else reference.linear(a[f"{s}_x"], a[f"{s}_weight"], a[f"{s}_bias"])
        for s in ("image", "text")
    ]
    norms = [a[f"{s}_{part}_weight"].to(projected[0].dtype) for s in ("image", "text") for part in "qk"]
    angles = [a[name].to(projected[0].dtype) for name in ("cos", "sin")]
    offsets = a["image_offsets"], a["text_offsets"]
    return {"qkv": reference.qk_norm_rope(*projected, *norms, *angles, *offsets, a["eps"])}


def swiglu(image: int, text: int, depth: int, hidden: int, draw: Draw | None = None) -> Inputs:
    draw = draw or Draw()
    made = streams([image], [text], depth, 2 * hidden, False, draw)
    made = {name: value for name, value in made.items() if not name.endswith("bias")}
    for name, rows in (("image", image), ("text", text)):
        made |= {f"{name}_x": draw.rows([rows], depth), f"{name}_y": torch.empty(rows, hidden, dtype=torch.bfloat16)}
    return {**made, "F": hidden}


def swiglu_spec(a: Inputs) -> dict[str, Tensor]:
    there = [s for s in ("image", "text") if a[f"{s}_weight"] is not None]
    results = reference.linear_swiglu([a[f"{s}_x"] for s in there], [a[f"{s}_weight"] for s in there])
    return {f"{s}_y": y for s, y in zip(there, results, strict=True)}


def gated(
    image: Sequence[int], text: Sequence[int], depth: int, width: int, bias: bool = True, in_place: bool = False,
    draw: Draw | None = None,
) -> Inputs:  # fmt: skip
    draw = draw or Draw()
    made = {**streams(image, text, depth, width, bias, draw), **samples(image, text), "D": width}
    for name, lengths in (("image", image), ("text", text)):
        table = draw(len(lengths), 3 * width)
        x = draw.rows(lengths, width)
        made |= {f"{name}_x": x, f"{name}_y": draw.rows(lengths, depth), f"{name}_gate": table[:, width : 2 * width]}
        made |= {f"{name}_gate_stride": 3 * width, f"{name}_out": x if in_place else torch.empty_like(x)}
    return made


def gated_spec(a: Inputs) -> dict[str, Tensor]:
    there = [s for s in ("image", "text") if a[f"{s}_weight"] is not None]
    fields = ("x", "y", "weight", "bias", "gate", "offsets")
    out = reference.linear_gated_residual(*([a[f"{s}_{field}"] for s in there] for field in fields))
    return {f"{s}_out": y for s, y in zip(there, out, strict=True)}


SPECS = {
    "linear": linear_spec,
    "linear_qkv_norm_rope": qkv_spec,
    "linear_swiglu": swiglu_spec,
    "linear_gated_residual": gated_spec,
}


def wide(made: Inputs) -> Inputs:
    floating = {name: x for name, x in made.items() if isinstance(x, Tensor) and x.is_floating_point()}
    return {**made, **{name: x.double() for name, x in floating.items()}}


def run(machine: emulator.Emulator, kernel: str, made: Inputs, seed: int = 0) -> dict[str, Tensor]:
    """The outputs of the kernel, whose arguments stay what they were."""
    copies: dict[int, Tensor] = {}
    fresh = {
        name: copies.setdefault(id(x), x.clone(memory_format=torch.preserve_format)) if isinstance(x, Tensor) else x
        for name, x in made.items()
    }
    for name, x in made.items():  # slices of a table stay slices
        if isinstance(x, Tensor) and x.dim() and not x.is_contiguous():
            fresh[name] = x
    machine.seed = seed
    machine.launch(kernel, torch.empty(0, dtype=torch.bfloat16), **fresh)
    return {name: fresh[name] for name in SPECS[kernel](made)}


def against_spec(machine: emulator.Emulator, kernel: str, made: Inputs, seeds: Sequence[int] = SEEDS) -> None:
    """Error against float64 at most twice the spec's own in bfloat16, plus one rounding; the same bits in any order."""
    exact = SPECS[kernel](wide(made))
    spec = {name: x.bfloat16() for name, x in SPECS[kernel](made).items()}
    first: dict[str, Tensor] = {}
    for seed in seeds:
        for name, got in run(machine, kernel, made, seed).items():
            scale = exact[name].abs().max().item() if got.numel() else 0.0
            allowed = 2 * error(spec[name], exact[name]) + torch.finfo(torch.bfloat16).eps * scale
            assert got.isfinite().all(), (name, seed)
            assert error(got, exact[name]) <= allowed, f"{name}, seed {seed}: {error(got, exact[name])} > {allowed}"
            assert same_bits(got, first.setdefault(name, got)), f"{name}: other bits with seed {seed}"


# ---- shapes


def test_one_tile(emulated):
    against_spec(emulated, "linear", linear(128, 64, 128))


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
@pytest.mark.parametrize(("depth", "columns", "bias"), [(64, 64, True), (192, 192, False)])
def test_linear(emulated, rows, depth, columns, bias):
    against_spec(emulated, "linear", linear(rows, depth, columns, bias))


def test_linear_goes_round_the_ring(emulated):
    """More steps than stages, and a step count that leaves tiles at different stages."""
    against_spec(emulated, "linear", linear(130, 64 * 11, 192))


HEADS = {
    "one row, one head": ([1], [0], 64, 1),
    "63 and text": ([63], [2], 64, 1),
    "64, then 65 of text": ([64], [65], 128, 1),
    "three samples": ([65, 0, 7], [3, 40, 0], 64, 2),
    "200 rows": ([200], [0], 64, 2),
    "text alone": ([0, 0], [5, 30], 64, 1),
    "parts that share a tile": ([20], [4], 64, 4),
}


@pytest.mark.parametrize("case", HEADS)
def test_qkv(emulated, case):
    against_spec(emulated, "linear_qkv_norm_rope", qkv(*HEADS[case]))


@pytest.mark.parametrize(
    "case", [(1, 0, 64, 32), (63, 65, 64, 96), (64, 1, 128, 128), (200, 31, 64, 160), (0, 9, 64, 64)]
)
def test_swiglu(emulated, case):
    against_spec(emulated, "linear_swiglu", swiglu(*case))


GATED = {
    "one row": ([1], [0], 64, 64),
    "63, 65": ([63], [65], 64, 192),
    "ragged samples": ([60, 0, 5, 7], [3, 2, 0, 70], 128, 256),
    "200 rows": ([200], [0], 64, 64),
    "text alone": ([0], [64], 64, 64),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", GATED)
def test_gated_residual(emulated, case, in_place):
    against_spec(emulated, "linear_gated_residual", gated(*GATED[case], bias=not in_place, in_place=in_place))


@pytest.mark.parametrize("multiprocessors", [1, 2, 100])
def test_tiles_of_a_persistent_block(emulated, monkeypatch, multiprocessors):
    """Bands of tiles, both streams, blocks that take many tiles and blocks that take one: the same bits."""
    monkeypatch.setattr(emulated, "multiprocessors", multiprocessors)
    against_spec(emulated, "linear_gated_residual", gated([300], [140], 64, 384), seeds=(0, 21))


@pytest.mark.parametrize(
    ("image", "text", "columns", "blocks"),
    # 128 x 256 or 128 x 192; 192 x 192 or 128 x 192; 128 x 224, whose last columns are not there, or 128 x 192
    [(70, 20, 256, (3, 4)), (180, 0, 192, (1, 2)), (70, 0, 640, (3, 4))],
    ids=["width", "height", "ragged"],
)
def test_shape_of_the_tiles_changes_no_bits(emulated, monkeypatch, image, text, columns, blocks):
    """The number of multiprocessors decides which shape is quickest."""
    made = {**gated([image], [text], 128, columns), "cluster": 1}
    results = []
    for count in blocks:
        monkeypatch.setattr(emulated, "multiprocessors", count)
        against_spec(emulated, "linear_gated_residual", made, seeds=(0, 21))
        results.append(run(emulated, "linear_gated_residual", made))
    for name, x in results[0].items():
        assert same_bits(x, results[1][name]), name


def test_more_row_tiles_than_a_band(emulated):
    against_spec(emulated, "linear", linear(128 * 17 + 1, 64, 64), seeds=(21,))


# ---- values


@pytest.mark.parametrize("scale", [6e4, 1e-30])
def test_extreme_values(emulated, scale):
    """Beyond what float16 holds, and squares below the smallest float."""
    draw = Draw(3, scale)
    against_spec(emulated, "linear_qkv_norm_rope", qkv([33], [9], 64, 1, draw), seeds=(0,))
    against_spec(emulated, "linear_swiglu", swiglu(33, 9, 64, 32, draw), seeds=(0,))
    against_spec(emulated, "linear_gated_residual", gated([33], [9], 64, 64, draw=draw), seeds=(0,))


def test_zero_rows_are_not_divided_by_zero(emulated):
    made = qkv([20], [3], 64, 1)
    made["image_x"].zero_()
    made["image_bias"].zero_()
    against_spec(emulated, "linear_qkv_norm_rope", made, seeds=(0,))


def test_hot_channel(emulated):
    """One input channel a thousand times the others."""
    made = swiglu(40, 0, 128, 64)
    made["image_x"][:, 77] *= 1000
    against_spec(emulated, "linear_swiglu", made, seeds=(0,))


def test_rows_do_not_see_each_other(emulated):
    """A sample's rows have the same bits alone, behind others, and beside a stream of text."""
    both = gated([70, 33], [20, 11], 128, 192)
    whole = run(emulated, "linear_gated_residual", both)
    rows = slice(70, 103)
    alone = {
        **both, "RI": 33, "RT": 0, "B": 1, "image_offsets": offsets_of([33]), "text_offsets": offsets_of([0]),
        **{f"image_{name}": both[f"image_{name}"][rows].clone() for name in ("x", "y", "out")},
        **{f"text_{name}": both[f"text_{name}"][:0].clone() for name in ("x", "y", "out")},
        "image_gate": both["image_gate"][1:].clone(), "image_gate_stride": 192, "text_weight": None,
    }  # fmt: skip
    emulated.seed = 21
    emulated.launch("linear_gated_residual", both["image_x"], **alone)
    assert same_bits(alone["image_out"], whole["image_out"][rows])


def test_no_rows(emulated):
    """Nothing to do is done without a launch."""
    made = gated([0, 0], [0, 0], 64, 64)
    assert run(emulated, "linear_gated_residual", made) == {}


# ---- refusals


def _other_dtype(machine: emulator.Emulator) -> None:
    machine.launch("linear", torch.empty(0), **linear(5, 64, 64))


def _other_device(machine: emulator.Emulator) -> None:
    machine.major = 8
    run(machine, "linear", linear(5, 64, 64))


def _other_head(machine: emulator.Emulator) -> None:
    run(machine, "linear_qkv_norm_rope", {**qkv([5], [0], 64, 2), "N": 4, "H": 32})


def _odd_gate(machine: emulator.Emulator) -> None:
    run(machine, "linear_gated_residual", {**gated([5], [0], 64, 64), "image_gate_stride": 196})


def _misaligned(kernel: str, name: str, made: Inputs) -> Callable[[emulator.Emulator], None]:
    """The launch with one argument 8 bytes off."""
    x = made[name]
    shifted = x.new_zeros(x.numel() + 8 // x.element_size())[8 // x.element_size() :]
    return lambda machine: machine.launch(kernel, x.new_empty(0, dtype=torch.bfloat16), **{**made, name: shifted})


@pytest.mark.parametrize(
    "call",
    [
        _other_dtype,
        _other_device,
        _other_head,
        _odd_gate,
        _misaligned("linear", "y", linear(5, 64, 64)),
        _misaligned("linear", "bias", linear(5, 64, 64)),
        _misaligned("linear_qkv_norm_rope", "cos", qkv([5], [0], 64, 1)),
        _misaligned("linear_qkv_norm_rope", "text_k_weight", qkv([5], [2], 64, 1)),
        _misaligned("linear_gated_residual", "text_bias", gated([5], [2], 64, 64)),
        _misaligned("linear_gated_residual", "image_gate", gated([5], [0], 64, 64)),
        lambda machine: run(machine, "linear", linear(5, 96, 64)),
        lambda machine: run(machine, "linear", linear(5, 64, 96)),
        lambda machine: run(machine, "linear_swiglu", swiglu(5, 0, 64, 48)),
    ],
    ids=["dtype", "device", "head", "gate stride", "y", "bias", "cos", "norm", "residual bias", "gate", "K", "D", "F"],
)
def test_refusals(emulated, monkeypatch, call):
    """What the kernels do not serve is an error of its own, not a wrong answer."""
    monkeypatch.setattr(emulated, "major", 9)
    with pytest.raises(emulator.EmulationError, match="error 801"):
        call(emulated)
