"""What the reasoner learns: wishes, scenes that suit them, one wording; and the reader that says what an answer tells."""

import random
from collections import Counter
from dataclasses import replace

import pytest

from lens.reasoner import Refined
from train.data.small_world.backdrops import allowed
from train.data.small_world.dense_reading import read
from train.data.small_world.kinds import CORE, KINDS
from train.data.small_world.mentions import nouns_of
from train.data.small_world.open_wishes import THEMES, held_out_wish
from train.data.small_world.wishes import (
    STYLES,
    Wishes,
    answer,
    as_named,
    at_home,
    open_wishes,
    phrased,
    scenes_of,
    settled,
    staged,
)
from train.data.small_world.wording import OPPOSITE
from train.data.small_world.world import World
from train.evaluate import reasoning
from train.networks.text_path import ROOT

TOKENIZER = ROOT / "train" / "data" / "assets" / "tokenizer"


def said(scene):
    return tuple((thing.kind, thing.colour) for thing in scene.things)


def test_every_theme_has_wishes_and_scenes_that_mini_draws():
    wishes = [wish for theme in THEMES for wish in theme.wishes]
    assert len(wishes) == len(set(wishes)) >= 400
    texts = {phrased(wish, random.Random(f"{wish} {i}")) for wish in wishes for i in range(9)}
    assert 0.1 < sum(map(held_out_wish, texts)) / len(texts) < 0.15
    for theme in THEMES:
        assert len(theme.wishes) >= 4
        for scene in scenes_of(theme):  # which checks facts and contrast
            assert {thing.kind for thing in scene.things} <= set(CORE)
            assert read(answer(scene)).things == said(scene)


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("a red dog", "grey", "'a red dog' is no object of the world"),
        ("a pink heart", "grey", "is kept from training"),
        ("a white cloud", "snow", "cloud does not stand out"),
    ],
)
def test_a_scene_that_cannot_be_is_refused(text, place, message):
    with pytest.raises(ValueError, match=message):
        staged(text, place)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_answers_tell_their_scene_and_nothing_is_left_to_chance(split):
    wishes = Wishes(TOKENIZER, split)
    asked = Counter()
    for seed in range(80):
        wish, scene = wishes(seed)
        assert wishes(seed) == (wish, scene)
        text = answer(scene)
        assert text == answer(replace(scene, seed=1, variant=1))
        reading = read(text)
        turned = scene.relation == "right" or (scene.relation == "below" and not scene.sign)
        assert reading.things == (said(scene)[::-1] if turned else said(scene))
        assert reading.relation == (OPPOSITE[scene.relation] if turned else scene.relation)
        assert reading.background == scene.background
        assert {kind for kind, _ in reading.things} <= set(CORE)
        words = wish == scene.caption or any(known in wish.lower() for known, _ in open_wishes())
        assert not words or held_out_wish(wish) == (split == "held_out")
        asked[words] += 1
    assert asked[True] > 50


def test_two_things_are_told_in_the_order_of_their_wish():
    """By the ends of the sentences: "... a red pear beneath a blue heart" -> "... a red pear and a blue heart. ... is below ..."."""
    world = World(classes=CORE, captions=STYLES, tasks={"two_object": 1, "position": 1, "color_attr": 1})
    turned = 0
    for seed in range(120):
        scene = world.scene(seed)
        told = as_named(scene)
        first, second = (KINDS[kind].noun for kind, _ in said(told))
        opening, text = answer(told).split(".")[0], scene.caption.lower()
        assert opening.endswith(f"{first} and {opening.split(' and ')[-1]}")
        assert opening.endswith(second)
        places = [min(text.find(form) for form in nouns_of(kind, "en") if form in text) for kind, _ in said(told)]
        assert places == sorted(places)
        assert (read(answer(told)).things, read(answer(told)).relation) == (said(scene), scene.relation)
        turned += told is not scene
    assert 20 < turned < 100


def test_a_backdrop_that_is_said_stays_and_another_is_at_home():
    world = World(classes=("penguin",), captions="brief", tasks={"single_object": 1})
    scenes = [world.scene(seed) for seed in range(40)]
    homes = [at_home(scene) for scene in scenes]
    assert {home.background for scene, home in zip(scenes, homes) if home.background != scene.background} == {"snow"}
    assert all(home.background in allowed("penguin", None) for home in homes)


CAR = "The picture shows a red car. The car is in the middle. The background is a plain mint wall. "
CAR += "Soft even light fills the picture. A soft shadow lies below the car. The car has soft shading. Nothing else is in view."
PAIR = "Two objects stand side by side: a red car and a blue cup. The car is on the left. The cup is on the right. The car is left "
PAIR += "of the cup. The background is a plain mint wall. The cup has soft shading. Soft even light fills the picture."
THREE = "Exactly three red cars are arranged with one above and two below. All three cars are red. The background is a plain mint "
THREE += "wall. Every car has soft shading. Soft even light fills the picture. A soft shadow lies below each car. Nothing else is in view."


def test_a_reading_is_what_a_caption_says():
    assert read(CAR).things == (("car", "red"),)
    assert (read(PAIR).things, read(PAIR).relation) == ((("car", "red"), ("cup", "blue")), "left")
    other = read(PAIR.replace("The car is left of the cup", "The cup is right of the car"))
    assert other == read(PAIR)
    swapped = PAIR.replace("a red car and a blue cup", "a blue cup and a red car")
    assert read(swapped) == read(PAIR)
    assert (read(THREE).things, read(THREE).background) == ((("car", "red"),) * 3, "mint")


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        (CAR, "below the car", "below the cup"),
        (CAR, "Nothing else", "Nothing at all"),
        (CAR, "Soft even light fills the picture", "It is night, and the sky behind is dark"),
        (CAR, " Nothing else is in view.", " Nothing else is in vi"),
        (CAR, "The picture shows a red car.", "The picture shows a red car. The image is all about a red car."),
        (CAR, " The background is a plain mint wall. Soft even light fills the picture.", ""),  # too short
        (PAIR, "The cup is on the right", "The cup is on the left"),
        (PAIR, "The car is left of the cup. ", ""),
        (PAIR, "car is left of the cup", "car is left of the car"),
        (THREE, "All three cars", "All four cars"),
        (THREE, "cars are red.", "cars are blue."),
        (THREE, "with one above and two below", "side by side"),
    ],
)
def test_what_contradicts_itself_or_is_no_sentence_is_not_read(text, old, new):
    assert old in text
    with pytest.raises(ValueError):
        read(text.replace(old, new))


def test_the_measure_sees_what_was_kept_and_what_was_not():
    """A reasoner that answers truly, one that always says the same, one that never ends, one that is unsure."""
    scenes = {scene.caption: scene for scene in reasoning.captions(24, reasoning.WITHOUT_SIGNS)}
    themes = dict(open_wishes())

    def suiting(text):
        """Of the longest wish in whatever phrasing, else of the first."""
        wish = max((w for w in themes if w in text.lower()), key=len, default="a birthday")
        return settled(wish, themes[wish])

    def true(wishes):
        told = [at_home(scenes[w]) if w in scenes else suiting(w) for w in wishes]
        return [Refined(w, answer(scene), "s") for w, scene in zip(wishes, told)]

    def same(wishes):
        return [Refined(w, CAR, "s") for w in wishes]

    def unsure(wishes):
        """Of the first seven."""
        mixed = [Refined(w, w, "s", "unsure", "40% for 'car'") for w in wishes[:7]]
        return [*mixed, *true(wishes)[7:]]

    def endless(wishes):
        return [Refined(w, w, "s", "broken") for w in wishes]

    def share(figures, group, name):
        right, asked = figures[group][name]
        return right / asked

    figures, lines = reasoning.report(true, 24, 0, 5, TOKENIZER)
    assert {right / asked for shares in figures.values() for right, asked in shares.values()} == {1.0}
    assert len(lines) == 24 + 5 + 5
    assert figures["open"]["fits"] == [5, 5]
    figures, _ = reasoning.report(same, 24, 0, 5, TOKENIZER)
    assert share(figures, "captions", "valid") == share(figures, "unknown", "ended") == 1
    assert share(figures, "captions", "class") < 0.3
    assert figures["open"]["fits"][0] <= 1
    figures, _ = reasoning.report(endless, 24, 0, 5, TOKENIZER)
    assert share(figures, "captions", "sure") == share(figures, "open", "ended") == 0
    assert figures["captions"].keys() == {"ended", "sure"}  # nothing else was asked
    figures, lines = reasoning.report(unsure, 24, 0, 5, TOKENIZER)
    told = figures["captions"]
    assert (told["ended"], told["sure"], told["valid"], told["everything"]) == ([24, 24], [17, 24], [17, 17], [17, 17])
    assert lines[0][2] == "unsure: 40% for 'car'"
