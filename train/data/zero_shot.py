"""Classes by words: an image belongs to the class whose phrases its embedding is nearest to, or to none.

A class's direction is the mean of its phrases' unit embeddings, made unit again; the probability is softmax(scale * cosine) over the
classes, CLIP's own. Where the largest is below `least`, the image is "unknown".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

PHRASES = Path(__file__).parent / "assets" / "class_phrases.v1.json"
UNKNOWN = "unknown"
SCALE = 100.0  # CLIP's trained logit scale, at which its softmax is meant
LEAST = 0.4  # ours: no paper says when a class is unknown


class Embedder(Protocol):
    """by: what stands beside a class; both give unit float32 [N, E] of one space."""

    by: str

    def texts(self, texts: Sequence[str]) -> np.ndarray: ...

    def images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 [H, W, 3], of any sizes."""
        ...


def phrases() -> dict[str, dict[str, list[str]]]:
    """Question ("scenario", "category") -> class -> phrases."""
    table: dict[str, dict[str, list[str]]] = json.loads(PHRASES.read_text(encoding="utf-8"))
    return table


def directions(classes: Mapping[str, Sequence[str]], embedder: Embedder) -> np.ndarray:
    """Unit float32 [classes, E]."""
    return unit(np.stack([embedder.texts(own).mean(0) for own in classes.values()]))


def classified(
    embeddings: np.ndarray, classes: Sequence[str], rows: np.ndarray, least: float = LEAST, scale: float = SCALE
) -> list[tuple[str, float]]:
    """Unit [N, E] and unit [classes, E] -> of each image the class, or "unknown", and the largest probability.

    Errors: ValueError where the two are not of one space.
    """
    if embeddings.ndim != 2 or embeddings.shape[1] != rows.shape[1]:
        raise ValueError(
            f"classified: embeddings {list(embeddings.shape)}, expected [N, {rows.shape[1]}] of the same model"
        )
    logits = scale * embeddings.astype(np.float64) @ rows.astype(np.float64).T
    chances = np.exp(logits - logits.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    best = chances.argmax(1)
    return [
        (classes[place] if own[place] >= least else UNKNOWN, float(own[place])) for place, own in zip(best, chances)
    ]


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; a row of zeros stays."""
    return (rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12)).astype(np.float32)


class Clip:
    """CLIP in the Transformers layout from a folder, both of its sides. Errors: ValueError naming the folder."""

    def __init__(self, folder: Path, device: str = "cpu"):
        from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: no config.json: expected a CLIP checkpoint in the Transformers layout")
        self.device, self.by = torch.device(device), folder.name
        try:
            self.processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, report = CLIPModel.from_pretrained(folder, local_files_only=True, output_loading_info=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder}: cannot be loaded: {error}") from None
        if wrong := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
            raise ValueError(f"{folder}: no weights, or of another shape, for {wrong[0]} and {len(wrong) - 1} others")
        self.model: Any = model.to(self.device).eval()

    def texts(self, texts: Sequence[str]) -> np.ndarray:
        given = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        with torch.inference_mode():
            pooled = self.model.text_model(input_ids=given.input_ids, attention_mask=given.attention_mask).pooler_output
            return unit(self.model.text_projection(pooled).float().cpu().numpy())

    def images(self, images: Sequence[np.ndarray]) -> np.ndarray:
        given = self.processor(images=list(images), return_tensors="pt")["pixel_values"].to(self.device)
        with torch.inference_mode():
            pooled = self.model.vision_model(pixel_values=given).pooler_output
            return unit(self.model.visual_projection(pooled).float().cpu().numpy())
