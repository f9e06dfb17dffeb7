"""Captions are true: objects, colours, numbers, relations, places, sizes and texts read back from the words."""

import random
import re
from dataclasses import replace
from itertools import pairwise

import pytest

from train.data.small_world import dense, dense_phrases, grammar, phrases, translations
from train.data.small_world.captions import STYLES, can_say, caption, words
from train.data.small_world.kinds import KINDS, PALETTE
from train.data.small_world.layout import place_of, size_of
from train.data.small_world.phrases import NUMBERS
from train.data.small_world.scene import Scene, Thing, is_unusual
from train.data.small_world.translations import LANGUAGES
from train.data.small_world.wording import OPPOSITE, with_article
from train.data.small_world.world import CAPTIONS, World

NOUNS = {form.lower(): name for name, kind in KINDS.items() for form in (kind.noun, kind.plural, *kind.also)}
COLOUR = "|".join(PALETTE)
SIZE_WORDS = {
    word: size for table in (phrases.SIZES, dense_phrases.SIZES) for size, group in table.items() for word in group
}
MENTION = re.compile(
    rf"(?:\b({'|'.join(sorted(SIZE_WORDS, key=len, reverse=True))}) )?(?:\b({COLOUR}) )?"
    rf"\b({'|'.join(map(re.escape, sorted(NOUNS, key=len, reverse=True)))})\b"
)
PHRASE = {p: r for r, group in dense_phrases.RELATIONS.items() for p in group}
RELATION = re.compile("|".join(sorted(PHRASE, key=len, reverse=True)))
PLACE = {p: place for place, group in dense_phrases.PLACES.items() for p in group}

SURROUNDINGS = sorted(  # (as said, as listed, pattern) of every background and every sentence on light; longest first
    (
        (form := source.lower().replace("it all", word), source, re.compile(rf"(?:^|[ ,]){re.escape(form)}(?=$|[ .])"))
        for table in (grammar.CLAUSES, dense.BEHIND, dense.LIT)
        for source in {p for group in table.values() for p in group}
        for word in (("it", "them") if "it all" in source else ("it",))
    ),
    key=lambda entry: (-len(entry[0]), entry[0]),
)


@pytest.fixture(scope="module")
def scenes():
    """Of both splits and three buckets, before photographs as well; whatever caption they came with."""
    out = []
    for split, size, count, share in (
        ("train", (64, 64), 500, 0.0),
        ("held_out", (64, 64), 150, 0.0),
        ("train", (96, 144), 150, 0.0),
        ("train", (64, 64), 300, 0.4),
    ):
        world = World(split, captions="brief", photographs=share)
        out += [world.scene(seed, *size) for seed in range(count)]
    return out


def said(scenes, style):
    for scene in scenes:
        if can_say(scene, style):
            yield scene, caption(scene, random.Random(f"test {scene.seed}"), style)


def objects_only(scene: Scene, text: str) -> str:
    """The caption in lower case without its sign's text and without what it says of background and light."""
    if scene.sign:
        assert text.count(f'"{scene.sign.text}"') == 1, text
        text = text.replace(f'"{scene.sign.text}"', '"..."')
    assert text.count('"') == (2 if scene.sign else 0)
    text = text.lower()
    own = {*grammar.CLAUSES[scene.background], *dense.BEHIND[scene.background]}
    for form, source, pattern in SURROUNDINGS:
        if form in text and pattern.search(text):
            assert source.endswith(".") or source in own, (source, scene.background, text)
            text = text.replace(form, "~")
    return text


def check_objects(scene: Scene, text: str) -> None:
    text = objects_only(scene, text)
    things = {t.kind: t for t in scene.things}
    coloured, named = set(), set()
    for size, colour, word in MENTION.findall(text):
        kind = NOUNS[word]
        assert kind in things, (word, text)
        named.add(kind)
        if colour:
            coloured.add(kind)
            assert colour == things[kind].colour, text
        if size:
            assert SIZE_WORDS[size] == size_of(things[kind].box, scene.height, scene.width), (size, text)
        if len(scene.things) > 1 and scene.task != "counting":
            assert word != KINDS[kind].plural or word == KINDS[kind].noun, text
    assert named == set(things), text
    for kind, thing in things.items():
        natural = thing.colour is None or thing.colour == KINDS[kind].natural
        assert kind in coloured or natural, text


NUMBERED = re.compile(
    rf"\b({'|'.join(NUMBERS.values())}) (?:(?:{COLOUR}) )?"
    rf"(?:{'|'.join(map(re.escape, sorted(NOUNS, key=len, reverse=True)))})\b"
)


def check_numbers(scene: Scene, text: str) -> None:
    found = set(NUMBERED.findall(text.lower()))
    count = len(scene.things)
    if scene.task == "counting" and count > 1:
        assert found == {NUMBERS[count]}, text
    else:
        assert found <= {"one"}, text


def stated_relations(text: str) -> set[tuple[str, str, str]]:
    """(class or sign, relation, class or sign) wherever a relation phrase is all that lies between two of them."""
    parts = re.compile(MENTION.pattern + r"|\bsign\b")
    out = set()
    for sentence in re.split(r"(?<=\.) ", text):
        found = list(parts.finditer(sentence))
        for a, b in pairwise(found):
            hit = RELATION.findall(sentence[a.end() : b.start()])
            if len(hit) == 1 and "," not in sentence[a.end() : b.start()]:
                out.add((NOUNS.get(a[3], "sign"), PHRASE[hit[0]], NOUNS.get(b[3], "sign")))
    return out


def is_true(scene: Scene, relation: tuple[str, str, str]) -> bool:
    boxes = {t.kind: t.box for t in scene.things} | ({"sign": scene.sign.box} if scene.sign else {})
    a, b = boxes[relation[0]], boxes[relation[2]]
    return {"left": a[2] <= b[0], "right": b[2] <= a[0], "above": a[3] <= b[1], "below": b[3] <= a[1]}[relation[1]]


@pytest.mark.parametrize("style", ["geneval", "brief", "dense"])
def test_objects_colours_sizes_and_numbers_are_true(scenes, style):
    for scene, text in said(scenes, style):
        check_objects(scene, text)
        check_numbers(scene, text)


@pytest.mark.parametrize("style", ["geneval", "dense"])
def test_relations_are_true_and_stated(scenes, style):
    stated = 0
    for scene, text in said(scenes, style):
        found = stated_relations(objects_only(scene, text))
        assert all(is_true(scene, one) for one in found), (found, text)
        if scene.task == "position" or (style == "dense" and scene.relation):
            assert found, text
            stated += 1
        if scene.task == "row":
            order = list(dict.fromkeys(NOUNS[m[2]] for m in MENTION.findall(objects_only(scene, text))))
            assert order == [t.kind for t in scene.things], text
    assert stated > 50


def test_brief_relations_are_true_and_stated(scenes):
    """Against every template: which relations a caption can be read as."""
    checked = 0
    article = r"an? (?:[\w-]+ ){0,3}?"
    for scene, text in said(scenes, "brief"):
        if scene.task != "position":
            continue
        bare = text.lower()
        forms = [
            "(?:" + "|".join(re.escape(n) for n, kind in NOUNS.items() if kind == t.kind) + ")" for t in scene.things
        ]
        found = set()
        for relation, templates in phrases.RELATIONS.items():
            for template in templates:
                for (x, y), name in ((forms, relation), (forms[::-1], OPPOSITE[relation])):
                    pattern = re.escape(template).replace(r"\{x\}", article + x).replace(r"\{y\}", article + y)
                    if re.match(rf"{pattern}(?:$|[ ,.])", bare):
                        found.add(name)
        assert found == {scene.relation}, text
        checked += 1
    assert checked > 50


def test_dense_places_are_true(scenes):
    pattern = re.compile("|".join(re.escape(p) for p in sorted(PLACE, key=len, reverse=True)))
    seen = set()
    for scene, text in said(scenes, "dense"):
        things = {t.kind: t for t in scene.things}
        for sentence in re.split(r"(?<=\.) ", objects_only(scene, text)):
            kinds = {NOUNS[m[2]] for m in MENTION.findall(sentence)}
            hits = pattern.findall(sentence)
            if len(kinds) == 1 and len(hits) == 1 and "side of" not in sentence and scene.task != "counting":
                box = things[kinds.pop()].box
                assert PLACE[hits[0]] == place_of(box, scene.height, scene.width), sentence
                seen.add(PLACE[hits[0]])
    assert len(seen) == 9


def test_unusual_sizes_and_places_are_always_said():
    world = World(tasks={"colors": 1.0, "single_object": 1.0})
    checked = 0
    for seed in range(700):
        scene = world.scene(seed)
        if not is_unusual(scene):
            continue
        size, place = (f(scene.things[0].box, 64, 64) for f in (size_of, place_of))
        assert not can_say(scene, "geneval")
        assert not can_say(scene, "translated")
        for style, sizes, places in (
            ("brief", phrases.SIZES, phrases.PLACES),
            ("dense", dense_phrases.SIZES, dense_phrases.PLACES),
        ):
            text = caption(scene, random.Random(seed), style).lower()
            if size in ("small", "huge"):
                assert any(f" {word} " in text or text.startswith(word) for word in sizes[size]), text
            if place != ("middle", "middle"):
                assert any(p in text for p in places[place]), text
        checked += 1
    assert checked > 60


def test_sign_colours_are_said_unless_black_on_white(scenes):
    world = World(tasks={"text": 1.0}, captions="brief")
    for seed in range(200):
        scene = world.scene(seed)
        usual = (scene.sign.paper, scene.sign.ink) == ("white", "black")
        assert can_say(scene, "geneval") == usual
        for style in ("brief", "dense"):
            text = objects_only(scene, caption(scene, random.Random(seed), style))
            around = " ".join(s for s in re.split(r"(?<=\.) ", text) if '"..."' in s or "letters" in s)
            if not usual or style == "dense":
                assert re.search(rf"\b{scene.sign.paper} (sign|board)\b|\bon {scene.sign.paper}\b", around), text
                assert re.search(rf"\b{scene.sign.ink} (letters|text|rim)\b|\bin {scene.sign.ink}\b", around), text


def test_geneval_captions_have_the_benchmark_s_forms():
    def of(task, relation, *things, text=None):
        sign = None
        if text:
            base = World(tasks={"text": 1.0}).scene(0).sign
            sign = replace(base, text=text, paper="white", ink="black")
        box = (12, 12, 52, 52)
        placed = tuple(Thing(kind, colour, box) for kind, colour in things)
        scene = Scene(0, "train", task, 64, 64, "grey", 0, relation, placed, sign, "", "", "")
        return {caption(scene, random.Random(i), "geneval") for i in range(20)}

    assert of("colors", None, ("guitar", None)) == {"a photo of a guitar"}
    assert of("colors", None, ("umbrella", "yellow")) == {"a photo of a yellow umbrella"}
    assert of("colors", None, ("apple", "red")) == {"a photo of a red apple"}
    assert of("single_object", None, ("apple", "red")) == {"a photo of an apple"}
    assert of("two_object", "left", ("car", "red"), ("cat", None)) == {"a photo of a car and a cat"}
    assert of("counting", None, *[("cat", None)] * 5) == {"a photo of five cats"}
    assert of("position", "above", ("owl", None), ("umbrella", "blue")) == {
        "a photo of an owl above a blue umbrella",
        "a photo of a blue umbrella below an owl",
    }
    assert of("position", "left", ("owl", None), ("tree", "green")) == {
        "a photo of an owl left of a tree",
        "a photo of a tree right of an owl",
    }
    assert of("color_attr", "left", ("mushroom", "brown"), ("boot", "orange")) == {
        "a photo of a brown mushroom and an orange boot"
    }
    assert of("text", None, text="OPEN") == {'a photo of a sign that says "OPEN"'}
    assert of("text", "above", ("butterfly", None), text="TEA 5") == {
        'a photo of a butterfly and a sign that says "TEA 5"'
    }


def test_dense_captions_have_40_to_100_words_and_are_well_formed(scenes):
    orders, lengths = set(), []
    for _, text in said(scenes, "dense"):
        count = dense.count_words(text)
        lengths.append(count)
        assert dense.MIN_WORDS <= count <= dense.MAX_WORDS, text
        assert not re.search(r"(?<!gap between )\b(them|they)\b|[{}~]|  |\.\.|,\.", text.lower()), text
        assert not re.search(r"\ba [aeio]|\ban [^aeiouh]", text.lower()), text
        sentences = re.split(r"(?<=\.) ", text)
        assert all(s[0].isupper() and s.endswith(".") for s in sentences), text
        assert len(set(sentences)) == len(sentences)
        orders.add(tuple(s.split()[0] for s in sentences[:2]))
    assert len(lengths) >= 500
    assert max(lengths) - min(lengths) > 40
    assert len(orders) > 50


def test_brief_captions_are_short_and_well_formed(scenes):
    for _, text in said(scenes, "brief"):
        assert 2 <= len(text.split()) <= 32, text
        assert not re.search(r"\ba [aeio]|\ban [^aeiouh]|[{}~]|  |it all", text.lower()), text


def test_the_mix_and_its_languages():
    world = World()
    scenes = [world.scene(seed) for seed in range(3000)]
    for style, share in CAPTIONS.items():
        found = sum(s.style == style for s in scenes) / len(scenes)
        assert (0.3 * share if style in ("translated", "geneval") else 0.9 * share) < found < share + 0.1, style
    assert {s.language for s in scenes if s.style == "translated"} == set(LANGUAGES)
    assert {s.language for s in scenes if s.style != "translated"} == {"en"}


def test_every_word_is_in_words():
    known = words(photographs=True)
    english = known - translations.words()
    assert len(english) <= 900
    assert words() < known
    assert {"a", "an", "red", "brown", "five", "sign"} <= known
    for style in STYLES:
        world = World(captions=style, photographs=0.4)
        for seed in range(400):
            scene = world.scene(seed)
            text = scene.caption
            if scene.sign:
                text = text.replace(f'"{scene.sign.text}"', "")
            if scene.language in ("zh", "ja"):
                pieces = sorted((w for w in known if not w.isascii() or w == "T恤"), key=len, reverse=True)
                rest = re.sub("|".join(map(re.escape, pieces)), "", text)
                assert rest in ("", "T"), (text, rest)
            else:
                unknown = {w.strip(',.;:"').lower() for w in text.split()} - {w.lower() for w in known} - {""}
                assert not unknown, (unknown, text)


def test_translated_phrases_agree():
    def phrase(kind, colour, language):
        return translations.phrase(Thing(kind, colour, (0, 0, 1, 1)), language, colour)

    assert phrase("apple", "green", "fr") == "une pomme verte"
    assert phrase("book", "white", "fr") == "un livre blanc"
    assert phrase("car", "white", "fr") == "une voiture blanche"
    assert phrase("book", "orange", "fr") == "un livre orange"
    assert phrase("apple", "red", "es") == "una manzana roja"
    assert phrase("fish", "purple", "es") == "un pez morado"
    assert phrase("anchor", "black", "es") == "un ancla negra"
    assert phrase("star", "brown", "es") == "una estrella marrón"
    assert phrase("apple", "red", "zh") == "红色的苹果"
    assert phrase("apple", "red", "ja") == "赤いりんご"
    assert phrase("penguin", None, "ja") == "ペンギン"
    for kind in KINDS.values():
        for language, articles in (("fr", ("un ", "une ")), ("es", ("un ", "una "))):
            assert phrase(kind.name, None, language).startswith(articles)
    for colour in PALETTE:
        for language in LANGUAGES:
            assert translations.COLOURS[language][colour][0]


def test_translated_captions_name_every_object_and_colour(scenes):
    checked = dict.fromkeys(LANGUAGES, 0)
    for scene in scenes:
        if not can_say(scene, "translated"):
            continue
        assert scene.task in ("single_object", "colors", "two_object", "color_attr")
        for language in LANGUAGES:
            text = caption(scene, random.Random(scene.seed), "translated", language).lower()
            at = [text.index(KINDS[t.kind].names[language].lower()) for t in scene.things]
            assert len(set(at)) == len(at)
            for thing in scene.things:
                if thing.colour is not None and thing.colour != KINDS[thing.kind].natural:
                    assert any(form in text for form in translations.COLOURS[language][thing.colour]), text
            own = translations.BEHIND[language][scene.background]
            for name, group in translations.BEHIND[language].items():
                for p in group:
                    assert p.lower() not in text or any(p in q for q in own), (name, text)
            checked[language] += 1
    assert min(checked.values()) > 100


def test_wording_is_deterministic_and_varied(scenes):
    for style in STYLES:
        language = "fr" if style == "translated" else "en"
        scene = next(s for s in scenes if can_say(s, style) and s.task == "color_attr")
        first = [caption(scene, random.Random(i), style, language) for i in range(40)]
        assert first == [caption(scene, random.Random(i), style, language) for i in range(40)]
        assert len(set(first)) >= {"geneval": 1, "brief": 30, "dense": 40, "translated": 15}[style]


def test_bad_arguments_say_what_was_expected(scenes):
    row = next(s for s in scenes if s.task == "row")
    with pytest.raises(ValueError, match="cannot say this scene of task 'row'"):
        caption(row, random.Random(0), "geneval")
    with pytest.raises(ValueError, match="expected one of"):
        caption(row, random.Random(0), "haiku")
    with pytest.raises(ValueError, match="in language 'de'"):
        caption(scenes[0], random.Random(0), "translated", "de")
    with pytest.raises(ValueError, match="in language 'fr'"):
        caption(scenes[0], random.Random(0), "brief", "fr")
    assert with_article("orange boot") == "an orange boot"
    assert with_article("unicycle") == "a unicycle"
    assert with_article("hourglass") == "an hourglass"
