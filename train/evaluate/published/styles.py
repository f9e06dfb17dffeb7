"""OneIG's two style encoders and what an image is given by them: CSD (arXiv 2404.01292) and OneIG's own fine-tuned CLIP.

Both are CLIP vision transformers. Of an image each makes one normalised vector; an image's score is the mean over both encoders of
max(0, largest cosine to the reference vectors of the style asked for), three a style in the published repository.

CSD: the file `checkpoint.pth` of its training code: OpenAI's ViT-L/14 without its projection under "backbone.", and in the projection's
place "last_layer_style", all in "model_state_dict", each perhaps behind "module.". Computed in float32. Whatever else the file holds
is not read. OneIG's: a folder of transformers' `CLIPVisionModelWithProjection`, computed in bfloat16, as published.
"""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lens.formats.fingerprint import fingerprint
from lens.formats.safetensors import open_shards, stored_as

from ...data.encoders import fingerprint_of
from .judging import Card
from .models import complete, device_name, exact_matmul

SIDE = 224  # of what an encoder sees
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of CLIP, of pixels in [0, 1]
HEAD = 64  # width of an attention head, in all of OpenAI's vision transformers
# OpenAI's names -> transformers'; of a block, what comes after its number
OUTSIDE = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1.weight": "embeddings.patch_embedding.weight",
    "ln_pre.weight": "pre_layrnorm.weight",
    "ln_pre.bias": "pre_layrnorm.bias",
    "ln_post.weight": "post_layernorm.weight",
    "ln_post.bias": "post_layernorm.bias",
}
INSIDE = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


class StyleEncoder(Protocol):
    card: Card

    def embed(self, images: Sequence[np.ndarray]) -> Tensor:
        """uint8 [H, W, 3] each -> normalised [N, D]."""
        ...


def pixels(images: Sequence[np.ndarray], side: int, rounded: bool) -> Tensor:
    """Short side `side`, bicubic; the middle square; normalised: float32 [N, 3, side, side].

    rounded: an odd rest before the middle is rounded to the even number, as torchvision does, instead of down, as transformers does.
    """
    out = []
    for image in images:
        height, width = image.shape[:2]
        short = min(height, width)
        size = (int(side * width / short), int(side * height / short))
        seen = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
        left, top = (round((n - side) / 2) if rounded else (n - side) // 2 for n in size)
        out.append(np.array(seen.crop((left, top, left + side, top + side))))
    x = torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2).float() / 255
    return (x - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def unpickled(path: Path) -> Any:
    """A file of torch.save, tensors and plain values alone. Errors: ValueError naming the file."""
    try:
        with torch.serialization.safe_globals(
            [argparse.Namespace]
        ):  # CSD's training keeps its options beside the weights
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: not found") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not a file of torch.save with tensors and options alone ({said})") from None


def openai_tensors(path: Path, stored: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """OpenAI's vision transformer with CSD's head -> transformers' names, and its sizes.

    Errors: ValueError naming file and key, for one missing, one too many, or one of another shape.
    """

    def taken(key: str, *shape: int) -> Tensor:
        if key not in left:
            raise ValueError(
                f"{path}: {key} missing, expected CSD's ViT-L/14; got {', '.join(sorted(stored)[:3])}, ..."
            )
        value = left.pop(key)
        if tuple(value.shape) != shape:
            raise ValueError(f"{path}: {key} must have shape {list(shape)}, got {list(value.shape)}")
        return value.float()

    left = dict(stored)
    left.pop("last_layer_content", None)  # the other head
    first, head = left.get("backbone.conv1.weight"), left.get("last_layer_style")
    hidden = left.get("backbone.transformer.resblocks.0.mlp.c_fc.weight")
    places = left.get("backbone.positional_embedding")
    for key, value, rank in (
        ("backbone.conv1.weight", first, 4), ("last_layer_style", head, 2),
        ("backbone.transformer.resblocks.0.mlp.c_fc.weight", hidden, 2), ("backbone.positional_embedding", places, 2),
    ):  # fmt: skip
        if value is None or value.dim() != rank:
            got = f"{', '.join(sorted(stored)[:3])}, ..." if value is None else f"shape {list(value.shape)}"
            raise ValueError(f"{path}: expected {key} of {rank} dimensions, as CSD's ViT-L/14 has it, got {got}")
    assert first is not None
    assert head is not None
    assert hidden is not None
    assert places is not None
    width, patch = first.shape[0], first.shape[-1]
    numbers = {int(m[1]) for key in left if (m := re.match(r"backbone\.transformer\.resblocks\.(\d{1,4})\.", key))}
    sizes = {
        "hidden_size": width,
        "intermediate_size": hidden.shape[0],
        "num_hidden_layers": len(numbers),
        "num_attention_heads": max(1, width // HEAD),
        "patch_size": patch,
        "image_size": patch * round((places.shape[0] - 1) ** 0.5),
        "projection_dim": head.shape[1],
    }
    inner = sizes["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(OUTSIDE, (width,))
    shapes |= {"positional_embedding": (*places.shape[:1], width), "conv1.weight": (width, 3, patch, patch)}
    out = {f"vision_model.{new}": taken(f"backbone.{old}", *shapes[old]) for old, new in OUTSIDE.items()}
    wide = {"mlp.c_fc": (inner, width), "mlp.c_proj": (width, inner), "attn.out_proj": (width, width)}
    for n in range(len(numbers)):
        before, after = f"backbone.transformer.resblocks.{n}.", f"vision_model.encoder.layers.{n}."
        for part, shape in (("weight", (3 * width, width)), ("bias", (3 * width,))):
            three = taken(f"{before}attn.in_proj_{part}", *shape).chunk(3)
            out |= {f"{after}self_attn.{name}_proj.{part}": value for name, value in zip("qkv", three)}
        for old, new in INSIDE.items():
            sides = wide.get(old, (width,))
            out[f"{after}{new}.weight"] = taken(f"{before}{old}.weight", *sides)
            out[f"{after}{new}.bias"] = taken(f"{before}{old}.bias", sides[0])
    out["visual_projection.weight"] = taken("last_layer_style", width, head.shape[1]).T.contiguous()
    if left:
        raise ValueError(f"{path}: {len(left)} unexpected keys, first {min(left)!r}")
    return out, sizes


class Csd:
    """`StyleEncoder` by the checkpoint of CSD's training code. Sizes are those of its tensors; ViT-L/14's as released."""

    def __init__(self, path: Path, device: str = "cpu"):
        """Errors: ValueError naming the file."""
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        state = unpickled(path)
        state = state.get("model_state_dict") if isinstance(state, dict) else None
        if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError(f"{path}: no tensors in 'model_state_dict': not CSD's checkpoint.pth")
        named = {key.removeprefix("module."): value for key, value in state.items()}
        tensors, sizes = openai_tensors(path, named)
        self.model: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, hidden_act="quick_gelu"))
        self.model.load_state_dict(tensors)
        self.model.eval().to(device)
        self.device, self.side = torch.device(device), sizes["image_size"]
        weights = fingerprint_of(tensors[name] for name in sorted(tensors))
        self.card = Card(f"CSD {path.name}", f"local {weights}", "float32, TF32 off", device_name(self.device))

    @torch.no_grad()
    def embed(self, images: Sequence[np.ndarray]) -> Tensor:
        with exact_matmul():
            out = self.model(pixel_values=pixels(images, self.side, True).to(self.device)).image_embeds
        return F.normalize(out, dim=-1)


class OneigStyle:
    """`StyleEncoder` by OneIG's fine-tuned CLIP, a folder of transformers."""

    def __init__(self, folder: Path, device: str = "cpu"):
        """Errors: ValueError naming the folder, and the key that is missing."""
        from transformers import CLIPVisionModelWithProjection

        weights = fingerprint({"": stored_as(open_shards(folder))})[:16]
        self.device = torch.device(device)
        self.model: Any = complete(CLIPVisionModelWithProjection, folder, dtype=torch.bfloat16).eval().to(self.device)
        self.side = int(self.model.config.image_size)
        self.card = Card(f"OneIG style {folder.name}", f"local {weights}", "bfloat16", device_name(self.device))

    @torch.no_grad()
    def embed(self, images: Sequence[np.ndarray]) -> Tensor:
        x = pixels(images, self.side, False).to(self.device, torch.bfloat16)
        return F.normalize(self.model(pixel_values=x).image_embeds, dim=-1)


# ------------------------------------------------------------------------------------------------ the score


def references(path: Path, width: int) -> dict[str, Tensor]:
    """Style -> [R, D] of the user's copy. Errors: ValueError naming the file and the style."""
    found = unpickled(path)
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{path}: expected a dictionary of styles, got {type(found).__name__}")
    for style, value in found.items():
        if not isinstance(value, Tensor) or value.dim() != 2 or value.shape[1] != width:
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{path}: {style}: expected vectors of {width}, as the encoder makes them, got {got}")
    return found


def closeness(embeddings: Tensor, known: Tensor) -> list[float]:
    """[N, D], references [R, D] in the encoder's dtype -> max(0, largest cosine) of each image."""
    cosines = embeddings @ known.to(embeddings.device, embeddings.dtype).T
    return cosines.amax(-1).float().clamp(min=0).tolist()


class Styles:
    """Both encoders with their references. `scores` gives an image's of a style."""

    def __init__(self, encoders: Sequence[tuple[StyleEncoder, Path]]):
        """encoders: each with the file of its reference vectors. Errors: ValueError naming a file that does not fit."""
        grey = [np.full((SIDE, SIDE, 3), 127, np.uint8)]
        self.encoders = [(one, references(path, one.embed(grey).shape[1])) for one, path in encoders]
        self.cards = [one.card for one, _ in encoders]

    def scores(self, images: Sequence[np.ndarray], style: str) -> list[float]:
        """Errors: ValueError for a style without references."""
        columns = []
        for encoder, known in self.encoders:
            if style not in known:
                raise ValueError(f"no reference vectors of {style!r}; there are {', '.join(sorted(known)[:5])}, ...")
            columns.append(closeness(encoder.embed(images), known[style]))
        return [sum(row) / len(row) for row in zip(*columns, strict=True)]
