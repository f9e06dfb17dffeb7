"""GenEval's 553 prompts, drawn again from numpy's PCG64 with seed 43: the file `evaluation_metadata.jsonl` byte for byte.

Source: djghosh13/geneval (MIT), commit af4902f. Every class alone once, in a drawn order; then 100 draws of each of the five
other tasks, equal ones kept once: 80, 99, 80, 94, 100 and 100 remain. The bytes are checked by their SHA-256, so that another
numpy, or a mistake here, cannot pass for the benchmark.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

SEED, DRAWS = 43, 100
SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
NUMBERS = {2: "two", 3: "three", 4: "four"}
NAMES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light", "fire hydrant",
    "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe",
    "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard", "sports ball", "kite", "baseball bat",
    "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl",
    "banana", "apple", "sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch",
    "potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard",
    "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip
UNCOLOURED = "person"  # the one class that no prompt paints

Entry = dict[str, Any]  # tag, include, perhaps exclude, prompt: one line of the file


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    """The benchmark's own: "sheeps", "skises", "knifes"."""
    return name + ("es" if name.endswith("s") else "s")


def _entry(tag: str, include: list[Entry], prompt: str, **more: Any) -> Entry:
    return {"tag": tag, "include": include, **more, "prompt": f"a photo of {prompt}"}


def _draws(rng: np.random.Generator) -> Iterator[Entry]:
    """All entries in order, equal ones not yet left out. Each draw from `rng` is part of the file's definition."""
    painted = len(NAMES) - 1
    for k in rng.choice(len(NAMES), size=len(NAMES), replace=False):
        yield _entry("single_object", [{"class": NAMES[k], "count": 1}], with_article(NAMES[k]))
    for _ in range(DRAWS):
        one, two = (NAMES[k] for k in rng.choice(len(NAMES), size=2, replace=False))
        include = [{"class": one, "count": 1}, {"class": two, "count": 1}]
        yield _entry("two_object", include, f"{with_article(one)} and {with_article(two)}")
    for _ in range(DRAWS):
        name, count = NAMES[rng.choice(len(NAMES))], int(rng.integers(2, 4, endpoint=True))
        more = [{"class": name, "count": count + 1}]
        include = [{"class": name, "count": count}]
        yield _entry("counting", include, f"{NUMBERS[count]} {plural(name)}", exclude=more)
    for _ in range(DRAWS):
        name, colour = NAMES[rng.choice(painted) + 1], COLOURS[rng.choice(len(COLOURS))]
        yield _entry("colors", [{"class": name, "count": 1, "color": colour}], f"{with_article(colour)} {name}")
    for _ in range(DRAWS):
        one, two = (NAMES[k] for k in rng.choice(len(NAMES), size=2, replace=False))
        relation = RELATIONS[rng.choice(len(RELATIONS))]
        # the object that the other one is placed by comes first
        include = [{"class": two, "count": 1}, {"class": one, "count": 1, "position": [relation, 0]}]
        yield _entry("position", include, f"{with_article(one)} {relation} {with_article(two)}")
    for _ in range(DRAWS):
        one, two = (NAMES[k + 1] for k in rng.choice(painted, size=2, replace=False))
        first, second = (COLOURS[k] for k in rng.choice(len(COLOURS), size=2, replace=False))
        include = [{"class": one, "count": 1, "color": first}, {"class": two, "count": 1, "color": second}]
        yield _entry("color_attr", include, f"{with_article(first)} {one} and {with_article(second)} {two}")


def content() -> bytes:
    """The file: one JSON object a line."""
    lines = dict.fromkeys(json.dumps(entry) for entry in _draws(np.random.default_rng(SEED)))
    return "".join(f"{line}\n" for line in lines).encode()


@functools.cache
def entries() -> tuple[Entry, ...]:
    """The 553 prompts with what is asked of each. Errors: RuntimeError where they are not the published ones."""
    made = content()
    if (found := hashlib.sha256(made).hexdigest()) != SHA256:
        raise RuntimeError(
            f"geneval: this numpy ({np.__version__}) draws other prompts: SHA-256 {found}, the published file has {SHA256}"
        )
    return tuple(json.loads(line) for line in made.decode().splitlines())
