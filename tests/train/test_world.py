"""The small world: determinism, exact boxes, true captions, nothing cut, the held-out pairs."""

import re

import numpy as np
import pytest

from train.data import sprites
from train.data.curate import ASSETS, SOURCES, pixel_hash
from train.data.grammar import BACKGROUNDS, NUMBERS, RELATIONS
from train.data.world import (
    BEHIND,
    MIN_CONTRAST,
    TASKS,
    World,
    allowed,
    backdrop,
    contrast,
    held_out_colours,
    held_out_pairs,
)

SEEDS = range(600)
SIZES = [(64, 64), (96, 64), (64, 128)]


@pytest.fixture(scope="module")
def scenes():
    world = World()
    return [world.scene(seed) for seed in SEEDS]


def test_same_seed_same_scene_and_pixels_whatever_was_drawn_before(scenes):
    other = World()
    for seed in (599, 3, 42):
        scene = other.scene(seed)
        assert scene == scenes[seed]
        assert np.array_equal(other.render(scene), World().render(scenes[seed]))
    assert other.scene(0, 64, 96) != other.scene(0)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_nothing_is_cut_and_objects_do_not_overlap(height, width):
    world = World()
    for seed in SEEDS:
        scene = world.scene(seed, height, width)
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            assert 1 <= x0 < x1 <= width - 1
            assert 1 <= y0 < y1 <= height - 1
        for i, a in enumerate(scene.things):
            for b in scene.things[i + 1 :]:
                apart = a.box[2] <= b.box[0] or b.box[2] <= a.box[0] or a.box[3] <= b.box[1] or b.box[3] <= a.box[1]
                assert apart, (scene.seed, a, b)


def test_boxes_are_where_the_pixels_change(scenes):
    """Away from shadows (which darken) the picture differs from its backdrop inside the boxes only, and reaches each edge."""
    world = World()
    for scene in scenes[:200]:
        bare = backdrop(scene.background, scene.variant, scene.height, scene.width)
        changed = np.abs(world.render(scene).astype(np.float32) - bare).max(-1) > 2
        brighter = (world.render(scene).astype(np.float32) - bare).max(-1) > 2
        outside = np.ones_like(changed)
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            outside[y0:y1, x0:x1] = False
            inside = changed[y0:y1, x0:x1]
            assert inside[:, :2].any()
            assert inside[:, -2:].any()
            assert inside[:2].any()
        assert not (brighter & outside).any(), scene.seed


def test_relation_of_boxes_is_the_stated_one(scenes):
    seen = set()
    for scene in scenes:
        if scene.relation is None:
            continue
        (a, b), axis = scene.things, {"left": 0, "above": 1}[scene.relation]
        assert a.box[axis + 2] <= b.box[axis]
        seen.add((scene.task, scene.relation))
    assert {("position", "left"), ("position", "above"), ("binding", "left"), ("pair", "left")} <= seen


def spoken_relation(text, first, second):
    """Which of the four relations a caption states of `first` to `second`; None if it states none."""
    found = set()
    for relation, templates in RELATIONS.items():
        for template in templates:
            for x, y, name in (
                (first, second, relation),
                (second, first, {"left": "right", "right": "left", "above": "below", "below": "above"}[relation]),
            ):
                article = r"an? (?:\w+ )?(?:t-)?"
                pattern = re.escape(template).replace(r"\{x\}", article + x).replace(r"\{y\}", article + y)
                if re.match(rf"{pattern}(?:$|\W)", text):
                    found.add(name)
    return found


def test_captions_are_true(scenes):
    for scene in scenes:
        text = scene.caption.lower().rstrip(".")
        distinct = {(t.kind, t.colour) for t in scene.things}
        said = {
            (name, p.replace("it all", it))
            for name, group in BACKGROUNDS.items()
            for p in group
            for it in ("it", "them")
        }
        said = {(name, p) for name, p in said if text.endswith(p)}
        assert {name for name, _ in said} in (set(), {scene.background}), (scene.caption, said, scene.background)
        if said:
            text = text.removesuffix(max((p for _, p in said), key=len)).rstrip(", ")
        for kind, colour in distinct:
            info = sprites.KINDS[kind]
            word = info.plural if len(scene.things) > len(distinct) else info.noun
            found = re.search(rf"(?:(\w+) )?(?:t-)?\b{word}\b", text)
            assert found, (scene.caption, kind)
            if found[1] in sprites.PALETTE:
                assert found[1] == colour, scene.caption
            else:  # unsaid: the class in its natural colour
                assert colour == info.natural, scene.caption
        for name in sprites.KINDS.values():
            if name.name not in {k for k, _ in distinct}:
                assert not re.search(rf"\b({name.noun}|{name.plural})\b", text), (scene.caption, name)
        numbers = [n for n, word in NUMBERS.items() if n > 1 and re.search(rf"\b{word}\b", text)]
        assert numbers == ([len(scene.things)] if scene.task == "counting" and len(scene.things) > 1 else []), (
            scene.caption
        )
        if scene.task == "position":
            a, b = (sprites.KINDS[t.kind].noun for t in scene.things)
            assert spoken_relation(text, a, b) == {scene.relation}, scene.caption


def test_every_task_class_and_background_occurs():
    world = World()
    scenes = [world.scene(seed) for seed in range(2000)]
    assert {s.task for s in scenes} == set(TASKS)
    assert {t.kind for s in scenes for t in s.things} == set(sprites.KINDS)
    assert {t.colour for s in scenes for t in s.things} >= set(sprites.PALETTE)
    assert {s.background for s in scenes} == set(BACKGROUNDS)


def test_contrast_rule(scenes):
    for scene in scenes:
        for thing in scene.things:
            own = np.array(sprites.surface_lab(thing.kind, thing.colour))
            for rgb in BEHIND[scene.background]:
                assert contrast(own, sprites.lab(np.array(rgb))) >= MIN_CONTRAST
    for kind in sprites.PAINTABLE:  # the pairs an eye loses
        assert kind == "mushroom" or "night" not in allowed(kind, "black")  # a black mushroom's spots are pale
        assert "checker" not in allowed(kind, "white")
        assert len([c for c in sprites.PALETTE if allowed(kind, c)]) == len(sprites.PALETTE)


def is_held_out(scene):
    kinds = {t.kind for t in scene.things}
    return any((t.kind, t.colour) in held_out_colours() for t in scene.things) or any(
        p <= kinds for p in held_out_pairs()
    )


def test_held_out_pairs_never_train_and_always_test(scenes):
    assert len(held_out_colours()) == len(sprites.PAINTABLE)
    assert len(held_out_pairs()) >= 10
    assert not any(is_held_out(scene) for scene in scenes)
    assert all(is_held_out(World("held_out").scene(seed)) for seed in range(200))


def test_recolouring_turns_the_whole_object():
    """The nearest palette colour of most pixels is the asked one; grey pixels are what black and white are made of."""
    palette = sprites.lab(np.array(list(sprites.PALETTE.values())))
    for kind in ("heart", "star", "key", "fish", "bell", "teapot"):
        for index, colour in enumerate(sprites.PALETTE):
            art = sprites.artwork(kind, colour)
            pixels = sprites.lab(art[..., :3][art[..., 3] > 0.9] * 255)
            distance = np.linalg.norm(pixels[:, None, 1:] - palette[None, :, 1:], axis=-1)
            neutral = colour in ("black", "white")
            nearest = distance.argmin(1)
            share = (np.linalg.norm(pixels[:, 1:], axis=-1) < 25).mean() if neutral else (nearest == index).mean()
            assert share > 0.7, (kind, colour, share)


def test_vendored_assets_are_the_recorded_pixels():
    import json

    from PIL import Image

    recorded = json.loads((ASSETS / "manifest.json").read_text())["rgba_sha256"]
    assert recorded.keys() == SOURCES.keys() == sprites.KINDS.keys()
    for name, value in recorded.items():
        with Image.open(ASSETS / f"{name}.webp") as image:
            assert pixel_hash(image) == value


def test_bad_arguments_say_what_was_expected():
    with pytest.raises(ValueError, match="multiples of 16"):
        World().scene(0, 60, 64)
    with pytest.raises(ValueError, match="'train' or 'held_out'"):
        World("test")
    with pytest.raises(ValueError, match="unknown tasks"):
        World(tasks={"juggling": 1.0})
