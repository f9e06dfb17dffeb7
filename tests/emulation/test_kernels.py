"""The CUDA kernels themselves, run thread by thread on the CPU, against the specification."""

import pytest
import torch

from lens import ops
from lens.ops import backend
from tests.ops import (
    harness,
    test_gated_residual,
    test_gated_residual_norm_modulate,
    test_group_norm_silu,
    test_guidance_step,
    test_pack_tokens,
    test_qk_norm_rope,
    test_rms_norm_modulate,
    test_swiglu,
)
from tests.ops.harness import Inputs, compiled, offsets_of, same_bits

# orders in which threads and blocks take their turn: warps run ahead of each other; any thread may be next
SEED, OTHER_SEED = 20, 21
ROW_OPS = {
    "rms_norm_modulate": test_rms_norm_modulate.inputs,
    "gated_residual": test_gated_residual.inputs,
    "gated_residual_norm_modulate": test_gated_residual_norm_modulate.inputs,
}
# row lengths of the samples, width; production rows are few, because every thread of them runs in turn
ROWS = {
    "production": ([33, 7], 1536),
    "five samples": ([1, 33, 0, 40, 2], 64),
    "many samples": ([1] * 40 + [0, 2], 24),
    "odd": ([3, 34], 341),
    "narrow": ([5], 7),
    "wide": ([2], 0),  # more than one chunk per thread in backward: by dtype
    "cached": ([3], 640),
    "no rows": ([0, 0], 16),
    "no samples": ([], 16),
}


def aligned(made: Inputs) -> Inputs:
    """Scale, shift and gate as slices of one table whose rows start on 16-byte boundaries, as the model has them."""
    names = [name for name in ("gate", "scale", "shift") if name in made]
    table = torch.cat([made[name].detach() for name in names], 1)
    width = table.shape[1] // len(names)
    slices = {name: table[:, i * width :][:, :width].requires_grad_() for i, name in enumerate(names)}
    return {**made, **slices}


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("case", ROWS)
@pytest.mark.parametrize("op", ROW_OPS)
def test_row_ops(emulated, op, case, dtype):
    """Forward and every gradient; vector accesses where the width allows them, then element by element."""
    lengths, width = ROWS[case]
    if case == "wide":
        width = {torch.float32: 2880, torch.bfloat16: 3500, torch.float64: 1000}[dtype]
    made = ROW_OPS[op](lengths, width)
    emulated.seed = SEED
    harness.against_spec(op, aligned(made), dtype, None)
    emulated.seed = OTHER_SEED
    if case != "production":
        harness.against_spec(op, made, dtype, None)


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("case", [(3, 4096), (9, 341), (3, 7), (5, 64), (0, 341)], ids=str)
def test_swiglu_rows(emulated, case, dtype):
    emulated.seed = SEED
    harness.against_spec("swiglu", test_swiglu.inputs(*case), dtype, None)


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("case", [([33, 0, 40], 64, 4, True), ([5, 34], 21, 3, False), ([0, 0], 8, 2, True)], ids=str)
def test_group_norm(emulated, case, dtype):
    lengths, width, groups, activate = case
    emulated.seed = SEED
    test_group_norm_silu.held_to_the_spec(
        test_group_norm_silu.inputs(lengths, width, groups, activate=activate), dtype, None
    )


def test_group_norm_of_a_sample_does_not_see_its_batch(emulated):
    made = test_group_norm_silu.cast(test_group_norm_silu.inputs([5, 34], 16, 4), torch.bfloat16)
    alone = {**made, "x": made["x"][5:].clone(), "offsets": offsets_of([34])}
    emulated.seed = SEED
    with compiled():
        whole = ops.group_norm_silu(**made)[5:]
        emulated.seed = OTHER_SEED
        assert same_bits(ops.group_norm_silu(**alone), whole)


HEADS = {
    "production": ([9, 36], [35, 0], 24, 64),
    "ragged": ([1, 33, 0, 64, 3], [0, 5, 2, 31, 1], 3, 8),
    "odd head": ([7, 40], [3, 1], 2, 10),
    "heads that fill no warp": ([3], [2], 5, 64),
    "wide head": ([2, 1], [1, 1], 2, 272),
    "no text": ([9, 4], [0, 0], 2, 64),
    "text alone": ([0, 0], [3, 5], 2, 12),
    "no rows": ([0], [0], 2, 8),
    "no samples": ([], [], 2, 8),
}


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("case", HEADS.values(), ids=HEADS)
def test_heads(emulated, case, dtype):
    emulated.seed = SEED
    harness.against_spec("qk_norm_rope", test_qk_norm_rope.inputs(*case), dtype, None)


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize(("guidance", "both"), [(5.0, True), (1.0, False)])
@pytest.mark.parametrize(("lengths", "channels"), [([5, 0, 4], 128), ([3, 2], 32), ([7], 7), ([2, 1], 300)])
def test_guidance(emulated, lengths, channels, guidance, both, dtype):
    emulated.seed = SEED
    made = test_guidance_step.cast(test_guidance_step.inputs(lengths, channels, guidance, both), dtype)
    exact = ops.reference.guidance_step(**test_guidance_step.cast(made, torch.float64))
    spec = ops.reference.guidance_step(**made)
    with compiled():
        got = ops.guidance_step(**made)
    rounding = torch.finfo(got.dtype).eps * exact.abs().max().item() * (32 if dtype == torch.float64 else 1)
    assert harness.error(got, exact) <= 2 * harness.error(spec, exact) + rounding


def test_guidance_of_opposite_velocities(emulated):
    """|comb| = 0: the factor is 1 and nothing becomes NaN."""
    c = torch.ones(3, 128)
    x, offsets, delta = torch.full((3, 128), 0.5), offsets_of([3]), torch.tensor([-0.1])
    with compiled():
        assert same_bits(ops.guidance_step(x, c, 2 * c, delta, 2.0, offsets), x)


@pytest.mark.parametrize("dtype", harness.DTYPES, ids=["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("case", test_pack_tokens.CASES)
def test_pack(emulated, case, dtype):
    lengths, length, channels = test_pack_tokens.CASES[case]
    lengths = [min(n, 12) for n in lengths]  # every thread of a row runs in turn
    x = torch.randn(len(lengths), length, channels).to(dtype)
    valid = [b * length + j for b, n in enumerate(lengths) for j in range(n)]
    rows = torch.tensor(valid, dtype=torch.int64)
    emulated.seed = SEED
    with compiled():
        packed = ops.pack_tokens(x, rows)
        padded = ops.unpack_tokens(packed, rows, len(lengths), length)
    assert same_bits(packed, ops.reference.pack_tokens(x, rows))
    assert same_bits(padded, ops.reference.unpack_tokens(packed, rows, len(lengths), length))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("op", "made"),
    [
        ("rms_norm_modulate", aligned(test_rms_norm_modulate.inputs([3, 34], 1536))),
        ("gated_residual_norm_modulate", aligned(test_gated_residual_norm_modulate.inputs([3], 640))),
        ("gated_residual", aligned(test_gated_residual.inputs([3, 34], 256))),
        ("swiglu", test_swiglu.inputs(5, 64)),
        ("qk_norm_rope", test_qk_norm_rope.inputs([5, 9], [2, 3], 3, 64)),
    ],
    ids=["norm", "gated norm", "gated", "swiglu", "heads"],
)
def test_bits_do_not_depend_on_the_address(emulated, op, made, dtype):
    """Aligned rows go through vector accesses, misaligned ones do not; order of threads and blocks differs as well."""
    made = harness.cast(made, dtype)
    with compiled():
        expected = harness.results(getattr(ops, op), made)
        emulated.seed = SEED
        got = harness.results(getattr(ops, op), harness.shifted(made))
    for part, value in got.items():
        assert same_bits(value, expected[part]), part


@pytest.mark.parametrize("op", ROW_OPS)
def test_a_sample_does_not_see_its_batch(emulated, op):
    """Output and row gradients of a sample have the same bits alone and in a batch; so have its modulation's."""
    lengths = [5, 0, 34, 1]
    made = harness.cast(ROW_OPS[op](lengths, 256), torch.bfloat16)
    offsets = made["offsets"].tolist()
    with compiled():
        whole = harness.results(getattr(ops, op), made)
        for b in (0, 2, 3):
            rows = slice(offsets[b], offsets[b + 1])
            alone = dict(made, offsets=offsets_of([lengths[b]]))
            for name in ("x", "y"):
                if name in made:
                    alone[name] = made[name].detach()[rows].clone()
            for name in ("gate", "scale", "shift"):
                if name in made:
                    alone[name] = made[name].detach()[b : b + 1].clone()
            alone = {name: v.detach() if isinstance(v, torch.Tensor) else v for name, v in alone.items()}
            outputs = harness.results(getattr(ops, op), alone)
            for part, value in outputs.items():
                assert same_bits(value, whole[part][rows]), (part, b)


def test_refusals(emulated):
    """Widths the kernels do not serve are an error of their own, not a wrong answer."""
    made = harness.cast(test_rms_norm_modulate.inputs([2], 6200), torch.bfloat16)
    with compiled(), pytest.raises(RuntimeError, match="error 801"):
        harness.results(ops.rms_norm_modulate, made)
    with compiled(), pytest.raises(RuntimeError, match="error 801"):
        backend.launch(
            "qk_norm_rope", torch.zeros(1), image_qkv=torch.zeros(1, 3 * 1024), text_qkv=torch.zeros(0),
            image_q_weight=torch.zeros(1024), image_k_weight=torch.zeros(1024), text_q_weight=torch.zeros(1024),
            text_k_weight=torch.zeros(1024), cos=torch.zeros(512), sin=torch.zeros(512), image_offsets=offsets_of([1]),
            text_offsets=offsets_of([0]), qkv=torch.zeros(3, 1024), RI=1, RT=0, B=1, N=1, H=1024, eps=0.0,
        )  # fmt: skip
