"""Clarity, entropy and luminance: the kernel against the specification, both against NumPy and OpenCV, and the refusals."""

import math

import numpy as np
import pytest
import torch

from lens import ops
from lens.ops import backend, reference
from lens.ops.image_scores import reduced_size
from tests.ops import harness

# height, width, side
CASES = {
    "as it is": (9, 13, 512),
    "reduced": (61, 97, 16),
    "whole steps": (64, 96, 32),
    "one row": (1, 40, 8),
    "one column": (77, 1, 8),
    "one pixel": (1, 1, 1),
    "to one row": (50, 7, 1),
    "long": (3, 700, 2),
    "barely": (33, 34, 32),
    "two": (2, 2, 2),
}


def noise(height, width, seed=0):
    """Smooth areas, flat runs and noise, so that every part of the histogram and of the Laplacian is met."""
    draw = np.random.default_rng([seed, height, width])
    y, x = np.mgrid[:height, :width]
    base = np.stack([x * 7 + y, y * 5, x + 3 * y], -1) % 256
    base[height // 2 :] = draw.integers(0, 256, (height - height // 2, width, 3))
    base[:, width // 2 :] //= 2
    return torch.from_numpy(base.astype(np.uint8))


def shares(n, boxes):
    """int [boxes, n]: how much of every element lies in every box, in parts of 1 / boxes."""
    edges, i = np.arange(boxes + 1) * n, np.arange(n) * boxes
    return np.clip(np.minimum(edges[1:, None], i + boxes) - np.maximum(edges[:-1, None], i), 0, None)


def in_numpy(pixels, h, w):
    """(clarity, entropy, luminance) from the formulas: the reduction in integers, all else in float64."""
    rgb = pixels.numpy().astype(np.int64)
    grey = (rgb @ [9798, 19235, 3735] + 16384) // 32768
    height, width = grey.shape
    q = np.floor((shares(height, h) @ grey @ shares(width, w).T) * (256 / (height * width)) + 0.5) / 256
    up, left = (np.arange(-1, n + 1) for n in (h, w))
    up, left = (np.where(i < 0, min(1, n - 1), np.where(i == n, max(0, n - 2), i)) for n, i in ((h, up), (w, left)))
    p = q[np.ix_(up, left)]
    laplacian = p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:] - 4 * q
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
    share = share[share > 0]
    return laplacian.var(), -(share * np.log2(share)).sum(), rgb.max(-1).mean() / 255


@pytest.mark.parametrize("isa", harness.ISAS)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_kernel_equals_the_specification_in_every_bit(case, isa):
    height, width, side = case
    pixels = noise(height, width)
    with harness.compiled(isa):
        found = ops.image_scores(pixels, side)
    with backend.use("reference"):
        assert ops.image_scores(pixels, side) == found
    expected = in_numpy(pixels, *reduced_size(height, width, side))
    assert np.allclose([found.clarity, found.entropy, found.luminance], expected, rtol=1e-9, atol=1e-12)


def test_against_opencv():
    """What a person would write with it: full size, no reduction but an exact one."""
    cv2 = pytest.importorskip("cv2")
    for pixels, side in ((noise(40, 52), 512), (noise(64, 96), 32)):
        grey = cv2.cvtColor(pixels.numpy(), cv2.COLOR_RGB2GRAY)
        found = ops.image_scores(pixels, side)
        histogram = cv2.calcHist([grey], [0], None, [256], [0, 256]).ravel() / grey.size
        assert found.entropy == pytest.approx(-sum(p * math.log2(p) for p in histogram.tolist() if p), rel=1e-6)
        hsv = cv2.cvtColor(pixels.numpy(), cv2.COLOR_RGB2HSV)
        assert found.luminance == pytest.approx(hsv[..., 2].mean() / 255)
        h, w = reduced_size(*grey.shape, side)
        small = cv2.resize(grey.astype(np.float64), (w, h), interpolation=cv2.INTER_AREA)
        assert found.clarity == pytest.approx(cv2.Laplacian(small, cv2.CV_64F).var(), rel=1e-4)  # steps of 1/256


def test_extremes():
    flat = torch.full((20, 30, 3), 255, dtype=torch.uint8)
    assert ops.image_scores(flat) == ops.ImageScores(0.0, 0.0, 1.0)
    board = torch.from_numpy((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))[..., None].expand(-1, -1, 3)
    found = ops.image_scores(board)
    assert found.entropy == 1
    assert found.luminance == 0.5
    assert found.clarity == (8 * 127.5) ** 2  # +-1020 everywhere: a strided view, too
    assert reduced_size(3000, 4000) == (512, 683)
    assert reduced_size(5, 1_000_000, 2) == (2, 400_000)


def test_refusals():
    with pytest.raises(ValueError, match=r"lens\.image_scores: pixels must be \[H, W, 3\], got \[2, 2\]"):
        ops.image_scores(torch.zeros(2, 2, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"pixels must be uint8 on the CPU, got torch\.float32 on cpu"):
        ops.image_scores(torch.zeros(2, 2, 3))
    with pytest.raises(ValueError, match=r"at least one pixel, got \[0, 2, 3\]"):
        ops.image_scores(torch.zeros(0, 2, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="side must be at least 1, got 0"):
        ops.image_scores(noise(2, 2), 0)
    with pytest.raises(ValueError, match=r"at most 2\^27 pixels at side 2000, got 2000 x 68000"):
        ops.image_scores(torch.zeros(1, dtype=torch.uint8).expand(2000, 68000, 3), 2000)


def test_the_kernel_refuses_what_does_not_fit():
    arrays = {name: torch.zeros(300, dtype=torch.int64) for name in ("pixels", "sums", "workspace")}
    with pytest.raises(ValueError, match=r"lens\.image_scores: h must be at most H, got 3"):
        backend.launch("image_scores", arrays["sums"], torch.float32, **arrays, H=2, W=2, h=3, w=2)


def test_box_sums_are_exact():
    x = torch.arange(7)
    assert reference.box_sums(x, 7).tolist() == [7 * i for i in range(7)]
    assert reference.box_sums(x, 1).tolist() == [21]
    assert reference.box_sums(x, 2).tolist() == [2 * (0 + 1 + 2) + 3, 3 + 2 * (4 + 5 + 6)]
