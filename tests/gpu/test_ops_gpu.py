"""The CUDA kernels on a device, against the specification computed on the CPU: forward, backward, bits."""

import pytest
import torch
from torch import Tensor

from lens import ops
from lens.ops import backend
from tests.ops import (
    harness,
    test_gated_residual,
    test_gated_residual_norm_modulate,
    test_guidance_step,
    test_pack_tokens,
    test_qk_norm_rope,
    test_rms_norm_modulate,
    test_swiglu,
)
from tests.ops.harness import Inputs, offsets_of, same_bits

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = pytest.mark.parametrize("dtype", harness.DTYPES, ids=["fp32", "bf16", "fp64"])
ROW_OPS = {
    "rms_norm_modulate": test_rms_norm_modulate.inputs,
    "gated_residual": test_gated_residual.inputs,
    "gated_residual_norm_modulate": test_gated_residual_norm_modulate.inputs,
}
ROWS = {
    "ragged": ([1, 33, 0, 64, 31, 2], 1536),
    "many samples": ([17] * 70, 256),
    "odd": ([300, 1, 33], 341),
    "narrow": ([5], 7),
    "no rows": ([0, 0], 16),
    "no samples": ([], 16),
    "production": ([4096, 4096], 1536),
}


def cases(named: dict, *large: str) -> list:
    """The cases, those whose reference takes the CPU seconds marked as large: they run after everything else."""
    marks = {name: pytest.mark.large if name in large else () for name in named}
    return [pytest.param(case, id=name, marks=marks[name]) for name, case in named.items()]


def placed(tensor: Tensor, shift: int) -> Tensor:
    """On the device, `shift` elements off a 16-byte boundary; rows that lay apart still do. Differentiable."""
    moved = tensor.to(DEVICE)
    if tensor.dim() == 2 and shift and tensor.is_floating_point():
        return torch.nn.functional.pad(moved, (shift, 3))[:, shift : shift + tensor.shape[1]]
    return moved


def on_device(op: str, shift: int = 0):
    """The op with its tensors on the device and its results back on the CPU; autograd passes through both copies."""

    def call(**inputs):
        strided = ("scale", "shift", "gate")
        moved = {
            name: placed(value, shift if name in strided else 0) if isinstance(value, Tensor) else value
            for name, value in inputs.items()
        }
        with backend.use("compiled"):
            outputs = getattr(ops, op)(**moved)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            return tuple(output.cpu() for output in outputs)

    return call


def results(call, inputs: Inputs) -> dict[str, Tensor]:
    with backend.use("compiled"):  # the backward kernels are chosen when they run
        return harness.results(call, inputs)


def against_spec(op: str, inputs: Inputs, dtype: torch.dtype, shift: int = 0) -> None:
    """As harness.against_spec, by a limit that knows the condition: a device rounds otherwise than this CPU."""
    inputs = harness.cast(inputs, dtype)
    harness.within_limits(op, inputs, dtype, results(on_device(op, shift), inputs), conditioned=True)


@DTYPES
@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("case", cases(ROWS, "production"))
@pytest.mark.parametrize("op", ROW_OPS)
def test_row_ops(op, case, shift, dtype):
    against_spec(op, ROW_OPS[op](*case), dtype, shift)


SWIGLU = [(45, 341), (3, 7), (0, 341), (8192, 4096)]


@DTYPES
@pytest.mark.parametrize("shape", cases({str(s): s for s in SWIGLU}, str(SWIGLU[-1])))
def test_swiglu_rows(shape, dtype):
    against_spec("swiglu", test_swiglu.inputs(*shape), dtype)


HEADS = {
    **test_qk_norm_rope.CASES,
    "released": ([4096, 4096], [415, 0], 24, 64),
    "wide head": ([20, 1], [1, 1], 2, 272),
    "many samples": ([9] * 40, [0, 5] * 20, 2, 64),
}


@DTYPES
@pytest.mark.parametrize("case", cases(HEADS, "released"))
def test_heads(case, dtype):
    against_spec("qk_norm_rope", test_qk_norm_rope.inputs(*case), dtype)


@DTYPES
@pytest.mark.parametrize(("guidance", "both"), [(5.0, True), (1.0, False)])
@pytest.mark.parametrize(("lengths", "channels"), [([4096, 0, 4095], 128), ([7], 7), ([20, 1], 300)])
def test_guidance(lengths, channels, guidance, both, dtype):
    made = test_guidance_step.cast(test_guidance_step.inputs(lengths, channels, guidance, both), dtype)
    exact = ops.reference.guidance_step(**test_guidance_step.cast(made, torch.float64))
    spec = ops.reference.guidance_step(**made)
    (got,) = on_device("guidance_step")(**made)
    rounding = torch.finfo(got.dtype).eps * exact.abs().max().item() * (32 if dtype == torch.float64 else 1)
    assert harness.error(got, exact) <= 2 * harness.error(spec, exact) + rounding


@DTYPES
@pytest.mark.parametrize("case", test_pack_tokens.CASES)
def test_pack(case, dtype):
    lengths, length, channels = test_pack_tokens.CASES[case]
    x = torch.randn(len(lengths), length, channels).to(dtype)
    rows = torch.tensor([b * length + j for b, n in enumerate(lengths) for j in range(n)], dtype=torch.int64)
    (packed,) = on_device("pack_tokens")(x=x, rows=rows)
    (padded,) = on_device("unpack_tokens")(packed=packed, rows=rows, batch=len(lengths), length=length)
    assert same_bits(packed, ops.reference.pack_tokens(x, rows))
    assert same_bits(padded, ops.reference.unpack_tokens(packed, rows, len(lengths), length))


SAMPLES = {
    **{op: make([3000, 0, 333, 1], 1536) for op, make in ROW_OPS.items()},
    "swiglu": test_swiglu.inputs(3000, 4096),
    "qk_norm_rope": test_qk_norm_rope.inputs([1000, 333], [100, 0], 24, 64),
}


@pytest.mark.parametrize("op", SAMPLES)
def test_same_bits_run_after_run(op):
    made = harness.cast(SAMPLES[op], torch.bfloat16)
    first = results(on_device(op), made)
    for _ in range(3):
        for part, value in results(on_device(op), made).items():
            assert same_bits(value, first[part]), part


@pytest.mark.parametrize("op", ROW_OPS)
def test_bits_do_not_depend_on_batch_or_address(op):
    """A sample alone, with its modulation off the 16-byte grid, has the bits it has in its batch."""
    made = harness.cast(SAMPLES[op], torch.bfloat16)
    whole, offsets = results(on_device(op), made), made["offsets"].tolist()
    for b in (0, 2, 3):
        rows = slice(offsets[b], offsets[b + 1])
        alone = {name: value.detach() for name, value in made.items()}
        alone |= {name: alone[name][rows].clone() for name in ("x", "y") if name in made}
        alone |= {name: alone[name][b : b + 1].clone() for name in ("gate", "scale", "shift") if name in made}
        alone["offsets"] = offsets_of([offsets[b + 1] - offsets[b]])
        for part, value in results(on_device(op, shift=1), alone).items():
            assert same_bits(value, whole[part][rows]), (part, b)


def test_more_elements_than_an_int_counts():
    """2^31 elements: the last rows equal the same rows alone."""
    rows, width = 1_400_000, 1536
    if torch.cuda.mem_get_info()[0] < 12 << 30:
        pytest.skip("needs 12 GiB of free device memory")
    x = torch.randn(64, width, device=DEVICE, dtype=torch.bfloat16).repeat(rows // 64, 1)
    weight, scale, shift = torch.randn(3, 1, width, device=DEVICE, dtype=torch.bfloat16)
    with backend.use("compiled"), torch.no_grad():
        whole = ops.rms_norm_modulate(x, weight[0], scale, shift, offsets_of([len(x)]).to(DEVICE))
        tail = ops.rms_norm_modulate(x[-64:].clone(), weight[0], scale, shift, offsets_of([64]).to(DEVICE))
    assert torch.equal(whole[-64:], tail)


def test_launches_can_be_captured():
    """A CUDA graph of a forward op on a side stream replays with new contents: no allocation or wait in a launcher."""
    made = {n: v.detach().to(DEVICE) for n, v in harness.cast(SAMPLES["rms_norm_modulate"], torch.bfloat16).items()}
    with backend.use("compiled"), torch.no_grad():
        ops.rms_norm_modulate(**made)  # loads the kernel, which capture forbids
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = ops.rms_norm_modulate(**made)
        made["x"].copy_(torch.randn_like(made["x"]))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, ops.rms_norm_modulate(**made))
