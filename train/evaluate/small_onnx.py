"""ONNX files of a few nodes, written byte by byte: no package that makes them is needed. And judges of colours, made of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def varint(n: int) -> bytes:
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def text(number: int, content: str | bytes) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | 2) + varint(len(content)) + content


def number(place: int, value: int) -> bytes:
    return varint(place << 3) + varint(value)


def value(name: str, *dims: int | str) -> bytes:
    shape = b"".join(text(1, number(1, d) if isinstance(d, int) else text(2, d)) for d in dims)
    return text(1, name) + text(2, text(1, number(1, 1) + text(2, shape)))


def model(nodes: Sequence[tuple[str, str, str]], output: str, *dims: int | str) -> bytes:
    """nodes: (op, input, output); one float input x [N, 3, S, S]."""
    graph = b"".join(text(1, text(1, x) + text(2, y) + text(4, op)) for op, x, y in nodes)
    graph += text(2, "small") + text(11, value("x", "N", 3, "S", "S")) + text(12, value(output, "N", *dims))
    return number(1, 8) + text(8, number(2, 13)) + text(7, graph)


MEANS = model([("GlobalAveragePool", "x", "pool"), ("Flatten", "pool", "y")], "y", 3)  # of R, G, B
PIXELS = model([("Flatten", "x", "y")], "y", "E")
COLOUR_THRESHOLDS = ("nsfw_max=0.8", "watermark_max=0.8", "aesthetic_min=0.02")  # of `colour_judges`


def written(folder: Path, name: str, content: bytes, **about: object) -> str:
    """FILE.onnx and FILE.json; the path as a word of the command line."""
    path = folder / f"{name}.onnx"
    path.write_bytes(content)
    path.with_suffix(".json").write_text(json.dumps({"name": f"small {name}", "revision": "1", "size": 16, **about}))
    return str(path)


def colour_judges(folder: Path) -> dict[str, str]:
    """Words of the command line by use: nsfw is red, a watermark green, beauty blue, near-duplicates the same 16 x 16 pixels."""
    channels = {"nsfw": 0, "watermark": 1, "aesthetic": 2}
    words = {use: written(folder, use, MEANS, index=channel) for use, channel in channels.items()}
    return words | {"embedding": written(folder, "embedding", PIXELS, mean=[0.5] * 3, duplicate_above=0.985)}
