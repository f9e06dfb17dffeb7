"""The products with an epilogue (csrc/cuda/gemm) on a device of compute capability 9.0: one tile first, then all shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lens.ops import backend
from tests.emulation import test_linear_fused_kernels as kernels
from tests.emulation.test_linear_fused_kernels import SPECS, Draw, Inputs
from tests.ops.harness import error, same_bits

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
WIDTH, HIDDEN, HEADS = 1536, 4096, 24  # the released model's


@pytest.fixture(autouse=True)
def hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the device is no sm_90")
    if why := backend.without("linear"):
        pytest.fail(why)


OUTPUTS = {
    "linear": ("y",),
    "linear_qkv_norm_rope": ("qkv",),
    "linear_swiglu": ("image_y", "text_y"),
    "linear_gated_residual": ("image_out", "text_out"),
}


def on_device(made: Inputs) -> Inputs:
    """The arguments on the device; slices of a table stay slices, an output that is an input stays one."""
    placed: dict[int, Tensor] = {}
    for x in made.values():
        if isinstance(x, Tensor) and id(x) not in placed:
            if x.is_contiguous():
                placed[id(x)] = x.to(DEVICE, copy=True)
            else:
                table = torch.zeros(x.shape[0], x.stride(0), dtype=x.dtype, device=DEVICE)
                placed[id(x)] = table[:, : x.shape[1]].copy_(x)
    return {name: placed[id(x)] if isinstance(x, Tensor) else x for name, x in made.items()}


def launch(kernel: str, made: Inputs) -> dict[str, Tensor]:
    """The outputs, NaN before the kernel writes them."""
    for name in OUTPUTS[kernel]:
        if sum(made[name] is x for x in made.values()) == 1:
            made[name].fill_(torch.nan)
    backend.launch(kernel, made[OUTPUTS[kernel][0]], **made)
    return {name: made[name] for name in OUTPUTS[kernel]}


def against_spec(kernel: str, made: Inputs) -> None:
    """Error against float64, computed on the device, at most twice the spec's own in bfloat16, plus one rounding."""
    moved = on_device(made)
    exact = SPECS[kernel](kernels.wide(moved))
    spec = {name: x.bfloat16() for name, x in SPECS[kernel](moved).items()}
    got = launch(kernel, moved)
    for name, value in exact.items():
        assert got[name].isfinite().all(), name
        allowed = 2 * error(spec[name], value) + 2**-7 * value.abs().max().item()
        assert error(got[name], value) <= allowed, f"{name}: {error(got[name], value)} > {allowed}"


# ---- one tile, then what is ragged: emulated shapes, now by the hardware


@pytest.mark.parametrize("cluster", [1, 2])
def test_one_tile(cluster):
    """Row r of x is one of the unit vectors: what comes out names the place it was read from. Of a block, of a cluster."""
    made = {**kernels.linear(128 * cluster, 64, 128, bias=False), "cluster": cluster}
    made["x"] = torch.eye(64).repeat(2 * cluster, 1).bfloat16()
    got = launch("linear", on_device(made))["y"]
    assert same_bits(got.cpu(), made["weight"].T.repeat(2 * cluster, 1))


@pytest.mark.parametrize("rows", [1, 129, 300])
def test_ragged_rows_of_a_cluster(rows):
    """One row, an odd number of row tiles."""
    against_spec("linear", {**kernels.linear(rows, 192, 192), "cluster": 2})


def test_one_tile_of_random_numbers():
    against_spec("linear", {**kernels.linear(128, 64, 128), "cluster": 1})


@pytest.mark.parametrize("rows", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("columns", [64, 192, 320])
def test_ragged_rows(rows, columns):
    against_spec("linear", kernels.linear(rows, 192, columns))


@pytest.mark.parametrize("cluster", [1, 2])
def test_narrow_shapes_of_every_epilogue(cluster):
    """Small enough for the sanitizer: both streams, one head, one tile each; two row tiles. Of a block, of a cluster."""
    against_spec("linear", {**kernels.linear(70, 128, 64), "cluster": cluster})
    against_spec("linear", {**kernels.linear(200, 64 * 9, 64), "cluster": cluster})
    against_spec("linear_qkv_norm_rope", {**kernels.qkv([20, 9], [3, 40], 64, 1), "cluster": cluster})
    against_spec("linear_swiglu", {**kernels.swiglu(20, 3, 64, 64), "cluster": cluster})
    against_spec("linear_gated_residual", {**kernels.gated([20, 9], [3, 40], 64, 64), "cluster": cluster})


@pytest.mark.parametrize("case", kernels.HEADS)
def test_ragged_qkv(case):
    against_spec("linear_qkv_norm_rope", kernels.qkv(*kernels.HEADS[case]))


@pytest.mark.parametrize(
    "case", [(1, 0, 64, 32), (63, 65, 64, 96), (64, 1, 128, 128), (200, 31, 64, 160), (0, 9, 64, 64)]
)
def test_ragged_swiglu(case):
    against_spec("linear_swiglu", kernels.swiglu(*case))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("case", kernels.GATED)
def test_ragged_gated_residual(case, in_place):
    against_spec("linear_gated_residual", kernels.gated(*kernels.GATED[case], in_place=in_place))


# ---- the released model's shapes

SHAPES = {
    "qkv": ("linear_qkv_norm_rope", lambda image, text: kernels.qkv(image, text, WIDTH, HEADS)),
    "w13": ("linear_swiglu", lambda image, text: kernels.swiglu(sum(image), sum(text), WIDTH, HIDDEN)),
    "out": ("linear_gated_residual", lambda image, text: kernels.gated(image, text, WIDTH, WIDTH)),
    "w2": ("linear_gated_residual", lambda image, text: kernels.gated(image, text, HIDDEN, WIDTH, bias=False)),
}
LENGTHS = {
    "pair": ([4096, 4096], [415, 0]),  # a guided pair at 1024x1024
    "one": ([4096], [200]),
    "1440": ([8100], [77]),
    "mixed": ([4096, 1024, 2304], [1, 415, 64]),
    "no text": ([4096], [0]),
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("product", SHAPES)
def test_released_shapes(product, lengths):
    kernel, make = SHAPES[product]
    against_spec(kernel, make(*LENGTHS[lengths]))


@pytest.mark.parametrize(("rows", "depth", "columns"), [(8192, 128, WIDTH), (8192, WIDTH, 128), (415, 11520, WIDTH)])
def test_released_ends(rows, depth, columns):
    against_spec("linear", kernels.linear(rows, depth, columns))


@pytest.mark.parametrize("product", SHAPES)
def test_same_bits_a_hundred_times(product):
    kernel, make = SHAPES[product]
    made = on_device(make(*LENGTHS["pair"]))
    first = {name: x.clone() for name, x in launch(kernel, made).items()}
    for _ in range(99):
        for name, x in launch(kernel, made).items():
            assert same_bits(x, first[name]), name


@pytest.mark.parametrize("product", SHAPES)
def test_rows_do_not_depend_on_other_rows(product):
    """A sample's image rows have the same bits alone and before another sample's."""
    kernel, make = SHAPES[product]
    both = on_device(make([700, 900], [31, 5]))
    alone = on_device(make([700], [31]))
    for name, x in alone.items():
        if isinstance(x, Tensor) and not name.endswith("offsets") and name not in OUTPUTS[kernel]:
            alone[name] = both[name][: x.shape[0]]
    whole, part = launch(kernel, both)[OUTPUTS[kernel][0]], launch(kernel, alone)[OUTPUTS[kernel][0]]
    if kernel == "linear_qkv_norm_rope":  # joint layout: the first sample's image rows come first
        whole, part = whole.transpose(0, 1), part.transpose(0, 1)
    assert same_bits(part[:700], whole[:700])


@pytest.mark.parametrize("lengths", ["pair", "one"])
@pytest.mark.parametrize("product", SHAPES)
def test_clusters_change_no_bits(product, lengths):
    """Blocks that copy alone, and twos that copy halves for both, a hundred times."""
    kernel, make = SHAPES[product]
    made = on_device(make(*LENGTHS[lengths]))
    alone = {name: x.clone() for name, x in launch(kernel, {**made, "cluster": 1}).items()}
    for _ in range(100):
        for name, x in launch(kernel, {**made, "cluster": 2}).items():
            assert same_bits(x, alone[name]), name


def test_shape_of_the_tiles_changes_no_bits():
    """Blocks alone on 132 multiprocessors: 4,296 rows take tiles of 128 x 224, 8,607 of 192 x 192; the same bits."""
    both = {**on_device(kernels.gated([4096, 4096], [200, 215], WIDTH, WIDTH)), "cluster": 1}
    alone = {**on_device(kernels.gated([4096], [200], WIDTH, WIDTH)), "cluster": 1}
    for name, x in alone.items():
        if isinstance(x, Tensor) and not name.endswith("offsets") and not name.endswith("_out"):
            alone[name] = both[name][: x.shape[0]]
    whole, part = (launch("linear_gated_residual", made) for made in (both, alone))
    for name, x in part.items():
        assert same_bits(x, whole[name][: x.shape[0]]), name


def test_extreme_values():
    """Beyond what float16 holds."""
    draw = Draw(3, 6e4)
    against_spec("linear_qkv_norm_rope", kernels.qkv([300], [9], WIDTH, HEADS, draw))
    against_spec("linear_swiglu", kernels.swiglu(300, 9, WIDTH, HIDDEN, draw))
