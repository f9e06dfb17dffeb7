"""What prompts are about: ten categories, their sub-categories, and items, in a text file that people read and edit.

`assets/taxonomy.v1.txt` says at its head how it is written. It is a pool larger than what is drawn from it, so that its
shares, its seed and the total can be changed; what is drawn follows from the file alone, and a smaller total draws nearly a part of
what a larger one does.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

TAXONOMY = Path(__file__).parent / "assets" / "taxonomy.v1.txt"
CATEGORIES = (
    "Human",
    "Object",
    "Animal",
    "Plant",
    "Scene",
    "Food",
    "Event",
    "Fictional World",
    "Text",
    "UI and Graphic Design",
)
DIMENSIONS = ("attribute", "spatial relationship", "count", "interaction", "colour")
MOST = 4  # dimensions that one prompt tests
_WHOLE = 1e-9  # how far from 1 the sum of the shares may be, which are decimal fractions


@dataclass(frozen=True)
class Item:
    """One subject. id: by the hash of what it is, so that it is the same in every selection."""

    category: str
    sub_category: str
    name: str

    @property
    def id(self) -> str:
        return f"rl-{_digest(self.category, self.sub_category, self.name).hex()[:12]}"


@dataclass(frozen=True)
class Taxonomy:
    """pools: category -> sub-category -> names, in the order of the file. fingerprint: SHA-256 of the file."""

    total: int
    seed: int
    shares: Mapping[str, float]
    pools: Mapping[str, Mapping[str, tuple[str, ...]]]
    fingerprint: str


def read_taxonomy(path: Path = TAXONOMY) -> Taxonomy:
    """Errors: ValueError naming the line for what cannot be read, an item that is there twice, shares that do not add up to 1."""
    data = path.read_bytes()
    numbers: dict[str, int] = {}
    words: dict[str, str] = {}
    shares: dict[str, float] = {}
    pools: dict[str, dict[str, list[str]]] = {}
    seen: dict[str, int] = {}
    category = sub = ""
    for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
        where, line = f"{path}, line {number}", line.strip()
        if match := re.fullmatch(r"(total|seed) = (\d+)", line):
            numbers[match[1]] = int(match[2])
        elif match := re.fullmatch(r"@(\w+) = (.+)", line):
            words[match[1]] = match[2]
        elif match := re.fullmatch(r"# (.+?) = ([\d.]+)", line):
            category, sub = match[1], ""
            if category in pools:
                raise ValueError(f"{where}: the category {category!r} is there twice")
            shares[category], pools[category] = float(match[2]), {}
        elif match := re.fullmatch(r"## (.+)", line):
            sub = match[1]
            if not category or sub in pools[category]:
                raise ValueError(f"{where}: expected a new sub-category below a category, got {sub!r}")
            pools[category][sub] = []
        elif line and not line.startswith("#"):
            if not sub:
                raise ValueError(f"{where}: expected a sub-category before the first item, got {line[:60]!r}")
            for name in _items(line, words, where):
                if (before := seen.setdefault(name.casefold(), number)) != number or name in pools[category][sub]:
                    raise ValueError(f"{where}: {name!r} is there already, in line {before}")
                pools[category][sub].append(name)
    if missing := [name for name in ("total", "seed") if name not in numbers]:
        raise ValueError(f"{path}: expected a line like {missing[0]} = 1")
    if abs(sum(shares.values()) - 1) > _WHOLE:
        raise ValueError(f"{path}: the shares add up to {sum(shares.values()):g}, expected 1")
    frozen = {name: {s: tuple(own) for s, own in subs.items()} for name, subs in pools.items()}
    return Taxonomy(numbers["total"], numbers["seed"], shares, frozen, hashlib.sha256(data).hexdigest())


def chosen(taxonomy: Taxonomy, total: int | None = None) -> list[Item]:
    """The items of a taxonomy, `total` of them (None: the file's own), in its order. Errors: ValueError for a category whose pool
    is too small."""
    found = []
    for category, count in shared(taxonomy.total if total is None else total, taxonomy.shares).items():
        pools = taxonomy.pools[category]
        if count > (room := sum(map(len, pools.values()))):
            raise ValueError(f"taxonomy: {category} has {room} items, its share asks for {count}")
        for sub, part in zip(pools, levelled(count, [len(own) for own in pools.values()])):
            ranked = sorted(pools[sub], key=lambda name: _digest(str(taxonomy.seed), category, sub, name))
            kept = set(ranked[:part])
            found += [Item(category, sub, name) for name in pools[sub] if name in kept]
    return found


def dimensions_of(item: Item, seed: int) -> tuple[str, ...]:
    """One to four of `DIMENSIONS` (each number as often as any other), in their order, by seed and item."""
    ranked = sorted(DIMENSIONS, key=lambda name: _digest(str(seed), item.id, name))
    count = 1 + int.from_bytes(_digest(str(seed), item.id, "how many")[:8], "big") * MOST // 2**64
    return tuple(name for name in DIMENSIONS if name in ranked[:count])


def shared(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers with the sum `total`, by the method of largest remainders; of equal ones the first."""
    exact = {name: total * share for name, share in shares.items()}
    counts = {name: int(value) for name, value in exact.items()}
    rest = sorted(exact, key=lambda name: counts[name] - exact[name])  # stable
    for name in rest[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def levelled(total: int, rooms: Sequence[int]) -> list[int]:
    """`total` over rooms as equally as their sizes allow; what cannot be halved goes to the first. ValueError: no room."""
    if total > sum(rooms):
        raise ValueError(f"levelled: {total} into {sum(rooms)} places")
    level = 0
    while sum(min(room, level + 1) for room in rooms) <= total and level < max(rooms, default=0):
        level += 1
    parts = [min(room, level) for room in rooms]
    more = total - sum(parts)
    for place, room in enumerate(rooms):
        if more and room > parts[place]:
            parts[place] += 1
            more -= 1
    return parts


def _items(line: str, words: Mapping[str, str], where: str) -> list[str]:
    """The names of one line, its braces written out."""

    def choices(match: re.Match[str]) -> list[str]:
        text = match[1]
        if text.startswith("@"):
            if text[1:] not in words:
                raise ValueError(f"{where}: no line {text} = ... before it")
            text = words[text[1:]]
        return text.split("|")

    found = []
    for part in filter(None, (part.strip() for part in line.split(","))):
        fixed = re.split(r"\{[^{}]*\}", part)
        options = [choices(match) for match in re.finditer(r"\{([^{}]*)\}", part)]
        for drawn in itertools.product(*options):
            name = "".join(itertools.chain(*itertools.zip_longest(fixed, drawn, fillvalue="")))
            if "{" in name or "}" in name or "  " in name:
                raise ValueError(f"{where}: expected {{one|two}} without blanks twice, got {part[:80]!r}")
            found.append(name)
    return found


def _digest(*parts: str) -> bytes:
    return hashlib.sha256("\n".join(parts).encode()).digest()
