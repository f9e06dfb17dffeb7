import pytest
import torch

from lens import ops
from lens.ops import reference
from tests.ops import harness
from tests.ops.harness import Inputs, Maker, compiled, offsets_of, same_bits

OP = "qk_norm_rope"
# image lengths, text lengths, heads, head dim
CASES = {
    "production": ([256, 60], [100, 0], 24, 64),
    "ragged": ([1, 33, 0, 64], [0, 5, 2, 31], 3, 8),
    "odd head": ([7, 40], [3, 1], 2, 10),
    "narrow head": ([5], [4], 1, 2),
    "no text": ([9, 4], [0, 0], 2, 64),
    "text alone": ([0, 0], [3, 5], 2, 12),
    "no rows": ([0], [0], 2, 8),
    "no samples": ([], [], 2, 8),
}


def inputs(image: list[int], text: list[int], heads: int, head_dim: int) -> Inputs:
    make, width = Maker(), 3 * heads * head_dim
    angle = make(sum(image) + sum(text), head_dim // 2, grad=False)
    return {
        "image_qkv": make(sum(image), width),
        "text_qkv": make(sum(text), width),
        **{f"{stream}_{part}_weight": make(head_dim) for stream in ("image", "text") for part in ("q", "k")},
        "cos": angle.cos(),
        "sin": angle.sin(),
        "image_offsets": offsets_of(image),
        "text_offsets": offsets_of(text),
    }


@harness.every_isa_and_dtype
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_against_spec(case, dtype, isa):
    harness.against_spec(OP, inputs(*case), dtype, isa)


def test_where_rows_go_and_how_they_turn():
    """Head dim 2, unit weights: a pair becomes sqrt(2) * (cos, sin) of its own angle plus the row's."""
    angles = torch.tensor([[0.1], [0.2], [0.3], [0.4], [0.5]], dtype=torch.float64)
    own = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)

    def rows(phase: torch.Tensor) -> torch.Tensor:
        pair = 7 * torch.stack([phase.cos(), phase.sin()], -1)
        return torch.cat([pair, pair, pair], -1)

    # sample 0: images 0, 1 and text 0; sample 1: image 2 and text 1 -> joint rows i0 i1 t0 i2 t1
    order = [0, 1, 3, 2, 4]
    one = torch.ones(2, dtype=torch.float64)
    for choice in ("compiled", "reference"):
        with ops.backend.use(choice):
            q, k, v = ops.qk_norm_rope(
                rows(own[:3]), rows(own[3:]), one, one, 2 * one, one, angles.cos(), angles.sin(),
                offsets_of([2, 1]), offsets_of([1, 1]), eps=0.0,
            )  # fmt: skip
        phase = own[order] + angles[:, 0]
        expected = 2**0.5 * torch.stack([phase.cos(), phase.sin()], -1)[:, None]
        torch.testing.assert_close(k, expected)
        torch.testing.assert_close(q, expected * torch.tensor([1.0, 1, 2, 1, 2]).double()[:, None, None])
        torch.testing.assert_close(v[:, 0], rows(own)[order][:, :2])


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_eps_is_the_callers(eps):
    made = {name: value.detach() for name, value in inputs(*CASES["ragged"]).items()}
    with compiled():
        got = ops.qk_norm_rope(**made, eps=eps)
        usual = ops.qk_norm_rope(**made)
    torch.testing.assert_close(got, reference.qk_norm_rope(**made, eps=eps))
    assert (got - usual).abs().max() > (1e-9 if eps == 0 else 1e-2)


@pytest.mark.parametrize("dtype", harness.DTYPES)
@pytest.mark.parametrize("case", ["ragged", "no text"])
def test_a_sample_does_not_see_its_batch(case, dtype):
    image, text = CASES[case][:2]
    made = harness.cast(inputs(*CASES[case]), dtype)
    made = {name: value.detach() for name, value in made.items()}
    image_offsets, text_offsets = made["image_offsets"].tolist(), made["text_offsets"].tolist()
    with compiled():
        whole = ops.qk_norm_rope(**made)
        for b in range(len(image)):
            of_image, of_text = slice(*image_offsets[b : b + 2]), slice(*text_offsets[b : b + 2])
            joint = slice(of_image.start + of_text.start, of_image.stop + of_text.stop)
            alone = {name: value for name, value in made.items() if name.endswith("weight")}
            alone.update(cos=made["cos"][joint], sin=made["sin"][joint])
            alone.update(image_qkv=made["image_qkv"][of_image].clone(), text_qkv=made["text_qkv"][of_text].clone())
            alone.update(image_offsets=offsets_of([image[b]]), text_offsets=offsets_of([text[b]]))
            assert same_bits(ops.qk_norm_rope(**alone), whole[:, joint])
            poisoned = dict(made)
            for name, rows in (("image_qkv", of_image), ("text_qkv", of_text), ("cos", joint), ("sin", joint)):
                poisoned[name] = torch.full_like(made[name], float("nan"))
                poisoned[name][rows] = made[name][rows]
            assert same_bits(ops.qk_norm_rope(**poisoned)[:, joint], whole[:, joint])


@pytest.mark.parametrize("dtype", harness.DTYPES)
def test_threads_and_alignment(dtype):
    harness.whatever_the_threads(OP, inputs([300, 0, 133], [33, 1, 0], 2, 32), dtype)
    harness.wherever_it_lies(OP, inputs([5, 9], [2, 3], 2, 10), dtype)
    harness.wherever_it_lies(OP, inputs([5, 9], [2, 3], 2, 64), dtype)


def test_strides_gradients_and_contracts():
    harness.contiguous_or_not(OP, inputs([5, 9], [2, 3], 2, 8))
    harness.gradcheck(OP, inputs([2, 0, 3], [1, 2, 0], 2, 4))
    made = harness.cast(inputs([5, 9], [2, 3], 2, 8), torch.float32)
    torch.library.opcheck(torch.ops.lens.qk_norm_rope.default, (*made.values(), 1e-6))
    made = {name: value.detach() for name, value in made.items()}
    dqkv = Maker()(3, 19, 2, 8, grad=False).float()
    torch.library.opcheck(torch.ops.lens.qk_norm_rope_backward.default, (dqkv, *made.values(), 1e-6))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_qkv": torch.zeros(14)}, "image_qkv must be [RI, 3 D], got [14]"),
        ({"image_qkv": torch.zeros(14, 48).half()}, "image_qkv must be float32, bfloat16 or float64, got float16"),
        ({"text_qkv": torch.zeros(5, 24)}, "text_qkv must be [RT, 3 D] = [5, 48], got [5, 24]"),
        ({"text_qkv": torch.zeros(5, 48).double()}, "text_qkv must be float32, got float64"),
        ({"image_q_weight": torch.zeros(8, 1)}, "image_q_weight must be [H], got [8, 1]"),
        ({"image_q_weight": torch.zeros(3)}, "image_q_weight must be [H] with H even and in [2, 512], got [3]"),
        ({"image_q_weight": torch.zeros(514)}, "image_q_weight must be [H] with H even and in [2, 512], got [514]"),
        ({"image_q_weight": torch.zeros(10)}, "image_qkv must be [RI, 3 N H] with H = 10, got [14, 48]"),
        ({"text_k_weight": torch.zeros(6)}, "text_k_weight must be [H] = [8], got [6]"),
        ({"cos": torch.zeros(19, 8)}, "cos must be [RI + RT, H / 2] = [19, 4], got [19, 8]"),
        ({"sin": torch.zeros(18, 4)}, "sin must be [RI + RT, H / 2] = [19, 4], got [18, 4]"),
        ({"sin": torch.zeros(19, 4).bfloat16()}, "sin must be float32, got bfloat16"),
        ({"image_offsets": torch.zeros(3)}, "image_offsets must be int32, got float32"),
        ({"text_offsets": torch.zeros(2, dtype=torch.int32)}, "text_offsets must be [B + 1] = [3], got [2]"),
    ],
)
def test_refusals(changes, message):
    harness.refuses(OP, inputs([5, 9], [2, 3], 2, 8), changes, message)


@pytest.mark.parametrize(("name", "rows"), [("image_offsets", "RI = 14"), ("text_offsets", "RT = 5")])
def test_refuses_offsets(name, rows):
    made = harness.cast(inputs([5, 9], [2, 3], 2, 8), torch.float32)
    made[name] = made[name] + torch.tensor([0, 0, 1], dtype=torch.int32)
    with compiled(), pytest.raises(ValueError, match=rf"lens.qk_norm_rope: {name} must rise from 0 to {rows}"):
        ops.qk_norm_rope(**made)


def test_reference_layout_of_positions():
    """The joint order of rows that the kernels and the rotary tables share."""
    rows = reference.joint_rows(offsets_of([2, 0, 1]), offsets_of([1, 2, 0]), 3, 3)
    assert rows.tolist() == [0, 1, 5, 2, 3, 4]
