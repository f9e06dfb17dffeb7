"""Pairs of records whose embeddings are near: candidates by a search, then every cosine anew in float64.

Small sets are compared whole, in blocks of a matrix product. Large ones are searched by FAISS: an inverted file over
float16 vectors (`IndexIVFScalarQuantizer`), of which every query probes PROBES lists. Either way what is kept is decided by the
exact cosine of the stored float16 embeddings, so a pair that is found is a pair, and the order of the records changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from .records import Pairs

EXACT = 1 << 16  # records that are compared whole: 2^16 of 1,024 features are 4.4 TFLOP
NEIGHBOURS = 256  # a record's nearest that are kept: a thousand copies of one image need not be half a million pairs
PROBES = 64
BLOCK = 1024
MARGIN = 2e-3  # float16 and float32 candidates are taken so far below the floor


def near_pairs(
    embeddings: np.ndarray, places: np.ndarray, sha256: Sequence[str], floor: float, exact: int = EXACT
) -> Pairs:
    """Every pair above `floor`, places a < b, in rising order.

    embeddings: float16 [N, E], rows of any length; places: int64 [N], rising, of the records they belong to
    sha256: of the N files; a file that came before is a pair with the first of its kind (cosine 1), and searched no more
    Errors: ValueError where more than `exact` are to be compared and FAISS is not installed.
    """
    first: dict[str, int] = {}
    copies = [(first.setdefault(name, i), i) for i, name in enumerate(sha256)]
    twins = np.array([pair for pair in copies if pair[0] != pair[1]], np.int64).reshape(-1, 2)
    own = np.fromiter(first.values(), np.int64, len(first))
    rows = embeddings[own]
    found = _whole(rows, floor) if len(rows) <= exact else _searched(rows, floor)
    pairs = np.unique(np.concatenate([np.zeros((0, 2), np.int64), *found]), axis=0)
    cosine = _cosines(rows, pairs)
    near = cosine > floor
    pairs, cosine = own[pairs[near]], cosine[near]
    pairs, cosine = np.concatenate([pairs, twins]), np.concatenate([cosine, np.ones(len(twins))])
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return Pairs(places[pairs[order, 0]], places[pairs[order, 1]], cosine[order], floor)


def _unit(rows: np.ndarray, kind: type) -> np.ndarray:
    wide: np.ndarray = rows.astype(kind)
    return wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)


def _cosines(rows: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """float64 [P], in blocks: one pair's bits depend on its two rows alone."""
    out = np.empty(len(pairs))
    for start in range(0, len(pairs), 4096):
        a, b = (_unit(rows[pairs[start : start + 4096, side]], np.float64) for side in (0, 1))
        out[start : start + 4096] = np.einsum("pe,pe->p", a, b)
    return out


def _nearest(similar: np.ndarray, floor: float) -> Iterator[tuple[int, np.ndarray]]:
    """Of every row of a block its columns above the floor, at most NEIGHBOURS, the most similar."""
    near = similar > floor - MARGIN
    for row in np.flatnonzero(near.any(1)):
        columns = np.flatnonzero(near[row])
        if len(columns) > NEIGHBOURS:
            columns = columns[np.argsort(-similar[row, columns], kind="stable")[:NEIGHBOURS]]
        yield int(row), columns


def _whole(rows: np.ndarray, floor: float) -> Iterator[np.ndarray]:
    unit = _unit(rows, np.float32)
    for start in range(0, len(unit), BLOCK):
        block = unit[start : start + BLOCK]
        similar = block @ unit[start:].T
        similar[np.tril_indices(len(block))] = -2  # each pair once, and none with itself
        for row, columns in _nearest(similar, floor):
            yield np.stack([np.full(len(columns), start + row), start + columns], 1)


def _searched(rows: np.ndarray, floor: float) -> Iterator[np.ndarray]:
    try:
        import faiss
    except ImportError:
        raise ValueError(
            f"curate: near-duplicates among {len(rows)} images need FAISS: pip install -e '.[data]' (up to {EXACT} do not)"
        ) from None
    n, width = rows.shape
    lists = max(1, min(1 << 18, int(4 * n**0.5)))
    quantizer = faiss.IndexFlatIP(width)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer, width, lists, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    index.nprobe = min(lists, PROBES)
    index.train(_unit(rows[:: max(1, n // (64 * lists))], np.float32))  # k-means from a fixed seed
    for start in range(0, n, BLOCK):
        index.add(_unit(rows[start : start + BLOCK], np.float32))
    for start in range(0, n, BLOCK):
        similar, others = index.search(_unit(rows[start : start + BLOCK], np.float32), min(n, NEIGHBOURS + 1))
        row, column = np.nonzero((similar > floor - MARGIN) & (others >= 0))
        pairs = np.stack([start + row, others[row, column]], 1)
        yield np.sort(pairs[pairs[:, 0] != pairs[:, 1]], axis=1)
