"""ONNX files of a few nodes, written byte by byte: no package that makes them is needed."""

import json
from pathlib import Path


def varint(n):
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def text(number, content):
    content = content.encode() if isinstance(content, str) else content
    return varint(number << 3 | 2) + varint(len(content)) + content


def number(place, value):
    return varint(place << 3) + varint(value)


def value(name, *dims):
    shape = b"".join(text(1, number(1, d) if isinstance(d, int) else text(2, d)) for d in dims)
    return text(1, name) + text(2, text(1, number(1, 1) + text(2, shape)))


def model(nodes, output, *dims):
    """nodes: (op, input, output); one float input x [N, 3, S, S]."""
    graph = b"".join(text(1, text(1, x) + text(2, y) + text(4, op)) for op, x, y in nodes)
    graph += text(2, "small") + text(11, value("x", "N", 3, "S", "S")) + text(12, value(output, "N", *dims))
    return number(1, 8) + text(8, number(2, 13)) + text(7, graph)


MEANS = model([("GlobalAveragePool", "x", "pool"), ("Flatten", "pool", "y")], "y", 3)  # of R, G, B
PIXELS = model([("Flatten", "x", "y")], "y", "E")


def written(folder: Path, name: str, content: bytes, **about) -> str:
    """FILE.onnx and FILE.json; the path as a word of the command line."""
    path = folder / f"{name}.onnx"
    path.write_bytes(content)
    path.with_suffix(".json").write_text(json.dumps({"name": f"small {name}", "revision": "1", "size": 16, **about}))
    return str(path)


def planted_models(folder: Path) -> list[str]:
    """Words of the command line: nsfw is red, a watermark green, beauty blue, near-duplicates the same 16 x 16 pixels."""
    words = []
    for use, channel in (("nsfw", 0), ("watermark", 1), ("aesthetic", 2)):
        words += [f"--{use}", written(folder, use, MEANS, index=channel)]
    embedding = written(folder, "embedding", PIXELS, mean=[0.5, 0.5, 0.5], duplicate_above=0.985)
    return [
        *words,
        "--embedding",
        embedding,
        "--set",
        "nsfw_max=0.8",
        "--set",
        "watermark_max=0.8",
        "--set",
        "aesthetic_min=0.02",
    ]
