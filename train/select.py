"""Stage "select": the best images under quotas, and nested subsets: lists that `shards` and `caption` take.

    python -m train select --rows captions.jsonl --join scores/ --quality aesthetic --total 100000 --out balanced.jsonl
    python -m train select --rows captions.jsonl --join scores/ classes.jsonl --quality aesthetic --total 1000 \\
        --shares portrait=0.3 landscape=0.3 text-rich=0.4 --allow-short --out some.jsonl
    python -m train select --rows captions.jsonl --subset 0.1625 --out lens_130m.jsonl     # 130M of 800M, and its half and quarter
    python -m train shards --images photos/ --captions balanced.jsonl --out shards/balanced

Rows and what is joined to them by key (else by file) are JSON lines or Parquet, files or folders of them. --total keeps, of every value of
--by (scenario) that has a share, the rows of the highest --quality; of equal ones those whose key has the smaller hash. Without
--shares the five named scenarios have a fifth each, which is the paper's balanced set for distillation; "other" and "unknown" have
none. A value with too few rows is an error that says how many there are, or with --allow-short a smaller set.

--subset keeps a share of the keys by their hash alone, so a smaller share lies within a larger one; every row then says
in `subsets` whether it is in the half and the quarter of what was kept.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import heapq
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lens.formats.files import write_json

from .data.captions import SCENARIOS
from .data.prompts import SUBSETS
from .data.sources import fraction
from .data.tables import read_rows
from .data.taxonomy import shared
from .loop.checkpoints import write_text
from .loop.clock import positive
from .report import bars, page, table

BALANCED = dict.fromkeys(SCENARIOS[:5], 0.2)
ENOUGH = 1e-6  # how far from 1 the sum of shares may be

Row = dict[str, Any]


def key_of(row: Mapping[str, Any]) -> str:
    """Errors: ValueError for a row without one."""
    key = row.get("key") or row.get("file")
    if not isinstance(key, str):
        raise ValueError(f"select: a row has neither key nor file: {str(dict(row))[:120]}")
    return key


def joined(rows: Iterable[Row], others: Sequence[Path], columns: Sequence[str]) -> Iterator[Row]:
    """Rows with those of `columns` that the other lists have for their key. In memory: the other lists, of these columns alone.

    Errors: ValueError for a key that a list has twice.
    """
    more: dict[str, Row] = {}
    for path in others:
        seen = set()
        for row in read_rows(path, ("key", "file", *columns)):
            key = key_of(row)
            if key in seen:
                raise ValueError(f"{path}: the key {key!r} is there twice")
            seen.add(key)
            more.setdefault(key, {}).update({name: row[name] for name in columns if row.get(name) is not None})
    seen = set()
    for row in rows:
        key = key_of(row)
        if key in seen:
            raise ValueError(f"--rows: the key {key!r} is there twice")
        seen.add(key)
        plain = {
            name: value for name, value in row.items() if not isinstance(value, bytes)
        }  # embeddings are no list's business
        yield {**plain, **more.get(key, {})}


def best(
    rows: Iterable[Row], total: int, shares: Mapping[str, float], by: str, quality: str
) -> tuple[dict[str, list[Row]], dict[str, int], collections.Counter[str]]:
    """(value -> its best rows, best first; value -> how many were asked for; why rows had no part: reason -> count).

    The order of the rows changes nothing. In memory: `total` rows.
    """
    asked = shared(total, shares)
    heaps: dict[str, list[tuple[float, int, Row]]] = {value: [] for value in shares}
    out: collections.Counter[str] = collections.Counter()
    for row in rows:
        value, score = row.get(by), row.get(quality)
        if not isinstance(value, str) or value not in heaps:
            out[f"{by} {value}"] += 1
        elif isinstance(score, bool) or not isinstance(score, int | float) or math.isnan(score):
            out[f"no {quality}"] += 1
        elif asked[value]:
            entry = float(score), -_number(key_of(row)), row
            heap = heaps[value]
            if len(heap) < asked[value]:
                heapq.heappush(heap, entry)
            else:
                heapq.heappushpop(heap, entry)
    found = {
        value: [row for _, _, row in sorted(heap, key=lambda e: e[:2], reverse=True)] for value, heap in heaps.items()
    }
    return found, asked, out


def subset(rows: Iterable[Row], share: float) -> Iterator[Row]:
    """Rows whose key's place in [0, 1) is below a share, with the nested parts of that share that they belong to."""
    for row in rows:
        place = fraction(key_of(row))
        if place < share:
            yield {**row, "subsets": [name for name, part in SUBSETS.items() if place < share * part]}


def shares_of(words: Sequence[str]) -> dict[str, float]:
    """From VALUE=SHARE. Errors: ValueError naming the word, or the sum."""
    found: dict[str, float] = {}
    for word in words:
        value, _, text = word.rpartition("=")
        try:
            found[value] = float(text)
        except ValueError:
            value = ""
        if not value or not 0 <= found[value] <= 1:
            raise ValueError(f"--shares {word}: expected VALUE=SHARE with a share in [0, 1]")
    if abs(sum(found.values()) - 1) > ENOUGH:
        raise ValueError(f"--shares: they add up to {sum(found.values()):g}, expected 1")
    return found


def _number(key: str) -> int:
    """The key's hash; unlike `fraction`, so that a subset and a tie have nothing to do with each other."""
    return int.from_bytes(hashlib.sha256(f"select {key}".encode()).digest()[:8], "big")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows", type=Path, required=True, metavar="PATH", help="JSON lines or Parquet, with key or file"
    )
    parser.add_argument(
        "--join", type=Path, nargs="+", default=[], metavar="PATH", help="more columns for the same keys"
    )
    parser.add_argument("--total", type=positive, help="rows to keep under the shares")
    parser.add_argument("--quality", default="aesthetic", metavar="COLUMN", help="more is better (default: aesthetic)")
    parser.add_argument("--by", default="scenario", metavar="COLUMN", help="what has shares (default: scenario)")
    parser.add_argument(
        "--shares", nargs="+", metavar="VALUE=SHARE", help="adding up to 1 (default: the scenarios, equal)"
    )
    parser.add_argument("--allow-short", action="store_true", help="keep fewer where a value has too few rows")
    parser.add_argument(
        "--subset", type=float, metavar="SHARE", help="first keep this share of the keys, by their hash"
    )
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines")


def run(options: argparse.Namespace) -> int:
    if options.total is None and options.subset is None:
        raise ValueError("select: expected --total, --subset or both")
    if options.subset is not None and not 0 < options.subset <= 1:
        raise ValueError(f"--subset: expected a share in (0, 1], got {options.subset}")
    rows = joined(read_rows(options.rows), options.join, (options.quality, options.by))
    if options.subset is not None:
        rows = subset(rows, options.subset)
    settings: dict[str, Any] = {
        "rows": options.rows.name,
        "join": [p.name for p in options.join],
        "subset": options.subset,
    }
    if options.total is None:
        kept = list(rows)
    else:
        shares = BALANCED if options.shares is None else shares_of(options.shares)
        found, asked, out = best(rows, options.total, shares, options.by, options.quality)
        short = {value: len(own) for value, own in found.items() if len(own) < asked[value]}
        reasons = ", ".join(f"{count} with {reason}" for reason, count in out.most_common(5)) or "none"
        if short and not options.allow_short:
            value = next(iter(short))
            raise ValueError(
                f"select: {short[value]} rows of {options.by} {value!r}, expected {asked[value]}; left out: {reasons}; "
                "ask for fewer, or give --allow-short"
            )
        kept = [row for own in found.values() for row in own]
        settings |= {
            "quality": options.quality,
            "by": options.by,
            "shares": shares,
            "asked": asked,
            "left_out": dict(out),
        }
        settings["kept"] = {value: len(own) for value, own in found.items()}
        print(f"kept {settings['kept']}; too few of {', '.join(short) or 'none'}; left out: {reasons}")
    if not kept:
        raise ValueError(f"select: no row of {options.rows} is left")
    write_text(options.out, "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in kept))
    write_json(options.out.with_suffix(".manifest.json"), {**settings, "selected": len(kept)})
    counts = dict(collections.Counter(str(row.get(options.by)) for row in kept).most_common())
    content = [(options.by.capitalize(), bars(options.by, counts)), ("Settings", table(settings))]
    write_text(options.out.with_suffix(".html"), page("Selected", content))
    print(f"{options.out}: {len(kept)} rows")
    return 0
