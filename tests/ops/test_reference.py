"""The spec itself, against numbers worked out by hand: everything else is held to it."""

import math

import torch

from lens.ops import reference
from tests.ops.harness import offsets_of


def test_sample_of_row_skips_samples_without_rows():
    assert reference.sample_of_row(offsets_of([0, 2, 0, 0, 1, 0]), 3).tolist() == [1, 1, 4]


def test_image_positions_are_centred_negative_first():
    assert reference.image_positions(3, 4).tolist() == [[0, r, c] for r in (-2, -1, 0) for c in (-2, -1, 0, 1)]


def test_text_positions_start_beside_the_picture():
    assert reference.text_positions(3, 9, 2).tolist() == [[4, 4, 4], [5, 5, 5]]
    assert reference.text_positions(10, 2, 0).shape == (0, 3)


def test_rope_table():
    """H = 64: 4 pairs turn by the frame, 14 by the row, 14 by the column."""
    cos, sin = reference.rope_table(torch.tensor([[3, -5, 2]]), dtype=torch.float64)
    angle = [3 * 1e4 ** (-2 * k / 8) for k in range(4)]
    angle += [-5 * 1e4 ** (-2 * k / 28) for k in range(14)] + [2 * 1e4 ** (-2 * k / 28) for k in range(14)]
    torch.testing.assert_close(cos[0].tolist(), [math.cos(a) for a in angle])
    torch.testing.assert_close(sin[0].tolist(), [math.sin(a) for a in angle])
    assert reference.rope_table(torch.zeros(1, 3))[0].dtype == torch.float32


def test_rms_norm_modulate():
    """Row (3, 4): rms = sqrt(12.5)."""
    x, weight = torch.tensor([[3.0, 4.0], [3.0, 4.0]]).double(), torch.tensor([1.0, 2.0]).double()
    scale, shift = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double(), torch.tensor([[0.0, 5.0], [7.0, 0.0]]).double()
    got = reference.rms_norm_modulate(x, weight, scale, shift, offsets_of([1, 1]), eps=0.0)
    rms = 12.5**0.5
    torch.testing.assert_close(got.tolist(), [[3 / rms, 16 / rms + 5], [7.0, 8 / rms]])


def test_swiglu():
    got = reference.swiglu(torch.tensor([[0.0, 1.0, 5.0, 2.0]]).double())
    torch.testing.assert_close(got.tolist(), [[0.0, 2 / (1 + math.exp(-1))]])


def test_gated_residual():
    x, y = torch.ones(3, 1).double(), torch.tensor([[1.0], [2.0], [3.0]]).double()
    got = reference.gated_residual(x, y, torch.tensor([[10.0], [-1.0]]).double(), offsets_of([1, 2]))
    assert got.tolist() == [[11], [-1], [-2]]


def test_joint_attention():
    """One head, one channel, logits 0 against log 3: weights 1/4 and 3/4; the second sample has one row."""
    q = torch.ones(3, 1, 1).double()
    k = torch.tensor([0.0, math.log(3.0), 9.0]).double().view(3, 1, 1)
    v = torch.tensor([4.0, 8.0, 5.0]).double().view(3, 1, 1)
    offsets = offsets_of([1, 1]), offsets_of([1, 0])
    image, text = reference.joint_attention(q, k, v, [1, 1], [1, 0], *offsets)
    torch.testing.assert_close(image.tolist(), [[7.0], [5.0]])
    torch.testing.assert_close(text.tolist(), [[7.0]])
    image, text = reference.joint_attention(q, k, v, [1, 1], [1, 0], *offsets, text_queries=False)
    torch.testing.assert_close(image.tolist(), [[7.0], [5.0]])
    assert text.shape == (0, 1)
