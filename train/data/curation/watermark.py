"""The watermark judge that ships: a small convolutional net trained on stamped pictures (train/watermark.py).

    judge = Marks.load()                        # train/data/assets/watermark.v1.safetensors
    judge.head(judge.backbone(batch))           # uint8 [B, 256, 256, 3] -> P(watermark) [B]

It sees the whole picture at SIDE x SIDE pixels. Of every cell of STRIDE x STRIDE pixels it gives the logit that a stamp covers
some of it, and of the picture a weighted sum of three summaries of these: the highest, the mean of the TOP highest, the share of
cells that have one. Loss of a batch: the binary cross entropy of pictures, plus CELLS times that of cells, in which one that is
covered counts as RARE do.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lens.formats.files import write_atomic, write_json

from ...evaluate.detector import Residual, layer

ASSET = Path(__file__).parents[1] / "assets" / "watermark.v1.safetensors"
SIDE, STRIDE, TOP = 256, 16, 16
CELLS, RARE = 2.0, 3.0  # with 1 and 1 nothing is found for thousands of pictures: seven cells of eight are bare


@dataclass(frozen=True)
class Shape:
    """Widths at strides 2, 4, 8, 16."""

    widths: tuple[int, int, int, int] = (12, 24, 32, 40)


class MarkNet(nn.Module):
    def __init__(self, shape: Shape = Shape()):
        super().__init__()
        self.shape = shape
        a, b, c, d = shape.widths
        self.trunk = nn.Sequential(
            layer(3, a, 2), layer(a, b, 2), layer(b, c, 2), Residual(c), layer(c, d, 2), Residual(d)
        )
        self.cell = nn.Conv2d(d, 1, 1)
        self.whole = nn.Linear(3, 1)
        assert self.cell.bias is not None
        nn.init.constant_(self.cell.bias, -3.0)  # nothing is seen at first
        with torch.no_grad():
            self.whole.weight.copy_(torch.tensor([[0.5, 0.5, 1.0]]))
            self.whole.bias.zero_()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's annotations lack this one

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float [B, 3, SIDE, SIDE] in [-1, 1] -> logits of pictures [B] and of cells [B, SIDE / STRIDE, SIDE / STRIDE]."""
        if x.shape[1:] != (3, SIDE, SIDE):
            raise ValueError(f"MarkNet: x must be [B, 3, {SIDE}, {SIDE}], got {list(x.shape)}")
        cells = self.cell(self.trunk(x.contiguous(memory_format=torch.channels_last))).float()[:, 0]
        flat = cells.flatten(1)
        best = flat.topk(TOP, 1).values
        return self.whole(torch.stack([best[:, 0], best.mean(1), flat.sigmoid().mean(1)], 1))[:, 0], cells


def loss(outputs: tuple[Tensor, Tensor], stamped: Tensor, covered: Tensor) -> dict[str, Tensor]:
    """stamped [B], covered [B, h, w]: 0 or 1. The two terms of the docstring above, and "loss", [B], of every picture."""
    whole, cells = outputs
    picture = F.binary_cross_entropy_with_logits(whole, stamped, reduction="none")
    rare = torch.tensor(RARE, device=cells.device)
    places = F.binary_cross_entropy_with_logits(cells, covered, reduction="none", pos_weight=rare).mean((1, 2))
    return {"picture": picture.mean(), "cells": places.mean(), "loss": picture + CELLS * places}


class Marks:
    """A `Classifier` (classifiers.py) of step 5, on the CPU one picture at a time."""

    duplicate_above: float | None = None

    def __init__(self, net: MarkNet, by: str, device: str = "cpu"):
        self.net, self.by, self.device = net.eval().requires_grad_(False).to(device), by, torch.device(device)

    @property
    def backbone(self) -> Marks:
        return self

    def prepare(self, image: Any) -> np.ndarray:
        """uint8 [SIDE, SIDE, 3]: the whole image, its aspect not kept."""
        from PIL import Image

        return np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=3.0))

    def logits(self, batch: np.ndarray) -> tuple[Tensor, Tensor]:
        with torch.inference_mode():
            parts = torch.tensor(batch).split(1 if self.device.type == "cpu" else len(batch))
            found = [self.net(pixels(part.to(self.device))) for part in parts]
            whole, cells = (torch.cat(own).cpu() for own in zip(*found))
        return whole, cells

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        return self.logits(batch)[0].sigmoid().numpy()

    def head(self, outputs: np.ndarray) -> np.ndarray:
        return outputs

    @classmethod
    def load(cls, path: Path = ASSET, device: str = "cpu") -> Marks:
        """Errors: FileNotFoundError, ValueError naming the file: no safetensors, or other tensors than its shape needs."""
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no watermark judge here; python -m train watermark --out runs/watermark --export {path}"
            )
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118 (no mapping)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file that can be read: {error}") from None
        if "widths" not in about:
            raise ValueError(
                f"{path}: its header names no widths; expected a file of python -m train watermark --export"
            )
        net = MarkNet(Shape(tuple(json.loads(about["widths"]))))
        wanted = {k: v.shape for k, v in net.state_dict().items() if v.is_floating_point()}
        given = {k: v.shape for k, v in tensors.items()}
        if wanted != given:
            name = sorted(k for k in wanted | given if wanted.get(k) != given.get(k))[0]
            raise ValueError(f"{path}: {name} must be {wanted.get(name)}, got {given.get(name)}")
        net.load_state_dict(tensors, strict=False)  # the norms' counters of batches are not kept
        return cls(net, f"lens-watermark@{_revision(path)} float32", device)


def pixels(batch: Tensor) -> Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in [-1, 1]."""
    return batch.permute(0, 3, 1, 2).float().div(127.5).sub(1)


@functools.cache
def _revision(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def write(path: Path, net: MarkNet, about: dict[str, Any]) -> None:
    """float32 weights and statistics with the shape in the header; `about` beside them as JSON."""
    tensors = {k: v.float().contiguous().clone() for k, v in net.state_dict().items() if v.is_floating_point()}
    content = save(tensors, metadata={"widths": json.dumps(net.shape.widths)})

    def put(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_atomic(path, put)
    write_json(path.with_suffix(".json"), about)
