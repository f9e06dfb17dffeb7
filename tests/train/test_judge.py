"""The judge: right on true renders, wrong on every kind of wrong picture."""

from dataclasses import replace

import numpy as np
import pytest

from train.data.world import Thing, World, allowed, backdrop
from train.evaluate.judge import judge
from train.evaluate.mini_bench import scenes_of, wilson

TASKS = ("single", "colours", "position", "counting", "binding", "row")


@pytest.mark.parametrize("task", TASKS)
def test_true_renders_are_right_and_other_pictures_wrong(task):
    world = World()
    scenes = scenes_of(task, 4)
    pictures = [world.render(scene) for scene in scenes]
    for i, (scene, picture) in enumerate(zip(scenes, pictures)):
        verdict = judge(picture, scene)
        assert verdict.whole, (scene, verdict)
        assert verdict.background == scene.background
        other = scenes[i - 1]
        if {(t.kind, t.colour) for t in other.things} != {(t.kind, t.colour) for t in scene.things}:
            assert not judge(pictures[i - 1], scene).whole


def test_it_does_not_know_where_the_scene_was_drawn():
    """Another seed's jitter and size, same request: still right. Blurred and noisy: still right."""
    world, scene = World(), scenes_of("colours", 1)[0]
    thing = scene.things[0]
    x0, y0, x1, y1 = thing.box
    small = replace(scene, things=(Thing(thing.kind, thing.colour, (x0 + 3, y0 + 2, x1 - 1, y1 - 2)),))
    picture = world.render(small).astype(np.float32)
    blurred = (picture + np.roll(picture, 1, 0) + np.roll(picture, 1, 1) + np.roll(picture, (1, 1), (0, 1))) / 4
    noise = np.random.default_rng(0).normal(0, 8, picture.shape)
    assert judge(np.clip(blurred + noise, 0, 255).astype(np.uint8), scene).whole


def test_each_fault_is_found():
    world, scene = World(), scenes_of("binding", 1)[0]
    first, second = scene.things
    swapped = (Thing(first.kind, second.colour, first.box), Thing(second.kind, first.colour, second.box))
    if all(scene.background in allowed(t.kind, t.colour) for t in swapped):
        verdict = judge(world.render(replace(scene, things=swapped)), scene)
        assert all(verdict.classes)
        assert not any(verdict.colours)
    missing = judge(world.render(replace(scene, things=scene.things[:1])), scene)
    assert missing.classes == (True, False)
    assert missing.things[1].kind is None
    empty = backdrop(scene.background, 0, 64, 64).astype(np.uint8)
    assert not any(judge(empty, scene).classes)
    single = scenes_of("single", 1)[0]
    crowded = world.render(single).copy()
    crowded[2:20, 2:20] = (10, 200, 10)
    crowded[44:62, 2:20] = (200, 10, 200)
    assert not judge(crowded, single).clean
    with pytest.raises(ValueError, match="expected"):
        judge(empty[:32], scene)


def test_interval():
    low, high = wilson(18, 20)
    assert (round(low, 3), round(high, 3)) == (0.699, 0.972)
