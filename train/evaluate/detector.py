"""Lens-Eye: a small anchor-free detector of the world's classes, boxes and colours, and the file it ships in.

    detector = Detector.load()            # train/evaluate/assets/detector.safetensors, names inside
    detector.look([picture, ...])         # uint8 [H, W, 3] of one size -> per picture list[Detection]

One convolutional net at any sides that are multiples of 16 (and at least 64): a trunk at stride 4, deeper at 8, context at 16,
all brought back to stride 4. Shapes: B pictures, h = H/4, w = W/4 cells, K classes, C = 10 colours. Four heads per cell:

    heat    [B, K, h, w]   logit of "the centre of an object of this class lies in this cell"
    place   [B, 2, h, w]   centre minus the cell's own centre, in cells
    size    [B, 2, h, w]   log of width and height, in cells
    colour  [B, C, h, w]   logits of the palette

Loss of a batch (sums over cells divided by the number of objects; y the heat target, a Gaussian around each centre):

    heat     -(1-p)^2 log p at centres;  -(1-y)^4 p^2 log(1-p) elsewhere        (Law and Deng's focal loss)
    class    cross entropy of heat over classes, colour cross entropy, |place - target|, |size - target|
             at every cell with y above NEAR, weighted so that an object counts once
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import load_file, save
from torch import Tensor

from lens.formats.files import write_atomic, write_json

from .geneval import BEST, Detection

ASSET = Path(__file__).parent / "assets" / "detector.safetensors"
STRIDE = 4
SIGN = "sign"  # a class beside the world's: where words are written
NEAR = 0.6  # cells whose heat target exceeds this learn class, colour and box
OVERLAP = 0.5  # of two boxes of a class that overlap more than this (intersection over union), the better one stays
LEAST = 0.05  # detections below this confidence are not reported


def layer(inside: int, outside: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    conv = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outside), nn.ReLU(inplace=True))


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.first = layer(width, width)
        norm = nn.BatchNorm2d(width)
        nn.init.zeros_(norm.weight)  # a block starts as the identity
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), norm)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


@dataclass(frozen=True)
class Shape:
    """Widths at strides 2, 4, 8, 16, blocks at 4, 8, 16, width of the neck."""

    widths: tuple[int, int, int, int] = (32, 48, 96, 96)
    blocks: tuple[int, int, int] = (1, 3, 1)
    neck: int = 64


class Detector(nn.Module):
    """`kinds`: class names in the order of the heat map; `colours`: palette words in the order of the colour head."""

    def __init__(self, kinds: Sequence[str], colours: Sequence[str], shape: Shape = Shape()):
        super().__init__()
        self.kinds, self.colours, self.shape = tuple(kinds), tuple(colours), shape
        a, b, c, d = shape.widths

        def stage(inside: int, width: int, blocks: int) -> nn.Sequential:
            return nn.Sequential(layer(inside, width, 2), *(Residual(width) for _ in range(blocks)))

        self.stem = layer(3, a, 2)
        self.fine, self.middle, self.coarse = (
            stage(a, b, shape.blocks[0]),
            stage(b, c, shape.blocks[1]),
            stage(c, d, shape.blocks[2]),
        )
        self.from_coarse = nn.Conv2d(d, c, 1)
        self.from_middle = nn.Conv2d(c, shape.neck, 1)
        self.from_fine = nn.Conv2d(b, shape.neck, 1)
        self.neck = layer(shape.neck, shape.neck)
        self.head = nn.Conv2d(shape.neck, len(self.kinds) + 4 + len(self.colours), 1)
        nn.init.normal_(self.head.weight, std=0.01)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)
        nn.init.constant_(self.head.bias[: len(self.kinds)], -4.0)  # nothing is seen at first
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's annotations lack this one

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """float [B, 3, H, W] in [-1, 1] -> heat, place, size, colour (see above)."""
        if x.shape[2] % 16 or x.shape[3] % 16 or min(x.shape[2:]) < 64:
            raise ValueError(
                f"Detector: picture {tuple(x.shape[2:])}, expected sides that are multiples of 16, at least 64"
            )
        fine = self.fine(self.stem(x.contiguous(memory_format=torch.channels_last)))
        middle = self.middle(fine)
        coarse = self.coarse(middle)
        middle = middle + F.interpolate(self.from_coarse(coarse), scale_factor=2.0, mode="nearest")
        whole = F.interpolate(self.from_middle(middle), scale_factor=2.0, mode="nearest") + self.from_fine(fine)
        out = self.head(self.neck(F.relu(whole)))
        heat, place, size, colour = out.split([len(self.kinds), 2, 2, len(self.colours)], 1)
        return heat, place, size, colour

    @torch.no_grad()
    def look(self, pictures: Sequence[np.ndarray], batch: int = 32) -> list[list[Detection]]:
        """uint8 [H, W, 3] of one size -> detections per picture, most confident first. In eval mode always."""
        stack = np.stack(list(pictures)) if len(pictures) else np.zeros((0, 64, 64, 3), np.uint8)
        if stack.dtype != np.uint8 or stack.ndim != 4 or stack.shape[-1] != 3:
            raise ValueError(f"Detector.look: pictures {stack.dtype} {stack.shape}, expected uint8 [n, H, W, 3]")
        training, seen = self.training, []
        self.eval()
        for start in range(0, len(stack), batch):
            x = torch.from_numpy(stack[start : start + batch]).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
            seen += self.decode(*self(x))
        self.train(training)
        return seen

    def decode(self, heat: Tensor, place: Tensor, size: Tensor, colour: Tensor) -> list[list[Detection]]:
        """Local maxima of each class's heat -> boxes in pixels, at most BEST per class, overlaps of a class removed."""
        score = torch.sigmoid(heat.float())
        peak = (score == F.max_pool2d(score, 3, 1, 1)) & (score > LEAST)
        out: list[list[Detection]] = [[] for _ in range(len(heat))]
        for b, k, y, x in peak.nonzero().tolist():
            cx, cy = ((v + 0.5 + place[b, i, y, x].item()) * STRIDE for i, v in enumerate((x, y)))
            w, h = (size[b, :, y, x].float().clamp(-3, 6).exp() * STRIDE).tolist()
            word = self.colours[int(colour[b, :, y, x].argmax())]
            shares = dict(zip(self.colours, colour[b, :, y, x].float().softmax(0).tolist()))
            box = (cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2)
            out[b].append(Detection(self.kinds[k], score[b, k, y, x].item(), box, word, shares))
        return [without_overlaps(found) for found in out]

    # ---- the shipped file
    def save(self, path: Path, about: dict) -> None:
        """float16 weights with names and shape in the header, and `about` beside them as JSON."""
        header = {
            "kinds": json.dumps(self.kinds),
            "colours": json.dumps(self.colours),
            "shape": json.dumps(vars(self.shape)),
        }
        tensors = {
            name: value.half().contiguous() for name, value in self.state_dict().items() if value.is_floating_point()
        }
        content = save(tensors, metadata=header)

        def write(temporary: Path) -> None:
            temporary.write_bytes(content)

        write_atomic(path, write)
        write_json(path.with_suffix(".json"), about)

    @classmethod
    def load(cls, path: Path = ASSET) -> Detector:
        """The shipped judge in eval mode, float32. Errors: missing file, other tensors than the header's shape needs."""
        from safetensors import safe_open

        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no Lens-Eye here; python -m train detector --out runs/detector --export {path}"
            )
        with safe_open(path, "pt") as file:
            header = file.metadata()
        shape: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(header["shape"]).items()
        }
        detector = cls(json.loads(header["kinds"]), json.loads(header["colours"]), Shape(**shape))
        tensors = {name: value.float() for name, value in load_file(path).items()}
        missing, unexpected = detector.load_state_dict(tensors, strict=False)
        missing = [name for name in missing if not name.endswith("num_batches_tracked")]
        if missing or unexpected:
            raise ValueError(f"{path}: missing {missing}, unexpected {unexpected}")
        return detector.eval().requires_grad_(False)


def without_overlaps(found: Sequence[Detection]) -> list[Detection]:
    """Best first; at most BEST per class; a box overlapping a better one of its class by more than OVERLAP goes."""
    kept: list[Detection] = []
    for one in sorted(found, key=lambda d: -d.score):
        same = [d for d in kept if d.kind == one.kind]
        if len(same) < BEST and all(overlap(one.box, d.box) <= OVERLAP for d in same):
            kept.append(one)
    return kept


def overlap(one: Sequence[float], two: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    w, h = (max(0.0, min(one[i + 2], two[i + 2]) - max(one[i], two[i])) for i in (0, 1))
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (one, two)]
    return w * h / max(sum(areas) - w * h, 1e-9)


@dataclass
class Targets:
    """Objects of a batch, N in all: picture [N], kind [N], colour [N] (-1: none), centre [N, 2] and size [N, 2] in cells."""

    picture: Tensor
    kind: Tensor
    colour: Tensor
    centre: Tensor
    size: Tensor


def loss(outputs: tuple[Tensor, Tensor, Tensor, Tensor], targets: Targets) -> dict[str, Tensor]:
    """The four terms of the docstring above, and "loss", their weighted sum."""
    heat, place, size, colour = (o.float() for o in outputs)
    h, w = heat.shape[2:]
    count = max(1, len(targets.kind))
    cell = torch.stack([targets.centre[:, 0].clamp(0, w - 1e-3), targets.centre[:, 1].clamp(0, h - 1e-3)], 1).long()
    width = (targets.size * 0.12).clamp_min(0.45)  # of the Gaussian, in cells, per axis
    dx = (torch.arange(w, device=heat.device)[None] - cell[:, :1]) / width[:, :1]
    dy = (torch.arange(h, device=heat.device)[None] - cell[:, 1:]) / width[:, 1:]
    bump = torch.exp(-0.5 * (dy[:, :, None] ** 2 + dx[:, None] ** 2))  # [N, h, w], 1 at the centre's cell
    y = torch.zeros(heat.shape[0] * heat.shape[1], h * w, device=heat.device)
    owner_map = (targets.picture * heat.shape[1] + targets.kind)[:, None].expand(-1, h * w)
    y = y.scatter_reduce(0, owner_map, bump.flatten(1), "amax").view_as(heat)
    p = torch.sigmoid(heat)
    negative = ((1 - y) ** 4 * p**2 * F.softplus(heat)).sum()
    at = (targets.picture, targets.kind, cell[:, 1], cell[:, 0])
    positive = ((1 - p[at]) ** 2 * F.softplus(-heat[at])).sum()

    owner, row, column = (bump > NEAR).nonzero(as_tuple=True)
    share = 1.0 / torch.bincount(owner, minlength=count)[owner]  # every object counts once
    where = targets.picture[owner]
    kind = F.cross_entropy(heat[where, :, row, column], targets.kind[owner], reduction="none")
    paint, painted = targets.colour[owner], targets.colour[owner] >= 0
    colours = F.cross_entropy(colour[where, :, row, column], paint.clamp_min(0), reduction="none") * painted
    own = torch.stack([column, row], 1) + 0.5
    moved = (place[where, :, row, column] - (targets.centre[owner] - own)).abs().sum(1)
    grown = (size[where, :, row, column] - targets.size[owner].log()).abs().sum(1)
    terms = {
        "heat": (negative + positive) / count,
        "class": (kind * share).sum() / count,
        "colour": (colours * share).sum() / count,
        "box": ((moved + 2 * grown) * share).sum() / count,
    }
    terms["loss"] = terms["heat"] + terms["class"] + terms["colour"] + 0.5 * terms["box"]
    return terms
