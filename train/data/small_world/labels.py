"""What each latent token of a scene shows: the class and the colour of the object on it, from the exact sprites."""

from __future__ import annotations

import numpy as np
import torch

from .kinds import KINDS, PALETTE
from .scene import Scene
from .sprites import sprite
from .world import World

TOKEN = 16  # pixels
COVER = 0.25  # a token's object covers more than this share of its pixels
CLASSES = ("none", *sorted(KINDS), "sign")
COLOURS = ("none", *PALETTE)
_CLASS = {name: i for i, name in enumerate(CLASSES)}
_COLOUR = {name: i for i, name in enumerate(COLOURS)}


def _token_means(cover: np.ndarray) -> np.ndarray:
    """float32 [H, W] -> means of 16x16 blocks [H/16, W/16]."""
    h, w = cover.shape[0] // TOKEN, cover.shape[1] // TOKEN
    return cover.reshape(h, TOKEN, w, TOKEN).mean((1, 3))


def token_labels(scene: Scene) -> np.ndarray:
    """Scene -> int64 [H/16, W/16, 2]: indices into CLASSES and COLOURS of the object that covers most of each token.

    Covered is what an object's alpha hides and nothing drawn later hides again. A token of which no object covers more
    than COVER has ("none", "none"); an object without one true colour word has its class and "none". A sign is class "sign"
    in the colour of its paper.
    """
    layers: list[tuple[int, int, tuple[int, int, int, int], np.ndarray | float]] = []  # class, colour, box, 1 - alpha
    if scene.sign is not None:  # in the order of World.render: a sign lies behind
        layers.append((_CLASS["sign"], _COLOUR[scene.sign.paper], scene.sign.box, 0.0))
    for t in scene.things:
        keep = sprite(t.kind, t.colour, t.box[2] - t.box[0], t.box[3] - t.box[1]).keep[..., 0]
        layers.append((_CLASS[t.kind], _COLOUR[t.colour or "none"], t.box, keep))
    seen = np.ones((scene.height, scene.width), np.float32)  # share of a pixel that later layers leave in sight
    shares = np.full((1 + len(layers), scene.height // TOKEN, scene.width // TOKEN), COVER, np.float32)
    for index in reversed(range(len(layers))):
        x0, y0, x1, y1 = layers[index][2]
        left, cover = layers[index][3], np.zeros_like(seen)
        cover[y0:y1, x0:x1] = (1 - left) * seen[y0:y1, x0:x1]
        seen[y0:y1, x0:x1] *= left
        shares[1 + index] = _token_means(cover)
    names = np.array([(0, 0), *(layer[:2] for layer in layers)], np.int64)
    return names[shares.argmax(0)]


def labelled(seeds: range, side: int) -> tuple[np.ndarray, torch.Tensor]:
    """Scenes of all classes and tasks: pixels uint8 [n, side, side, 3], token labels int64 [n, side/16, side/16, 2]."""
    world, pictures, labels = World(), [], []
    for start in range(seeds.start, seeds.stop, 500):
        scenes, pixels = world.batch(list(range(start, min(start + 500, seeds.stop))), side, side)
        pictures.append(pixels)
        labels.append(np.stack([token_labels(scene) for scene in scenes]))
    return np.concatenate(pictures), torch.from_numpy(np.concatenate(labels))
