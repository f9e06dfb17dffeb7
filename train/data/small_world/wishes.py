"""Wish -> answer: what Mini's reasoner learns. An answer is a dense caption of CORE's classes, the ones Lens-Mini draws.

    wish, scene = Wishes(tokenizer)(seed)     # seed alone decides
    text = answer(scene)                      # 45 to 60 words, always the same of one scene, in the order of the wish

Four kinds of wishes. Captions of the world, whose answer tells the same scene. Open wishes (`open_wishes`), whose answer is a
scene that suits them. Captions of all the world's classes, where one that Mini does not draw gives way to one of its group.
Words without any meaning here, so that every wish has an end. Of captions and of open wishes in their phrasings one text in
eight is kept from training, by its words. The facts that the transformer never sees are not: trained without, a reasoner writes
"purple pear" for the purple fish that it never read of, and what it is for is to keep to the wish.

What a wish leaves open is settled, not drawn: one backdrop for each class (HOME) and one phrase of each group of the dense
grammar. A reasoner that takes the most probable token says but one thing anyway, and what is left to chance has to be learned
as chance, against what must be copied. Words without meaning alone are answered by chance: so a reasoner is unsure where it
has not understood (`lens.reasoner.SURE`).
"""

from __future__ import annotations

import functools
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .backdrops import BACKGROUNDS, allowed
from .captions import caption
from .captions import words as said
from .kinds import CORE, KINDS, PALETTE
from .layout import arrangement, placed
from .mentions import mentions, nouns_of, said_background
from .open_wishes import PHRASINGS, THEMES, Theme, held_out_wish
from .phrases import NUMBERS
from .scene import Scene, Thing
from .sprites import fitted_size
from .wording import OPPOSITE
from .world import TASKS, World, is_held_out

SHARES = {"caption": 0.58, "open": 0.27, "elsewhere": 0.07, "unknown": 0.08}
STYLES = {"brief": 0.65, "geneval": 0.35}
ASKED = {  # task -> share of the captions: two and three things, which have to be kept apart, are learned last
    "single_object": 0.06, "colors": 0.08, "two_object": 0.16, "position": 0.30,
    "counting": 0.10, "color_attr": 0.14, "row": 0.14, "text": 0.02,  # signs, whose text Mini cannot draw anyway
}  # fmt: skip
UNSEEN_FACTS = 0.25  # share of captions with a fact that the transformer's training leaves out
PAIRS = ("two_object", "position", "color_attr")
SIDE = 128
ANYTHING = (  # for words without meaning: many, none of them likely
    "a yellow star", "a red heart", "a blue balloon", "a white cup", "an orange fish", "a purple book", "a brown chair",
)  # fmt: skip
WORDS = 46  # of an answer, from which on no sentence is added
HOME = {
    "apple": "table", "car": "meadow", "heart": "pink", "star": "night", "key": "table", "book": "table",
    "umbrella": "mint", "fish": "beach", "shirt": "mint", "balloon": "meadow", "bell": "lavender", "mushroom": "meadow",
    "teapot": "table", "anchor": "beach", "boot": "meadow", "bucket": "beach", "cap": "brick", "chair": "brick",
    "cup": "table", "dress": "lavender", "moon": "night", "cloud": "meadow", "pear": "table", "bird": "meadow",
    "leaf": "meadow", "elephant": "meadow", "whale": "beach", "lock": "brick", "house": "meadow", "tree": "meadow",
    "crown": "lavender", "cactus": "sunset", "penguin": "snow", "rocket": "night", "banana": "table", "carrot": "meadow",
}  # fmt: skip
INSTEAD = {  # group -> what stands for its members that Mini does not draw
    "animal": ("bird", "elephant", "fish"), "fruit": ("pear", "apple"), "vegetable": ("carrot",), "food": ("mushroom", "banana"),
    "plant": ("tree", "leaf"), "clothing": ("shirt", "cap"), "jewel": ("crown",), "vehicle": ("car",), "building": ("house",),
    "furniture": ("chair",), "tool": ("key",), "instrument": ("bell",), "toy": ("balloon",), "luggage": ("bucket",),
    "sky": ("star", "cloud"), "symbol": ("heart",), "object": ("book", "cup"),
}  # fmt: skip


class Settled(random.Random):
    """A wording without chance: the first of whatever is to choose from, no synonym, no size that need not be said, the
    backdrop before what else may be added."""

    def random(self) -> float:
        return 0.5

    def choice(self, seq: Any) -> Any:
        return seq[0]

    def shuffle(self, *args: Any) -> None:
        pass

    def randint(self, a: int, b: int) -> int:
        return min(max(a, WORDS), b)


def answer(scene: Scene) -> str:
    """The dense caption of a scene in its one settled wording."""
    return caption(scene, Settled(), "dense")


def as_named(scene: Scene) -> Scene:
    """A scene of two things, told from the one that its wish names first: their order and its opposite relation where that is
    the second. What is said in the order of the wish is copied; in another one it has to be sorted first."""
    if scene.relation is None or len(scene.things) != 2 or scene.task not in PAIRS:
        return scene
    named = {mention.thing: mention.nouns[0] for mention in mentions(scene)}
    if named[0] < named[1]:
        return scene
    return replace(scene, things=scene.things[::-1], relation=OPPOSITE[scene.relation])


def at_home(scene: Scene) -> Scene:
    """The scene where its wish leaves it: before the backdrop that is said, else HOME of its first thing, or the first
    other one, that all of them stand out from."""
    if scene.sign is not None or said_background(scene) is not None:
        return scene
    chosen = [(thing.kind, thing.colour) for thing in scene.things]
    return replace(scene, background=_home(chosen))


def _home(chosen: Sequence[tuple[str, str | None]]) -> str:
    places = (HOME[chosen[0][0]], "mint", "lavender", "grey", *BACKGROUNDS)
    return next((place for place in places if all(place in allowed(*one) for one in chosen)), "grey")


# ------------------------------------------------------------------------------------------------ open wishes


@functools.cache
def _forms() -> dict[str, str]:
    """Every noun, singular and plural -> class."""
    return {form: kind for kind in KINDS for form in nouns_of(kind, "en")}


@functools.cache
def staged(text: str, background: str) -> Scene:
    """The scene of a short caption such as "three red balloons", "a pear and a white cup" (left to right), "a cloud above a
    tree" or "a pear, a cup and a key". Errors: ValueError for a text that is none, or a fact that is kept from training."""
    relation = "above" if " above " in text else "left"
    counts = {word: count for count, word in NUMBERS.items()} | {"a": 1, "an": 1}
    chosen: list[tuple[str, str | None]] = []
    for part in re.split(r", | and | above ", text):
        match = re.fullmatch(rf"({'|'.join(counts)}) (?:({'|'.join(PALETTE)}) )?(.+)", part)
        if match is None or match[3] not in _forms():
            raise ValueError(f"staged: {text!r}: {part!r} is no object of the world")
        kind = _forms()[match[3]]
        chosen += [(kind, match[2] or KINDS[kind].natural)] * counts[match[1]]
    many, one = len(chosen), len(set(chosen)) == 1
    task = {1: "single_object", 2: "position", 3: "row"}[many] if many == 1 or not one else "counting"
    if is_held_out(chosen):
        raise ValueError(f"staged: {text!r} is kept from training")
    if bad := [kind for kind, colour in chosen if background not in allowed(kind, colour)]:
        raise ValueError(f"staged: {text!r}: {bad[0]} does not stand out from {background}")
    pair = relation if task == "position" else None
    cells, smallest, largest, _ = arrangement(many, one, pair, SIDE, SIDE)
    room = (smallest[0] + largest[0]) / 2, (smallest[1] + largest[1]) / 2
    things = tuple(
        Thing(kind, colour, placed(fitted_size(kind, *room), cell, SIDE, SIDE))
        for (kind, colour), cell in zip(chosen, cells)
    )
    return Scene(0, "train", task, SIDE, SIDE, background, 0, pair, things, None, "", "", "")


def scenes_of(theme: Theme) -> list[Scene]:
    """Every scene that suits a theme, before every backdrop of it."""
    return [staged(text, place) for text in theme.scenes for place in theme.backdrops]


def settled(wish: str, theme: Theme) -> Scene:
    """The one of a theme's scenes that stands for a wish: any, but always the same."""
    scenes = scenes_of(theme)
    return scenes[sum(map(ord, wish)) % len(scenes)]


@functools.cache
def open_wishes() -> tuple[tuple[str, Theme], ...]:
    """Every wish with its theme."""
    return tuple((wish, theme) for theme in THEMES for wish in theme.wishes)


def phrased(wish: str, rng: random.Random) -> str:
    text = rng.choice(PHRASINGS).format(w=wish)
    return text[0].upper() + text[1:] + "." if rng.random() < 0.2 else text


def open_wish(rng: random.Random, unseen: bool) -> tuple[str, Scene]:
    """A wish in a phrasing that is, as a text, kept from training or not, and its scene. As it stands no wish is kept."""
    while True:
        wish, theme = rng.choice(open_wishes())
        text = phrased(wish, rng)
        if (held_out_wish(text) and text != wish) == unseen:
            return text, settled(wish, theme)


def unknown(rng: random.Random, tokenizer: Path) -> list[str]:
    """One to four words without meaning here: of the vocabulary, or invented, which fall into several tokens."""
    if rng.random() < 0.5:
        return rng.sample(unknown_words(tokenizer), rng.randint(1, 4))
    syllables = [
        ["".join(map(rng.choice, ("bcdfghjklmnprstvwz", "aeiou"))) for _ in range(rng.randint(2, 3))]
        for _ in range(rng.randint(1, 2))
    ]
    return ["a", *("".join(word) + rng.choice("lnrstx ").strip() for word in syllables)]


# ------------------------------------------------------------------------------------------------ pairs


@dataclass(frozen=True)
class Wishes:
    """Pairs of one split, by seed. shares: kind of wish -> share. tokenizer: folder whose words serve as unknown ones."""

    tokenizer: Path
    split: str = "train"
    shares: tuple[tuple[str, float], ...] = tuple(SHARES.items())

    def __call__(self, seed: int) -> tuple[str, Scene]:
        """The wish, and the scene that its answer tells."""
        rng, unseen = random.Random(f"wish {self.split} {seed}"), self.split == "held_out"
        kind = rng.choices([k for k, _ in self.shares], [share for _, share in self.shares])[0]
        if kind == "open":
            return open_wish(rng, unseen)
        if kind == "unknown":
            wish = " ".join(unknown(rng, self.tokenizer))
            return phrased(wish, rng), staged(rng.choice(ANYTHING), "mint")
        drawn, change = (_whole, _drawable) if kind == "elsewhere" else (_core, as_named)
        while True:
            facts = "held_out" if unseen or rng.random() < UNSEEN_FACTS else "train"
            scene = drawn(facts).scene(rng.getrandbits(40), SIDE, SIDE)
            if held_out_wish(scene.caption) == unseen and (told := change(scene)) is not None:
                return scene.caption, at_home(told)


@functools.cache
def _core(split: str) -> World:
    return World(split, ASKED, CORE, STYLES)


@functools.cache
def _whole(split: str) -> World:
    return World(split, {task: share for task, share in TASKS.items() if task != "text"}, None, STYLES)


def _drawable(scene: Scene) -> Scene | None:
    """The scene as named, with classes of CORE; None where it has them already, or has become one that is not clear."""
    scene, things = as_named(scene), []
    for thing in scene.things:
        if thing.kind in CORE:
            things.append(thing)
            continue
        choice = INSTEAD[KINDS[thing.kind].group]
        kind = choice[sum(map(ord, thing.kind)) % len(choice)]
        natural = KINDS[kind].natural
        colour = thing.colour or natural or "brown" if KINDS[kind].paint is not None else natural
        things.append(replace(thing, kind=kind, colour=colour))
    same = len({(t.kind, t.colour) for t in things}) < len({(t.kind, t.colour) for t in scene.things})
    unclear = any(scene.background not in allowed(t.kind, t.colour) for t in things)
    if tuple(things) == scene.things or same or unclear:
        return None
    return replace(scene, things=tuple(things))


@functools.cache
def unknown_words(tokenizer: Path) -> list[str]:
    """English words among the tokens that no caption and no open wish has."""
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    known = {token[1:] for token in vocabulary if re.fullmatch("Ġ[a-z]{4,}", token)}
    texts = " ".join(wish for theme in THEMES for wish in theme.wishes)
    return sorted(known - said() - set(re.findall("[a-z]+", f"{texts} {' '.join(PHRASINGS)}")))
