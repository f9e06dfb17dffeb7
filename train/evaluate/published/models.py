"""The published judges as transformers models: Mask2Former for boxes and masks, CLIP for colours and for CLIPScore.

Both compute in float32 with TF32 off (`exact_matmul`): users of the official code got other scores where it was on. Weights
come from the hub or a folder, only when one is made; the revision is what the hub calls the weights that were loaded.

GenEval's own detector is mmdet's Mask2Former Swin-S; the hub has Meta's weights of the same architecture and data, which the
card says. CLIP ViT-L/14 is OpenAI's, the same weights as open_clip's "openai".
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .geneval_prompts import COLOURS, NAMES
from .judging import Card

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"
MOST = 100  # detections of an image
GREY = (153, 153, 153)  # "#999", in place of everything outside of a mask
# GenEval's name -> what label files of COCO models call the class
COCO = {
    "computer mouse": ("mouse",),
    "tv remote": ("remote",),
    "computer keyboard": ("keyboard",),
    "motorcycle": ("motorbike",),
    "airplane": ("aeroplane",),
    "couch": ("sofa",),
    "potted plant": ("pottedplant",),
    "dining table": ("diningtable",),
    "tv": ("tvmonitor",),
}


@dataclass(frozen=True)
class Found:
    """One detection: class, float32 score, box (x0, y0, x1, y1) in pixels, mask bool [H, W] or None."""

    kind: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None = None


class ObjectDetector(Protocol):
    card: Card

    def detect(self, image: np.ndarray) -> list[Found]:
        """uint8 [H, W, 3] -> detections of GenEval's 80 classes, in any order. Whatever it raises makes the judgement missing."""
        ...


class ColourClassifier(Protocol):
    card: Card

    def colours(self, crops: Sequence[Image.Image], kind: str) -> list[str]:
        """RGB crops of objects of a class -> one of COLOURS each."""
        ...


class ClipScorer(Protocol):
    card: Card

    def similarity(self, image: np.ndarray, text: str) -> float:
        """Cosine of image and text, the text cut to 77 tokens."""
        ...


@contextlib.contextmanager
def exact_matmul() -> Iterator[None]:
    """Inside the block float32 products are float32: no TF32 in cuBLAS or cuDNN."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def revision_of(model: Any, source: str) -> str:
    """The hub's commit, or "local" for a folder."""
    return "local" if Path(source).is_dir() else str(getattr(model.config, "_commit_hash", None) or "unknown")


def load(cls: Any, source: str, **more: Any) -> Any:
    """`from_pretrained`. Errors: ValueError naming what is missing, where neither hub nor folder has it."""
    try:
        return cls.from_pretrained(source, **more)
    except OSError as error:
        raise ValueError(
            f"judge {source}: cannot be loaded ({str(error).splitlines()[0]}); give a folder that has it"
        ) from None


def complete(cls: Any, folder: Path, **more: Any) -> Any:
    """`from_pretrained` of a folder whose files hold every weight: transformers draws missing ones at random and goes on.

    Errors: ValueError naming folder and key, what was expected and what is there.
    """
    more |= {"output_loading_info": True, "ignore_mismatched_sizes": True, "local_files_only": True}
    model, told = load(cls, str(folder), **more)
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"judge {folder}: no {cls.__name__}: {len(missing)} keys missing, first {missing[0]!r}")
    if told["mismatched_keys"]:
        key, got, expected = min(told["mismatched_keys"])
        raise ValueError(f"judge {folder}: no {cls.__name__}: {key} must have shape {list(expected)}, got {list(got)}")
    return model


# ------------------------------------------------------------------------------------------------ Mask2Former


def instances(
    classes: Tensor, masks: Tensor, size: tuple[int, int], valid: tuple[int, int]
) -> list[tuple[int, float, Tensor]]:
    """(label, score, mask bool [H, W]) of the MOST best pairs of query and class, as mmdet scores them.

    classes [Q, K + 1] logits, the last "nothing"; masks [Q, h, w] logits of the padded input, whose first `valid` share of
    rows and columns, in input pixels of (padded) h * 4, is the image; size: the image's own (H, W). Score: softmax
    probability times the mean sigmoid of the mask inside its own support; pairs whose mask is empty are left out.
    """
    shares = classes.softmax(-1)[:, :-1]
    best, index = shares.flatten().topk(min(MOST, shares.numel()))
    query, label = index // shares.shape[1], index % shares.shape[1]
    full = F.interpolate(
        masks[None], size=(masks.shape[1] * 4, masks.shape[2] * 4), mode="bilinear", align_corners=False
    )
    cut = full[:, :, : valid[0], : valid[1]]
    fitted = F.interpolate(cut, size=size, mode="bilinear", align_corners=False)[0]
    out = []
    for score, q, k in zip(best, query, label):
        inside = fitted[q] > 0
        if inside.any():
            quality = fitted[q].sigmoid()[inside].mean()
            out.append((int(k), float((score * quality).float()), inside))
    return out


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The smallest box around a mask that is not empty; the far edges one pixel beyond the last pixel, as mmdet counts."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


def named_labels(labels: Mapping[Any, str], source: str) -> dict[int, str]:
    """A model's label numbers -> GenEval's names. Errors: ValueError where one of the 80 classes is not there."""
    own = {str(name): int(k) for k, name in labels.items()}
    found = {name: next((own[n] for n in (name, *COCO.get(name, ())) if n in own), None) for name in NAMES}
    if missing := [name for name, k in found.items() if k is None]:
        raise ValueError(f"judge {source}: knows no {', '.join(missing[:5])}; expected COCO's 80 classes")
    return {k: name for name, k in found.items() if k is not None}


class Mask2Former:
    """`ObjectDetector` by transformers. The input's short side becomes 800, its long side at most 1333, padded to 32."""

    SHORT, LONG, MULTIPLE = 800, 1333, 32
    MEAN, DEVIATION = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

    def __init__(self, source: str = DETECTOR, device: str = "cpu"):
        """Errors: ValueError where the weights are not to be had, or know other classes."""
        from transformers import Mask2FormerForUniversalSegmentation

        self.device = torch.device(device)
        self.model: Any = load(Mask2FormerForUniversalSegmentation, source).float().eval().to(self.device)
        self.names = named_labels(self.model.config.id2label, source)
        self.card = Card(
            f"Mask2Former {source}", revision_of(self.model, source), "float32, TF32 off", device_name(self.device),
            "Meta's weights in transformers; the published scores are by mmdet's",
        )  # fmt: skip

    def prepared(self, image: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
        """uint8 [H, W, 3] -> normalised [1, 3, h, w] padded below and to the right, and (rows, columns) that are the image."""
        height, width = image.shape[:2]
        scale = min(self.SHORT / min(height, width), self.LONG / max(height, width))
        size = (round(height * scale), round(width * scale))
        resized = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
        x = torch.from_numpy(np.array(resized)).permute(2, 0, 1).float()
        x = (x - torch.tensor(self.MEAN)[:, None, None]) / torch.tensor(self.DEVIATION)[:, None, None]
        down, right = (-side % self.MULTIPLE for side in size)
        return F.pad(x, (0, right, 0, down))[None], size

    @torch.no_grad()
    def detect(self, image: np.ndarray) -> list[Found]:
        x, valid = self.prepared(image)
        with exact_matmul():
            out = self.model(pixel_values=x.to(self.device))
        height, width = image.shape[:2]
        found = instances(out.class_queries_logits[0], out.masks_queries_logits[0], (height, width), valid)
        kept = [(k, score, mask.cpu().numpy()) for k, score, mask in found if k in self.names]
        return [Found(self.names[k], score, box_of(mask), mask) for k, score, mask in kept]


# ------------------------------------------------------------------------------------------------ CLIP


def crop_of(image: np.ndarray, found: Found) -> Image.Image:
    """The detection's box of the image, GREY outside of its mask."""
    whole = Image.fromarray(image)
    if found.mask is not None:
        if found.mask.shape != image.shape[:2]:
            raise ValueError(f"crop_of: mask {found.mask.shape} of an image {image.shape[:2]}")
        whole = Image.composite(whole, Image.new("RGB", whole.size, GREY), Image.fromarray(found.mask))
    return whole.crop(tuple(found.box))  # type: ignore[arg-type]


def colour_texts(kind: str) -> list[list[str]]:
    """Per colour of COLOURS the three sentences whose mean embedding stands for it."""
    forms = (f"a photo of a {{}} {kind}", f"a photo of a {{}}-colored {kind}", "a photo of a {} object")
    return [[form.format(colour) for form in forms] for colour in COLOURS]


def zero_shot(images: Tensor, texts: Tensor) -> Tensor:
    """images [N, D], texts [C, S, D], neither normalised -> index of the nearest class [N].

    A class is the normalised mean of its sentences' normalised embeddings.
    """
    classes = F.normalize(F.normalize(texts, dim=-1).mean(1), dim=-1)
    return (F.normalize(images, dim=-1) @ classes.T).argmax(-1)


class Clip:
    """`ColourClassifier` and `ClipScorer` by OpenAI's CLIP in transformers."""

    def __init__(self, source: str = CLIP, device: str = "cpu"):
        """Errors: ValueError where the weights are not to be had."""
        from transformers import CLIPModel, CLIPProcessor

        self.device = torch.device(device)
        self.model: Any = load(CLIPModel, source).float().eval().to(self.device)
        self.processor: Any = load(CLIPProcessor, source)
        self.card = Card(
            f"CLIP {source}", revision_of(self.model, source), "float32, TF32 off", device_name(self.device)
        )
        self._classes: dict[str, Tensor] = {}

    @torch.no_grad()
    def embedded_images(self, images: Sequence[Image.Image]) -> Tensor:
        inputs = self.processor(images=list(images), return_tensors="pt")
        with exact_matmul():
            out = self.model.vision_model(pixel_values=inputs["pixel_values"].to(self.device))
            return self.model.visual_projection(out.pooler_output)

    @torch.no_grad()
    def embedded_texts(self, texts: Sequence[str]) -> Tensor:
        inputs = self.processor(text=list(texts), return_tensors="pt", padding=True, truncation=True, max_length=77)
        with exact_matmul():
            out = self.model.text_model(**{name: value.to(self.device) for name, value in inputs.items()})
            return self.model.text_projection(out.pooler_output)

    def colours(self, crops: Sequence[Image.Image], kind: str) -> list[str]:
        if kind not in self._classes:
            self._classes[kind] = torch.stack([self.embedded_texts(own) for own in colour_texts(kind)])
        return [COLOURS[k] for k in zero_shot(self.embedded_images(crops), self._classes[kind]).tolist()]

    def similarity(self, image: np.ndarray, text: str) -> float:
        pair = self.embedded_images([Image.fromarray(image)]), self.embedded_texts([text])
        return float(F.cosine_similarity(*pair))
