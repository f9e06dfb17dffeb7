"""The vendored pictures and their words: recorded pixels, names in five languages, colours that read as asked."""

import shutil
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from train.data.small_world.kinds import CORE, GROUPS, KINDS, LANGUAGES, PAINTABLE, PALETTE
from train.data.small_world.sprites import artwork, colours_of, fitted_size, lab, sprite
from train.data.small_world.vendor_emoji import ASSETS, SOURCES, altered

FIRST = "apple car heart star key book umbrella fish shirt balloon bell mushroom teapot house tree crown cactus penguin"
WORDS = list(PALETTE)
PALETTE_LAB = lab(np.array(list(PALETTE.values()), np.float64))


def vote(kind: str, colour: str | None, size: int) -> str:
    """The palette word nearest to most object pixels; lightness counts half, shading moves it most."""
    drawn = sprite(kind, colour, *fitted_size(kind, size, size))
    alpha = 1 - drawn.keep[..., 0]
    solid = alpha > 0.6
    pixels = lab(drawn.colour[solid] / alpha[solid][:, None])
    away = (pixels[:, None] - PALETTE_LAB) * np.array([0.5, 1, 1])
    return WORDS[np.bincount(np.linalg.norm(away, axis=-1).argmin(1), minlength=len(WORDS)).argmax()]


def test_files_are_the_recorded_pixels():
    assert SOURCES.keys() == KINDS.keys() == {path.stem for path in ASSETS.glob("*.webp")}
    assert altered() == []
    assert sum(path.stat().st_size for path in ASSETS.glob("*.webp")) <= 1_300_000


def test_one_changed_pixel_or_a_stray_file_is_found(tmp_path):
    folder = shutil.copytree(ASSETS, tmp_path / "emoji")
    with Image.open(folder / "moon.webp") as image:
        rgba = np.array(image.convert("RGBA"))
    y, x = np.argwhere(rgba[..., 3] == 255)[0]
    rgba[y, x, 1] ^= 1
    Image.fromarray(rgba).save(folder / "moon.webp", lossless=True, exact=True)
    shutil.copy(folder / "car.webp", folder / "stray.webp")
    (folder / "key.webp").unlink()
    assert altered(folder) == ["key", "moon", "stray"]


def test_every_class_has_its_words():
    assert len(KINDS) >= 84
    assert len(PAINTABLE) >= 40
    assert list(PALETTE) == ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
    assert len(set(SOURCES.values())) == len(KINDS)
    for name, kind in KINDS.items():
        assert kind.name == name
        assert kind.group in GROUPS
        assert kind.natural is None or kind.natural in PALETTE
        assert set(kind.names) == set(LANGUAGES)
        assert set(kind.gender) == {"fr", "es"}
        assert set(kind.gender.values()) <= {"m", "f"}
        for language, word in kind.names.items():
            assert word == word.strip() != ""
            assert word.isascii() is False or language in ("fr", "es")
    assert {kind.group for kind in KINDS.values()} == set(GROUPS)


def test_no_word_means_two_classes():
    """English nouns, plurals and synonyms together; elsewhere the noun. Colour words name nothing else."""
    english = Counter(
        word.lower() for k in KINDS.values() for word in {k.noun, k.plural, *k.also, *(f"{a}s" for a in k.also)}
    )
    assert [word for word, count in english.items() if count > 1] == []
    assert not set(english) & set(PALETTE)
    for language in LANGUAGES:
        words = Counter(kind.names[language].lower() for kind in KINDS.values())
        assert [word for word, count in words.items() if count > 1] == []


def test_plurals():
    irregular = {"fish": "fish", "leaf": "leaves", "scarf": "scarves", "snowman": "snowmen"}
    irregular["bunch of grapes"] = "bunches of grapes"
    for kind in KINDS.values():
        noun = kind.noun
        if noun in irregular:
            expected = irregular[noun]
        elif noun.endswith(("s", "x", "ch", "sh")):
            expected = noun + "es"
        elif noun.endswith("y") and noun[-2] not in "aeiou":
            expected = noun[:-1] + "ies"
        else:
            expected = noun + "s"
        assert kind.plural == expected


def test_core_is_thirty_six_known_classes_painted_ones_first():
    assert len(CORE) == len(set(CORE)) == 36
    assert set(FIRST.split()) <= set(CORE) <= set(KINDS)
    painted = [name in PAINTABLE for name in CORE]
    assert painted == sorted(painted, reverse=True)
    assert sum(painted) >= 24


@pytest.mark.parametrize("size", [20, 24, 45])
def test_most_pixels_say_the_colour_that_was_asked(size):
    """Every recolourable class in all ten colours, and every class with one true colour of its own."""
    asked = [(name, colour) for name in KINDS for colour in colours_of(name) if colour is not None]
    assert len(asked) > 10 * len(PAINTABLE)
    wrong = [(name, colour, vote(name, colour, size)) for name, colour in asked if vote(name, colour, size) != colour]
    assert wrong == []


def test_paint_covers_the_object():
    """Not "pink only in its fins": from one colour to another, most of the object changes."""
    least = {"car": 0.4, "mushroom": 0.4}  # windows and tyres; spots and stem
    for name in PAINTABLE:
        red, blue = artwork(name, "red"), artwork(name, "blue")
        solid = red[..., 3] > 0.6
        moved = np.abs(red[..., :3] - blue[..., :3]).max(-1)[solid] > 0.15
        assert moved.mean() >= least.get(name, 0.55), (name, moved.mean())


def test_natural_word_of_a_painted_class_is_true_of_the_picture():
    """The unpainted picture of what is painted as a whole: grey where its word is, else near the word's hue in Lab."""
    for name in PAINTABLE:
        natural = KINDS[name].natural
        if natural is None or KINDS[name].paint != "all":
            continue
        with Image.open(ASSETS / f"{name}.webp") as image:
            rgba = np.asarray(image.convert("RGBA"), np.float64)
        middle = np.median(lab(rgba[..., :3][rgba[..., 3] > 150]), 0)[1:]
        wanted = PALETTE_LAB[WORDS.index(natural)][1:]
        if natural in ("black", "white"):
            assert np.linalg.norm(middle) < 25, (name, natural)
        else:
            cosine = middle @ wanted / np.linalg.norm(middle) / np.linalg.norm(wanted)
            assert cosine > 0.6, (name, natural, cosine)
