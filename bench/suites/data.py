"""The data engine's pass over an image: data/image_scores/<height>x<width>/uint8, clarity, entropy and luminance, CPU alone.

"images" of a row over its time is images/s of the threads used; --threads 1 --cpu-time gives that of one core. The
reference img2dataset states 1,345 images/s on 16 cores for download and resize together. Decoding is not part of it.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lens import ops
from lens.ops import reference
from lens.ops.image_scores import reduced_size, scores_of

from ..case import OURS, Case, Subject, Work, generator
from ..work.scale import Scale

SUBJECTS = (OURS, "spec_eager", "numpy", "opencv")
SIZES = ((512, 683), (768, 1024), (1536, 2048), (3000, 4000))
BOUND = 0.02  # OpenCV's reduced image is rounded to whole greys, which moves clarity by some thousandths


def image(height: int, width: int) -> Tensor:
    """uint8 [H, W, 3], smooth with grain: from a small one drawn from a fixed key."""
    g = generator(torch.device("cpu"), "data", height, width)
    coarse = torch.rand(1, 3, height // 8 + 1, width // 8 + 1, generator=g)
    fine = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic", align_corners=False)
    grain = torch.rand(1, 1, height, width, generator=g) - 0.5
    return ((fine + 0.1 * grain).clamp(0, 1) * 255).round().to(torch.uint8)[0].permute(1, 2, 0).contiguous()


def as_tensor(clarity: float, entropy: float, luminance: float) -> Tensor:
    return torch.tensor([clarity, entropy, luminance], dtype=torch.float64)


def ours(pixels: Tensor) -> Tensor:
    found = ops.image_scores(pixels)
    return as_tensor(found.clarity, found.entropy, found.luminance)


def spec(pixels: Tensor) -> Tensor:
    height, width, _ = pixels.shape
    h, w = reduced_size(height, width)
    found = scores_of(reference.image_sums(pixels, h, w).tolist(), height * width, h * w)
    return as_tensor(found.clarity, found.entropy, found.luminance)


def by_numpy(pixels: Tensor) -> Tensor:
    """The same arithmetic in NumPy, in as few passes as its functions allow."""
    rgb = pixels.numpy().astype(np.int32)
    height, width, _ = rgb.shape
    h, w = reduced_size(height, width)
    grey = (9798 * rgb[..., 0] + 19235 * rgb[..., 1] + 3735 * rgb[..., 2] + 16384) >> 15

    def boxes(x: np.ndarray, n: int) -> np.ndarray:
        places = np.arange(n + 1) * len(x)
        whole, rest = places // n, (places % n)[:, None]
        before = np.zeros((len(x) + 1, x.shape[1]), np.int64)
        np.cumsum(x, 0, out=before[1:])
        return np.diff(n * before[whole] + rest * x[np.minimum(whole, len(x) - 1)], axis=0)

    q = np.floor(boxes(boxes(grey, h).T, w).T * (256 / (height * width)) + 0.5).astype(np.int64)
    p = np.pad(q, 1, mode="reflect")
    laplacian = p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:] - 4 * q
    share = np.bincount(grey.ravel(), minlength=256) / grey.size
    share = share[share > 0]
    entropy = -(share * np.log2(share)).sum()
    return as_tensor(laplacian.var() / 65536, entropy, pixels.numpy().max(-1).mean() / 255)


def by_opencv() -> Any:
    import cv2  # type: ignore[import-untyped, unused-ignore]

    def call(pixels: Tensor) -> Tensor:
        rgb = pixels.numpy()
        h, w = reduced_size(*rgb.shape[:2])
        cv2.setNumThreads(torch.get_num_threads())
        grey = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
        small = cv2.resize(grey, (w, h), interpolation=cv2.INTER_AREA)
        clarity = float(cv2.meanStdDev(cv2.Laplacian(small, cv2.CV_64F))[1][0, 0]) ** 2
        share = cv2.calcHist([grey], [0], None, [256], [0, 256]).ravel() / grey.size
        share = share[share > 0]
        r, g, b = cv2.split(rgb)
        value = cv2.mean(cv2.max(cv2.max(r, g), b))[0] / 255
        return as_tensor(clarity, float(-(share * np.log2(share)).sum()), value)

    return call


def prepare(height: int, width: int, device: torch.device) -> Work:
    subjects = {OURS: Subject(ours), "spec_eager": Subject(spec), "numpy": Subject(by_numpy)}
    left_out = {}
    if importlib.util.find_spec("cv2"):
        subjects["opencv"] = Subject(by_opencv())
    else:
        left_out["opencv"] = "OpenCV is not installed"
    return Work(
        inputs=[(image(height, width),)],
        subjects=subjects,
        oracle=spec,
        bound=BOUND,
        flops=0,
        bytes=3 * height * width,
        left_out=left_out,
        more={"images": 1},
    )


def cases(scale: Scale, gpu: bool) -> list[Case]:
    """On a CPU alone."""
    found = []
    for height, width in () if gpu else ((48, 64),) if scale.tiny else SIZES:

        def make(device: torch.device, height: int = height, width: int = width) -> Work:
            return prepare(height, width, device)

        found.append(Case(f"{scale.prefix}data/image_scores/{height}x{width}/uint8", SUBJECTS, make))
    return found
