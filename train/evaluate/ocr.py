"""Reading signs: RapidOCR tuned for small pictures (extra `eval`), and text scores as pure functions.

    reader = Reader()                          # ImportError with the remedy where the extra is missing
    reader.read(picture)                       # uint8 [H, W, 3] -> "TEA 5"
    reader.read(picture, box)                  # only what is inside the box (x0, y0, x1, y1)

A small picture is enlarged to SIDE pixels before text is looked for ("max": the detector shrinks what is larger and enlarges
nothing by itself). With a box (a sign that a detector found) its crop is read as one line, without text detection.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

SIDE, LINE = 256, 96
KEPT = re.compile(r"[^A-Za-z0-9\u4e00-\u9fff\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u00ff\u0152\u0153 ]")
REMEDY = "not measured: needs lens[eval]"


def available() -> bool:
    """Whether the extra is installed."""
    return importlib.util.find_spec("rapidocr_onnxruntime") is not None


class Reader:
    """RapidOCR with one thread. Errors: ImportError naming the extra."""

    def __init__(self) -> None:
        if not available():
            raise ImportError("Reader: rapidocr_onnxruntime is not installed; pip install -e '.[eval]' from a checkout")
        from rapidocr_onnxruntime import RapidOCR

        self.engine = RapidOCR(det_limit_type="max", intra_op_num_threads=1, inter_op_num_threads=1)

    def read(self, picture: np.ndarray, box: tuple[float, float, float, float] | None = None) -> str:
        """uint8 [H, W, 3] -> the words from left to right, top to bottom ("" where none are seen)."""
        from PIL import Image

        if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
            raise ValueError(f"Reader.read: picture {picture.dtype} {picture.shape}, expected uint8 [H, W, 3]")
        image = Image.fromarray(picture)
        if box is not None:
            part = image.crop(
                (
                    max(0, round(box[0])),
                    max(0, round(box[1])),
                    min(image.width, round(box[2])),
                    min(image.height, round(box[3])),
                )
            )
            if min(part.size) < 4:
                return ""
            part = part.resize((max(1, round(part.width * LINE / part.height)), LINE), Image.Resampling.BICUBIC)
            found, _ = self.engine(
                np.ascontiguousarray(np.asarray(part)[..., ::-1]), use_det=False, use_cls=False, use_rec=True
            )
            return " ".join(line[0] for line in found or [] if line[0])
        scale = max(1.0, SIDE / max(image.size))
        large = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
        found, _ = self.engine(np.ascontiguousarray(np.asarray(large)[..., ::-1]), use_cls=False)
        lines = sorted(found or [], key=lambda line: (round(line[0][0][1] / (0.15 * large.height)), line[0][0][0]))
        return " ".join(line[1] for line in lines)


def same_text(asked: str, read: str) -> bool:
    """Equal but for blanks, case and punctuation."""
    return squeezed(asked) == squeezed(read)


def squeezed(text: str) -> str:
    return re.sub(r"[^0-9a-z\u00c0-\uffff]", "", text.lower())


def cleaned(text: str) -> str:
    """OneIG's filter: letters, digits, Chinese characters, French accents and blanks stay; blanks collapse."""
    return " ".join(KEPT.sub("", text).split())


def edit_distance(one: Sequence, two: Sequence) -> int:
    """Levenshtein: insertions, deletions and substitutions that turn one into the other."""
    row = list(range(len(two) + 1))
    for i, a in enumerate(one, 1):
        previous, row[0] = row[0], i
        for j, b in enumerate(two, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (a != b))
    return row[-1]


def text_score(pairs: Sequence[tuple[str, str]], limit: int = 100) -> dict[str, float]:
    """OneIG's text score of (asked, read) pairs, case-sensitive after `cleaned`.

    ED = mean edit distance, CR = share exact, WAC = sum of multiset word matches / sum of asked words,
    score = 1 - min(limit, ED) (1 - CR) (1 - WAC) / limit; limit is 100 for English, 50 for Chinese.
    Errors: ValueError where no pair, or no asked word, is left.
    """
    clean = [(cleaned(a), cleaned(r)) for a, r in pairs]
    words = sum(len(a.split()) for a, _ in clean)
    if not words:
        raise ValueError(f"text_score: {len(clean)} pairs with no asked word, expected at least one")
    ed = sum(edit_distance(a, r) for a, r in clean) / len(clean)
    cr = sum(a == r for a, r in clean) / len(clean)
    wac = sum((Counter(a.split()) & Counter(r.split())).total() for a, r in clean) / words
    return {"ED": ed, "CR": cr, "WAC": wac, "score": 1 - min(limit, ed) * (1 - cr) * (1 - wac) / limit}
